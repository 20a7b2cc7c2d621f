"""How a checkpoint tensor maps to a parameter: each parameter carries its own shards."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from nanovllm.kernels.types import DRAW_GROUP
from nanovllm.layers.context import ModelContext
from nanovllm.parallel.tensor_parallel import TensorParallel

# Rows per rank are a multiple: matrix products like it, and `Ops.sample` needs whole groups.
VOCAB_ALIGNMENT = 8 * DRAW_GROUP
MAX_PIECE = 1 << 26  # numbers of a tensor that are read and quantised at a time
PIECE_ALIGNMENT = 128  # rows of a piece are a multiple, so that it cuts through no block of scales


@dataclass(frozen=True)
class Shard:
    """The part of one checkpoint tensor that this rank holds, and where in the parameter it goes.

    `source` indexes the checkpoint tensor of `full_shape`, `target` the parameter.

    Attributes:
        head_order: of each head's rows in the checkpoint, one head below another, the order in
            which the parameter has them; empty: the same.
        fused_name: the checkpoint's module whose tensor holds several shards, "" if it has the
            parameter's own name; None: the tensor holds this shard alone.
        is_transposed: whether the tensor has the parameter's rows as its last dimension.
    """

    full_shape: tuple[int, ...]
    source: tuple[slice, ...]
    target: tuple[slice, ...]
    head_order: tuple[int, ...] = ()
    fused_name: str | None = None
    is_transposed: bool = False

    def pieces(self) -> "Iterator[Shard]":
        """The shard in parts of whole rows, which bounds the memory that loading it takes.

        Shards of stacked experts and those whose rows change places are not cut.
        """
        if len(self.source) != 2 or len(self.target) != 2 or self.is_transposed or self.head_order:
            yield self
            return
        (source, columns), (target, *rest) = self.source, self.target
        step = piece_rows(columns.stop - columns.start)
        for start in range(0, source.stop - source.start, step):
            size = min(step, source.stop - source.start - start)
            rows = slice(source.start + start, source.start + start + size)
            place = slice(target.start + start, target.start + start + size)
            yield replace(self, source=(rows, columns), target=(place, *rest))

    def in_order(self, part: torch.Tensor) -> torch.Tensor:
        """`part`, what `source` selects, with its rows in the parameter's order.

        The experts of a part [experts, rows, ...] come one below another.
        """
        if self.is_transposed:
            part = part.transpose(-1, -2)
        if part.dim() > len(self.target):
            part = part.flatten(0, 1)
        if not self.head_order:
            return part
        heads = part.unflatten(0, (-1, len(self.head_order)))
        return heads[:, list(self.head_order)].flatten(0, 1)


def piece_rows(num_columns: int) -> int:
    """Rows of so many numbers that are loaded at a time."""
    rows = MAX_PIECE // max(num_columns, 1)
    return max(rows // PIECE_ALIGNMENT, 1) * PIECE_ALIGNMENT


class Heads(NamedTuple):
    """The heads of a projection, and how a checkpoint has their rows.

    Projections of one `fused_name` lie one below another in its tensor, as they are listed.
    """

    number: int  # over all ranks
    size: int  # features of each
    order: tuple[int, ...] = ()  # see `Shard.head_order`
    fused_name: str | None = None  # see `Shard.fused_name`


# The checkpoint's module name, or of a part of a fused one any name -> heads, or (number, size).
HeadsByName = Mapping[str, Heads | tuple[int, int]]


class Parameter(nn.Parameter):
    """An inference parameter whose `shards` say what to load into it.

    Keys of `shards` are the names of the checkpoint's modules that are merged in this one
    ("q_proj" in "qkv_proj"), or "" if the parameter has the checkpoint's own name. Where one tensor
    of the checkpoint holds several shards, the keys only tell these apart: see `Shard.fused_name`.

    `tensor_name` is the last part of the tensor's name in the checkpoint, "" if the tensor has the
    module's name. None: it is the parameter's own.
    """

    shards: dict[str, Shard]
    tensor_name: str | None = None

    @torch.no_grad()
    def fill(self, shard: Shard, part: torch.Tensor) -> None:
        """Take over `part`, what `shard.source` selects of a checkpoint tensor, of any dtype."""
        self[shard.target].copy_(shard.in_order(part))


class OffsetParameter(Parameter):
    """A norm's weight that checkpoints store less `offset`: float32, so that the sum is exact.

    With a float32 weight, ops round once, after the product.
    """

    offset: float

    @torch.no_grad()
    def fill(self, shard: Shard, part: torch.Tensor) -> None:
        """See `Parameter.fill`."""
        self[shard.target].copy_(shard.in_order(part).float() + self.offset)


# ---- parameters, uninitialised but for padding --------------------------------------------------


def new_parameter(
    shape: tuple[int, ...],
    shards: dict[str, Shard],
    dtype: torch.dtype,
    device: torch.device,
    cls: type[Parameter] = Parameter,
) -> Parameter:
    """A parameter of `shape` and class `cls` with its `shards`."""
    parameter = cls(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    parameter.shards = shards
    return parameter


def new_whole_parameter(shape: tuple[int, ...], context: ModelContext) -> Parameter:
    """A parameter that every rank holds whole."""
    everything = tuple(slice(0, n) for n in shape)
    shards = {"": Shard(shape, everything, everything)}
    return new_parameter(shape, shards, context.dtype, context.device)


def new_norm_weight(
    size: int,
    context: ModelContext,
    offset: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parameter:
    """A norm's weight, which every rank holds whole.

    With an offset it is an `OffsetParameter` of `dtype`.
    """
    weight = new_whole_parameter((size,), context)
    if offset is None:
        return weight
    with_offset = OffsetParameter(weight.data.to(dtype), requires_grad=False)
    with_offset.shards, with_offset.offset = weight.shards, offset
    return with_offset


def new_bias(weight_shards: dict[str, Shard], context: ModelContext) -> Parameter:
    """The bias of a weight with `weight_shards`: an element for each row."""
    shards = {
        name: replace(
            shard,
            full_shape=shard.full_shape[:1],
            source=shard.source[:1],
            target=shard.target[:1],
        )
        for name, shard in weight_shards.items()
    }
    return new_parameter(shape_of(shards), shards, context.dtype, context.device)


def new_parameter_of_heads(
    num_heads: int, size: int, context: ModelContext, dtype: torch.dtype
) -> Parameter:
    """`size` numbers for each of this rank's heads, one head after another."""
    shards = column_shards(1, {"": (num_heads, size)}, context.tp)
    return new_bias(shards, replace(context, dtype=dtype))


