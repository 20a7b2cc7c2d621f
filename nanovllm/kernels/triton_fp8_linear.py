"""Products with fp8 weights, as Triton kernels for Hopper.

Few tokens: activations keep their dtype and a program multiplies one tile of weights, converted in
registers, as triton_linear.py does. More: activations are quantised, each row or each group of 128
elements of it to its own largest magnitude, and fp8 tensor cores multiply.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.ops import (
    FP8_BLOCK,
    FP8_DTYPE,
    FP8_MAX,
    FP8_MIN_AMAX,
    PartialSums,
    Product,
)
from nanovllm.kernels.triton_launch import (
    await_previous,
    num_multiprocessors,
    overlap_options,
    release_next,
)

MAX_SPLIT_TOKENS = 32  # the most for which activations keep their dtype
# Weights of a program, rows and columns, few enough for registers: with scales of rows, of blocks.
SPLIT_TILES = (64, 512), (64, 256)
SPLIT_WARPS = 4

BLOCK_N = 128  # weight rows of a tile of the fp8 product; within one block of scales
STAGES = 4
GROUP_M = 16  # tiles of x that are multiplied side by side with the same weights
MIN_BLOCKS_PER_PART = 4  # of FP8_BLOCK columns: what a part of a split K multiplies at least
# Tokens from which torch's product takes over from ours, where there is a scale for each row.
MIN_SCALED_MM_TOKENS = 512


@triton.jit(do_not_specialize=["num_tokens"])
def _split_fp8_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x_tiles,  # x [T, K] as tiles of [BLOCK_M, BLOCK_K]; what is past T or K reads as zeros
    weight_tiles,  # weight [N, K] as tiles of [BLOCK_N, BLOCK_K]; likewise
    scales,  # [N], or [ceil(N / FP8_BLOCK), num_scale_columns]
    bias,  # [N] or None
    num_tokens,
    N,
    num_scale_columns,
    BY_BLOCKS: tl.constexpr,  # whether the scales are those of blocks
    FP8_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    first_row = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    row = first_row + tl.arange(0, BLOCK_N)
    # No kernel writes weights: they come before the wait, and so do their scales.
    weight = weight_tiles.load([first_row, part * BLOCK_K])
    if BY_BLOCKS:
        # All of the tile's rows have the scales of one row of blocks.
        scale_column = part * (BLOCK_K // FP8_BLOCK) + tl.arange(0, BLOCK_K) // FP8_BLOCK
        column_scales = tl.load(
            scales + (first_row // FP8_BLOCK) * num_scale_columns + scale_column,
            mask=scale_column < num_scale_columns,
            other=0.0,
        )
        largest = tl.max(column_scales, axis=0)
    else:
        row_scales = tl.load(scales + row, mask=row < N, other=0.0)
    await_previous(OVERLAP)
    x = x_tiles.load([0, part * BLOCK_K])
    if BY_BLOCKS:
        # x takes the scales, relative to their largest: float16 would lose them in full.
        relative = column_scales / tl.where(largest > 0, largest, 1.0)
        x = (x.to(tl.float32) * relative[None, :]).to(x.dtype)
    product = tl.dot(weight.to(x.dtype), x.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    if BY_BLOCKS:
        product *= largest
    else:
        product *= row_scales[:, None]
    if bias is not None:
        bias_values = tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        product += tl.where(part == 0, bias_values, 0.0)[:, None]
    token = tl.arange(0, BLOCK_M)
    pointers = out + (part * num_tokens + token[None, :]).to(tl.int64) * N + row[:, None]
    mask = (token < num_tokens)[None, :] & (row < N)[:, None]
    tl.store(pointers, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_kernel(
    values,  # fp8 [T, K]
    scales,  # float32 [T, ceil(K / GROUP)]
    x,  # [T, K]
    K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,  # a power of 2 that covers the groups of a row
    GROUP: tl.constexpr,
    FP8_MAX: tl.constexpr,
    FP8_MIN_AMAX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NUM_GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    numbers = tl.load(x + token * K + column, mask=column < K, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(numbers), axis=1)
    is_nonzero = amax > FP8_MIN_AMAX
    inverse = tl.where(is_nonzero, FP8_MAX / amax, 1.0)
    rounded = (numbers * inverse[:, None]).to(values.dtype.element_ty)
    tl.store(values + token * K + column, rounded, mask=column < K)
    num_groups: tl.constexpr = (K + GROUP - 1) // GROUP
    scale = tl.where(is_nonzero, amax * (1 / FP8_MAX), 1.0)
    tl.store(scales + token * num_groups + group, scale, mask=group < num_groups)


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_part"])
def _fp8_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x_tiles,  # fp8 x [T, K] as tiles of [BLOCK_M, FP8_BLOCK]; what is past T or K reads as zeros
    x_scales,  # float32 [T], or [T, num_blocks]
    weight_tiles,  # weight [N, K] as tiles of [BLOCK_N, FP8_BLOCK]; likewise
    scales,  # [N], or [ceil(N / FP8_BLOCK), num_blocks]
    bias,  # [N] or None
    num_tokens,
    blocks_per_part,  # blocks of FP8_BLOCK columns that a program multiplies
    N,
    num_blocks,  # of FP8_BLOCK columns
    BY_BLOCKS: tl.constexpr,  # whether the scales are those of blocks
    FP8_BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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

    token = first_token + tl.arange(0, BLOCK_M)
    row = first_row + tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    begin = part * blocks_per_part
    for block in range(begin, tl.minimum(begin + blocks_per_part, num_blocks)):
        x = x_tiles.load([first_token, block * FP8_BLOCK])
        weight = weight_tiles.load([first_row, block * FP8_BLOCK])
        if BY_BLOCKS:
            block_scale = tl.load(scales + first_row // FP8_BLOCK * num_blocks + block)
            token_scales = tl.load(x_scales + token * num_blocks + block, mask=is_token, other=0.0)
            product += tl.dot(x, weight.T) * (token_scales * block_scale)[:, None]
        else:
            product = tl.dot(x, weight.T, product)
    if not BY_BLOCKS:
        token_scales = tl.load(x_scales + token, mask=is_token, other=0.0)
        row_scales = tl.load(scales + row, mask=row < N, other=0.0)
        product *= token_scales[:, None] * row_scales[None, :]
    if bias is not None:
        bias_values = tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        product += tl.where(part == 0, bias_values, 0.0)[None, :]
    pointers = out + (part * num_tokens + token[:, None]).to(tl.int64) * N + row[None, :]
    mask = is_token[:, None] & (row < N)[None, :]
    tl.store(pointers, product.to(out.dtype.element_ty), mask=mask)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> Product:
    """x [T, K], fp8 weight [N, K] with its scales, bias [N] -> [T, N]; see `Ops.fp8_linear`.

    K and N are multiples of 16, what bulk copies and torch's product ask for.
    """
    num_tokens = len(x)
    if num_tokens == 0:
        return x.new_empty(0, len(weight))
    if num_tokens <= MAX_SPLIT_TOKENS:
        return split_fp8_linear(x, weight, scales, bias)
    group = FP8_BLOCK if scales.dim() == 2 else None
    values, x_scales = quantize_rows(x, group)
    if scales.dim() == 1 and num_tokens >= MIN_SCALED_MM_TOKENS:
        return scaled_mm(values, x_scales, weight, scales, bias, x.dtype)
    return tiled_fp8_linear(values, x_scales, weight, scales, bias, x.dtype)


def split_fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> Product:
    """`fp8_linear` of few tokens, with x in its own dtype."""
    num_tokens, k = x.shape
    n = len(weight)
    block_n, block_k = SPLIT_TILES[scales.dim() - 1]
    assert x.is_contiguous() and weight.is_contiguous() and scales.is_contiguous()
    block_m = max(16, triton.next_power_of_2(num_tokens))
    num_parts = triton.cdiv(k, block_k)
    out = _new_out(x, num_parts, num_tokens, n, x.dtype)
    _split_fp8_linear_kernel[(triton.cdiv(n, block_n), num_parts)](
        out,
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        scales,
        bias,
        num_tokens,
        n,
        scales.shape[-1],
        BY_BLOCKS=scales.dim() == 2,
        FP8_BLOCK=FP8_BLOCK,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=SPLIT_WARPS,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, x.dtype)


def quantize_rows(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> (FP8_DTYPE [T, K], scales float32 [T, ceil(K / group)]), without group [T, 1].

    x is about values * scales; a scale is the largest magnitude of its elements / FP8_MAX, or 1
    where they are all below FP8_MIN_AMAX.
    """
    num_tokens, k = x.shape
    assert x.is_contiguous()
    width = group or triton.next_power_of_2(k)
    num_groups = triton.cdiv(k, width)
    values = torch.empty(num_tokens, k, dtype=FP8_DTYPE, device=x.device)
    scales = torch.empty(num_tokens, num_groups, dtype=torch.float32, device=x.device)
    if num_tokens:
        _quantize_kernel[(num_tokens,)](
            values,
            scales,
            x,
            K=k,
            NUM_GROUPS=triton.next_power_of_2(num_groups),
            GROUP=width,
            FP8_MAX=FP8_MAX,
            FP8_MIN_AMAX=FP8_MIN_AMAX,
            num_warps=8 if k > 4096 else 4,
            **overlap_options(x.device),
        )
    return values, scales


