"""Layer normalisation (Ba et al. 2016, arXiv 1607.06450), with and without a residual."""

import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.types import Unreduced, summed
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import new_norm_weight, new_whole_parameter


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last dimension, rounded once.

    Args:
        size: of the last dimension.
        eps: is added to the variance.
        context: what the rank's layers are built with.
        bias: whether there is one.
        offset: what checkpoints leave out of the weight; their sum is of the model's dtype.
    """

    def __init__(
        self, size: int, eps: float, context: ModelContext, bias: bool, offset: float | None = None
    ) -> None:
        super().__init__()
        self.tp, self.eps = context.tp, eps
        self.weight = new_norm_weight(size, context, offset, context.dtype)
        self.bias = new_whole_parameter((size,), context) if bias else None

    def forward(self, x: Tensor | Unreduced) -> Tensor:
        """x [T, size], or all ranks' terms of it -> [T, size]."""
        whole = x if isinstance(x, Tensor) else summed(self.tp.sum_over_ranks(x))
        return F.layer_norm(whole, (len(self.weight),), self.weight, self.bias, self.eps)

    def add(self, x: Tensor | Unreduced, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum), sum = residual + x, or all ranks' terms of it."""
        whole = x if isinstance(x, Tensor) else summed(self.tp.sum_over_ranks(x))
        total = residual + whole
        return self(total), total