def new_vocab_parameter(vocab_size: int, hidden_size: int, context: ModelContext) -> Parameter:
    """This rank's rows of a table [vocab_size, hidden_size].

    The vocabulary is padded so that every rank has equally many rows; padding rows are zero.
    """
    per_rank = -(-vocab_size // (context.tp.size * VOCAB_ALIGNMENT)) * VOCAB_ALIGNMENT
    start = min(context.tp.rank * per_rank, vocab_size)
    end = min(start + per_rank, vocab_size)
    columns = slice(0, hidden_size)
    shard = Shard(
        (vocab_size, hidden_size), (slice(start, end), columns), (slice(0, end - start), columns)
    )
    parameter = new_parameter((per_rank, hidden_size), {"": shard}, context.dtype, context.device)
    parameter.data[end - start :].zero_()
    return parameter


# ---- shards of linear weights -------------------------------------------------------------------


def shape_of(shards: dict[str, Shard]) -> tuple[int, ...]:
    """The shape of the parameter that `shards` fill."""
    targets = zip(*(shard.target for shard in shards.values()), strict=True)
    return tuple(max(part.stop for part in parts) for parts in targets)


def column_shards(input_size: int, heads: HeadsByName, tp: TensorParallel) -> dict[str, Shard]:
    """Of each projection the rows of this rank's heads, one projection below another."""
    all_heads = {name: Heads(*values) for name, values in heads.items()}
    num_rows: Counter[str] = Counter()  # of each tensor of the checkpoint
    first_rows = {}
    for name, part in all_heads.items():
        tensor = name if part.fused_name is None else part.fused_name
        first_rows[name] = num_rows[tensor]
        num_rows[tensor] += part.number * part.size
    columns = slice(0, input_size)
    shards, offset = {}, 0
    for name, (num_heads, head_dim, order, fused_name) in all_heads.items():
        size = max(num_heads // tp.size, 1) * head_dim
        start = first_rows[name] + tp.rank * num_heads // tp.size * head_dim
        source, target = slice(start, start + size), slice(offset, offset + size)
        full_shape = num_rows[name if fused_name is None else fused_name], input_size
        shards[name] = Shard(full_shape, (source, columns), (target, columns), order, fused_name)
        offset += size
    return shards


def row_shards(
    input_size: int, output_size: int, tp: TensorParallel, names: Sequence[str] = ("",)
) -> dict[str, Shard]:
    """All rows of each projection, and this rank's columns of them, one below another.

    names: the projections' module names in the checkpoint; "" is the parameter's own.
    """
    size = input_size // tp.size
    source = slice(0, output_size), slice(tp.rank * size, (tp.rank + 1) * size)
    return {
        name: Shard(
            (output_size, input_size),
            source,
            (slice(i * output_size, (i + 1) * output_size), slice(0, size)),
        )
        for i, name in enumerate(names)
    }
