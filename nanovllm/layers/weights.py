"""How a checkpoint tensor maps to a parameter: each parameter carries its own shards."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shard:
    """The part of one checkpoint tensor that this rank holds, and where in the parameter it goes.

    `source` indexes the checkpoint tensor of `full_shape`, `target` the parameter.
    """

    full_shape: tuple[int, ...]
    source: tuple[slice, ...]
    target: tuple[slice, ...]


class Parameter(nn.Parameter):
    """An inference parameter whose `shards` say what to load into it.

    Keys of `shards` are the names of the checkpoint's modules that are merged in this one
    ("q_proj" in "qkv_proj"), or "" if the parameter has the checkpoint's own name.
    """

    shards: dict[str, Shard]

    @torch.no_grad()
    def fill(self, shard: Shard, part: torch.Tensor) -> None:
        """Take over `part`, what `shard.source` selects of a checkpoint tensor, of any dtype."""
        self[shard.target].copy_(part)


def new_parameter(
    shape: tuple[int, ...],
    shards: dict[str, Shard],
    dtype: torch.dtype,
    device: torch.device,
    cls: type[Parameter] = Parameter,
) -> Parameter:
    """An uninitialised parameter of `shape` and class `cls` with its `shards`."""
    parameter = cls(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    parameter.shards = shards
    return parameter


def whole(shape: tuple[int, ...]) -> dict[str, Shard]:
    """Shards of a parameter that every rank holds whole."""
    everything = tuple(slice(0, n) for n in shape)
    return {"": Shard(shape, everything, everything)}
