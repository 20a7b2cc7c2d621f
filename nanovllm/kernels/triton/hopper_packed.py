"""Products with weights of 4 bits for Hopper, in Gluon: numbers are taken apart where they meet x.

The matrix instructions take the weight's rows from registers. Layouts are such that a thread takes
apart the int32 words that hold the numbers of its own fragments, so none of them passes through
shared memory again. The order of the columns within a group does not matter as long as x has it.

Few tokens: a warp takes 32 rows. Its words come through a ring in shared memory, by asynchronous
copies, and x through the multiprocessor's cache. In bfloat16 a number's bits, put below those of
128, add it to that. The sum of x, which one more product with a constant gives, takes it off, and
the group's scale multiplies the sums of the group, not its numbers.

Many tokens: a warp copies x and words, two warpgroups multiply 64 rows each. They dequantise
a block while the matrix instructions of the block before run. Barriers are as in
hopper_prefill.py.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels.triton.hopper_prefill import (
    COMPUTING_REGISTERS,
    COPYING_REGISTERS,
    start_copy,
)
from nanovllm.kernels.triton.launch import (
    cdiv,
    is_hopper,
    num_multiprocessors,
    overlap_options,
    with_dry_runs,
)
from nanovllm.kernels.types import LinearOutput, PackedWeight, PartialSums

# Triton 3.9 has another name for it than 3.6.
copy_words = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32}
COLUMNS = gl.constexpr(128)  # of a block, which lies in one group
WORDS = gl.constexpr(16)  # int32 of a row of a block
MIDDLE = gl.constexpr(8)  # zero where a weight has none
FEW_BLOCKS = 2  # of a step of few tokens' loop
MIN_BLOCKS = 8  # of a part of a split K, with many tokens
MANY_ROWS = gl.constexpr(128)  # of the weight, of a program with many tokens


class FewTile(NamedTuple):
    """How a product of few tokens is cut up."""

    tokens: int  # 8 or 16
    row_tiles: int  # of 16 rows, of a warp: 1 or 2
    num_warps: int
    num_stages: int  # steps in the ring
    programs_per_sm: int  # that a split of K aims at


class ManyTile(NamedTuple):
    """How a product of many tokens is cut up."""

    tokens: int
    num_stages: int


# Tokens, at most -> tile; None: the kernel of packed_linear.py is faster. For more tokens a weight
# is dequantised. See tests/benchmarks/bench_packed_linear.py.
TILES: dict[int, FewTile | ManyTile | None] = {
    8: FewTile(8, 2, 2, 4, 6),
    16: None,
    64: ManyTile(64, 4),
    1024: ManyTile(128, 3),
}


def _assembly(is_bfloat16: bool, is_scaled: bool) -> str:
    """PTX: two words -> of each of the four planes the first word's pair, then the second's.

    Plane p are the numbers at bit 4 p of each half of a word. In bfloat16 they come with 128 added,
    in float16 with -8. is_scaled: as (number - zero) * scale, with zeros + 128 (float16: 1,024) and
    scales behind the words, each of them twice in a register.
    """
    lines = [".reg .b32 bits, other;"]
    kind, ones = ("bf16x2", "0x43004300") if is_bfloat16 else ("f16x2", "0x64006400")
    for plane in range(4):
        for word in range(2):
            source, out = f"${8 + word}", f"${2 * plane + word}"
            if plane:
                lines.append(f"shr.u32 bits, {source}, {4 * plane};")
                source = "bits"
            is_done = is_bfloat16 and not is_scaled
            target = out if is_done else "bits"
            lines.append(f"lop3.b32 {target}, {source}, 0x000F000F, {ones}, 0xEA;")
            if is_done:
                continue
            zero = f"${10 + word}" if is_scaled else "other"
            if not is_scaled:
                lines.append("mov.b32 other, 0x64086408;")  # 1,032
            if is_bfloat16:
                lines.append("mov.b32 other, 0xBF80BF80;")  # -1
                lines.append(f"fma.rn.bf16x2 bits, {zero}, other, bits;")
            else:
                lines.append(f"sub.rn.f16x2 {'bits' if is_scaled else out}, bits, {zero};")
            if is_scaled:
                lines.append(f"mul.rn.{kind} {out}, bits, ${12 + word};")
    return "{" + "\n".join(lines) + "}"


UNPACK_BF16 = gl.constexpr(_assembly(is_bfloat16=True, is_scaled=False))
UNPACK_FP16 = gl.constexpr(_assembly(is_bfloat16=False, is_scaled=False))
DEQUANTIZE_BF16 = gl.constexpr(_assembly(is_bfloat16=True, is_scaled=True))
DEQUANTIZE_FP16 = gl.constexpr(_assembly(is_bfloat16=False, is_scaled=True))
EIGHT_BF16 = gl.constexpr((gl.bfloat16,) * 8)
EIGHT_FP16 = gl.constexpr((gl.float16,) * 8)


@gluon.jit
def _await_previous(OVERLAP: gl.constexpr):
    """`launch.await_previous` for Gluon."""
    if OVERLAP:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;",
            "=r",
            [],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, 0;",
            "=r",
            [],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def _unpacked(words, dtype: gl.constexpr, layout: gl.constexpr):
    """int32 [ROWS, WORDS] -> [ROWS, COLUMNS], in the order plane, word of a chunk, chunk, half.

    `words` is in a layout whose threads hold the four words of a chunk side by side. A word's
    numbers are the columns that it holds: see `PackedWeight`.
    """
    ROWS: gl.constexpr = words.shape[0]
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        UNPACK_BF16 if dtype == gl.bfloat16 else UNPACK_FP16,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=EIGHT_BF16 if dtype == gl.bfloat16 else EIGHT_FP16,
        is_pure=True,
        pack=2,
    )
    low = gl.join(gl.join(a, b), gl.join(c, d))
    high = gl.join(gl.join(e, f), gl.join(g, h))
    # Of two words side by side, each result has one half in the first's place, one in the second's:
    # [ROWS, chunk, pair of words, half, word of the pair, plane's low bit, plane's high bit].
    parts = gl.join(low, high).reshape([ROWS, 4, 2, 2, 2, 2, 2])
    return gl.convert_layout(parts.permute((0, 6, 5, 2, 4, 1, 3)).reshape([ROWS, COLUMNS]), layout)


@gluon.jit
def _repeated(sums, ROWS: gl.constexpr, layout: gl.constexpr):
    """sums [16 * warps, T], whose rows are equal -> [ROWS, T], as many rows or twice as many."""
    if sums.shape[0] < ROWS:
        sums = gl.join(sums, sums).permute((2, 0, 1)).reshape([ROWS, sums.shape[1]])
    return gl.convert_layout(sums, layout)


@gluon.jit
def _of_block(numbers, x_pointers, minus_ones, base):
    """numbers [ROWS, COLUMNS] less `base` times a block of x [T, COLUMNS] -> float32 [ROWS, T]."""
    ROWS: gl.constexpr = numbers.shape[0]
    TOKENS: gl.constexpr = x_pointers.shape[0]
    layout: gl.constexpr = numbers.type.layout.parent
    # chunk, plane, word, half -> the order of the numbers
    x = gl.load(x_pointers).reshape([TOKENS, 4, 4, 4, 2]).permute((2, 3, 1, 4, 0))
    x = gl.convert_layout(x.reshape([COLUMNS, TOKENS]), gl.DotOperandLayout(1, layout, 2))
    product = mma_v2(numbers, x, gl.zeros([ROWS, TOKENS], gl.float32, layout))
    if base is not None:
        nothing = gl.zeros([minus_ones.shape[0], TOKENS], gl.float32, layout)
        product += _repeated(mma_v2(minus_ones, x, nothing), ROWS, layout) * base
    return product


@gluon.jit
def _load_groups(scales, zeros, row_places, block, GROUP: gl.constexpr, BLOCKS: gl.constexpr):
    """Of so many blocks the scale of each row, and the zero if there are any."""
    values = ()
    for i in gl.static_range(BLOCKS):
        group = (block + i) // (GROUP // COLUMNS)
        values += (gl.load(scales + group + row_places),)  # type: ignore[assignment]
        if zeros is not None:
            values += (gl.load(zeros + group + row_places),)  # type: ignore[assignment]
    return values


@gluon.jit
def _in_float32(values):
    result = ()
    for i in gl.static_range(len(values)):
        result += (values[i].to(gl.float32),)
    return result


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens", "blocks_per_part"])
def _few_tokens_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x,  # [T, K]
    words,  # int32 [N, K / 8]
    scales,  # [N, K / GROUP]
    zeros,  # uint8, the same, or None
    bias,  # [N] or None
    num_tokens,  # at most TOKENS
    blocks_per_part,  # a multiple of BLOCKS
    N,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    dtype: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()  # 1, 2 or 4
    # A thread of a warp holds a chunk's words of rows g and g + 8, as fragments have them.
    further_rows: gl.constexpr = [] if ROWS == 16 * WARPS else [[16 * WARPS, 0]]
    row_warps: gl.constexpr = [] if WARPS == 1 else [[16, 0]] if WARPS == 2 else [[16, 0], [32, 0]]
    words_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]] + further_rows,  # noqa: RUF005 (no unpacking in kernels)
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        row_warps,
        [],
        [ROWS, 16],
    )
    # And a chunk of a token; every warp has all of x.
    further_tokens: gl.constexpr = [] if TOKENS == 8 else [[8, 0]]
    same_warps: gl.constexpr = [] if WARPS == 1 else [[0, 0]] if WARPS == 2 else [[0, 0], [0, 0]]
    x_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]] + further_tokens,  # noqa: RUF005
        [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]],
        same_warps,
        [],
        [TOKENS, 128],
    )
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    first_row = gl.program_id(0) * ROWS
    part = gl.program_id(1)
    begin = part * blocks_per_part
    end = gl.minimum(begin + blocks_per_part, K // COLUMNS)
    num_rows = gl.minimum(N - first_row, ROWS)  # what others give is not stored

    # No kernel writes weights: they may come before the wait.
    row = gl.arange(0, ROWS, gl.SliceLayout(1, words_layout))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, words_layout))
    places = gl.minimum(row, num_rows - 1)[:, None] * (K // 8) + word[None, :]
    words += first_row.to(gl.int64) * (K // 8) + begin * WORDS
    is_word = (word >= 0)[None, :]
    ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * BLOCKS, ROWS, WORDS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    for stage in gl.static_range(STAGES - 1):
        for i in gl.static_range(BLOCKS):
            mask = (begin + stage * BLOCKS < end) & is_word
            slot = ring.index(stage * BLOCKS + i)
            copy_words(slot, words + places, mask=mask)
            words += WORDS
        async_copy.commit_group()
    row = gl.minimum(gl.arange(0, ROWS, gl.SliceLayout(1, layout)), num_rows - 1)
    scales += first_row.to(gl.int64) * (K // GROUP)
    if zeros is not None:
        zeros += first_row.to(gl.int64) * (K // GROUP)
    row_places = row * (K // GROUP)
    groups = _in_float32(_load_groups(scales, zeros, row_places, begin, GROUP, BLOCKS))
    _await_previous(OVERLAP)

    token = gl.minimum(gl.arange(0, TOKENS, gl.SliceLayout(1, x_layout)), num_tokens - 1)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, x_layout))
    x_pointers = x + token[:, None] * K + (begin * COLUMNS + column)[None, :]
    ADDED: gl.constexpr = 128 if dtype == gl.bfloat16 else -MIDDLE
    # The compiler must not know that it is always -1: it would make it anew for every use.
    minus_one = gl.where(num_tokens > 0, -1.0, 0.0).to(dtype)
    minus_ones = gl.full([16 * gl.num_warps(), COLUMNS], minus_one, dtype, weight_layout)
    sums = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    stage = 0
    free_stage = STAGES - 1
    for block in range(begin, end, BLOCKS):
        async_copy.wait_group(STAGES - 2)
        mask = (block + (STAGES - 1) * BLOCKS < end) & is_word
        for i in gl.static_range(BLOCKS):
            slot = ring.index(free_stage * BLOCKS + i)
            copy_words(slot, words + places, mask=mask)
            words += WORDS
        async_copy.commit_group()
        later = gl.minimum(block + BLOCKS, end - BLOCKS)
        next_groups = _load_groups(scales, zeros, row_places, later, GROUP, BLOCKS)
        for i in gl.static_range(BLOCKS):
            own_words = ring.index(stage * BLOCKS + i).load(words_layout)
            numbers = _unpacked(own_words, dtype, weight_layout)
            if zeros is not None:
                base = (groups[2 * i + 1] + ADDED)[:, None]
                scale = groups[2 * i]
            else:
                base = ADDED + MIDDLE if ADDED != -MIDDLE else None
                scale = groups[i]
            of_block = _of_block(numbers, x_pointers + i * COLUMNS, minus_ones, base)
            sums += of_block * scale[:, None]
        groups = _in_float32(next_groups)
        x_pointers += BLOCKS * COLUMNS
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        free_stage = gl.where(free_stage == STAGES - 1, 0, free_stage + 1)
    if bias is not None:
        bias_values = gl.load(bias + first_row + row).to(gl.float32)
        sums += gl.where(part == 0, bias_values, 0.0)[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    local_row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    pointers = out + (part * num_tokens + token[None, :]).to(gl.int64) * N
    mask = (token < num_tokens)[None, :] & (local_row < num_rows)[:, None]
    result = sums.to(out.dtype.element_ty)
    gl.store(pointers + (first_row + local_row)[:, None], result, mask=mask)


# Many tokens


@gluon.jit
def _pairs(values, dtype: gl.constexpr):
    """Each value in `dtype`, twice in an int32."""
    return (values.to(dtype).to(gl.int16, bitcast=True).to(gl.int32) & 65535) * 65537


@gluon.jit
def _dequantized(words, zeros, scales, dtype: gl.constexpr, layout: gl.constexpr):
    """int32 [64, WORDS] -> (number - zero) * scale [64, COLUMNS], in the columns' order.

    `words` is in a layout whose threads hold the same word of all chunks side by side; zeros and
    scales [64] come from `_pairs`.
    """
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        DEQUANTIZE_BF16 if dtype == gl.bfloat16 else DEQUANTIZE_FP16,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        [words, zeros[:, None], scales[:, None]],
        dtype=EIGHT_BF16 if dtype == gl.bfloat16 else EIGHT_FP16,
        is_pure=True,
        pack=2,
    )
    low = gl.join(gl.join(a, b), gl.join(c, d))
    high = gl.join(gl.join(e, f), gl.join(g, h))
    # [64, pair of chunks, half, word, chunk of the pair, plane's low bit, plane's high bit]
    parts = gl.join(low, high).reshape([64, 2, 2, 4, 2, 2, 2])
    return gl.convert_layout(parts.permute((0, 1, 4, 6, 5, 3, 2)).reshape([64, COLUMNS]), layout)


@gluon.jit
def _copy_tiles(
    tiles,  # the descriptors of x and of the words
    ring,  # x, words, full, free
    place,  # first token, first row, first block, end of the blocks
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """The copying warp: x and both halves' words of each block."""
    x_tiles, word_tiles = tiles
    x_ring, word_ring, full, free = ring
    first_token, first_row, begin, end = place
    _await_previous(OVERLAP)
    for block in range(begin, end):
        turn = block - begin
        stage = turn % STAGES
        is_full = full.index(stage)
        mbarrier.wait(free.index(stage), (turn // STAGES + 1) & 1)
        mbarrier.expect(is_full, x_tiles.block_type.nbytes + 2 * word_tiles.block_type.nbytes)
        for half in gl.static_range(2):
            slot = word_ring.index(2 * stage + half)
            start_copy(word_tiles, [first_row + 64 * half, block * WORDS], is_full, slot)
        start_copy(x_tiles, [first_token, block * COLUMNS], is_full, x_ring.index(stage))


@gluon.jit
def _weights_of_block(
    zeros,  # of the weight, or None
    words,  # int32 [64, WORDS] in shared memory
    scale,
    zero,
    dtype: gl.constexpr,
    words_layout: gl.constexpr,
    layout: gl.constexpr,
):
    """A block's dequantised weights [64, COLUMNS]."""
    ADDED: gl.constexpr = 128 if dtype == gl.bfloat16 else 1024
    own_words = words.load(words_layout)
    if zeros is not None:
        base = _pairs((zero.to(gl.int32) + ADDED).to(gl.float32), dtype)
    else:
        base = _pairs(gl.full([64], ADDED + MIDDLE, gl.float32, scale.type.layout), dtype)
    return _dequantized(own_words, base, _pairs(scale, dtype), dtype, layout)


@gluon.jit
def _multiply_half(
    out,
    bias,
    weight,  # scales, zeros or None
    ring,
    place,
    sizes,  # number of tokens, rows of the weight
    part,
    HALF: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A computing warpgroup: its 64 rows of the weight times x.

    The next block's weights are made while the matrix instructions of this one's run.
    """
    x_ring, word_ring, full, free = ring
    first_token, first_row, begin, end = place
    num_tokens, N = sizes
    scales, zeros = weight
    dtype: gl.constexpr = x_ring.dtype
    TOKENS: gl.constexpr = x_ring.shape[1]
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    # A thread holds one word of each chunk of rows g and g + 8.
    words_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 4], [0, 8], [8, 0]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 16],
    )
    rows_layout: gl.constexpr = gl.SliceLayout(1, words_layout)
    first_row += HALF * 64
    row = gl.minimum(first_row + gl.arange(0, 64, rows_layout), N - 1)
    scales += row.to(gl.int64) * (K // GROUP)
    if zeros is not None:
        zeros += row.to(gl.int64) * (K // GROUP)
    pointers = (scales, zeros)
    sums = gl.zeros([64, TOKENS], gl.float32, sums_layout)
    scale, zero = _group_of(pointers, begin, GROUP)
    next_scale, next_zero = _group_of(pointers, gl.minimum(begin + 1, end - 1), GROUP)
    mbarrier.wait(full.index(0), 0)
    words = word_ring.index(HALF)
    numbers = _weights_of_block(zeros, words, scale, zero, dtype, words_layout, weight_layout)
    for block in range(begin, end - 1):
        turn = block - begin
        stage, next_stage = turn % STAGES, (turn + 1) % STAGES
        x = x_ring.index(stage).permute((1, 0))
        sums = warpgroup_mma(numbers, x, sums, is_async=True)
        scale, zero = next_scale, next_zero
        next_scale, next_zero = _group_of(pointers, gl.minimum(block + 2, end - 1), GROUP)
        mbarrier.wait(full.index(next_stage), ((turn + 1) // STAGES) & 1)
        words = word_ring.index(2 * next_stage + HALF)
        next_numbers = _weights_of_block(
            zeros, words, scale, zero, dtype, words_layout, weight_layout
        )
        sums, numbers = warpgroup_mma_wait(0, [sums, numbers])  # they are read until then
        mbarrier.arrive(free.index(stage))
        numbers = next_numbers
    x = x_ring.index((end - 1 - begin) % STAGES).permute((1, 0))
    sums = warpgroup_mma(numbers, x, sums, is_async=True)
    sums, numbers = warpgroup_mma_wait(0, [sums, numbers])
    if bias is not None:
        own_row = gl.minimum(first_row + gl.arange(0, 64, gl.SliceLayout(1, sums_layout)), N - 1)
        bias_values = gl.load(bias + own_row).to(gl.float32)
        sums += gl.where(part == 0, bias_values, 0.0)[:, None]
    # 8 rows of a token for each thread.
    out_layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    result = gl.convert_layout(sums.to(out.dtype.element_ty), out_layout)
    own_row = first_row + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
    token = first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, out_layout))
    out_pointers = out + (part * num_tokens + token).to(gl.int64)[None, :] * N + own_row[:, None]
    mask = (token < num_tokens)[None, :] & (own_row < N)[:, None]
    gl.store(out_pointers, result, mask=mask)


@gluon.jit
def _group_of(pointers, block, GROUP: gl.constexpr):
    """The scales of the group of a block, and its zeros; without zeros again the scales."""
    group = block // (GROUP // COLUMNS)
    scale = gl.load(pointers[0] + group)
    zero = scale if pointers[1] is None else gl.load(pointers[1] + group)
    return scale, zero


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens", "blocks_per_part"])
def _many_tokens_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x_tiles,  # x [T, K], tensor descriptor of [TOKENS, COLUMNS]
    word_tiles,  # int32 [N, K / 8], of [64, WORDS]
    scales,  # [N, K / GROUP]
    zeros,  # uint8, the same, or None
    bias,  # [N] or None
    num_tokens,
    blocks_per_part,
    N,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    TOKENS: gl.constexpr = x_tiles.block_type.shape[0]
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    x_ring = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, TOKENS, COLUMNS], x_tiles.layout)
    word_ring = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 64, WORDS], word_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)  # both warpgroups read each stage
    # Programs that run at the same time share tiles of the weight, in the L2 cache.
    num_token_tiles = gl.cdiv(num_tokens, TOKENS)
    first_token = gl.program_id(0) % num_token_tiles * TOKENS
    first_row = gl.program_id(0) // num_token_tiles * MANY_ROWS
    part = gl.program_id(1)
    begin = part * blocks_per_part
    end = gl.minimum(begin + blocks_per_part, K // COLUMNS)
    ring = (x_ring, word_ring, full, free)
    place = (first_token, first_row, begin, end)
    sizes = (num_tokens, N)
    weight = (scales, zeros)
    gl.warp_specialize(
        [
            (
                _multiply_half,
                (
                    out,
                    bias,
                    weight,
                    ring,
                    place,
                    sizes,
                    part,
                    0,
                    K,
                    GROUP,
                    STAGES,
                ),
            ),
            (
                _multiply_half,
                (
                    out,
                    bias,
                    weight,
                    ring,
                    place,
                    sizes,
                    part,
                    1,
                    K,
                    GROUP,
                    STAGES,
                ),
            ),
            (_copy_tiles, ((x_tiles, word_tiles), ring, place, STAGES, OVERLAP)),
        ],
        [4, 1],  # warps of the second and the third
        [COMPUTING_REGISTERS, COPYING_REGISTERS],
    )


# Launches


@cache
def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[dtype])


def choose_tile(x: torch.Tensor, weight: PackedWeight) -> FewTile | ManyTile | None:
    """The tile of `hopper_packed_linear`, or None: it does not take them, or is not the fastest."""
    is_taken = (
        is_hopper(x.device)
        and weight.bits == 4
        and x.dtype != torch.float32
        and weight.group_size % COLUMNS.value == 0
        and x.shape[1] % (FEW_BLOCKS * COLUMNS.value) == 0
    )
    return next((tile for most, tile in TILES.items() if is_taken and len(x) <= most), None)


def hopper_packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, tile: FewTile | ManyTile
) -> LinearOutput:
    """`packed_linear` in a tile of `choose_tile`, or another one; without `order`."""
    if isinstance(tile, FewTile):
        return few_tokens_linear(x, weight, bias, tile)
    return many_tokens_linear(x, weight, bias, tile)


def few_tokens_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, tile: FewTile
) -> LinearOutput:
    """`packed_linear` of at most tile.tokens tokens."""
    num_tokens, k = x.shape
    n = weight.shape[0]
    assert num_tokens <= tile.tokens and k % (FEW_BLOCKS * COLUMNS.value) == 0
    assert x.is_contiguous() and weight.numbers.is_contiguous() and weight.scales.is_contiguous()
    rows = 16 * tile.row_tiles * tile.num_warps
    num_tiles = cdiv(n, rows)
    num_steps = k // (FEW_BLOCKS * COLUMNS.value)
    num_programs = tile.programs_per_sm * num_multiprocessors(x.device)
    num_parts = max(1, min(num_steps // 2, round(num_programs / num_tiles)))
    steps_per_part = cdiv(num_steps, num_parts)
    num_parts = cdiv(num_steps, steps_per_part)
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    _few_tokens_linear_kernel[(num_tiles, num_parts)](
        out,
        x,
        weight.numbers.view(torch.int32),
        weight.scales,
        weight.zeros,
        bias,
        num_tokens,
        steps_per_part * FEW_BLOCKS,
        n,
        K=k,
        GROUP=weight.group_size,
        TOKENS=tile.tokens,
        ROWS=rows,
        BLOCKS=FEW_BLOCKS,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, x.dtype)


def many_tokens_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, tile: ManyTile
) -> LinearOutput:
    """`packed_linear` of any number of tokens."""
    num_tokens, k = x.shape
    n = weight.shape[0]
    assert x.is_contiguous() and weight.numbers.is_contiguous() and weight.scales.is_contiguous()
    num_blocks = k // COLUMNS.value
    num_tiles = cdiv(num_tokens, tile.tokens) * cdiv(n, MANY_ROWS.value)
    most_parts = min(num_multiprocessors(x.device) // num_tiles, num_blocks // MIN_BLOCKS)
    num_parts = max(1, most_parts)
    blocks_per_part = cdiv(num_blocks, num_parts)
    num_parts = cdiv(num_blocks, blocks_per_part)
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    words = weight.numbers.view(torch.int32)
    x_shape, words_shape = [tile.tokens, COLUMNS.value], [64, WORDS.value]
    _many_tokens_linear_kernel[(num_tiles, num_parts)](
        out,
        TensorDescriptor.from_tensor(x, x_shape, _shared_layout(*x_shape, x.dtype)),
        TensorDescriptor.from_tensor(words, words_shape, _shared_layout(*words_shape, torch.int32)),
        weight.scales,
        weight.zeros,
        bias,
        num_tokens,
        blocks_per_part,
        n,
        K=k,
        GROUP=weight.group_size,
        STAGES=tile.num_stages,
        COMPUTING_REGISTERS=COMPUTING_REGISTERS,
        COPYING_REGISTERS=COPYING_REGISTERS,
        num_warps=4,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, x.dtype)
