"""Weights of linear layers in 4 or 8 bits: a checkpoint's, or rounded as they are loaded.

On load, groups of 128 columns share a scale; of 64 or 32, where the rank's columns are no multiple
of 128. Some weights keep the model's dtype, as `packed_group_size` says. A checkpoint's then have
the values that its numbers stand for; on load they are not rounded.
"""

from dataclasses import replace
from typing import Literal

import torch

from nanovllm.errors import ArgumentError
from nanovllm.kernels.torch_ops import quantize_packed
from nanovllm.kernels.types import PackedWeight
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import Parameter, Shard, new_parameter, shape_of

ROW_ALIGNMENT, COLUMN_ALIGNMENT = 16, 32  # of a projection: its rows and columns are a multiple
GROUP_SIZES = (128, 64, 32)  # on load, the first that fits
MAX_ROUNDED_ELEMENTS = 2**20  # of a weight at a time, while it is rounded
Part = Literal["numbers", "scales", "zeros", "order"]


class PackedParameter(Parameter):
    """One of the tensors of a `PackedWeight`, as the checkpoint has it."""

    part: Part
    bits: int

    @torch.no_grad()
    def fill(self, shard: Shard, part: torch.Tensor) -> None:
        """See `Parameter.fill`. ArgumentError if merged modules order their columns differently."""
        first_name, first = next(iter(self.shards.items()))
        if self.part == "order" and shard is not first:  # the first one's is there
            if not torch.equal(self[shard.target], part.to(self)):
                name = next(name for name, s in self.shards.items() if s is shard)
                raise ArgumentError(
                    f"{name!r} and {first_name!r}, which are multiplied together, have their "
                    "columns in different orders (act-order), which is not supported"
                )
            return
        super().fill(shard, part)


class RoundedNumbers(Parameter):
    """The numbers of a packed weight that rounds what it is filled with, and sets `scales`."""

    scales: Parameter
    bits: int
    group_size: int

    @torch.no_grad()
    def fill(self, shard: Shard, part: torch.Tensor) -> None:
        """See `Parameter.fill`; `part` has all columns of the weight. Some rows at a time."""
        part = shard.in_order(part)
        first = shard.target[0].start
        for rows in part.split(max(1, MAX_ROUNDED_ELEMENTS // part.shape[1])):
            packed = quantize_packed(
                rows.to(self.device), self.bits, self.group_size, self.scales.dtype
            )
            target = slice(first, first + len(rows))
            self[target].copy_(packed.numbers)
            self.scales[target].copy_(packed.scales)
            first = target.stop


def packed_group_size(shards: dict[str, Shard], context: ModelContext) -> int | None:
    """Columns of a group of the packed weight that `shards` fill; None: it is not packed.

    These are not: sizes that are no multiple of ROW_ALIGNMENT and COLUMN_ALIGNMENT; with a
    checkpoint's format a tensor of all experts, a slice of columns that cuts through a group, and
    one of a weight with an order of its columns.
    """
    form = context.weight_format
    num_columns = shape_of(shards)[1]
    num_rows = [shard.target[0].stop - shard.target[0].start for shard in shards.values()]
    if form is None or num_columns % COLUMN_ALIGNMENT or any(n % ROW_ALIGNMENT for n in num_rows):
        return None
    if form.is_on_load:
        sizes = (n for n in GROUP_SIZES if n <= form.group_size)
        return next(n for n in sizes if num_columns % n == 0)
    for shard in shards.values():
        if len(shard.full_shape) != 2:
            return None
        columns, all_columns = shard.source[1], shard.full_shape[1]
        group_size = all_columns if form.group_size == -1 else form.group_size
        is_whole = columns == slice(0, all_columns)
        cuts = columns.start % group_size or columns.stop % group_size
        if (form.has_order and not is_whole) or (cuts and form.group_size != -1):
            return None
        if group_size % COLUMN_ALIGNMENT or all_columns % group_size:
            return None
    return min(group_size, num_columns)


def new_packed_weight(
    shards: dict[str, Shard], context: ModelContext, group_size: int
) -> PackedWeight:
    """An uninitialised weight of parameters that `shards`, those of the weight [N, K], fill."""
    form = context.weight_format
    assert form is not None
    bits = form.bits
    num_rows, num_columns = shape_of(shards)
    numbers_shape = num_rows, num_columns * bits // 8
    scales_shape = num_rows, num_columns // group_size
    if form.is_on_load:
        numbers = new_parameter(numbers_shape, shards, torch.uint8, context.device, RoundedNumbers)
        assert isinstance(numbers, RoundedNumbers)
        numbers.tensor_name = "weight"
        numbers.scales = new_parameter(scales_shape, {}, context.dtype, context.device)
        numbers.bits, numbers.group_size = bits, group_size
        return PackedWeight(numbers, numbers.scales, None, None, bits, group_size)

    def new(part: Part, shards: dict[str, Shard], dtype: torch.dtype) -> PackedParameter:
        shape = shape_of(shards)
        parameter = new_parameter(shape, shards, dtype, context.device, PackedParameter)
        assert isinstance(parameter, PackedParameter)
        parameter.part, parameter.bits = part, bits
        return parameter

    # With one scale for a whole row, every rank has it.
    width = None if form.group_size == -1 else form.group_size
    of_numbers = {name: _narrowed(shard, 8 // bits) for name, shard in shards.items()}
    of_scales = {name: _narrowed(shard, width) for name, shard in shards.items()}
    of_order = {name: _columns_alone(shard) for name, shard in shards.items()}
    return PackedWeight(
        new("numbers", of_numbers, torch.uint8),
        new("scales", of_scales, context.dtype),
        new("zeros", of_scales, torch.uint8) if form.has_zeros else None,
        new("order", of_order, torch.int32) if form.has_order else None,
        bits,
        group_size,
    )


def _narrowed(shard: Shard, width: int | None) -> Shard:
    """The shard of a tensor with one column for each `width` of the weight's; None: for all."""

    def narrow(columns: slice) -> slice:
        if width is None:
            return slice(0, 1)
        return slice(columns.start // width, columns.stop // width)

    (num_rows, num_columns), (source, columns), (target, own) = (
        shard.full_shape,
        shard.source,
        shard.target,
    )
    return replace(
        shard,
        full_shape=(num_rows, 1 if width is None else num_columns // width),
        source=(source, narrow(columns)),
        target=(target, narrow(own)),
    )


def _columns_alone(shard: Shard) -> Shard:
    return replace(
        shard,
        full_shape=shard.full_shape[1:],
        source=shard.source[1:],
        target=shard.target[1:],
        head_order=(),
    )
