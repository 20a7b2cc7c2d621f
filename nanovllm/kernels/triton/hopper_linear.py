"""Products of few tokens with small weights for Hopper, in Gluon: `split_linear` with less latency.

A program multiplies one tile of weights. It starts their copies to shared memory, waits for the
kernel ahead, reads x, and multiplies chunk after chunk as the weights come: neither waits for the
other.

The parts of a split K are left unsummed, for the kernel that reads them. If IS_GATED, a program has
all of K instead, and of gate and of up the same rows. It adds the parts up in their order and
rounds as `silu_and_mul` does, so it gives the bits that this kernel gives behind the product.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import cdiv, overlap_options, with_dry_runs
from nanovllm.kernels.triton.weight_tiles import COLUMNS, RUN, silu_of_runs, weight_tiles
from nanovllm.kernels.types import LinearOutput, PartialSums

BLOCK_N = 64  # weight rows of a program: the rows of Hopper's smallest matrix instruction
BLOCK_K = 512  # weight columns of a part: with BLOCK_N 64 KiB, so two programs share an SM
CHUNK = COLUMNS  # of a copy
CHUNKS_PER_BARRIER = 4
NUM_WARPS = 4
# With 1,024 columns 128 KiB of shared memory for the weights and 64 KiB for x.
MAX_GATED_TOKENS, MAX_GATED_COLUMNS = 32, 1024


@gluon.jit
def _multiply(weights, x, arrived, acc, PART: gl.constexpr, CHUNKS: gl.constexpr):
    """acc + the product of a part, which goes on meanwhile."""
    NUM_CHUNKS: gl.constexpr = weights.shape[0]
    CHUNKS_PER_BARRIER: gl.constexpr = NUM_CHUNKS // arrived.shape[0]
    BLOCK_M: gl.constexpr = x.shape[0] // NUM_CHUNKS
    for i in gl.static_range(PART * CHUNKS, (PART + 1) * CHUNKS):
        if i % CHUNKS_PER_BARRIER == 0:
            mbarrier.wait(arrived.index(i // CHUNKS_PER_BARRIER), 0)
        x_chunk = x.slice(i * BLOCK_M, BLOCK_M).permute((1, 0))
        acc = warpgroup_mma(weights.index(i), x_chunk, acc, is_async=True)
    return acc


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens"])
def _hopper_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]; IS_GATED: [T, N / 2]
    x,  # [T, K]
    weight_tiles,  # weight [N, K] in tiles of CHUNK columns, see weight_tiles.py
    bias,  # [N] or None
    num_tokens,
    N: gl.constexpr,
    K: gl.constexpr,
    IS_GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    RUN: gl.constexpr,
    CHUNK: gl.constexpr,
    CHUNKS_PER_BARRIER: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: gl.constexpr = weight_tiles.dtype
    NUM_COLUMNS: gl.constexpr = K if IS_GATED else BLOCK_K
    NUM_CHUNKS: gl.constexpr = NUM_COLUMNS // CHUNK
    swizzled: gl.constexpr = gl.NVMMASharedLayout(2 * CHUNK, 16, 2)
    tile = gl.program_id(0)
    part = gl.program_id(1)
    first_column = part * NUM_COLUMNS

    # No kernel writes weights: they come before the wait.
    weights = gl.allocate_shared_memory(dtype, [NUM_CHUNKS, BLOCK_N, CHUNK], swizzled)
    arrived = gl.allocate_shared_memory(
        gl.int64, [NUM_CHUNKS // CHUNKS_PER_BARRIER, 1], mbarrier.MBarrierLayout()
    )
    for i in gl.static_range(NUM_CHUNKS // CHUNKS_PER_BARRIER):
        mbarrier.init(arrived.index(i), count=1)
    for i in gl.static_range(NUM_CHUNKS):
        barrier = arrived.index(i // CHUNKS_PER_BARRIER)
        if i % CHUNKS_PER_BARRIER == 0:
            mbarrier.expect(barrier, CHUNKS_PER_BARRIER * weight_tiles.block_type.nbytes)
        place = weights.index(i)
        column = first_column + i * CHUNK
        if IS_GATED:
            runs = place.reshape(weight_tiles.block_shape)
            start_copy(weight_tiles, [tile * (BLOCK_N // RUN // 2), 0, 0, column], barrier, runs)
        else:
            start_copy(weight_tiles, [tile * BLOCK_N, column], barrier, place)

    # The weights' rows are the rows of the matrix instruction, which has at least 64 of them.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    product = zeros
    if bias is not None:
        row = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
        bias_values = gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
        product += gl.where(part == 0, bias_values, 0.0)[:, None]

    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, x_layout))
    column = first_column + gl.arange(0, NUM_COLUMNS, layout=gl.SliceLayout(0, x_layout))
    x_pointers = x + token[:, None] * K + column[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    x_values = gl.load(x_pointers, mask=(token < num_tokens)[:, None], other=0.0)
    x_values = x_values.reshape([BLOCK_M, NUM_CHUNKS, CHUNK]).permute(1, 0, 2)
    x_chunks = gl.allocate_shared_memory(dtype, [NUM_CHUNKS * BLOCK_M, CHUNK], swizzled)
    x_chunks.store(x_values.reshape([NUM_CHUNKS * BLOCK_M, CHUNK]))
    fence_async_shared()

    CHUNKS: gl.constexpr = BLOCK_K // CHUNK  # of a part
    product = _multiply(weights, x_chunks, arrived, product, 0, CHUNKS)
    if NUM_CHUNKS > CHUNKS:
        second = _multiply(weights, x_chunks, arrived, zeros, 1, CHUNKS)
        product, second = warpgroup_mma_wait(0, [product, second])
        product += second
    else:
        product = warpgroup_mma_wait(0, [product])
    if IS_GATED:
        act = silu_of_runs(product, RUN, dtype)
        out_layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
        _store(out, act, tile, num_tokens, N // 2, out_layout)
    else:
        _store(out + part * num_tokens * N, product, tile, num_tokens, N, layout)


@gluon.jit
def _store(out, values, tile, num_tokens, N: gl.constexpr, layout: gl.constexpr):
    """Values [rows of a tile, BLOCK_M] of a product, transposed, to out [T, N]."""
    values = gl.convert_layout(values.to(out.dtype.element_ty), layout)
    NUM_ROWS: gl.constexpr = values.shape[0]
    row = tile * NUM_ROWS + gl.arange(0, NUM_ROWS, layout=gl.SliceLayout(1, layout))
    BLOCK_M: gl.constexpr = values.shape[1]
    token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    mask = (row < N)[:, None] & (token < num_tokens)[None, :]
    gl.store(out + token[None, :] * N + row[:, None], values, mask=mask)


def hopper_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block_m: int
) -> LinearOutput:
    """x [T, K], weight [N, K], bias [N] -> [T, N], in parts if K > BLOCK_K.

    T <= block_m, a power of two from 8 to 128; K is a multiple of BLOCK_K. The bits are those of
    `split_linear`.
    """
    (num_tokens, k), n = x.shape, weight.shape[0]
    num_parts = k // BLOCK_K
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    _launch(out, x, weight, bias, block_m, num_parts, is_gated=False)
    return out if num_parts == 1 else PartialSums(out, x.dtype)


def takes_gated(num_tokens: int, n: int, k: int) -> bool:
    """Whether `hopper_gated_linear` computes x [num_tokens, k] and weight [n, k]."""
    is_whole = k % BLOCK_K == 0 and n % (2 * RUN) == 0
    return is_whole and num_tokens <= MAX_GATED_TOKENS and k <= MAX_GATED_COLUMNS


def hopper_gated_linear(x: torch.Tensor, weight: torch.Tensor, block_m: int) -> torch.Tensor:
    """`Ops.gated_linear` for what `takes_gated` allows; block_m as of `hopper_linear`."""
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    _launch(out, x, weight, None, block_m, 1, is_gated=True)
    return out


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    block_m: int,
    num_parts: int,
    is_gated: bool,
) -> None:
    (num_tokens, k), n = x.shape, weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous()
    assert num_tokens <= block_m and k % BLOCK_K == 0
    _hopper_linear_kernel[(cdiv(n, BLOCK_N), num_parts)](
        out,
        x,
        weight_tiles(weight, BLOCK_N, is_gated),
        bias,
        num_tokens,
        N=n,
        K=k,
        IS_GATED=is_gated,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        RUN=RUN,
        CHUNK=CHUNK,
        CHUNKS_PER_BARRIER=CHUNKS_PER_BARRIER,
        num_warps=NUM_WARPS,
        **overlap_options(x.device),
    )
