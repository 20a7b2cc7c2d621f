"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467), with and without a residual."""

from torch import Tensor, nn

from nanovllm.kernels.types import Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import new_whole_parameter


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, context: ModelContext) -> None:
        super().__init__()
        self.ops, self.tp, self.eps = context.ops, context.tp, eps
        self.weight = new_whole_parameter((size,), context)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> [T, size]."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Unreduced, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum), sum = residual + all ranks' x. The residual's memory may be reused."""
        return self.tp.add_rms_norm(self.ops, x, residual, self.weight, self.eps)
