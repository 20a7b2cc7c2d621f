"""Products of a few tokens with weights of 4 bits for Hopper, in Gluon, with what stands around.

A program has some rows of the weight and all of their columns, so no kernel has to add up parts of
K. The RMS norm of the residual ahead of the product, SiLU behind gate and up, and the sum with the
residual behind O and down are part of it. As many programs as there are multiprocessors, or nearly,
go through their rows pass by pass.

Words and scales come by bulk copies into a ring of stages in shared memory. The copies begin before
the wait for the kernel ahead, and go on while warps take the numbers apart: memory is never idle.
Each warp has its own blocks of columns. A pass ends with the sum over the warps. The ring is small
enough for two or three kernels on a multiprocessor, so the next kernel's copies fill the time from
one kernel's last words to the other's first product.

A number's bits alone are a bfloat16 that is the number times 2^-133, see hopper_packed.py. What is
to be taken off each number, times x, is the same for all rows: sums begin with it.

With several parts a program has one part's columns. Then nothing is ahead of the product, and the
parts are left unsummed; or the last program of some rows adds them to the residual.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels.triton.hopper_packed import (
    COLUMNS,
    HIGH_X_FACTOR,
    MIDDLE,
    SUMS_FACTOR,
    WORDS,
    X_FACTOR,
    bits_along,
    reinterpret,
    unpacked,
)
from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import next_power_of_2, overlap_options, with_dry_runs
from nanovllm.kernels.types import LinearOutput, PackedWeight, PartialSums

MAX_TOKENS = 16
# Triton 3.9 has another name for it than 3.6.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
MIN_BLOCKS = 8  # of a stage: a bulk copy takes at least 16 bytes of a row's scales
MAX_SEGMENT = 4096  # columns of x that are loaded at a time


class RowsTile(NamedTuple):
    """How a product is cut up.

    Attributes:
        passes: of a program.
        rows: of a pass, 16 or 32; of gate and up half of them each.
        num_warps: 4, 8 or 16; each has a block of columns of a step.
        steps: of a stage, which one barrier and one refill serve.
        stages: of the ring.
        max_registers: of a thread; None: as many as it takes.
    """

    passes: int
    rows: int
    num_warps: int
    steps: int
    stages: int
    max_registers: int | None = None


@gluon.constexpr_function
def _places(num_warps: int, tokens: int, rows: int) -> list[list[list[int]]]:
    """Bases of registers, lanes and warps for [tokens, rows]: neighbouring rows in a warp."""
    bases = bits_along(rows, 1, 1, 2) + bits_along(tokens, 1, 0, 2)
    num_bits = num_warps.bit_length() - 1
    bases += [[0, 0]] * max(0, 5 + num_bits - len(bases))
    return [bases[5 + num_bits :], bases[:5], bases[5 : 5 + num_bits]]


@gluon.constexpr_function
def _layout_of_results(num_warps: int, tokens: int, rows: int) -> Any:
    """Of [tokens, rows]."""
    return gl.DistributedLinearLayout(*_places(num_warps, tokens, rows), [], [tokens, rows])


@gluon.constexpr_function
def _layout_of_sums(num_warps: int, tokens: int, rows: int, is_gated: bool) -> Any:
    """Of [num_warps, tokens, rows]: a thread has the sums of all warps.

    With is_gated it has those of a row of the first half, and the same one of the second.
    """
    registers, lanes, warps = (
        [[0, *basis] for basis in bases]
        for bases in _places(num_warps, tokens, rows // 2 if is_gated else rows)
    )
    if is_gated:
        registers.insert(0, [0, 0, rows // 2])
    registers = bits_along(num_warps, 1, 0, 3) + registers
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [num_warps, tokens, rows])


@gluon.jit
def _start_stage(
    turn,
    tiles,  # the descriptors of words and of scales
    ring,  # words, scales, full
    place,  # first row, first block
    is_wanted,
    BLOCKS: gl.constexpr,  # of a program
    IS_GATED: gl.constexpr,
):
    """Start the copies of a stage, if they are wanted."""
    word_tiles, scale_tiles = tiles
    word_ring, scale_ring, full = ring
    first_row, first_block = place
    STAGES: gl.constexpr = full.shape[0]
    STEPS: gl.constexpr = word_ring.shape[0] // STAGES
    W: gl.constexpr = word_ring.shape[1]
    ROWS: gl.constexpr = word_ring.shape[2]
    TURNS: gl.constexpr = BLOCKS // (STEPS * W)  # of a pass
    stage = turn % STAGES
    is_full = full.index(stage)
    block = first_block + turn % TURNS * (STEPS * W)
    NUM_BYTES: gl.constexpr = STEPS * word_tiles.block_type.nbytes + scale_tiles.block_type.nbytes
    mbarrier.expect(is_full, NUM_BYTES, pred=is_wanted)
    scale_slot = scale_ring.index(stage)
    if IS_GATED:
        row = first_row // 2 + turn // TURNS * (ROWS // 2)
        for step in gl.static_range(STEPS):
            slot = word_ring.index(stage * STEPS + step).reshape(word_tiles.block_shape)
            start_copy(word_tiles, [block + step * W, 0, row, 0], is_full, slot, pred=is_wanted)
        scale_slot = scale_slot.reshape(scale_tiles.block_shape)
        start_copy(scale_tiles, [0, row, block], is_full, scale_slot, pred=is_wanted)
    else:
        row = first_row + turn // TURNS * ROWS
        for step in gl.static_range(STEPS):
            slot = word_ring.index(stage * STEPS + step)
            start_copy(word_tiles, [block + step * W, row, 0], is_full, slot, pred=is_wanted)
        start_copy(scale_tiles, [row, block], is_full, scale_slot, pred=is_wanted)


@gluon.jit
def _load_x(
    x, column, num_tokens, K: gl.constexpr, X_TOKENS: gl.constexpr, SEGMENTS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """x's columns in SEGMENTS pieces [X_TOKENS, SEGMENT]; past the tokens zeros."""
    token = gl.arange(0, X_TOKENS, gl.SliceLayout(1, layout))
    SEGMENT: gl.constexpr = column.shape[0]
    pieces = ()
    for i in gl.static_range(SEGMENTS):
        pointers = x + token[:, None] * K + (column + i * SEGMENT)[None, :]
        # Past the multiprocessor's cache, which other programs' writes do not reach.
        values = gl.load(pointers, (token < num_tokens)[:, None], 0.0, cache_modifier=".cg")
        pieces += (values,)  # type: ignore[assignment]
    return pieces


