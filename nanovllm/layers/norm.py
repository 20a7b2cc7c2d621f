"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467), with and without a residual."""

import torch
from torch import nn

from nanovllm.kernels.ops import Product
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import new_parameter, whole


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, context: ModelContext) -> None:
        super().__init__()
        self.ops = context.ops
        self.tp = context.tp
        self.eps = eps
        self.weight = new_parameter((size,), whole((size,)), context.dtype, context.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, size] -> [T, size]."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Product, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(sum), sum), sum = residual + all ranks' x; the residual's memory may be reused."""
        return self.tp.add_rms_norm(self.ops, x, residual, self.weight, self.eps)
