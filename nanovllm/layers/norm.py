"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467), with and without a residual."""

from torch import Tensor, nn

from nanovllm.kernels.types import Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import new_norm_weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension.

    offset: what checkpoints leave out of the weight (Gemma's are the weight less 1), which is
        float32 then; None: the weight is of the model's dtype.
    """

    def __init__(
        self, size: int, eps: float, context: ModelContext, offset: float | None = None
    ) -> None:
        super().__init__()
        self.ops, self.tp, self.eps = context.ops, context.tp, eps
        self.weight = new_norm_weight(size, context, offset)

    def forward(self, x: Tensor | Unreduced) -> Tensor:
        """x [T, size], or all ranks' terms of it -> [T, size]."""
        whole = x if isinstance(x, Tensor) else self.tp.sum_over_ranks(x)
        return self.ops.rms_norm(whole, self.weight, self.eps)

    def add(self, x: Tensor | Unreduced, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum), sum = residual + x, or all ranks' terms of it.

        The residual's memory may be reused.
        """
        if isinstance(x, Tensor):
            return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
        return self.tp.add_rms_norm(self.ops, x, residual, self.weight, self.eps)
