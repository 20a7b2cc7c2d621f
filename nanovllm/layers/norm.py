"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467), with and without a residual."""

from torch import Tensor

from nanovllm.kernels.types import Unreduced
from nanovllm.layers.context import Layer, ModelContext
from nanovllm.layers.weights import new_parameter, whole


class RMSNorm(Layer[[Tensor], Tensor]):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, context: ModelContext) -> None:
        super().__init__()
        self.ops = context.ops
        self.tp = context.tp
        self.eps = eps
        self.weight = new_parameter((size,), whole((size,)), context.dtype, context.device)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> [T, size]."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Unreduced, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum), sum = residual + all ranks' x. The residual's memory may be reused."""
        return self.tp.add_rms_norm(self.ops, x, residual, self.weight, self.eps)
