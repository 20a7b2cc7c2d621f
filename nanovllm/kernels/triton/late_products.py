"""Products and norms that wait for the operation that reads them, for a few tokens on Hopper.

O and down are left to the norm behind them (`Product`). It adds them to the residual, and is itself
left to the products that read it (`Normed`). So `narrow_linear` computes a layer's products, norms,
sums with the residual and SiLU in four kernels.
"""

from typing import cast

import torch

from nanovllm.kernels.triton import activation, norm, rope
from nanovllm.kernels.triton import linear as plain_linear
from nanovllm.kernels.triton.launch import is_hopper, num_multiprocessors
from nanovllm.kernels.triton.narrow_linear import (
    CHUNK,
    GATED_ROWS,
    PIECE,
    QKV_ROWS,
    RESIDUAL_ROWS,
    Way,
    add_linear,
    normed_linear,
)
from nanovllm.kernels.types import KVCache, LateOutput, LinearOutput, Normed, Product

MAX_TOKENS = 16  # 0: off, for an ablation
# Of K; weights [N, K] are left to other kernels if N is more than one program's rows for each
# multiprocessor. Qwen3-0.6B's are not; others have not been measured.
MAX_NORMED_COLUMNS, MAX_ADDED_COLUMNS = 1024, 3072
# Up to 8 tokens three programs of these have a multiprocessor at a time.
QKV_WAY, GATED_WAY = Way(True, 8, 0, 80), Way(True, 8, 1, 96)
ADDING_WAY = Way(True, 8)  # with 80 registers as well
WAY_OF_MORE = Way(True, 8)  # of more than 8 tokens


def _fits(x: torch.Tensor, weight: torch.Tensor, rows: int, max_columns: int) -> bool:
    (num_tokens, k), n = x.shape, weight.shape[0]
    return (
        0 < num_tokens <= MAX_TOKENS
        and is_hopper(x.device)
        and weight.dtype in (torch.bfloat16, torch.float16)
        and k % (PIECE * CHUNK) == 0
        and k <= max_columns
        and n % rows == 0
        and n // rows <= num_multiprocessors(x.device)
    )


def leaves_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `add_rms_norm` should get x [T, K] weight^T [T, N] as a `Product`."""
    return _fits(x, weight, RESIDUAL_ROWS, MAX_ADDED_COLUMNS) and x.is_contiguous()


def _narrow(
    x: Normed, weight: torch.Tensor, is_gated: bool, rows: int, way: Way
) -> torch.Tensor | None:
    """The product by `normed_linear`; None: it is not for that."""
    if not _fits(x.x, weight, rows, MAX_NORMED_COLUMNS) or x.weight.dtype != x.x.dtype:
        return None
    way = way if len(x.x) <= 8 else WAY_OF_MORE
    return normed_linear(x.x, x.weight, x.eps, weight, is_gated, way)


def add_rms_norm(
    x: LateOutput, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Ops.add_rms_norm`; of a product the norm is a `Normed`."""
    if not isinstance(x, Product):
        return norm.add_rms_norm(x, residual, weight, eps)
    add_linear(x.x, x.weight, residual, ADDING_WAY if len(x.x) <= 8 else WAY_OF_MORE)
    # Who leaves a product has said that the norm is read by what takes a `Normed`.
    return cast(torch.Tensor, Normed(residual, weight, eps)), residual


def linear(
    x: torch.Tensor | Normed, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> LinearOutput:
    """See `Ops.linear`."""
    if isinstance(x, Normed):
        if bias is None and (out := _narrow(x, weight, False, QKV_ROWS, QKV_WAY)) is not None:
            return out
        x = norm.rms_norm(*x)
    return plain_linear.linear(x, weight, bias)


def gated_linear(x: torch.Tensor | Normed, weight: torch.Tensor) -> torch.Tensor:
    """See `Ops.gated_linear`."""
    if isinstance(x, Normed):
        out = _narrow(x, weight, True, GATED_ROWS, GATED_WAY)
        if out is not None:
            return out
        x = norm.rms_norm(*x)
    return activation.gated_linear(x, weight)


def heads_linear(
    qkv: Product,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See `Ops.heads_linear`."""
    rest = q_norm_weight, k_norm_weight, eps, cos_sin, positions, cache, slot_mapping
    if isinstance(qkv.x, Normed):
        return rope.qk_norm_rope_store(linear(*qkv), *rest)
    return rope.heads_linear(qkv, *rest)
