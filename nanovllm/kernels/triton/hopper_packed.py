"""Products with weights of 4 bits for Hopper, in Gluon: numbers are taken apart where they meet x.

The matrix instructions take the weight's rows from registers. Layouts are such that a thread takes
apart the int32 words that hold the numbers of its own fragments, so none of them passes through
shared memory again. The order of the columns within a group does not matter as long as x has it.

Few tokens: one bulk copy brings all of a program's words, before the wait for the kernel ahead. So
the words of the next kernels are on their way while this one computes and ends. x goes through
shared memory once a program. Warps take 32 rows each of some blocks of columns, and add up. In
bfloat16 a number's bits alone are that number times 2^-133, the smallest one there is: none has to
be added. x comes times 2^60, and the sums go back by 2^73. The sum of x, which one more product
with a constant gives, takes the zeros off. The group's scale multiplies the group's sums, not its
numbers.

Many tokens: a warp copies x and words, two warpgroups multiply 64 rows each. They dequantise
a block while the matrix instructions of the block before run. Barriers are as in
hopper_prefill.py.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
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
reinterpret = next(
    getattr(gl.shared_memory_descriptor, name)
    for name in ("reinterpret", "_reinterpret")
    if hasattr(gl.shared_memory_descriptor, name)
)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32}
COLUMNS = gl.constexpr(128)  # of a block, which lies in one group
WORDS = gl.constexpr(16)  # int32 of a row of a block
MIDDLE = gl.constexpr(8)  # zero where a weight has none
# Of few tokens' x and sums in bfloat16. Numbers at a half's bits 4 to 7 are 16 times as large.
X_FACTOR = gl.constexpr(2.0**60)
HIGH_X_FACTOR = gl.constexpr(2.0**56)
SUMS_FACTOR = gl.constexpr(2.0**73)
MIN_BLOCKS = 8  # of a part of a split K, with many tokens
MANY_ROWS = gl.constexpr(128)  # of the weight, of a program with many tokens


class FewTile(NamedTuple):
    """How a product of few tokens is cut up."""

    tokens: int  # 1, 8 or 16
    row_warps: int  # a program has 32 rows for each
    column_warps: int  # that share the blocks of these rows
    blocks: int  # of a program, a power of two


class ManyTile(NamedTuple):
    """How a product of many tokens is cut up."""

    tokens: int
    num_stages: int


# Tokens, at most -> tile; None: the kernel of packed_linear.py is faster. For more tokens a weight
# is dequantised. See tests/benchmarks/bench_packed_linear.py.
TILES: dict[int, FewTile | ManyTile | None] = {
    1: FewTile(1, 2, 2, 8),
    8: FewTile(8, 4, 2, 8),
    16: None,
    64: ManyTile(64, 4),
    1024: ManyTile(128, 3),
}


def _assembly(is_bfloat16: bool, is_scaled: bool) -> str:
    """PTX: two words -> of each of the four planes the first word's pair, then the second's.

    Plane p are the numbers at bit 4 p of each half of a word. In bfloat16 they are times 2^-133,
    planes 1 and 3 times 2^-129; in float16 less 8. is_scaled: as (number - zero) * scale, with
    zeros + 128 (float16: 1,024) and scales behind the words, each of them twice in a register.
    """
    lines = [".reg .b32 bits, other;"]
    if is_bfloat16 and not is_scaled:
        for word in range(2):
            lines.append(f"shr.u32 other, ${8 + word}, 8;")
            for plane in range(4):
                source = "other" if plane >= 2 else f"${8 + word}"
                mask = "0x00F000F0" if plane % 2 else "0x000F000F"
                lines.append(f"and.b32 ${2 * plane + word}, {source}, {mask};")
        return "{" + "\n".join(lines) + "}"
    kind, ones = ("bf16x2", "0x43004300") if is_bfloat16 else ("f16x2", "0x64006400")
    for plane in range(4):
        for word in range(2):
            source, out = f"${8 + word}", f"${2 * plane + word}"
            if plane:
                lines.append(f"shr.u32 bits, {source}, {4 * plane};")
                source = "bits"
            lines.append(f"lop3.b32 bits, {source}, 0x000F000F, {ones}, 0xEA;")
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
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# Few tokens


@gluon.constexpr_function
def bits_along(count: int, stride: int, dim: int, rank: int) -> list[list[int]]:
    """Bases of a linear layout for the bits of 0 .. count - 1, which are strides along `dim`."""
    return [
        [stride * 2**bit if i == dim else 0 for i in range(rank)]
        for bit in range(count.bit_length() - 1)
    ]


@gluon.jit
def unpacked(words, dtype: gl.constexpr, layout: gl.constexpr):
    """int32 [W, ROWS, WORDS] -> [W, ROWS, COLUMNS]: plane, word of a chunk, chunk, half.

    `words` is in a layout whose threads hold the four words of a chunk side by side. A word's
    numbers are the columns that it holds: see `PackedWeight`.
    """
    W: gl.constexpr = words.shape[0]
    ROWS: gl.constexpr = words.shape[1]
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
    # [.., chunk, pair of words, half, word of the pair, plane's low bit, plane's high bit].
    parts = gl.join(low, high).reshape([W, ROWS, 4, 2, 2, 2, 2, 2])
    numbers = parts.permute((0, 1, 7, 6, 3, 5, 2, 4)).reshape([W, ROWS, COLUMNS])
    return gl.convert_layout(numbers, layout)


@gluon.jit
def _minus_ones(
    num_tokens, dtype: gl.constexpr, W: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr
):
    """[W, ROWS, COLUMNS] of numbers -1 as `unpacked` gives them.

    The compiler must not know them: it would make them anew for every use.
    """
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    if dtype == gl.bfloat16:
        smallest = gl.where(num_tokens > 0, -32767, 0)  # its bits, less 2^16
        values = gl.where(column // 32 % 2 == 0, smallest, smallest + 15).to(gl.int16)
        values = values.to(dtype, bitcast=True)
    else:
        values = (gl.where(num_tokens > 0, -1.0, 0.0) + column.to(gl.float32) * 0).to(dtype)
    return gl.zeros([W, ROWS, COLUMNS], dtype, layout) + values[None, None, :]


@gluon.jit
def _load_groups(values, rows, block, K: gl.constexpr, GROUP: gl.constexpr, STEPS: gl.constexpr):
    """Scales or zeros [W, ROWS] of each step, float32; past K those of the last group."""
    W: gl.constexpr = block.shape[0]
    result = ()
    for i in gl.static_range(STEPS):
        group = gl.minimum(block + i * W, K // COLUMNS - 1) // (GROUP // COLUMNS)
        result += (gl.load(values + rows[None, :] + group[:, None]),)  # type: ignore[assignment]
    return result


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens"])
def _few_tokens_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x,  # [T, K]
    word_tiles,  # int32 [K / COLUMNS, N, WORDS], tensor descriptor of [BLOCKS, ROWS, WORDS]
    scales,  # [N, K / GROUP]
    zeros,  # uint8, the same, or None
    bias,  # [N] or None
    num_tokens,  # at most X_TOKENS
    N,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    X_TOKENS: gl.constexpr,
    ROW_WARPS: gl.constexpr,  # 1, 2, 4 or 8
    W: gl.constexpr,  # column warps: 1, 2, 4 or 8
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: gl.constexpr = x.dtype.element_ty
    TOKENS: gl.constexpr = 8 if X_TOKENS < 8 else X_TOKENS  # of the matrix instruction
    BLOCKS: gl.constexpr = word_tiles.block_type.shape[0]
    ROWS: gl.constexpr = word_tiles.block_type.shape[1]
    STEPS: gl.constexpr = BLOCKS // W
    part = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS
    begin = part * BLOCKS

    # No kernel writes weights: they come before the wait. Past K and N come zeros.
    all_words = gl.allocate_shared_memory(gl.int32, [BLOCKS, ROWS, WORDS], word_tiles.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    mbarrier.expect(arrived, word_tiles.block_type.nbytes)
    start_copy(word_tiles, [begin, first_row, 0], arrived, all_words)
    words = reinterpret(all_words, gl.int32, [STEPS, W, ROWS, WORDS], word_tiles.layout)

    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, ROW_WARPS, 1], [1, 16, 8])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    # A thread of a warp holds a chunk's words of rows g and g + 8, as fragments have them.
    words_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 8, 0], [0, 16 * ROW_WARPS, 0]],
        [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        bits_along(ROW_WARPS, 16, 1, 3) + bits_along(W, 1, 0, 3),
        [],
        [W, ROWS, WORDS],
    )
    # And a chunk of a token.
    further_tokens: gl.constexpr = [] if TOKENS == 8 else [[0, 0, 8, 0]]
    x_layout: gl.constexpr = gl.DistributedLinearLayout(
        [  # noqa: RUF005 (no unpacking in kernels)
            [0, 0, 0, 1],
            [0, 0, 0, 2],
            [0, 0, 0, 4],
            [0, 1, 0, 0],
            [0, 2, 0, 0],
        ]
        + further_tokens,
        [[0, 0, 0, 8], [0, 0, 0, 16], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        bits_along(ROW_WARPS, 0, 1, 4) + bits_along(W, 1, 0, 4),
        [],
        [W, 4, TOKENS, 32],
    )
    rows_layout: gl.constexpr = gl.SliceLayout(2, layout)
    row = gl.minimum(gl.arange(0, ROWS, gl.SliceLayout(0, rows_layout)), N - 1 - first_row)
    rows = row * (K // GROUP)
    block = begin + gl.arange(0, W, gl.SliceLayout(1, rows_layout))
    scales += first_row.to(gl.int64) * (K // GROUP)
    all_scales = _load_groups(scales, rows, block, K, GROUP, STEPS)
    if zeros is not None:
        zeros += first_row.to(gl.int64) * (K // GROUP)
        all_zeros = _load_groups(zeros, rows, block, K, GROUP, STEPS)

    WARPS: gl.constexpr = gl.num_warps()
    X_WARPS: gl.constexpr = WARPS if X_TOKENS > WARPS else X_TOKENS
    columns_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [1, 32], [X_WARPS, WARPS // X_WARPS], [1, 0]
    )
    token = gl.arange(0, X_TOKENS, gl.SliceLayout(1, columns_layout))
    column = begin * COLUMNS + gl.arange(0, BLOCKS * COLUMNS, gl.SliceLayout(0, columns_layout))
    x_mask = (token < num_tokens)[:, None] & (column < K)[None, :]
    x_pointers = x + token[:, None] * K + column[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    x_values = gl.load(x_pointers, mask=x_mask, other=0.0)
    if dtype == gl.bfloat16:
        factor = gl.where(column // 8 % 2 == 0, X_FACTOR, HIGH_X_FACTOR).to(dtype)
        x_values *= factor[None, :]
    # Plane by plane, as threads read a chunk. Past X_TOKENS memory stays as it is: what products
    # come of it are other columns of the sums, and not stored.
    x_values = x_values.reshape([X_TOKENS, BLOCKS, 4, 4, 8]).permute((1, 3, 0, 2, 4))
    all_x = gl.allocate_shared_memory(
        dtype, [BLOCKS * 4, TOKENS, 32], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    all_x.slice(0, X_TOKENS, dim=1).store(x_values.reshape([BLOCKS * 4, X_TOKENS, 32]))
    step_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    x_of_steps = reinterpret(all_x, dtype, [STEPS, W, 4, TOKENS, 32], step_layout)

    ADDED: gl.constexpr = 0 if dtype == gl.bfloat16 else -MIDDLE  # to each number
    minus_ones = _minus_ones(num_tokens, dtype, W, 16 * ROW_WARPS, weight_layout)
    sums = gl.zeros([W, ROWS, TOKENS], gl.float32, layout)
    mbarrier.wait(arrived, 0)
    for i in gl.static_range(STEPS):
        numbers = unpacked(words.index(i).load(words_layout), dtype, weight_layout)
        # plane, token, chunk, word, half -> the order of the numbers
        x_block = x_of_steps.index(i).load(x_layout).reshape([W, 4, TOKENS, 4, 4, 2])
        x_block = x_block.permute((0, 1, 4, 3, 5, 2)).reshape([W, COLUMNS, TOKENS])
        x_block = gl.convert_layout(x_block, gl.DotOperandLayout(1, layout, 2))
        product = mma_v2(numbers, x_block, gl.zeros([W, ROWS, TOKENS], gl.float32, layout))
        if dtype == gl.bfloat16 or zeros is not None:  # what is to be taken off each number
            of_half = gl.zeros([W, ROWS // 2, TOKENS], gl.float32, layout)
            x_sums = mma_v2(minus_ones, x_block, of_half)  # their rows are equal
            x_sums = gl.join(x_sums, x_sums).permute((0, 3, 1, 2)).reshape([W, ROWS, TOKENS])
            if zeros is not None:
                base = (all_zeros[i].to(gl.float32) + ADDED)[:, :, None]
            else:
                base = MIDDLE
            product += gl.convert_layout(x_sums, layout) * base
        sums += product * all_scales[i].to(gl.float32)[:, :, None]
    result = gl.sum(sums, axis=0)
    if dtype == gl.bfloat16:
        result *= SUMS_FACTOR
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, result.type.layout))
    if bias is not None:
        bias_values = gl.load(bias + gl.minimum(row, N - 1)).to(gl.float32)
        result += gl.where(part == 0, bias_values, 0.0)[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, result.type.layout))
    pointers = out + (part * num_tokens + token[None, :]).to(gl.int64) * N + row[:, None]
    mask = (token < num_tokens)[None, :] & (row < N)[:, None]
    gl.store(pointers, result.to(out.dtype.element_ty), mask=mask)


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
def _shared_layout(*shape_and_dtype: Any) -> Any:
    *shape, dtype = shape_and_dtype
    return gl.NVMMASharedLayout.get_default_for(shape, DTYPES[dtype])


def choose_tile(x: torch.Tensor, weight: PackedWeight) -> FewTile | ManyTile | None:
    """The tile of `hopper_packed_linear`, or None: it does not take them, or is not the fastest."""
    is_taken = (
        is_hopper(x.device)
        and weight.bits == 4
        and x.dtype != torch.float32
        and weight.group_size % COLUMNS.value == 0
        and x.shape[1] % COLUMNS.value == 0
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
    assert num_tokens <= tile.tokens and k % COLUMNS.value == 0
    assert x.is_contiguous() and weight.numbers.is_contiguous() and weight.scales.is_contiguous()
    rows = 32 * tile.row_warps
    num_blocks = k // COLUMNS.value
    num_parts = cdiv(num_blocks, tile.blocks)
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    words = weight.numbers.view(torch.int32)
    block = [tile.blocks, rows, WORDS.value]
    _few_tokens_linear_kernel[(num_parts, cdiv(n, rows))](
        out,
        x,
        TensorDescriptor(
            words,
            [num_blocks, n, WORDS.value],
            [WORDS.value, k // 8, 1],
            block,
            _shared_layout(*block, torch.int32),
        ),
        weight.scales,
        weight.zeros,
        bias,
        num_tokens,
        n,
        K=k,
        GROUP=weight.group_size,
        X_TOKENS=tile.tokens,
        ROW_WARPS=tile.row_warps,
        W=tile.column_warps,
        num_warps=tile.row_warps * tile.column_warps,
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
