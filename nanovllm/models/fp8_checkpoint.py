"""Reads fp8 checkpoints: weights are numbers with a scale for each block of FP8_BLOCK x FP8_BLOCK.

`x.weight` holds the numbers, `x.weight_scale_inv` the scales that they are multiplied by.
"""

from collections.abc import Collection

import torch

from nanovllm.errors import ArgumentError, shown
from nanovllm.kernels.torch_ops import dequantize_weight
from nanovllm.kernels.types import FP8_BLOCK, FP8_DTYPE
from nanovllm.layers.fp8_weights import blocks_of
from nanovllm.models.checkpoint import Checkpoint

SCALES_SUFFIX = "_scale_inv"


class DequantizedCheckpoint:
    """A checkpoint whose fp8 weights read as float32, numbers times scales.

    Args:
        checkpoint: with fp8 weights or without; see `Checkpoint`.
        expected: the tensors that a model has. Where the scales are among them, numbers and scales
            are read as they are.

    Raises:
        ArgumentError: the scales of a weight are not one for each block; from `read`: a tensor is
            fp8 without scales, or has scales and is not fp8.
    """

    def __init__(self, checkpoint: Checkpoint, expected: Collection[str]) -> None:
        self._checkpoint = checkpoint
        self._expected = expected
        names = checkpoint.names()
        self._hidden = {
            name
            for name in names
            if name.endswith(SCALES_SUFFIX)
            and name not in expected
            and (weight := name.removesuffix(SCALES_SUFFIX)) in names
            and len(checkpoint.shape(weight)) == 2
        }
        for name in self._hidden:
            weight = name.removesuffix(SCALES_SUFFIX)
            found, shape = checkpoint.shape(name), checkpoint.shape(weight)
            needed = tuple(blocks_of(slice(0, size)).stop for size in shape)
            if found != needed:
                raise ArgumentError(
                    f"tensor {shown(name)} has shape {shown(list(found))}, but {shown(weight)} of "
                    f"shape {shown(list(shape))} has {shown(list(needed))} blocks of "
                    f"{FP8_BLOCK} x {FP8_BLOCK}"
                )

    def names(self) -> set[str]:
        """See `Checkpoint`."""
        return self._checkpoint.names() - self._hidden

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._checkpoint.shape(name)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """See `Checkpoint`."""
        part = self._checkpoint.read(name, index)
        scales_name = name + SCALES_SUFFIX
        has_scales = scales_name in self._hidden or scales_name in self._expected
        if has_scales != (part.dtype == FP8_DTYPE):
            kind = f"{part.dtype}, not fp8, beside" if has_scales else "fp8 without"
            raise ArgumentError(f"tensor {name!r} is {kind} {scales_name!r}")
        if scales_name not in self._hidden:
            return part
        blocks = tuple(blocks_of(s) for s in index)
        scales = self._checkpoint.read(scales_name, blocks)
        first_row, first_column = (s.start % FP8_BLOCK for s in index)
        return dequantize_weight(part, scales, (first_row, first_column))
