"""Weights of bitsandbytes checkpoints, in 4 bits or 8.

4 bits (Dettmers et al. 2023, arXiv 2305.14314), of a module's elements row by row, in blocks of
(mostly) 64:

    weight                 uint8 [elements / 2, 1], the first of two in the high half
    weight.quant_map       float32 [16], what each number means: nf4 or fp4
    weight.absmax          what it is multiplied by in each block: float32, or uint8 and then
    weight.nested_quant_map, weight.nested_absmax   the same once more, of absmax less an offset
    weight.quant_state.bitsandbytes__nf4            JSON: shape, block sizes, offset

8 bits (Dettmers et al. 2022, arXiv 2208.07339): weight int8 [N, K], and SCB float32 [N], what 127
stands for in each row.
"""

import json

import torch
from torch import Tensor

from nanovllm.errors import ArgumentError, shown, shown_error
from nanovllm.models.checkpoint import BYTE, SafetensorsCheckpoint
from nanovllm.models.quantized_weight import PackedNumbers, QuantizedWeight

STATE = "weight.quant_state.bitsandbytes__"
STATES = tuple(STATE + kind for kind in ("nf4", "fp4"))
SCALES = "SCB"
MAPS = "weight.quant_map weight.absmax weight.nested_quant_map weight.nested_absmax".split()


class FourBitWeight(QuantizedWeight):
    """A weight whose numbers of 4 bits stand for the 16 entries of a table.

    Raises:
        ArgumentError: a tensor is missing, or the state or the shapes fit no weight.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, module: str) -> None:
        super().__init__(checkpoint, module, ("weight", *MAPS, *STATES))
        name = next(end for end in STATES if self.has(end))
        size = self.vector_of(name, (BYTE,))
        try:
            state = json.loads(bytes(self.read(name, slice(0, size)).tolist()))
            num_rows, num_columns = map(int, state["shape"])
            self._block = int(state["blocksize"])
            self._nested_block = int(state.get("nested_blocksize") or 1)
            self._offset = float(state.get("nested_offset") or 0.0)
            if min(num_rows, num_columns, self._block, self._nested_block) < 1:
                raise ValueError("sizes must be positive")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"cannot read {shown(f'{module}.{name}')}: {shown_error(error)}"
            ) from error
        self.shape = num_rows, num_columns
        num_elements = num_rows * num_columns
        self.check("weight", (BYTE,), -(-num_elements // 2), 1)
        num_blocks = -(-num_elements // self._block)
        self.check("weight.quant_map", ("F32",), 16)
        self._is_nested = self.has("weight.nested_absmax")
        self.check("weight.absmax", (BYTE if self._is_nested else "F32",), num_blocks)
        if self._is_nested:
            self.check("weight.nested_absmax", ("F32",), -(-num_blocks // self._nested_block))
            self.check("weight.nested_quant_map", ("F32",), 256)

    def values(self, rows: slice, columns: slice) -> Tensor:
        """See `QuantizedWeight.values`."""
        width = self.shape[1]
        start, stop = rows.start * width, rows.stop * width
        first, last = start // 2, -(-stop // 2)
        packed = self.read("weight", slice(first, last), slice(0, 1)).flatten()
        table = self.read("weight.quant_map", slice(0, 16))
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)  # of each byte
        values = pairs.index_select(0, packed.int()).flatten()
        values = values[start - 2 * first :][: stop - start]
        part = slice(start // self._block, -(-stop // self._block))
        largest = self._largest(part)
        if start % self._block == 0 and stop % self._block == 0:
            values = (values.view(-1, self._block) * largest.unsqueeze(1)).flatten()
        else:
            values = values * largest[torch.arange(start, stop) // self._block - part.start]
        return values.view(-1, width)[:, columns]

    def _largest(self, blocks: slice) -> Tensor:
        """float32, the largest magnitude of each block."""
        found = self.read("weight.absmax", blocks)
        if not self._is_nested:
            return found
        table = self.read("weight.nested_quant_map", slice(0, 256))
        part = slice(blocks.start // self._nested_block, -(-blocks.stop // self._nested_block))
        nested = self.read("weight.nested_absmax", part)
        of_block = torch.arange(blocks.start, blocks.stop) // self._nested_block - part.start
        return table.index_select(0, found.int()) * nested[of_block] + self._offset


class EightBitWeight(PackedNumbers):
    """A weight of int8 numbers with a scale for each row.

    Raises:
        ArgumentError: the scales fit no weight of this shape.
    """

    bits = 8

    def __init__(self, checkpoint: SafetensorsCheckpoint, module: str) -> None:
        super().__init__(checkpoint, module, ("weight", SCALES, "weight_format"))
        num_rows, num_columns = self.matrix_of("weight", ("I8",))
        self.shape, self.group_size = (num_rows, num_columns), num_columns
        self.check(SCALES, ("F32",), num_rows)
        if self.has("weight_format") and int(self.read("weight_format")) != 0:
            raise ArgumentError(f"{shown(f'{module}.weight_format')} must be 0, row by row")

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        """See `PackedNumbers.numbers`."""
        return (self.read("weight", rows, columns).short() + 128).to(torch.uint8)

    def scales(self, rows: slice, groups: slice) -> Tensor:
        """See `PackedNumbers.scales`."""
        return (self.read(SCALES, rows) / 127).unsqueeze(1)[:, groups]

    def zeros(self, rows: slice, groups: slice) -> Tensor | None:
        """See `PackedNumbers.zeros`."""
        return None
