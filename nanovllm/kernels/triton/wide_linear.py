"""Products of up to 256 tokens for Hopper, in Gluon: one warp copies, warpgroups compute.

A program multiplies 64 rows of the weight for each of its warpgroups with all tokens, so that every
weight is read from memory once. The weight's rows are those of the matrix instruction. Sizes in
Triton are powers of two, so a warpgroup has its tokens in up to three pieces, one after the other.
The copying warp brings columns of both, by bulk tensor copies, into a ring of shared memory: the
first weights come before the wait for the kernel ahead. Where K is split, the parts are left
unsummed, as those of kernels/triton/linear.py.

Of few tokens the weights' bytes are all that counts. Several programs share a multiprocessor then:
while one stores its sums and the next one starts, the copies of the others go on.

A piece ends with the last token at the latest, and may begin within the piece before: both store
the same. Copies of rows past the end take longer than those of rows that exist.

With fp8 weights x is quantised, and scales are as in kernels/triton/fp8_linear.py. Those of blocks
belong to a stage each, and its product is added to the sums with them.

Every stage of the ring has two barriers: "full" when its bytes are there, "free" when all
warpgroups are done with them; see kernels/triton/hopper_prefill.py.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.device import RESERVED_SHARED_MEMORY, device_limits
from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import cdiv, overlap_options, with_dry_runs
from nanovllm.kernels.triton.weight_tiles import (
    RUN,
    TILE_BYTES,
    silu_of_runs,
    tile_layout,
    weight_tiles,
)
from nanovllm.kernels.types import FP8_BLOCK, LinearOutput, PartialSums

ROWS = 64  # of the weight, for a warpgroup: those of a matrix instruction
MAX_TOKENS = 256
MAX_PIECES = 3  # of the tokens
MAX_STAGES = {32: 12, 256: 8}  # by the most tokens
# From so many tokens on three warpgroups have few stages, and wait long for what all programs read
# at the same time. So each begins at other columns of K.
SKEWED_TOKENS = 225
RESERVED_BYTES = 7 << 10  # of shared memory, in which stored sums are exchanged
COPYING_REGISTERS = 24  # of a thread
# Number of warpgroups -> most tokens -> registers of each thread at a program's start, and of those
# in the second and third warpgroup; the first has what the others leave. Sums and 26 more are the
# least. With few, a program starts beside one of the kernel ahead.
REGISTERS = {
    1: {64: (64, 64), 128: (96, 96), 192: (128, 128), 256: (168, 168)},
    3: {64: (64, 64), 128: (96, 112), 256: (128, 160)},
}


@gluon.jit
def _start_stage(tiles, first_row, column, ring, stage, IS_GATED: gl.constexpr):
    """The copies of a stage's weights; its barrier expects the bytes of x as well."""
    x_tiles, weight_tiles = tiles
    weights, _xs, full, _free = ring
    GROUPS: gl.constexpr = weights.shape[0] // full.shape[0]
    full = full.index(stage)
    num_bytes: gl.constexpr = GROUPS * weight_tiles.block_type.nbytes + x_tiles[0].block_type.nbytes
    if len(x_tiles) == 1:
        mbarrier.expect(full, num_bytes)
    elif len(x_tiles) == 2:
        mbarrier.expect(full, num_bytes + x_tiles[1].block_type.nbytes)
    else:
        more: gl.constexpr = x_tiles[1].block_type.nbytes + x_tiles[2].block_type.nbytes
        mbarrier.expect(full, num_bytes + more)
    for group in gl.static_range(GROUPS):
        row = first_row + group * weight_tiles.block_shape[0]
        to = weights.index(stage * GROUPS + group)
        if IS_GATED:
            runs = to.reshape(weight_tiles.block_shape)
            start_copy(weight_tiles, [row, 0, 0, column], full, runs)
        else:
            start_copy(weight_tiles, [row, column], full, to)


@gluon.jit
def _shifted(block, shift, count):
    """The block of K that is the `block`-th one of a program, whose first is `shift`."""
    if shift is None:
        return block
    else:
        return (block + shift) % count