def tiled_fp8_linear(
    values: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Product:
    """The product in `dtype` of what `quantize_rows` gave, in groups where the scales are blocks'.

    K is split where there would be less programs than multiprocessors.
    """
    num_tokens, k = values.shape
    n = len(weight)
    block_m = 64 if num_tokens <= 64 else 128
    num_tiles = triton.cdiv(num_tokens, block_m) * triton.cdiv(n, BLOCK_N)
    num_blocks = triton.cdiv(k, FP8_BLOCK)
    most_parts = max(1, num_blocks // MIN_BLOCKS_PER_PART)
    num_parts = min(most_parts, max(1, num_multiprocessors(values.device) // num_tiles))
    blocks_per_part = triton.cdiv(num_blocks, num_parts)
    num_parts = triton.cdiv(num_blocks, blocks_per_part)
    out = _new_out(values, num_parts, num_tokens, n, dtype)
    _fp8_linear_kernel[(num_tiles, num_parts)](
        out,
        TensorDescriptor.from_tensor(values, [block_m, FP8_BLOCK]),
        x_scales,
        TensorDescriptor.from_tensor(weight, [BLOCK_N, FP8_BLOCK]),
        scales,
        bias,
        num_tokens,
        blocks_per_part,
        n,
        num_blocks,
        BY_BLOCKS=scales.dim() == 2,
        FP8_BLOCK=FP8_BLOCK,
        GROUP_M=GROUP_M,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        num_warps=4 if block_m == 64 else 8,
        num_stages=STAGES,
        **overlap_options(values.device),
    )
    return out if num_parts == 1 else PartialSums(out, dtype)


def scaled_mm(
    values: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """torch's product of quantised rows with weights that have a scale for each row, in `dtype`."""
    out = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=x_scales,
        scale_b=scales.unsqueeze(0),
        out_dtype=torch.bfloat16,  # the only one that it offers
        use_fast_accum=True,
    )
    if bias is not None:
        out += bias
    return out.to(dtype)


def _new_out(
    x: torch.Tensor, num_parts: int, num_tokens: int, n: int, dtype: torch.dtype
) -> torch.Tensor:
    if num_parts == 1:
        return torch.empty(num_tokens, n, dtype=dtype, device=x.device)
    return torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
