"""Products of 33 to 256 tokens for Hopper, in Gluon: one warp copies, warpgroups compute.

A program multiplies 64 rows of the weight with all tokens, so that every weight is read once, and
each of its warpgroups has tokens of its own. The weight's rows are those of the matrix instruction.
The copying warp brings columns of both, by bulk tensor copies, into a ring of shared memory: the
first weights come before the wait for the kernel ahead. Where K is split, the parts are left
unsummed, as those of kernels/triton/linear.py.

The last tokens' tile ends with the last token, and may begin within the tile before: both store the
same. Copies of rows past the end take longer than those of rows that exist.

Every stage of the ring has two barriers: "full" when its bytes are there, "free" when all
warpgroups are done with them; see kernels/triton/hopper_prefill.py.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.triton.launch import (
    cdiv,
    num_multiprocessors,
    overlap_options,
    with_dry_runs,
)
from nanovllm.kernels.types import LinearOutput, PartialSums

ROWS = 64  # of the weight, for a program: those of a matrix instruction
RUN = 8  # rows of gate, and behind them those of up: one thread gets both of a row
MAX_TOKENS = 256
BLOCK_K = 64  # columns of a stage
COPYING_REGISTERS = 24  # of a thread
COMPUTING_REGISTERS = {1: 240, 2: 240, 3: 160}  # by the number of warpgroups
# Triton 3.8 has another name for it than 3.6 and 3.7.
start_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _start_stage(tiles, first_row, column, ring, stage, IS_GATED: gl.constexpr):
    """The copy of a stage's weights; its barrier expects the bytes of x as well."""
    x_tiles, weight_tiles = tiles
    weights, xs, full, _free = ring
    GROUPS: gl.constexpr = xs.shape[0] // weights.shape[0]
    full = full.index(stage)
    num_bytes: gl.constexpr = weight_tiles.block_type.nbytes + GROUPS * x_tiles.block_type.nbytes
    mbarrier.expect(full, num_bytes)
    if IS_GATED:
        runs = weights.index(stage).reshape(weight_tiles.block_shape)
        start_copy(weight_tiles, [first_row, 0, 0, column], full, runs)
    else:
        start_copy(weight_tiles, [first_row, column], full, weights.index(stage))


