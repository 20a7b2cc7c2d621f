"""Reads MXFP4 checkpoints (OCP Microscaling Formats 1.0): 32 numbers of 4 bits share a scale.

`x_blocks` [E, rows, columns / 32, 16] uint8 has two numbers (e2m1) in a byte, the first in the low
bits. `x_scales` [E, rows, columns / 32] uint8 has powers of two (e8m0). They read as one tensor x
[E, columns, rows].
"""

import torch

from nanovllm.errors import ArgumentError, shown
from nanovllm.models.checkpoint import BYTE, SafetensorsCheckpoint

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32  # numbers that share a scale
# By their 4 bits: the upper half is the lower one with a sign.
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.bfloat16)
E2M1 = torch.cat((MAGNITUDES, -MAGNITUDES))
# [256, 2], the numbers of each byte.
PAIRS = torch.stack((E2M1.repeat(16), E2M1.repeat_interleave(16)), 1)


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks [..., G, 16] uint8, scales [..., G] uint8 -> [..., G * 32] bfloat16, exactly.

    A number is its e2m1 times 2^(scale - 127). The scale 255 is a NaN.
    """
    numbers = PAIRS.index_select(0, blocks.flatten().int()).view(*blocks.shape[:-1], BLOCK)
    powers = scales.view(torch.float8_e8m0fnu).to(torch.bfloat16)
    return (numbers * powers.unsqueeze(-1)).flatten(-2)


class Mxfp4Checkpoint:
    """A checkpoint whose MXFP4 weights read as bfloat16; all others read as they are.

    Raises:
        ArgumentError: blocks and scales do not fit each other, or are no bytes.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self._checkpoint = checkpoint
        names = checkpoint.names()
        self._shapes = {
            name.removesuffix(BLOCKS): self._packed_shape(name.removesuffix(BLOCKS))
            for name in names
            if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in names
        }

    def _packed_shape(self, name: str) -> tuple[int, ...]:
        blocks = self._checkpoint.shape(name + BLOCKS, (BYTE,))
        scales = self._checkpoint.shape(name + SCALES, (BYTE,))
        if len(blocks) != 4 or blocks[3] != BLOCK // 2 or scales != blocks[:3]:
            raise ArgumentError(
                f"tensor {shown(name + BLOCKS)} must have shape [experts, rows, blocks, "
                f"{BLOCK // 2}] and the scales [experts, rows, blocks], got {shown(list(blocks))} "
                f"and {shown(list(scales))}"
            )
        return blocks[0], blocks[2] * BLOCK, blocks[1]

    def names(self) -> set[str]:
        """See `Checkpoint`."""
        packed = {name + suffix for name in self._shapes for suffix in (BLOCKS, SCALES)}
        return self._checkpoint.names() - packed | self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._shapes[name] if name in self._shapes else self._checkpoint.shape(name)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """See `Checkpoint`."""
        if name not in self._shapes:
            return self._checkpoint.read(name, index)
        experts, columns, rows = index
        first = columns.start // BLOCK
        groups = slice(first, -(-columns.stop // BLOCK))
        part = dequantize_mxfp4(
            self._checkpoint.read(name + BLOCKS, (experts, rows, groups, slice(0, BLOCK // 2))),
            self._checkpoint.read(name + SCALES, (experts, rows, groups)),
        )
        columns = slice(columns.start - first * BLOCK, columns.stop - first * BLOCK)
        return part[..., columns].transpose(1, 2)
