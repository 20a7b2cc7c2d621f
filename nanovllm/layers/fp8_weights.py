"""Weights of linear layers in fp8: a checkpoint's, or quantised on load.

A checkpoint's have scales for blocks, or for rows ("channels"). On load each row gets a scale, of
this rank's columns ("rows"). Where the backend has no fp8 products, or the
rank's slice cuts through blocks, the model's dtype keeps the values that fp8 gave the weights.
"""

from dataclasses import replace

import torch

from nanovllm.kernels.torch_ops import dequantize_weight, quantize
from nanovllm.kernels.types import FP8_BLOCK, FP8_DTYPE
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import Parameter, Shard, new_bias, new_parameter, shape_of

ALIGNMENT = 16  # rows and columns of a weight that is multiplied in fp8 are a multiple


class RowQuantizedParameter(Parameter):
    """An fp8 weight that quantises what it is filled with; `scales` [N] float32 are the rows'."""

    scales: Parameter

    @torch.no_grad()
    def fill(self, shard: Shard, part: torch.Tensor) -> None:
        """See `Parameter.fill`; `part` has all columns of the parameter."""
        # Where the scales are: an offloaded weight is in host memory.
        values, scales = quantize(shard.in_order(part).to(self.scales.device))
        self[shard.target].copy_(values)
        self.scales[shard.target[0]].copy_(scales)


class RowRoundedParameter(Parameter):
    """A weight in the model's dtype with the values that `RowQuantizedParameter` gives it."""

    @torch.no_grad()
    def fill(self, shard: Shard, part: torch.Tensor) -> None:
        """See `Parameter.fill`; `part` has all columns of the parameter."""
        part = shard.in_order(part).to(self.device)
        self[shard.target].copy_(dequantize_weight(*quantize(part)))


def keeps_fp8(shards: dict[str, Shard], context: ModelContext) -> bool:
    """Whether `new_linear_weight` makes a weight in fp8."""
    if not context.ops.has_fp8_products or any(n % ALIGNMENT for n in shape_of(shards)):
        return False
    if context.fp8_scales == "blocks":
        return all(map(_has_whole_blocks, shards.values()))
    return context.fp8_scales in ("rows", "channels")


def new_linear_weight(
    shards: dict[str, Shard], context: ModelContext, may_be_fp8: bool = True
) -> tuple[Parameter, Parameter | None]:
    """An uninitialised weight that `shards` fill and, if it is fp8, scales for `Ops.fp8_linear`."""
    shape, kind, device = shape_of(shards), context.fp8_scales, context.device
    is_fp8 = may_be_fp8 and keeps_fp8(shards, context)
    if is_fp8 and kind == "blocks":
        return (
            new_parameter(shape, shards, FP8_DTYPE, device),
            new_parameter(
                tuple(_num_blocks(n) for n in shape),
                {name: _shard_of_scales(shard) for name, shard in shards.items()},
                torch.float32,
                device,
            ),
        )
    if is_fp8 and kind == "channels":
        return (
            new_parameter(shape, shards, FP8_DTYPE, device),
            new_bias(shards, replace(context, dtype=torch.float32)),
        )
    if is_fp8:
        weight = new_parameter(shape, shards, FP8_DTYPE, device, RowQuantizedParameter)
        assert isinstance(weight, RowQuantizedParameter)
        weight.scales = new_parameter(shape[:1], {}, torch.float32, device)
        return weight, weight.scales
    cls = RowRoundedParameter if kind == "rows" else Parameter
    return new_parameter(shape, shards, context.dtype, device, cls), None


def blocks_of(part: slice) -> slice:
    """The blocks of a weight that its rows (or columns) `part` lie in."""
    return slice(part.start // FP8_BLOCK, -(-part.stop // FP8_BLOCK))


def _has_whole_blocks(shard: Shard) -> bool:
    """Whether the shard is whole blocks, and each row stays in its block."""
    if shard.head_order and FP8_BLOCK % len(shard.head_order) != 0:
        return False
    return all(
        source.start % FP8_BLOCK == 0
        and target.start % FP8_BLOCK == 0
        and (source.stop % FP8_BLOCK == 0 or source.stop == full)
        for full, source, target in zip(shard.full_shape, shard.source, shard.target, strict=True)
    )


def _num_blocks(n: int) -> int:
    return -(-n // FP8_BLOCK)


def _shard_of_scales(shard: Shard) -> Shard:
    return replace(
        shard,
        full_shape=tuple(_num_blocks(n) for n in shard.full_shape),
        source=tuple(blocks_of(part) for part in shard.source),
        target=tuple(blocks_of(part) for part in shard.target),
        head_order=(),
    )
