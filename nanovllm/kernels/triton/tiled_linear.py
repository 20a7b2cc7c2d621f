"""A product with a weight matrix in tiles, as a Triton kernel for Hopper: bf16, float16 or fp8.

Few tokens are bound by the weights' bandwidth, 128 by what the multiprocessors can fetch: a program
loops over tiles of x and of the weight, which bulk copies fetch ahead. Where K is split, the parts
are left unsummed, as those of kernels/triton/linear.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.triton.launch import await_previous, jit, num_multiprocessors, overlap_options
from nanovllm.kernels.types import FP8_BLOCK, LinearOutput, PartialSums

GROUP_M = 16  # tiles of x that are multiplied side by side with the same weights
MIN_COLUMNS_PER_PART = 512  # of a split K


class LinearTile(NamedTuple):
    """How a product is cut up: block_m tokens, block_n rows and block_k columns of the weight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that a split of K aims at where there would be fewer


@jit(do_not_specialize=["num_tokens", "blocks_per_part", "stride_x_scales"])
def _tiled_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x_tiles,  # x [M, K] as tiles of [BLOCK_M, BLOCK_K]; what is past M or K reads as zeros
    x_scales,  # of fp8 x: float32 [M], or [num_blocks, M], else None
    weight_tiles,  # weight [N, K] as tiles of [BLOCK_N, BLOCK_K]; likewise
    scales,  # of fp8 weights: float32 [N], or [ceil(N / FP8_BLOCK), num_blocks], else None
    bias,  # [N] or None
    num_tokens,
    blocks_per_part,  # blocks of BLOCK_K columns that a program multiplies
    N,
    num_blocks,  # of BLOCK_K columns
    stride_x_scales,
    BY_BLOCKS: tl.constexpr,  # whether the scales are those of blocks; BLOCK_K is then FP8_BLOCK
    FP8_BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    # Programs that run at the same time share tiles of x and of weights, in the L2 cache.
    num_rows_of_tiles = tl.cdiv(num_tokens, BLOCK_M)
    tiles_per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_in_group = tl.program_id(0) // tiles_per_group * GROUP_M
    rows_in_group = tl.minimum(num_rows_of_tiles - first_in_group, GROUP_M)
    index = tl.program_id(0) % tiles_per_group
    first_token = (first_in_group + index % rows_in_group) * BLOCK_M
    first_row = index // rows_in_group * BLOCK_N
    part = tl.program_id(1)

    # Few tokens: the weight's rows are those of the matrix instruction, which has at least 64.
    SWAPPED: tl.constexpr = BLOCK_M < 128
    token = first_token + tl.arange(0, BLOCK_M)
    row = first_row + tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_row = row < N
    product = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
    begin = part * blocks_per_part
    for block in range(begin, tl.minimum(begin + blocks_per_part, num_blocks)):
        x = x_tiles.load([first_token, block * BLOCK_K])
        weight = weight_tiles.load([first_row, block * BLOCK_K])
        if BY_BLOCKS:
            weight_scale = tl.load(scales + first_row // FP8_BLOCK * num_blocks + block)
            token_scales = tl.load(
                x_scales + block * stride_x_scales + token, mask=is_token, other=0.0
            )
            factors = along_tokens(token_scales * weight_scale, SWAPPED)
            zeros = tl.zeros_like(product)
            product += multiply_add(x, weight, zeros, SWAPPED) * factors
        else:
            product = multiply_add(x, weight, product, SWAPPED)
    if scales is not None and not BY_BLOCKS:
        token_scales = tl.load(x_scales + token, mask=is_token, other=0.0)
        row_scales = tl.load(scales + row, mask=is_row, other=0.0)
        product *= along_tokens(token_scales, SWAPPED) * along_tokens(row_scales, not SWAPPED)
    if bias is not None:
        bias_values = tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
        product += along_tokens(tl.where(part == 0, bias_values, 0.0), not SWAPPED)
    out_row = along_tokens((part * num_tokens + token).to(tl.int64) * N, SWAPPED)
    mask = along_tokens(is_token, SWAPPED) & along_tokens(is_row, not SWAPPED)
    pointers = out + out_row + along_tokens(row, not SWAPPED)
    tl.store(pointers, product.to(out.dtype.element_ty), mask=mask)


@jit
def multiply_add(x, weight, product, SWAPPED: tl.constexpr):
    """product + x @ weight.T, transposed if SWAPPED."""
    if SWAPPED:
        product = tl.dot(weight, x.T, product, input_precision="ieee")
    else:
        product = tl.dot(x, weight.T, product, input_precision="ieee")
    return product


@jit
def along_tokens(values, SWAPPED: tl.constexpr):
    """A value for each token, to go with products of SWAPPED or not; of rows with `not SWAPPED`."""
    return values[None, :] if SWAPPED else values[:, None]


def tiled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile: LinearTile,
    dtype: torch.dtype,
    num_tokens: int,
    x_scales: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> LinearOutput:
    """x [M, K], weight [N, K], bias [N] -> [T, N] in `dtype`, T = num_tokens <= M.

    Rows of x and weight are a multiple of 16 bytes. If they are fp8, with x_scales [M, 1] or, of
    blocks, [M, ceil(K / FP8_BLOCK)], its columns contiguous, and scales as in `Ops.fp8_linear`.
    """
    n, k = weight.shape
    by_blocks = scales is not None and scales.dim() == 2
    assert x.is_contiguous() and weight.is_contiguous()
    assert not by_blocks or tile.block_k == FP8_BLOCK
    num_tiles = triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(n, tile.block_n)
    num_blocks = triton.cdiv(k, tile.block_k)
    num_programs = tile.programs_per_sm * num_multiprocessors(x.device)
    num_parts = max(1, min(k // MIN_COLUMNS_PER_PART, round(num_programs / num_tiles)))
    blocks_per_part = triton.cdiv(num_blocks, num_parts)
    num_parts = triton.cdiv(num_blocks, blocks_per_part)
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    _tiled_linear_kernel[(num_tiles, num_parts)](
        out,
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
        x_scales,
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        scales,
        bias,
        num_tokens,
        blocks_per_part,
        n,
        num_blocks,
        x_scales.stride(1) if x_scales is not None else 0,
        BY_BLOCKS=by_blocks,
        FP8_BLOCK=FP8_BLOCK,
        GROUP_M=GROUP_M,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, dtype)
