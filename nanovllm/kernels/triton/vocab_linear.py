"""Logits of few tokens for Hopper, in Gluon: programs that stay and stream the vocabulary's rows.

The hidden states of all tokens stay in a program's shared memory. One warp copies tiles of the
weight, by bulk tensor copies, into a ring: the first ones before the wait for the kernel ahead. A
warpgroup multiplies them. So the copies go on from a program's first tile to its last one, and
neither a tile's sums on their way out nor the launch of a program interrupts them.

Every stage of the ring has two barriers: "full" when its bytes are there, "free" when the warpgroup
is done with them; see kernels/triton/hopper_prefill.py.
"""

from functools import cache
from typing import Any

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

from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import (
    cdiv,
    next_power_of_2,
    num_multiprocessors,
    overlap_options,
    with_dry_runs,
)

ROWS = 64  # of the weight, for a tile: those of a matrix instruction
BLOCK_K = 64  # columns of a stage
MAX_TOKENS = 32
MAX_COLUMNS = 1024  # for which x of MAX_TOKENS takes 64 KiB of shared memory
NUM_STAGES = 16  # 128 KiB
COPYING_REGISTERS = 24  # of a thread


@gluon.jit
def _copy(tiles, ring, xs, x_arrived, num_tiles, STAGES: gl.constexpr, OVERLAP: gl.constexpr):
    """The copying warp."""
    x_tiles, weight_tiles = tiles
    weights, full, free = ring
    NUM_BLOCKS: gl.constexpr = xs.shape[0]
    ROWS: gl.constexpr = weights.shape[1]
    BLOCK_K: gl.constexpr = weights.shape[2]
    first_tile = gl.program_id(0)
    step = gl.num_programs(0)
    num_copies = gl.cdiv(num_tiles - first_tile, step) * NUM_BLOCKS
    # No kernel writes weights: they come before the wait.
    for i in range(gl.minimum(num_copies, STAGES)):
        row = (first_tile + i // NUM_BLOCKS * step) * ROWS
        mbarrier.expect(full.index(i), weight_tiles.block_type.nbytes)
        start_copy(weight_tiles, [row, i % NUM_BLOCKS * BLOCK_K], full.index(i), weights.index(i))
    if OVERLAP:
        gdc_wait()
    mbarrier.expect(x_arrived, NUM_BLOCKS * x_tiles.block_type.nbytes)
    for block in gl.static_range(NUM_BLOCKS):
        start_copy(x_tiles, [0, block * BLOCK_K], x_arrived, xs.index(block))
    for i in range(STAGES, num_copies):
        stage = i % STAGES
        row = (first_tile + i // NUM_BLOCKS * step) * ROWS
        mbarrier.wait(free.index(stage), (i // STAGES + 1) & 1)
        place = weights.index(stage)
        mbarrier.expect(full.index(stage), weight_tiles.block_type.nbytes)
        start_copy(weight_tiles, [row, i % NUM_BLOCKS * BLOCK_K], full.index(stage), place)


@gluon.jit
def _compute(
    out,
    ring,
    xs,
    x_arrived,
    num_tiles,
    num_tokens,
    N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The computing warpgroup."""
    weights, full, free = ring
    NUM_BLOCKS: gl.constexpr = xs.shape[0]
    BLOCK_T: gl.constexpr = xs.shape[1]
    ROWS: gl.constexpr = weights.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 16])
    LANES: gl.constexpr = ROWS // 8
    out_layout: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
    dtype: gl.constexpr = out.dtype.element_ty
    token = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, out_layout))
    mbarrier.wait(x_arrived, 0)
    i = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        acc = gl.zeros([ROWS, BLOCK_T], gl.float32, layout)
        for block in gl.static_range(NUM_BLOCKS):
            stage = (i + block) % STAGES
            mbarrier.wait(full.index(stage), ((i + block) // STAGES) & 1)
            x = xs.index(block).permute((1, 0))
            acc = warpgroup_mma(weights.index(stage), x, acc, is_async=True)
            if block > 0:
                acc = warpgroup_mma_wait(1, [acc])
                mbarrier.arrive(free.index((i + block - 1) % STAGES))
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((i + NUM_BLOCKS - 1) % STAGES))
        i += NUM_BLOCKS
        values = gl.convert_layout(acc.to(dtype), out_layout)
        row = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
        pointers = out + token.to(gl.int64)[None, :] * N + row[:, None]
        gl.store(pointers, values, mask=(row < N)[:, None] & (token < num_tokens)[None, :])


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _vocab_linear_kernel(
    out,  # [T, N]
    x_tiles,  # x [T, K], tensor descriptor of [BLOCK_T, BLOCK_K]; rows past T read as zeros
    weight_tiles,  # weight [N, K], of [ROWS, BLOCK_K]; rows past N read as zeros
    num_tokens,
    num_tiles,
    N: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,  # of BLOCK_K columns
    STAGES: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    dtype: gl.constexpr = x_tiles.dtype
    BLOCK_T: gl.constexpr = x_tiles.block_shape[0]
    ROWS: gl.constexpr = weight_tiles.block_shape[0]
    BLOCK_K: gl.constexpr = x_tiles.block_shape[1]
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    weights = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], weight_tiles.layout)
    xs = gl.allocate_shared_memory(dtype, [NUM_BLOCKS, BLOCK_T, BLOCK_K], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    x_arrived = gl.allocate_shared_memory(gl.int64, [1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    mbarrier.init(x_arrived, count=1)
    ring = (weights, full, free)
    tiles = (x_tiles, weight_tiles)
    gl.warp_specialize(
        [
            (_compute, (out, ring, xs, x_arrived, num_tiles, num_tokens, N, STAGES)),
            (_copy, (tiles, ring, xs, x_arrived, num_tiles, STAGES, OVERLAP)),
        ],
        [1],
        [COPYING_REGISTERS],
    )


@cache
def _layout() -> Any:
    """Of a tile of BLOCK_K columns in shared memory, as matrix instructions read it."""
    return gl.NVMMASharedLayout(2 * BLOCK_K, 16, 2)


def vocab_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, num_stages: int = NUM_STAGES
) -> torch.Tensor:
    """x [T, K], weight [N, K] -> out [T, N]; see `Ops.vocab_linear`.

    T <= MAX_TOKENS, K a multiple of BLOCK_K up to MAX_COLUMNS, N of 8. bfloat16 or float16, all
    contiguous.
    """
    (num_tokens, k), n = x.shape, weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    assert num_tokens <= MAX_TOKENS and k % BLOCK_K == 0 and k <= MAX_COLUMNS and n % 8 == 0
    block_t = max(8, next_power_of_2(num_tokens))
    num_tiles = cdiv(n, ROWS)
    _vocab_linear_kernel[(min(num_tiles, num_multiprocessors(x.device)),)](
        out,
        TensorDescriptor(x, [num_tokens, k], [k, 1], [block_t, BLOCK_K], _layout()),
        TensorDescriptor(weight, [n, k], [k, 1], [ROWS, BLOCK_K], _layout()),
        num_tokens,
        num_tiles,
        N=n,
        NUM_BLOCKS=k // BLOCK_K,
        STAGES=num_stages,
        COPYING_REGISTERS=COPYING_REGISTERS,
        num_warps=4,
        **overlap_options(x.device),
    )
    return out