@gluon.jit
def _copy(tiles, ring, place, IS_GATED: gl.constexpr, OVERLAP: gl.constexpr):
    """The copying warp."""
    x_tiles, _weight_tiles = tiles
    _weights, xs, full, free = ring
    first_row, tokens, begin, count, shift, _part = place
    STAGES: gl.constexpr = full.shape[0]
    BLOCK_K: gl.constexpr = xs[0].shape[2]
    # No kernel writes weights: they come before the wait.
    for block in range(gl.minimum(count, STAGES)):
        column = (begin + _shifted(block, shift, count)) * BLOCK_K
        _start_stage(tiles, first_row, column, ring, block, IS_GATED)
    if OVERLAP:
        gdc_wait()
    for block in range(count):
        stage = block % STAGES
        column = (begin + _shifted(block, shift, count)) * BLOCK_K
        if block >= STAGES:
            mbarrier.wait(free.index(stage), (block // STAGES + 1) & 1)
            _start_stage(tiles, first_row, column, ring, stage, IS_GATED)
        for piece in gl.static_range(len(xs)):
            to = xs[piece].index(stage)
            start_copy(x_tiles[piece], [tokens[piece], column], full.index(stage), to)


@gluon.jit
def _compute(
    product,  # out, bias, num_tokens, n
    factors,  # x_scales, scales, stride_x_scales, num_blocks
    ring,
    place,
    GROUP: gl.constexpr,
    SCALE_BLOCK: gl.constexpr,
    IS_GATED: gl.constexpr,
    RUN: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """A computing warpgroup."""
    weights, xs, full, free = ring
    first_row, tokens, _begin, count, _shift, part = place
    STAGES: gl.constexpr = full.shape[0]
    GROUPS: gl.constexpr = weights.shape[0] // STAGES
    ROWS: gl.constexpr = weights.shape[1]
    PIECES: gl.constexpr = len(xs)
    T0: gl.constexpr = xs[0].shape[1]
    T1: gl.constexpr = xs[1].shape[1] if PIECES > 1 else 16
    T2: gl.constexpr = xs[2].shape[1] if PIECES > 2 else 16
    K: gl.constexpr = 256 // xs[0].dtype.primitive_bitwidth  # of a matrix instruction
    layout0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T0, K])
    layout1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T1, K])
    layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T2, K])
    acc0 = gl.zeros([ROWS, T0], gl.float32, layout0)
    acc1 = gl.zeros([ROWS, T1], gl.float32, layout1)
    acc2 = gl.zeros([ROWS, T2], gl.float32, layout2)
    IS_SCALED: gl.constexpr = factors[1] is not None
    if OVERLAP and IS_SCALED:
        gdc_wait()
    if SCALE_BLOCK > 0:
        acc0 = _sum_of_blocks(acc0, product[2], factors, ring, place, layout0, SCALE_BLOCK)
        count = 0
    for block in range(count):
        stage = block % STAGES
        mbarrier.wait(full.index(stage), (block // STAGES) & 1)
        weight = weights.index(stage * GROUPS + GROUP)
        acc0 = warpgroup_mma(weight, xs[0].index(stage).permute((1, 0)), acc0, is_async=True)
        # Wait for the products of the stage before.
        if PIECES == 1:
            acc0 = warpgroup_mma_wait(1, [acc0])
        else:
            acc1 = warpgroup_mma(weight, xs[1].index(stage).permute((1, 0)), acc1, is_async=True)
            if PIECES == 2:
                acc0, acc1 = warpgroup_mma_wait(2, [acc0, acc1])
            else:
                x2 = xs[2].index(stage).permute((1, 0))
                acc2 = warpgroup_mma(weight, x2, acc2, is_async=True)
                acc0, acc1, acc2 = warpgroup_mma_wait(3, [acc0, acc1, acc2])
        if block > 0:
            mbarrier.arrive(free.index((block - 1) % STAGES))
    first_row += GROUP * (ROWS // RUN // 2 if IS_GATED else ROWS)
    if PIECES == 1:
        acc0 = warpgroup_mma_wait(0, [acc0])
    elif PIECES == 2:
        acc0, acc1 = warpgroup_mma_wait(0, [acc0, acc1])
    else:
        acc0, acc1, acc2 = warpgroup_mma_wait(0, [acc0, acc1, acc2])
    follows = (product, factors, part)
    _finish(follows, acc0, first_row, tokens[0], layout0, SCALE_BLOCK, IS_GATED, RUN)
    if PIECES > 1:
        _finish(follows, acc1, first_row, tokens[1], layout1, SCALE_BLOCK, IS_GATED, RUN)
    if PIECES > 2:
        _finish(follows, acc2, first_row, tokens[2], layout2, SCALE_BLOCK, IS_GATED, RUN)


@gluon.jit
def _factors_of_block(factors, row, block, token, num_tokens, SCALE_BLOCK: gl.constexpr):
    """For products of a block of K with each token."""
    x_scales, scales, stride_x_scales, num_blocks = factors
    scale = gl.load(scales + row // SCALE_BLOCK * num_blocks + block)
    return gl.load(x_scales + block * stride_x_scales + token, token < num_tokens, 0.0) * scale


@gluon.jit
def _sum_of_blocks(
    acc, num_tokens, factors, ring, place, layout: gl.constexpr, SCALE_BLOCK: gl.constexpr
):
    """acc + the product whose blocks of K have scales of their own, by one warpgroup in one piece.

    The scales of a block are asked for while the block before is multiplied.
    """
    weights, xs, full, free = ring
    row, tokens, begin, count, _shift, _part = place
    STAGES: gl.constexpr = full.shape[0]
    token = tokens[0] + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    next_factors = _factors_of_block(factors, row, begin, token, num_tokens, SCALE_BLOCK)
    for block in range(count):
        block_factors = next_factors
        following = begin + gl.minimum(block + 1, count - 1)
        next_factors = _factors_of_block(factors, row, following, token, num_tokens, SCALE_BLOCK)
        stage = block % STAGES
        mbarrier.wait(full.index(stage), (block // STAGES) & 1)
        x = xs[0].index(stage).permute((1, 0))
        product = gl.zeros_like(acc)
        product = warpgroup_mma(weights.index(stage), x, product, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, [product])
        mbarrier.arrive(free.index(stage))
        acc += product * block_factors[None, :]
    return acc


@gluon.jit
def _finish(
    follows,
    acc,
    first_row,
    first_token,
    layout: gl.constexpr,
    SCALE_BLOCK: gl.constexpr,
    IS_GATED: gl.constexpr,
    RUN: gl.constexpr,
):
    """What follows a piece's product."""
    product, factors, part = follows
    out, bias, num_tokens, n = product
    ROWS: gl.constexpr = acc.shape[0]
    BLOCK_T: gl.constexpr = acc.shape[1]
    dtype: gl.constexpr = out.dtype.element_ty
    x_scales, scales, _stride, _num_blocks = factors
    if scales is not None and SCALE_BLOCK == 0:
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        token = first_token + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
        acc *= gl.load(scales + row, row < n, 0.0)[:, None]
        acc *= gl.load(x_scales + token, token < num_tokens, 0.0)[None, :]
    if IS_GATED:
        act = silu_of_runs(acc, RUN, dtype)
        _store(out, act, first_row * RUN, first_token, num_tokens, n // 2)
    else:
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        if bias is not None:
            values = gl.load(bias + row, mask=(row < n) & (part == 0), other=0.0)
            acc += values.to(gl.float32)[:, None]
        if dtype == gl.float32:
            token = first_token + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
            pointers = out + (part * num_tokens + token).to(gl.int64)[None, :] * n + row[:, None]
            gl.store(pointers, acc, mask=(row < n)[:, None] & (token < num_tokens)[None, :])
        else:
            _store(out, acc, first_row, first_token, num_tokens, n)


@gluon.jit
def _store(out, values, first_row, first_token, num_tokens, n):
    """Values [rows, BLOCK_T], transposed, to out [T, n]: 16 bytes of a token's for each thread."""
    ROWS: gl.constexpr = values.shape[0]
    BLOCK_T: gl.constexpr = values.shape[1]
    LANES: gl.constexpr = ROWS // 8
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
    values = gl.convert_layout(values.to(out.dtype.element_ty), layout)
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    token = first_token + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
    pointers = out + token.to(gl.int64)[None, :] * n + row[:, None]
    gl.store(pointers, values, mask=(row < n)[:, None] & (token < num_tokens)[None, :])


@gluon.jit
def _clamp(first, last):
    """Where a piece begins that would begin at `first`, and at `last` if it ended with x."""
    return gl.maximum(gl.minimum(first, last), 0)


@gluon.jit
def _pieces(x_tiles, first, num_tokens, STAGES: gl.constexpr):
    """Of each piece of the tokens from `first` on: its descriptor, its ring, where it begins."""
    tiles0, tiles1, tiles2 = x_tiles
    T0: gl.constexpr = tiles0.block_shape[0]
    BLOCK_K: gl.constexpr = tiles0.block_shape[1]
    x0 = gl.allocate_shared_memory(tiles0.dtype, [STAGES, T0, BLOCK_K], tiles0.layout)
    first0 = _clamp(first, num_tokens - T0)
    if tiles1 is None:
        return (tiles0,), (x0,), (first0,)
    else:
        T1: gl.constexpr = tiles1.block_shape[0]
        x1 = gl.allocate_shared_memory(tiles1.dtype, [STAGES, T1, BLOCK_K], tiles1.layout)
        first1 = _clamp(first + T0, num_tokens - T1)
        if tiles2 is None:
            return (tiles0, tiles1), (x0, x1), (first0, first1)
        else:
            T2: gl.constexpr = tiles2.block_shape[0]
            x2 = gl.allocate_shared_memory(tiles2.dtype, [STAGES, T2, BLOCK_K], tiles2.layout)
            first2 = _clamp(first + T0 + T1, num_tokens - T2)
            return x_tiles, (x0, x1, x2), (first0, first1, first2)


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "blocks_per_part", "stride_x_scales"])
def _wide_linear_kernel(
    out,  # [T, n], or float32 [parts, T, n]; IS_GATED: [T, n / 2]
    x_tiles0,  # x [T, K], tensor descriptors of [tokens of a piece, BLOCK_K]
    x_tiles1,  # or None
    x_tiles2,  # or None
    weight_tiles,  # weight [n, K], see weight_tiles.py; what is past n or K reads as zeros
    bias,  # [n] or None
    x_scales,  # of fp8 x: float32 [T], or [num_blocks, T], else None
    scales,  # of fp8 weights: float32 [n], or [ceil(n / FP8_BLOCK), num_blocks], else None
    num_tokens,
    n,
    num_blocks,  # of TILE_BYTES of a row
    blocks_per_part,
    stride_x_scales,
    SCALE_BLOCK: gl.constexpr,  # rows of the weight with a scale for each block of K; 0: none have
    TOKENS: gl.constexpr,  # of a program: those of all pieces
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,  # warpgroups, each of which has ROWS rows
    IS_GATED: gl.constexpr,
    IS_SKEWED: gl.constexpr,  # programs begin at different columns of K
    RUN: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    dtype: gl.constexpr = x_tiles0.dtype
    BLOCK_K: gl.constexpr = x_tiles0.block_shape[1]
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    layout: gl.constexpr = x_tiles0.layout
    weights = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, ROWS, BLOCK_K], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    all_tiles = x_tiles0, x_tiles1, x_tiles2
    first = gl.program_id(2) * TOKENS
    x_tiles, xs, tokens = _pieces(all_tiles, first, num_tokens, STAGES)
    part = gl.program_id(1)
    begin = part * blocks_per_part
    count = gl.minimum(blocks_per_part, num_blocks - begin)
    rows: gl.constexpr = GROUPS * (ROWS // RUN // 2 if IS_GATED else ROWS)
    if IS_SKEWED:
        place = (gl.program_id(0) * rows, tokens, begin, count, gl.program_id(0) % count, part)
    else:
        place = (gl.program_id(0) * rows, tokens, begin, count, None, part)
    tiles = (x_tiles, weight_tiles)
    ring = (weights, xs, full, free)
    product = (out, bias, num_tokens, n)
    factors = (x_scales, scales, stride_x_scales, num_blocks)
    # fmt: off
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_compute,
                 (product, factors, ring, place, 0, SCALE_BLOCK, IS_GATED, RUN, OVERLAP)),
                (_copy, (tiles, ring, place, IS_GATED, OVERLAP)),
            ],
            [1],
            [COPYING_REGISTERS],
        )
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (_compute,
                 (product, factors, ring, place, 0, SCALE_BLOCK, IS_GATED, RUN, OVERLAP)),
                (_compute,
                 (product, factors, ring, place, 1, SCALE_BLOCK, IS_GATED, RUN, OVERLAP)),
                (_compute,
                 (product, factors, ring, place, 2, SCALE_BLOCK, IS_GATED, RUN, OVERLAP)),
                (_copy, (tiles, ring, place, IS_GATED, OVERLAP)),
            ],
            [4, 4, 1],
            [COMPUTING_REGISTERS, COMPUTING_REGISTERS, COPYING_REGISTERS],
        )
    # fmt: on


class WideTile(NamedTuple):
    """What a program multiplies at a time."""

    pieces: tuple[int, ...]  # tokens of each, powers of 2, the largest first
    groups: int = 1  # warpgroups, of ROWS rows each
    num_parts: int = 1  # of K
    programs_per_sm: int = 1  # that share a multiprocessor's memory


def wide_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile: WideTile,
    *,
    is_gated: bool = False,
    x_scales: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> LinearOutput:
    """x [T, K], weight [N, K], bias [N] -> [T, N], with K in the tile's parts or fewer.

    Rows of x, weight and result are a multiple of 16 bytes. All contiguous, in bfloat16 or float16.
    Or x and weight are fp8 and the result is in `dtype`, with x_scales and scales as in
    `tiled_linear`; with those of blocks the tile has one warpgroup and one piece.

    Args:
        tile: as `choose_wide` in kernels/triton/linear.py chooses it. Programs share the tokens if
            there are more than its pieces have.
        is_gated: -> `Ops.gated_linear` instead, [T, N / 2]. N is then a multiple of 2 * RUN, there
            is one part and no bias. The bits are those of `silu_and_mul` behind the product, but
            for skewed programs: these sum up in an order of their own.
    """
    num_tokens, k = x.shape
    n = weight.shape[0]
    block_k = TILE_BYTES // x.element_size()
    assert x.is_contiguous() and weight.is_contiguous()
    num_blocks = cdiv(k, block_k)
    dtype = dtype or x.dtype
    blocks_per_part = cdiv(num_blocks, tile.num_parts)
    num_parts = cdiv(num_blocks, blocks_per_part)
    width = n // 2 if is_gated else n
    if num_parts == 1:
        out = torch.empty(num_tokens, width, dtype=dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    x_tiles = [
        TensorDescriptor(
            x, [num_tokens, k], [k, 1], [size, block_k], tile_layout(2, 8 * x.element_size())
        )
        for size in tile.pieces
    ]
    tokens, rows = sum(tile.pieces), ROWS * tile.groups
    stage_bytes = (rows + tokens) * TILE_BYTES
    by_tokens = REGISTERS[tile.groups]
    registers, computing = next(pair for most, pair in by_tokens.items() if tokens <= most)
    stages = next(stages for most, stages in MAX_STAGES.items() if tokens <= most)
    room = device_limits(x.device).shared_memory + RESERVED_SHARED_MEMORY
    room = room // tile.programs_per_sm - RESERVED_SHARED_MEMORY - RESERVED_BYTES
    grid = cdiv(n, rows), num_parts, cdiv(num_tokens, tokens)
    _wide_linear_kernel[grid](
        out,
        *x_tiles,
        *[None] * (MAX_PIECES - len(x_tiles)),
        weight_tiles(weight, ROWS, is_gated),
        bias,
        x_scales,
        scales,
        num_tokens,
        n,
        num_blocks,
        blocks_per_part,
        0 if x_scales is None else x_scales.stride(1),
        SCALE_BLOCK=FP8_BLOCK if scales is not None and scales.dim() == 2 else 0,
        TOKENS=tokens,
        ROWS=ROWS,
        GROUPS=tile.groups,
        IS_GATED=is_gated,
        IS_SKEWED=tile.groups == 3 and num_tokens >= SKEWED_TOKENS,
        RUN=RUN,
        STAGES=min(stages, room // stage_bytes),
        COMPUTING_REGISTERS=computing,
        COPYING_REGISTERS=COPYING_REGISTERS,
        num_warps=4,
        maxnreg=registers,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, dtype)
