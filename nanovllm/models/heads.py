"""Classification heads on top of the decoder, in the place of the LM head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import new_whole_parameter
from nanovllm.models.head_config import NUM_REWARDS, HeadConfig

MAX_ROWS = 2048  # whose float32 states are in memory at once


class WholeLinear(nn.Module):
    """A linear layer that every rank holds whole, computed in float32."""

    def __init__(
        self, input_size: int, output_size: int, has_bias: bool, context: ModelContext
    ) -> None:
        super().__init__()
        self.weight = new_whole_parameter((output_size, input_size), context)
        self.bias = new_whole_parameter((output_size,), context) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [N, input_size] -> [N, output_size]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x, self.weight.float(), bias)


def new_head(config: HeadConfig, hidden_size: int, context: ModelContext) -> nn.Module:
    """The module `score` of a model: float32 hidden states [N, hidden_size] -> [N, labels].

    Module names are those of the checkpoint's tensors.
    """
    num_labels = len(config.labels)
    if config.kind not in NUM_REWARDS:
        return WholeLinear(hidden_size, num_labels, config.has_bias, context)
    return nn.Sequential(
        WholeLinear(hidden_size, hidden_size, True, context),
        nn.ReLU(),
        WholeLinear(hidden_size, num_labels, True, context),
    )


def head_of(model: nn.Module) -> nn.Module | None:
    """The classification head of a model; None: it has none."""
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Module) else None


class PoolerHead:
    """What is applied to hidden states before they leave the device.

    Args:
        head: of `head_of`; None: the states themselves are wanted.
    """

    def __init__(self, head: nn.Module | None = None) -> None:
        self.head = head

    def __call__(self, states: Tensor) -> Tensor:
        """states [N, hidden_size] of any dtype -> float32 [N, labels] or [N, hidden_size]."""
        if self.head is None:
            return states.float()
        return torch.cat([self.head(part.float()) for part in states.split(MAX_ROWS)])
