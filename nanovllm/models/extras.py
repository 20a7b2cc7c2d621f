"""What a family's configuration adds to the plain decoder: other activations, caps, multipliers."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import LateOutput, LinearOutput, Normed, Product, Unreduced, summed
from nanovllm.layers.linear import ColumnParallelLinear
from nanovllm.layers.rotary import cos_sin_table
from nanovllm.models.model_config import ModelConfig

GELU_IS_TANH = {"gelu": False, "gelu_pytorch_tanh": True}  # by transformers' names


def activation(config: ModelConfig, ops: Ops) -> Callable[[LinearOutput], Tensor]:
    """The gated activation of the model's MLPs: gate_up [T, 2I] -> [T, I]."""
    if config.hidden_act == "silu":
        return ops.silu_and_mul
    return partial(ops.gelu_and_mul, is_tanh=GELU_IS_TANH[config.hidden_act])


def gated_linear(
    linear: ColumnParallelLinear, activate: Callable[[LinearOutput], Tensor], x: Tensor | Normed
) -> Tensor:
    """activate(linear(x)): x [T, K] -> [T, I], where `linear` is gate and up and has 2I rows.

    One operation, if the activation is SiLU and the product can be left to it.
    """
    product = linear_later(linear, x)
    if not isinstance(product, Product):
        return activate(product)
    if activate == linear.ops.silu_and_mul:
        return linear.ops.gated_linear(*product)
    return activate(linear.ops.linear(*product))


def linear_later(linear: ColumnParallelLinear, x: Tensor | Normed) -> LateOutput:
    """linear(x): x [T, K] -> [T, N], left to the operation that reads it where it can be.

    That is so if nothing is added to the product of a weight in the model's dtype: no bias and no
    adapters.
    """
    weight, is_sum = linear.weight, linear.bias is not None or linear.has_adapters
    if is_sum or linear.weight_scale is not None or not isinstance(weight, Tensor):
        return linear(x if isinstance(x, Tensor) else linear.ops.rms_norm(*x))
    return Product(cast(Tensor, x), weight)


def finish_logits(config: ModelConfig) -> Callable[[Tensor], Tensor] | None:
    """What becomes of logits [B, V], in place, after the LM head's product; None: nothing.

    A multiplier, or a soft cap: cap * tanh(logits / cap).
    """
    multiplier, cap = config.logits_multiplier, config.final_logit_softcapping

    def finish(logits: Tensor) -> Tensor:
        if multiplier != 1:
            logits.mul_(multiplier)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    return None if multiplier == 1 and cap is None else finish


def scaled(x: Unreduced, factor: float) -> Unreduced:
    """Every rank's term [T, N], once it is rounded to its dtype, times `factor`."""
    return Unreduced(summed(x.term) * factor)


def rotary_tables(
    config: ModelConfig, max_model_len: int | None, device: torch.device
) -> list[Tensor]:
    """Each layer's table of rotations, as `cos_sin_table` makes it; equal ones are one tensor.

    They reach `max_model_len`, or where that is None, all positions that the model is meant for.
    """
    size = max_model_len or config.max_positions
    made: dict[str, Tensor] = {}
    tables = []
    for index in range(config.num_hidden_layers):
        rope = config.rope_of(index)
        key = repr(rope and sorted(rope.items()))
        if key not in made:
            made[key] = cos_sin_table(config.head_dim, size, rope, device)
        tables.append(made[key])
    return tables