@gluon.jit
def _copy(tiles, ring, place, IS_GATED: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr):
    """The copying warp."""
    x_tiles, _weight_tiles = tiles
    _weights, xs, full, free = ring
    first_row, first_token, last_token, begin, count, _part = place
    GROUPS: gl.constexpr = xs.shape[0] // STAGES
    BLOCK_T: gl.constexpr = xs.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    # No kernel writes weights: they come before the wait.
    for block in range(gl.minimum(count, STAGES)):
        _start_stage(tiles, first_row, (begin + block) * BLOCK_K, ring, block, IS_GATED)
    if OVERLAP:
        gdc_wait()
    for block in range(count):
        stage = block % STAGES
        column = (begin + block) * BLOCK_K
        if block >= STAGES:
            mbarrier.wait(free.index(stage), (block // STAGES + 1) & 1)
            _start_stage(tiles, first_row, column, ring, stage, IS_GATED)
        for group in gl.static_range(GROUPS):
            to = xs.index(stage * GROUPS + group)
            token = gl.minimum(first_token + group * BLOCK_T, last_token)
            start_copy(x_tiles, [token, column], full.index(stage), to)


@gluon.jit
def _compute(
    out,
    bias,
    ring,
    place,
    num_tokens,
    GROUP: gl.constexpr,
    N: gl.constexpr,
    IS_GATED: gl.constexpr,
    RUN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A computing warpgroup."""
    weights, xs, full, free = ring
    first_row, first_token, last_token, _begin, count, part = place
    ROWS: gl.constexpr = weights.shape[1]
    GROUPS: gl.constexpr = xs.shape[0] // STAGES
    BLOCK_T: gl.constexpr = xs.shape[1]
    first_token = gl.minimum(first_token + GROUP * BLOCK_T, last_token)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 16])
    acc = gl.zeros([ROWS, BLOCK_T], gl.float32, layout)
    for block in range(count):
        stage = block % STAGES
        mbarrier.wait(full.index(stage), (block // STAGES) & 1)
        x = xs.index(stage * GROUPS + GROUP).permute((1, 0))
        acc = warpgroup_mma(weights.index(stage), x, acc, is_async=True)
        acc = warpgroup_mma_wait(1, [acc])
        if block > 0:
            mbarrier.arrive(free.index((block - 1) % STAGES))
    acc = warpgroup_mma_wait(0, [acc])
    dtype: gl.constexpr = out.dtype.element_ty
    if IS_GATED:
        runs = acc.reshape([ROWS // RUN // 2, 2, RUN, BLOCK_T])
        gate, up = gl.split(runs.permute(0, 2, 3, 1))
        gate = gate.reshape([ROWS // 2, BLOCK_T]).to(dtype).to(gl.float32)
        up = up.reshape([ROWS // 2, BLOCK_T]).to(dtype).to(gl.float32)
        # Rounded as `silu_and_mul` does.
        act = (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32)
        _store(out, act * up, first_row * RUN, first_token, num_tokens, N // 2)
    else:
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        if bias is not None:
            values = gl.load(bias + row, mask=(row < N) & (part == 0), other=0.0)
            acc += values.to(gl.float32)[:, None]
        if dtype == gl.float32:
            token = first_token + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
            pointers = out + (part * num_tokens + token).to(gl.int64)[None, :] * N + row[:, None]
            gl.store(pointers, acc, mask=(row < N)[:, None] & (token < num_tokens)[None, :])
        else:
            _store(out, acc, first_row, first_token, num_tokens, N)


@gluon.jit
def _store(out, values, first_row, first_token, num_tokens, N: gl.constexpr):
    """Values [rows, BLOCK_T], transposed, to out [T, N]: 16 bytes of a token's for each thread."""
    ROWS: gl.constexpr = values.shape[0]
    BLOCK_T: gl.constexpr = values.shape[1]
    LANES: gl.constexpr = ROWS // 8
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
    values = gl.convert_layout(values.to(out.dtype.element_ty), layout)
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    token = first_token + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
    pointers = out + token.to(gl.int64)[None, :] * N + row[:, None]
    gl.store(pointers, values, mask=(row < N)[:, None] & (token < num_tokens)[None, :])


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "blocks_per_part"])
def _wide_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]; IS_GATED: [T, N / 2]
    x_tiles,  # x [T, K], tensor descriptor of [BLOCK_T, BLOCK_K]; rows past T read as zeros
    weight_tiles,  # weight [N, K], see `_weight_tiles`; rows past N read as zeros
    bias,  # [N] or None
    num_tokens,
    num_blocks,  # of BLOCK_K columns
    blocks_per_part,
    N: gl.constexpr,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,  # warpgroups, each of which has BLOCK_T tokens
    IS_GATED: gl.constexpr,
    RUN: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    dtype: gl.constexpr = x_tiles.dtype
    BLOCK_T: gl.constexpr = x_tiles.block_shape[0]
    BLOCK_K: gl.constexpr = x_tiles.block_shape[1]
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    swizzled: gl.constexpr = x_tiles.layout
    weights = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], swizzled)
    xs = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, BLOCK_T, BLOCK_K], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    ring = (weights, xs, full, free)
    part = gl.program_id(1)
    begin = part * blocks_per_part
    count = gl.minimum(blocks_per_part, num_blocks - begin)
    rows: gl.constexpr = ROWS // RUN // 2 if IS_GATED else ROWS
    first_token = gl.program_id(2) * GROUPS * BLOCK_T
    last_token = gl.maximum(num_tokens - BLOCK_T, 0)
    place = (gl.program_id(0) * rows, first_token, last_token, begin, count, part)
    tiles = (x_tiles, weight_tiles)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_compute, (out, bias, ring, place, num_tokens, 0, N, IS_GATED, RUN, STAGES)),
                (_copy, (tiles, ring, place, IS_GATED, STAGES, OVERLAP)),
            ],
            [1],
            [COPYING_REGISTERS],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (out, bias, ring, place, num_tokens, 0, N, IS_GATED, RUN, STAGES)),
                (_compute, (out, bias, ring, place, num_tokens, 1, N, IS_GATED, RUN, STAGES)),
                (_copy, (tiles, ring, place, IS_GATED, STAGES, OVERLAP)),
            ],
            [4, 1],
            [COMPUTING_REGISTERS, COPYING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (out, bias, ring, place, num_tokens, 0, N, IS_GATED, RUN, STAGES)),
                (_compute, (out, bias, ring, place, num_tokens, 1, N, IS_GATED, RUN, STAGES)),
                (_compute, (out, bias, ring, place, num_tokens, 2, N, IS_GATED, RUN, STAGES)),
                (_copy, (tiles, ring, place, IS_GATED, STAGES, OVERLAP)),
            ],
            [4, 4, 1],
            [COMPUTING_REGISTERS, COMPUTING_REGISTERS, COPYING_REGISTERS],
        )


