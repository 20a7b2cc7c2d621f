"""Products with fp8 weights on Hopper: activations are quantised, fp8 tensor cores multiply.

Each row of x, or each group of 128 elements of it where the weight's scales are those of blocks,
gets the scale of its own largest magnitude.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nanovllm.kernels.triton.launch import (
    await_previous,
    is_hopper,
    jit,
    num_multiprocessors,
    overlap_options,
    release_next,
)
from nanovllm.kernels.triton.linear import choose_for_few
from nanovllm.kernels.triton.tiled_linear import LinearTile, tiled_linear
from nanovllm.kernels.triton.wide_linear import WideTile, wide_linear
from nanovllm.kernels.types import FP8_BLOCK, FP8_DTYPE, FP8_MAX, FP8_MIN_AMAX, LinearOutput

# `wide_linear` multiplies few tokens. With more than these and scales of rows, it costs more to add
# up the parts of a split K than to leave some multiprocessors with one program instead of two.
MAX_TOKENS_OF_MANY_PARTS = 16
# More tokens: rows of the weight, at most -> tokens, at most -> tile; see bench_fp8_linear.py. For
# others torch's product wins.
TILES = {
    4096: {
        128: LinearTile(128, 64, 128, 4, 8, 1),
        192: LinearTile(64, 128, 128, 4, 8, 1),
        256: LinearTile(128, 128, 128, 4, 6, 1),
    },
    16384: {128: LinearTile(128, 64, 128, 4, 8, 1)},
}
# Where the scales are those of blocks; there block_k is one.
TILES_OF_BLOCKS = {
    4096: {128: LinearTile(128, 64, 128, 8, 6, 1), 256: LinearTile(128, 128, 128, 8, 4, 1)}
}
MIN_RAGGED_TOKENS = 512  # below, torch's product of a multiple of 128 tokens is faster
TORCH_MULTIPLE = 16  # of tokens, so that a column of scales is a multiple of 16 bytes
# For more tokens with blocks that torch does not multiply.
RAGGED_TILE = LinearTile(128, 128, 128, 8, 4, 1)


@jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    values,  # fp8 [num_rows, K]
    scales,  # float32 [ceil(K / GROUP), num_rows]
    x,  # [T, K]
    num_rows,
    K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,  # a power of 2 that covers the groups of a row
    GROUP: tl.constexpr,
    FP8_MAX: tl.constexpr,
    FP8_MIN_AMAX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
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
    tl.store(scales + group * num_rows + token, scale, mask=group < num_groups)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> LinearOutput:
    """x [T, K], fp8 weight [N, K] with its scales, bias [N] -> [T, N]; see `Ops.fp8_linear`.

    K and N are multiples of 16, what bulk copies and torch's product ask for.
    """
    num_tokens = len(x)
    if num_tokens == 0:
        return x.new_empty(0, len(weight))
    group = FP8_BLOCK if scales.dim() == 2 else None
    if is_hopper(x.device) and (few := _choose_for_few(x, weight, by_blocks=group is not None)):
        values, x_scales = quantize_rows(x, group)
        return wide_linear(
            values, weight, bias, few, x_scales=x_scales, scales=scales, dtype=x.dtype
        )
    if tile := choose_tile(num_tokens, weight, scales):
        values, x_scales = quantize_rows(x, group, multiple=tile.block_m)
        return tiled_linear(values, weight, bias, tile, x.dtype, num_tokens, x_scales, scales)
    multiple = 128 if num_tokens < MIN_RAGGED_TOKENS else TORCH_MULTIPLE
    values, x_scales = quantize_rows(x, group, multiple)
    return scaled_mm(values, x_scales, weight, scales, bias, x.dtype)[:num_tokens]


def _choose_for_few(x: torch.Tensor, weight: torch.Tensor, by_blocks: bool) -> WideTile | None:
    """The tile of `wide_linear` for few tokens."""
    (num_tokens, k), n = x.shape, len(weight)
    programs = 2 if by_blocks or num_tokens <= MAX_TOKENS_OF_MANY_PARTS else 1
    return choose_for_few(num_tokens, n, k, num_multiprocessors(x.device), programs)


def choose_tile(num_tokens: int, weight: torch.Tensor, scales: torch.Tensor) -> LinearTile | None:
    """The tile of `tiled_linear` for many tokens, or None if torch's product is faster."""
    n, k = weight.shape
    by_blocks = scales.dim() == 2
    table = TILES_OF_BLOCKS if by_blocks else TILES
    tiles = next((tiles for most, tiles in table.items() if n <= most), {})
    for most, tile in tiles.items():
        if num_tokens <= most:
            return tile
    if by_blocks:  # torch asks for whole blocks, and 16 bytes of scales
        return RAGGED_TILE if n % FP8_BLOCK or k % (4 * FP8_BLOCK) else None
    return None


def quantize_rows(
    x: torch.Tensor, group: int | None = None, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> (FP8_DTYPE [M, K], scales float32 [M, ceil(K / group)], without group [M, 1]).

    x is about values * scales; a scale is the largest magnitude of its elements / FP8_MAX, or 1
    where they are all below FP8_MIN_AMAX. The columns of scales are contiguous. M is T rounded up
    to a `multiple`; rows past T hold anything.
    """
    num_tokens, k = x.shape
    assert x.is_contiguous()
    width = group or triton.next_power_of_2(k)
    num_groups = triton.cdiv(k, width)
    num_rows = triton.cdiv(num_tokens, multiple) * multiple
    values = torch.empty(num_rows, k, dtype=FP8_DTYPE, device=x.device)
    scales = torch.empty(num_groups, num_rows, dtype=torch.float32, device=x.device)
    if num_tokens:
        _quantize_kernel[(num_tokens,)](
            values,
            scales,
            x,
            num_rows,
            K=k,
            NUM_GROUPS=triton.next_power_of_2(num_groups),
            GROUP=width,
            FP8_MAX=FP8_MAX,
            FP8_MIN_AMAX=FP8_MIN_AMAX,
            num_warps=8 if k > 4096 else 4,
            **overlap_options(x.device),
        )
    return values, scales.t() if group else scales.view(num_rows, 1)


def scaled_mm(
    values: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """torch's product in `dtype` of what `quantize_rows` gave, in groups for scales of blocks.

    These must be whole blocks.
    """
    if scales.dim() == 1:
        out = torch._scaled_mm(
            values,
            weight.t(),
            scale_a=x_scales,
            scale_b=scales.unsqueeze(0),
            out_dtype=torch.bfloat16,  # the only one that it offers
            use_fast_accum=True,
        )
    else:
        out = F.scaled_mm(
            values,
            weight.t(),
            x_scales,
            F.ScalingType.BlockWise1x128,
            scales.t(),
            F.ScalingType.BlockWise128x128,
        )
    if bias is not None:
        out += bias
    return out.to(dtype)