@gluon.jit
def _norm(pieces, norm_weights, eps, K: gl.constexpr):
    """The RMS norm of pieces [X_TOKENS, SEGMENT], rounded as kernels/triton/norm.py does."""
    dtype: gl.constexpr = pieces[0].dtype
    values = pieces[0].to(gl.float32)
    total = gl.sum(values * values, axis=1)
    for i in gl.static_range(1, len(pieces)):
        values = pieces[i].to(gl.float32)
        total += gl.sum(values * values, axis=1)
    inverse = gl.rsqrt(total / K + eps)
    result = ()
    for i in gl.static_range(len(pieces)):
        normed = pieces[i].to(gl.float32) * inverse[:, None]
        if norm_weights[i].dtype == dtype:
            normed = normed.to(dtype).to(gl.float32)
        normed = (normed * norm_weights[i].to(gl.float32)[None, :]).to(dtype)
        result += (normed,)  # type: ignore[assignment]
    return result


@gluon.jit
def _copies(x, COUNT: gl.constexpr):
    """x [T, N] COUNT times, a power of two: [COUNT * T, N]."""
    if COUNT == 1:
        return x
    else:
        T: gl.constexpr = x.shape[0]
        both = gl.join(x, x).permute((2, 0, 1)).reshape([2 * T, x.shape[1]])
        return _copies(both, COUNT // 2)


@gluon.jit
def _share_x(pieces, column, xs, bases):
    """x to shared memory, plane by plane; and what each token's sums of a block begin with."""
    dtype: gl.constexpr = pieces[0].dtype
    T: gl.constexpr = pieces[0].shape[0]
    TOKENS: gl.constexpr = bases.shape[2]
    BLOCKS: gl.constexpr = pieces[0].shape[1] // COLUMNS  # of a piece
    for i in gl.static_range(len(pieces)):
        values = pieces[i]
        if dtype == gl.bfloat16:
            sums = gl.sum(values.to(gl.float32).reshape([T, BLOCKS, COLUMNS]), axis=2)
            sums *= -MIDDLE / SUMS_FACTOR
            bases.index(i).store(_copies(sums, TOKENS // T).permute((1, 0)))
            factor = gl.where(column // 8 % 2 == 0, X_FACTOR, HIGH_X_FACTOR).to(dtype)
            values *= factor[None, :]
        # block, chunk, plane, number -> block, plane, token, chunk, number
        values = values.reshape([T, BLOCKS, 4, 4, 8]).permute((1, 3, 0, 2, 4))
        xs.index(i).store(values.reshape([BLOCKS * 4, T, 32]))


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens"])
def _packed_rows_kernel(
    out,  # [T, N], which IS_ADDED changes; IS_GATED: [T, N / 2]; parts: float32 [parts, T, N]
    residual,  # [T, N], to which parts are added, or None
    counters,  # int32 [N / rows of a program], zeros between launches; None: parts are not summed
    x,  # [T, K]
    norm_weight,  # [K]; None: x is not normed
    word_tiles,  # int32 [K / COLUMNS, N, WORDS] in boxes of [W, ROWS, WORDS]; see `_tiles`
    scale_tiles,  # [N, K / COLUMNS] in boxes of [ROWS, STEPS * W]
    num_tokens,  # at most X_TOKENS
    eps,
    N: gl.constexpr,
    K: gl.constexpr,
    PART_COLUMNS: gl.constexpr,  # of a program
    SEGMENT: gl.constexpr,
    PASSES: gl.constexpr,
    ROWS: gl.constexpr,  # of a pass
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    X_TOKENS: gl.constexpr,  # 1, 2, 4, 8 or 16
    IS_GATED: gl.constexpr,
    IS_ADDED: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: gl.constexpr = x.dtype.element_ty
    TOKENS: gl.constexpr = 8 if X_TOKENS < 8 else X_TOKENS  # of the matrix instruction
    W: gl.constexpr = gl.num_warps()
    BLOCKS: gl.constexpr = PART_COLUMNS // COLUMNS
    TURNS: gl.constexpr = BLOCKS // (STEPS * W)  # of a pass
    ALL_TURNS: gl.constexpr = PASSES * TURNS
    SEGMENTS: gl.constexpr = PART_COLUMNS // SEGMENT
    first_row = gl.program_id(0) * (PASSES * ROWS)
    part = gl.program_id(1)
    place = (first_row, part * BLOCKS)

    # No kernel writes weights: they come before the wait.
    words_in_ring: gl.constexpr = gl.NVMMASharedLayout(64, 32, 3)
    scales_in_ring: gl.constexpr = gl.NVMMASharedLayout(0, 16, 2)
    word_ring = gl.allocate_shared_memory(gl.int32, [STAGES * STEPS, W, ROWS, WORDS], words_in_ring)
    scale_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, STEPS * W], scales_in_ring)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    tiles = (word_tiles, scale_tiles)
    ring = (word_ring, scale_ring, full)
    for i in gl.static_range(STAGES):
        _start_stage(i, tiles, ring, place, True, BLOCKS, IS_GATED)

    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [1, W], [1, 0])
    piece_column = gl.arange(0, SEGMENT, gl.SliceLayout(0, x_layout))
    norm_weights = ()
    if norm_weight is not None:
        for i in gl.static_range(SEGMENTS):
            values = gl.load(norm_weight + piece_column + i * SEGMENT)
            norm_weights += (values,)  # type: ignore[assignment]

    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    # A thread of a warp holds a chunk's words of rows g and g + 8, as fragments have them,
    further_rows: gl.constexpr = [] if ROWS == 16 else [[0, 16, 0]]
    words_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 8, 0]] + further_rows,  # noqa: RUF005 (no unpacking in kernels)
        [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        bits_along(W, 1, 0, 3),
        [],
        [W, ROWS, WORDS],
    )
    # and a chunk of a token: [W, plane, copy, token, chunk and number].
    COPIES: gl.constexpr = TOKENS // X_TOKENS
    fragments: gl.constexpr = gl.BlockedLayout(
        [1, 4, 1, 1, 8], [1, 1, COPIES, 8 // COPIES, 4], [W, 1, 1, 1, 1], [4, 1, 3, 2, 0]
    )
    # [W, token, row]: a thread has the sums of all warps, and gate's and up's of a row.
    shared_sums: gl.constexpr = _layout_of_sums(W, TOKENS, ROWS, IS_GATED)
    OUT_ROWS: gl.constexpr = ROWS // 2 if IS_GATED else ROWS  # of a pass
    WIDTH: gl.constexpr = N // 2 if IS_GATED else N
    out_layout: gl.constexpr = _layout_of_results(W, TOKENS, OUT_ROWS)
    row = gl.arange(0, OUT_ROWS, gl.SliceLayout(0, out_layout))
    row += gl.program_id(0) * (PASSES * OUT_ROWS)
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, out_layout))
    out_pointers = out + (part * num_tokens + token)[:, None] * WIDTH + row[None, :]
    out_mask = (token < num_tokens)[:, None] & (row >= 0)[None, :]

    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    all_x = gl.allocate_shared_memory(dtype, [SEGMENTS, SEGMENT // COLUMNS * 4, X_TOKENS, 32], flat)
    flat_pair: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    all_bases = gl.allocate_shared_memory(
        gl.float32, [SEGMENTS, SEGMENT // COLUMNS, TOKENS], flat_pair
    )
    # Swizzled so that neither the stores nor the loads meet in a bank.
    sums_of_warps = gl.allocate_shared_memory(
        gl.float32, [W, TOKENS, ROWS], gl.SwizzledSharedLayout(8, 64 // ROWS, ROWS // 8, [2, 1, 0])
    )
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    column = part * PART_COLUMNS + piece_column
    pieces = _load_x(x, column, num_tokens, K, X_TOKENS, SEGMENTS, x_layout)
    if IS_ADDED:
        gl.static_assert(PASSES == 1)
        addend = gl.load(out_pointers, out_mask, 0.0, cache_modifier=".cg")
    if norm_weight is not None:
        pieces = _norm(pieces, norm_weights, eps, K)
    _share_x(pieces, piece_column, all_x, all_bases)
    of_steps: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    xs = reinterpret(all_x, dtype, [BLOCKS // W, W, 4, 1, X_TOKENS, 32], of_steps)
    # In Triton 3.6 a transposed view of copied memory that is not swizzled shows other elements.
    plain_scales = reinterpret(scale_ring, dtype, [STAGES, ROWS, STEPS * W], flat_pair)
    bases = reinterpret(all_bases, gl.float32, [BLOCKS // W, W, TOKENS], flat_pair)

    for pass_ in range(PASSES):
        sums = gl.zeros([W, ROWS, TOKENS], gl.float32, layout)
        for turn_of_pass in range(TURNS):
            turn = pass_ * TURNS + turn_of_pass
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            words = ()
            scales = ()
            for step in gl.static_range(STEPS):
                of_step = word_ring.index(stage * STEPS + step)
                words += (of_step.load(words_layout),)  # type: ignore[assignment]
                scales_of_step = plain_scales.index(stage).slice(step * W, W, dim=1).permute((1, 0))
                scales += (scales_of_step.load(gl.SliceLayout(2, layout)),)  # type: ignore[assignment]
            # The words are in registers: the stage is free for others.
            if ALL_TURNS > STAGES:
                further = turn + STAGES
                is_wanted = further < ALL_TURNS
                _start_stage(further, tiles, ring, place, is_wanted, BLOCKS, IS_GATED)
            for step in gl.static_range(STEPS):
                numbers = unpacked(words[step], dtype, weight_layout)
                number = turn_of_pass * STEPS + step
                x_block = xs.index(number).load(fragments)
                x_block = x_block.broadcast_to([W, 4, COPIES, X_TOKENS, 32])
                # plane, token, chunk, word, half -> the order of the numbers
                x_block = x_block.reshape([W, 4, TOKENS, 4, 4, 2]).permute((0, 1, 4, 3, 5, 2))
                x_block = x_block.reshape([W, COLUMNS, TOKENS])
                x_block = gl.convert_layout(x_block, gl.DotOperandLayout(1, layout, 2))
                product = gl.zeros([W, ROWS, TOKENS], gl.float32, layout)
                if dtype == gl.bfloat16:
                    product += bases.index(number).load(gl.SliceLayout(1, layout))[:, None, :]
                product = mma_v2(numbers, x_block, product)
                sums += product * scales[step].to(gl.float32)[:, :, None]
        sums_of_warps.store(sums.permute((0, 2, 1)))
        result = gl.sum(sums_of_warps.load(shared_sums), axis=0)
        if dtype == gl.bfloat16:
            result *= SUMS_FACTOR
        if IS_GATED:
            gate, up = gl.split(result.reshape([TOKENS, 2, OUT_ROWS]).permute((0, 2, 1)))
            gate = gate.to(dtype).to(gl.float32)
            act = (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32)
            result = act * up.to(dtype).to(gl.float32)
        result = gl.convert_layout(result.to(out.dtype.element_ty), out_layout, assert_trivial=True)
        if IS_ADDED:
            result = (result.to(gl.float32) + addend.to(gl.float32)).to(dtype)
        gl.store(out_pointers + pass_ * OUT_ROWS, result, mask=out_mask)
    if counters is not None:
        barrier()  # all warps' sums are stored
        num_done = gl.atomic_add(counters + gl.program_id(0), 1, sem="acq_rel")
        if num_done == K // PART_COLUMNS - 1:
            _add_parts(
                out, residual, token, row, out_mask, num_tokens, N, K // PART_COLUMNS, PASSES
            )
            gl.store(counters + gl.program_id(0), 0)


@gluon.jit
def _add_parts(
    out, residual, token, row, mask, num_tokens, N: gl.constexpr, PARTS: gl.constexpr,
    PASSES: gl.constexpr,
):  # fmt: skip
    """The last program of some rows adds all parts of them to the residual, in the parts' order."""
    dtype: gl.constexpr = residual.dtype.element_ty
    place = token[:, None] * N + row[None, :]
    OUT_ROWS: gl.constexpr = row.shape[0]
    totals = ()
    for i in gl.static_range(PASSES):
        total = gl.load(out + place + i * OUT_ROWS, mask, 0.0, cache_modifier=".cg")
        for part in gl.static_range(1, PARTS):
            pointers = out + place + i * OUT_ROWS + part * num_tokens * N
            total += gl.load(pointers, mask, 0.0, cache_modifier=".cg")
        addend = gl.load(residual + place + i * OUT_ROWS, mask, 0.0, cache_modifier=".cg")
        total = (total.to(dtype).to(gl.float32) + addend.to(gl.float32)).to(dtype)
        totals += (total,)  # type: ignore[assignment]
    for i in gl.static_range(PASSES):
        gl.store(residual + place + i * OUT_ROWS, totals[i], mask=mask)


def _tiles(weight: PackedWeight, tile: RowsTile, is_gated: bool) -> tuple[Any, Any]:
    """Tensor descriptors of a step's words, and of a stage's scales.

    With is_gated a box's rows are some of the weight's first half, and as many of its second.
    """
    n, k = weight.shape
    num_blocks, warps = k // COLUMNS.value, tile.num_warps
    # Of the rows: their shape, their distance in rows, and how many of them are in a box.
    shape, distances, box = [n], [1], [tile.rows]
    if is_gated:
        shape, distances, box = [2, n // 2], [n // 2, 1], [2, tile.rows // 2]
    words = TensorDescriptor(
        weight.numbers.view(torch.int32),
        [num_blocks, *shape, WORDS.value],
        [WORDS.value, *(distance * (k // 8) for distance in distances), 1],
        [warps, *box, WORDS.value],
        gl.NVMMASharedLayout(64, 32, len(box) + 2),
    )
    scales = TensorDescriptor(
        weight.scales,
        [*shape, num_blocks],
        [*(distance * num_blocks for distance in distances), 1],
        [*box, tile.steps * warps],
        gl.NVMMASharedLayout(0, 16, len(box) + 1),
    )
    return words, scales


def takes(weight: PackedWeight, num_parts: int, tile: RowsTile) -> bool:
    """Whether `packed_rows` multiplies the weight in such tiles."""
    n, k = weight.shape
    columns_of_stage = COLUMNS.value * tile.steps * tile.num_warps
    return (
        weight.bits == 4
        and weight.zeros is None
        and weight.order is None
        and weight.group_size == COLUMNS.value
        and tile.steps * tile.num_warps >= MIN_BLOCKS
        and n % (tile.passes * tile.rows) == 0
        and k % (num_parts * columns_of_stage) == 0
    )


def packed_rows(
    x: torch.Tensor,
    weight: PackedWeight,
    tile: RowsTile,
    norm: tuple[torch.Tensor, float] | None = None,
    is_gated: bool = False,
    residual: torch.Tensor | None = None,
    num_parts: int = 1,
    counters: torch.Tensor | None = None,
) -> LinearOutput:
    """x [T, K] weight^T [T, N], of at most 16 tokens, for weights and tiles that `takes` allows.

    Args:
        norm: weight [K] and epsilon of an RMS norm of x ahead of the product.
        is_gated: the result is silu(gate) * up [T, N / 2], gate being the product's first half.
        residual: [T, N]; the product, rounded, is added to it in its memory, and it is the result.
        num_parts: of K. Several ones are left unsummed without a residual, with neither norm nor
            gate.
        counters: int32, zeros, as they are again afterwards; for parts that are added to a
            residual, one for every rows of a program.
    """
    (num_tokens, k), n = x.shape, weight.shape[0]
    assert num_tokens <= MAX_TOKENS and takes(weight, num_parts, tile)
    assert x.is_contiguous() and weight.numbers.is_contiguous() and weight.scales.is_contiguous()
    assert num_parts == 1 or (norm is None and not is_gated)
    assert residual is None or residual.is_contiguous()
    is_joined = num_parts > 1 and residual is not None
    assert not is_joined or counters is not None
    if residual is not None and num_parts == 1:
        assert tile.passes == 1
        out = residual
    elif num_parts > 1:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    else:
        out = torch.empty(num_tokens, n // 2 if is_gated else n, dtype=x.dtype, device=x.device)
    norm_weight, eps = (None, 0.0) if norm is None else norm
    columns = k // num_parts
    blocks = columns // COLUMNS.value
    turns = tile.passes * blocks // (tile.steps * tile.num_warps)
    words, scales = _tiles(weight, tile, is_gated)
    _packed_rows_kernel[(n // (tile.passes * tile.rows), num_parts)](
        out,
        residual if is_joined else None,
        counters if is_joined else None,
        x,
        norm_weight,
        words,
        scales,
        num_tokens,
        eps,
        N=n,
        K=k,
        PART_COLUMNS=columns,
        SEGMENT=min(MAX_SEGMENT, columns & -columns),
        PASSES=tile.passes,
        ROWS=tile.rows,
        STEPS=tile.steps,
        STAGES=min(tile.stages, turns),
        X_TOKENS=next_power_of_2(num_tokens),
        IS_GATED=is_gated,
        IS_ADDED=out is residual,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        **overlap_options(x.device),
    )
    if is_joined:
        assert residual is not None
        return residual
    return out if num_parts == 1 else PartialSums(out, x.dtype)