class WideTile(NamedTuple):
    """What a program multiplies at a time."""

    tokens: int  # of a warpgroup
    groups: int  # warpgroups
    stages: int  # of the ring, at most: as many as shared memory has room for
    # Of each thread when a program starts. None: all of a multiprocessor's, so that no program of
    # the next kernel can come beside it.
    registers: int | None = None


TILES = {
    8: WideTile(8, 1, 8),
    16: WideTile(16, 1, 8),
    32: WideTile(32, 1, 8),
    64: WideTile(64, 1, 8),
    128: WideTile(128, 1, 8),
    192: WideTile(64, 3, 6),
    256: WideTile(128, 2, 5),
}  # by the most tokens


def choose_tile(num_tokens: int, num_programs: int, num_parts: int, num_sms: int) -> WideTile:
    """The tile for x [num_tokens, K], if so many programs with all tokens would compute it.

    Of more than 192 tokens each has half, if K is whole and all programs run at once even then.
    """
    if num_tokens > 192 and num_parts == 1 and 2 * num_programs <= num_sms:
        return TILES[128]
    return next(tile for most, tile in TILES.items() if num_tokens <= most)


@cache
def _layout(rank: int) -> Any:
    """Of a tile of BLOCK_K columns in shared memory, as matrix instructions read it."""
    return gl.NVMMASharedLayout(2 * BLOCK_K, 16, rank)


def _weight_tiles(weight: torch.Tensor, is_gated: bool) -> Any:
    """A tensor descriptor of tiles [ROWS, BLOCK_K] of a weight [N, K].

    With is_gated they are RUN rows of the weight's first half, RUN of its second, and so on.
    """
    n, k = weight.shape
    if not is_gated:
        return TensorDescriptor(weight, [n, k], [k, 1], [ROWS, BLOCK_K], _layout(2))
    num_runs = n // 2 // RUN
    strides = [RUN * k, num_runs * RUN * k, k, 1]
    block = [ROWS // RUN // 2, 2, RUN, BLOCK_K]
    return TensorDescriptor(weight, [num_runs, 2, RUN, k], strides, block, _layout(4))


def wide_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    num_parts: int,
    *,
    is_gated: bool = False,
    tile: WideTile | None = None,
) -> LinearOutput:
    """x [T, K], weight [N, K], bias [N] -> [T, N], with K in so many parts or fewer.

    T <= MAX_TOKENS, N is a multiple of 8 and K of BLOCK_K. bfloat16 or float16, all contiguous.

    Args:
        is_gated: -> `Ops.gated_linear` instead, [T, N / 2]. N is then a multiple of 2 * RUN, there
            is one part and no bias. The bits are those of `silu_and_mul` behind the product.
        tile: overrides the tuned choice.
    """
    num_tokens, k = x.shape
    n = weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous()
    assert k % BLOCK_K == 0 and n % 8 == 0
    num_blocks = k // BLOCK_K
    blocks_per_part = cdiv(num_blocks, num_parts)
    num_parts = cdiv(num_blocks, blocks_per_part)
    if tile is None:
        num_sms = num_multiprocessors(x.device)
        tile = choose_tile(num_tokens, cdiv(n, ROWS) * num_parts, num_parts, num_sms)
    width = n // 2 if is_gated else n
    if num_parts == 1:
        out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    block = [tile.tokens, BLOCK_K]
    x_tiles = TensorDescriptor(x, [num_tokens, k], [k, 1], block, _layout(2))
    grid = cdiv(n, ROWS), num_parts, cdiv(num_tokens, tile.tokens * tile.groups)
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    _wide_linear_kernel[grid](
        out,
        x_tiles,
        _weight_tiles(weight, is_gated),
        bias,
        num_tokens,
        num_blocks,
        blocks_per_part,
        N=n,
        ROWS=ROWS,
        GROUPS=tile.groups,
        IS_GATED=is_gated,
        RUN=RUN,
        STAGES=min(tile.stages, blocks_per_part),
        COMPUTING_REGISTERS=COMPUTING_REGISTERS[tile.groups],
        COPYING_REGISTERS=COPYING_REGISTERS,
        num_warps=4,
        **limit,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, x.dtype)
