"""The weight of linear layers, whatever its kind: in the model's dtype, fp8 or packed."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from nanovllm.kernels.types import LinearOutput, PackedWeight, Product
from nanovllm.layers.context import ModelContext
from nanovllm.layers.fp8_weights import keeps_fp8, new_linear_weight
from nanovllm.layers.packed_weights import new_packed_weight, packed_group_size
from nanovllm.layers.weights import Parameter, Shard


class LinearWeight(nn.Module):
    """A weight [N, K] of this rank, of the kind that the context asks for and its shape allows.

    Args:
        shards: what fills it.
        context: see `ModelContext`.
        is_plain: whether it has the model's dtype, whatever the context asks for.

    Attributes:
        shards: what fills it, in rows and columns of the weight, however it is kept.
        weight: a parameter, in the model's dtype or fp8; or parameters in a `PackedWeight`.
        weight_scale: of an fp8 weight.
        has_adapters: whether a hook adds the terms of adapters to the product.
        leaves_product: says of x and the weight whether the product is left to what reads it; None:
            it never is.
    """

    weight: Parameter | PackedWeight
    weight_scale: Parameter | None

    def __init__(
        self, shards: dict[str, Shard], context: ModelContext, is_plain: bool = False
    ) -> None:
        super().__init__()
        self.ops, self.shards, self._context = context.ops, shards, context
        self.has_adapters = False
        self.leaves_product: Callable[[Tensor, Tensor], bool] | None = None
        self.same_kind = [self]  # those whose kind changes together
        group_size = None if is_plain else packed_group_size(shards, context)
        if group_size is None:
            self.weight, self.weight_scale = new_linear_weight(shards, context, not is_plain)
            return
        self.weight, self.weight_scale = new_packed_weight(shards, context, group_size), None
        for name in ("numbers", "scales", "zeros", "order"):
            self.register_parameter(name, getattr(self.weight, name))

    @property
    def loaded(self) -> Parameter:
        """The parameter that is filled with the checkpoint's weight."""
        weight = self.weight
        return cast(Parameter, weight.numbers) if isinstance(weight, PackedWeight) else weight

    def multiply_later(self, x: Tensor, bias: Tensor | None) -> LinearOutput:
        """`multiply`, or a `Product` for the norm that reads it, as `leaves_product` says."""
        weight, is_sum = self.weight, bias is not None or self.has_adapters
        if self.leaves_product is None or is_sum or self.weight_scale is not None:
            return self.multiply(x, bias)
        if isinstance(weight, Tensor) and self.leaves_product(x, weight):
            return cast(LinearOutput, Product(x, weight))
        return self.multiply(x, bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> LinearOutput:
        """x [T, K], bias [N] -> x weight^T + bias [T, N]."""
        if isinstance(self.weight, PackedWeight):
            return self.ops.packed_linear(x, self.weight, bias)
        if self.weight_scale is None:
            return self.ops.linear(x, self.weight, bias)
        return self.ops.fp8_linear(x, self.weight, self.weight_scale, bias)

    def unpack(self) -> None:
        """Hold the weight, and those of `same_kind`, in the model's dtype; before it is loaded."""
        for module in self.same_kind:
            if isinstance(module.weight, PackedWeight):
                del module.weight, module.numbers, module.scales, module.zeros, module.order
            elif module.weight_scale is None:
                continue
            module.weight, module.weight_scale = new_linear_weight(
                module.shards, module._context, may_be_fp8=False
            )


def is_compact(shards: dict[str, Shard], context: ModelContext) -> bool:
    """Whether a weight that `shards` fill is fp8 or packed."""
    return keeps_fp8(shards, context) or packed_group_size(shards, context) is not None
