"""MLPs without a gate."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.types import Unreduced, summed
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.models.model_config import ModelConfig


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by transformers' names
    "relu2": squared_relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class PlainMLP(nn.Module):
    """down(act(up(x))); biases are the config's choice.

    names: of up and down in checkpoints.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        names: tuple[str, str] = ("up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        size, inner_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activate = ACTIVATIONS[config.hidden_act]
        self.up = ColumnParallelLinear(size, {names[0]: (inner_size, 1)}, bias, context)
        self.down_name = names[1]
        setattr(self, names[1], RowParallelLinear(inner_size, size, bias, context))

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size]."""
        return getattr(self, self.down_name)(self.activate(summed(self.up(x))))
