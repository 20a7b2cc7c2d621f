"""Products of 65 to 128 tokens for Hopper, in Gluon: one warp copies, a warpgroup computes.

A program multiplies 64 rows of the weight with all tokens, so that every weight is read once. The
weight's rows are those of the matrix instruction. The copying warp brings columns of both, by bulk
tensor copies, into a ring of shared memory: the first weights come before the wait for the kernel
ahead. Where K is split, the parts are left unsummed, as those of kernels/triton/linear.py.

Every stage of the ring has two barriers: "full" when its bytes are there, "free" when the warpgroup
is done with them; see kernels/triton/hopper_prefill.py.
"""

from functools import cache
from typing import Any

import torch
import triton
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

from nanovllm.kernels.triton.launch import overlap_options, with_dry_runs
from nanovllm.kernels.types import LinearOutput, PartialSums

ROWS = 64  # of the weight, for a program: those of a matrix instruction
BLOCK_T = 128  # tokens
BLOCK_K = 64  # columns of a stage
MAX_STAGES = 8  # of 24 KiB
COPYING_REGISTERS = 24  # of a thread
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Triton 3.8 has another name for it than 3.6 and 3.7.
start_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _start_stage(tiles, place, ring, stage):
    """The copy of a stage's weights; its barrier expects the bytes of x as well."""
    x_tiles, weight_tiles = tiles
    weights, _xs, full, _free = ring
    full = full.index(stage)
    mbarrier.expect(full, weight_tiles.block_type.nbytes + x_tiles.block_type.nbytes)
    start_copy(weight_tiles, place, full, weights.index(stage))


@gluon.jit
def _copy(tiles, ring, place, STAGES: gl.constexpr, OVERLAP: gl.constexpr):
    """The copying warp."""
    x_tiles, _weight_tiles = tiles
    _weights, xs, full, free = ring
    first_row, begin, count, _part = place
    BLOCK_K: gl.constexpr = xs.shape[2]
    # No kernel writes weights: they come before the wait.
    for block in range(gl.minimum(count, STAGES)):
        _start_stage(tiles, [first_row, (begin + block) * BLOCK_K], ring, block)
    if OVERLAP:
        gdc_wait()
    for block in range(count):
        stage = block % STAGES
        column = (begin + block) * BLOCK_K
        if block >= STAGES:
            mbarrier.wait(free.index(stage), (block // STAGES + 1) & 1)
            _start_stage(tiles, [first_row, column], ring, stage)
        start_copy(x_tiles, [0, column], full.index(stage), xs.index(stage))


@gluon.jit
def _compute(
    out,
    bias,
    ring,
    place,
    num_tokens,
    N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The computing warpgroup."""
    weights, xs, full, free = ring
    first_row, _begin, count, part = place
    ROWS: gl.constexpr = weights.shape[1]
    BLOCK_T: gl.constexpr = xs.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 16])
    acc = gl.zeros([ROWS, BLOCK_T], gl.float32, layout)
    for block in range(count):
        stage = block % STAGES
        mbarrier.wait(full.index(stage), (block // STAGES) & 1)
        x = xs.index(stage).permute((1, 0))
        acc = warpgroup_mma(weights.index(stage), x, acc, is_async=True)
        acc = warpgroup_mma_wait(1, [acc])
        if block > 0:
            mbarrier.arrive(free.index((block - 1) % STAGES))
    acc = warpgroup_mma_wait(0, [acc])
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    if bias is not None:
        values = gl.load(bias + row, mask=(row < N) & (part == 0), other=0.0)
        acc += values.to(gl.float32)[:, None]
    if out.dtype.element_ty == gl.float32:
        token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, layout))
        pointers = out + (part * num_tokens + token).to(gl.int64)[None, :] * N + row[:, None]
        gl.store(pointers, acc, mask=(row < N)[:, None] & (token < num_tokens)[None, :])
    else:
        # 16 bytes of a token's row for each thread.
        out_layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
        product = gl.convert_layout(acc.to(out.dtype.element_ty), out_layout)
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
        token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, out_layout))
        pointers = out + token.to(gl.int64)[None, :] * N + row[:, None]
        gl.store(pointers, product, mask=(row < N)[:, None] & (token < num_tokens)[None, :])


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "blocks_per_part"])
def _wide_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x_tiles,  # x [T, K], tensor descriptor of [BLOCK_T, BLOCK_K]; rows past T read as zeros
    weight_tiles,  # weight [N, K], of [ROWS, BLOCK_K]; rows past N read as zeros
    bias,  # [N] or None
    num_tokens,
    num_blocks,  # of BLOCK_K columns
    blocks_per_part,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    dtype: gl.constexpr = x_tiles.dtype
    ROWS: gl.constexpr = weight_tiles.block_shape[0]
    BLOCK_T: gl.constexpr = x_tiles.block_shape[0]
    BLOCK_K: gl.constexpr = x_tiles.block_shape[1]
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    weights = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], weight_tiles.layout)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    ring = (weights, xs, full, free)
    part = gl.program_id(1)
    begin = part * blocks_per_part
    count = gl.minimum(blocks_per_part, num_blocks - begin)
    place = (gl.program_id(0) * ROWS, begin, count, part)
    tiles = (x_tiles, weight_tiles)
    gl.warp_specialize(
        [
            (_compute, (out, bias, ring, place, num_tokens, N, STAGES)),
            (_copy, (tiles, ring, place, STAGES, OVERLAP)),
        ],
        [1],
        [COPYING_REGISTERS],
    )


@cache
def _layout(rows: int, dtype: torch.dtype) -> Any:
    """Of a tile [rows, BLOCK_K] in shared memory, as matrix instructions read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, BLOCK_K], DTYPES[dtype])


def _tiles(matrix: torch.Tensor, rows: int) -> Any:
    """A tensor descriptor of tiles [rows, BLOCK_K]."""
    layout = _layout(rows, matrix.dtype)
    return TensorDescriptor(
        matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, BLOCK_K], layout
    )


def wide_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_parts: int
) -> LinearOutput:
    """x [T, K], weight [N, K], bias [N] -> [T, N], with K in so many parts or fewer.

    T <= BLOCK_T, N is a multiple of 8 and K of BLOCK_K. bfloat16 or float16, all contiguous.
    """
    num_tokens, k = x.shape
    n = weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous() and num_tokens <= BLOCK_T
    assert k % BLOCK_K == 0 and n % 8 == 0
    num_blocks = k // BLOCK_K
    blocks_per_part = triton.cdiv(num_blocks, num_parts)
    num_parts = triton.cdiv(num_blocks, blocks_per_part)
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    _wide_linear_kernel[(triton.cdiv(n, ROWS), num_parts)](
        out,
        _tiles(x, BLOCK_T),
        _tiles(weight, ROWS),
        bias,
        num_tokens,
        num_blocks,
        blocks_per_part,
        N=n,
        STAGES=min(MAX_STAGES, blocks_per_part),
        COPYING_REGISTERS=COPYING_REGISTERS,
        num_warps=4,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, x.dtype)
