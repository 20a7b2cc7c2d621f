"""Reads checkpoints that have a weight of all experts of a layer in one tensor."""

from collections.abc import Collection
from typing import NamedTuple

import torch

from nanovllm.models.checkpoint import Checkpoint

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


class _Part(NamedTuple):
    """One expert's weight in a tensor of all experts."""

    tensor: str
    expert: int
    first_row: int
    num_rows: int
    num_columns: int


class SplitExpertsCheckpoint:
    """A checkpoint with tensors of all experts shown as one with a tensor for each.

    "x.experts.gate_up_proj" [E, 2I, H] reads as "x.experts.3.gate_proj.weight" and "...up_proj...",
    [I, H] each, and "x.experts.down_proj" [E, H, I] as "x.experts.3.down_proj.weight". All other
    tensors are as they are.

    Args:
        checkpoint: with such tensors or without; see `Checkpoint`.
        expected: the tensors that a model has. One that is among them is not split.
    """

    def __init__(self, checkpoint: Checkpoint, expected: Collection[str]) -> None:
        self._checkpoint = checkpoint
        self._parts: dict[str, _Part] = {}
        self._names = checkpoint.names()
        for name in sorted(self._names):
            if name in expected or not name.endswith((GATE_UP, DOWN)):
                continue
            if len(checkpoint.shape(name)) == 3:
                self._names.remove(name)
                self._split(name)

    def _split(self, name: str) -> None:
        num_experts, num_rows, num_columns = self._checkpoint.shape(name)
        prefix, _, projection = name.rpartition(".")
        projections = [projection]
        if name.endswith(GATE_UP):
            projections, num_rows = ["gate_proj", "up_proj"], num_rows // 2
        for expert in range(num_experts):
            for i, projection in enumerate(projections):
                part = _Part(name, expert, i * num_rows, num_rows, num_columns)
                self._parts[f"{prefix}.{expert}.{projection}.weight"] = part

    def names(self) -> set[str]:
        """See `Checkpoint`."""
        return self._names | self._parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        part = self._parts.get(name)
        return (part.num_rows, part.num_columns) if part else self._checkpoint.shape(name)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """See `Checkpoint`."""
        part = self._parts.get(name)
        if part is None:
            return self._checkpoint.read(name, index)
        rows, columns = index
        rows = slice(part.first_row + rows.start, part.first_row + rows.stop)
        expert = slice(part.expert, part.expert + 1)
        return self._checkpoint.read(part.tensor, (expert, rows, columns))[0]
