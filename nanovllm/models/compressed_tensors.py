"""Weights of compressed-tensors checkpoints, as LLM Compressor writes them.

A module [N, K] is stored in one of three ways:

    pack-quantized   weight_packed int32 [N, K * B / 32], B = 4 or 8 bits a number, the first in the
                     lowest bits; weight_shape [2], which is (N, K); weight_zero_point int32
                     [N * B / 32, groups] if it is not symmetric; weight_g_idx int32 [K], the
                     groups of the columns, if they are in no order
    int-quantized    weight int8 [N, K]; weight_zero_point int8 if it is not symmetric
    float-quantized  weight float8_e4m3fn [N, K]

with weight_scale [N, groups], where a row is one group or has several, or [1] for all of them.
Numbers and zeros are signed. Packed, 2^(B - 1) is added to them.
"""

import torch
from torch import Tensor

from nanovllm.errors import ArgumentError, shown
from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.quantization_config import BITS
from nanovllm.models.quantized_weight import (
    FLOATS,
    INT32,
    PackedNumbers,
    QuantizedWeight,
    unpacked,
    within_words,
    words_of,
)

ZERO, INPUT_ZERO = "weight_zero_point", "input_zero_point"
TENSORS = "weight weight_packed weight_scale weight_shape weight_g_idx input_scale".split()
INTEGERS = ("I8", "I32", "I64")


class SignedNumbers(PackedNumbers):
    """Numbers around zero with a scale for each row, group of a row, or for all."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, module: str) -> None:
        super().__init__(checkpoint, module, (*TENSORS, ZERO, INPUT_ZERO))

    def set_groups(self) -> None:
        """Set `group_size` by the scales' shape."""
        shape = self.shape_of("weight_scale", FLOATS)
        self._is_one_scale = shape in ((), (1,), (1, 1)) and self.shape[0] != 1
        num_groups = 1
        if not self._is_one_scale and len(shape) == 2:
            num_groups = max(shape[1], 1)
        if not self._is_one_scale and shape not in ((self.shape[0],), (self.shape[0], num_groups)):
            raise self.wrong("weight_scale", FLOATS)
        self._dims = len(shape)
        self.group_size = -(-self.shape[1] // num_groups)

    def scales(self, rows: slice, groups: slice) -> Tensor:
        """See `PackedNumbers.scales`."""
        if self._is_one_scale:
            scale = self.read("weight_scale").reshape(1, 1)
            return scale.expand(len(range(self.shape[0])[rows]), 1)[:, groups]
        if self._dims == 1:
            return self.read("weight_scale", rows).unsqueeze(1)[:, groups]
        return self.read("weight_scale", rows, groups)

    def signed_zeros(self, rows: slice, groups: slice) -> Tensor | None:
        """Zeros that are no packed words, as `zeros` gives them."""
        if not self.has(ZERO):
            return None
        if len(self.shape_of(ZERO, INTEGERS)) == 2:
            found = self.read(ZERO, rows, groups)
        else:
            every = self.read(ZERO).reshape(-1, 1)
            found = every.expand(self.shape[0], 1)[rows, groups]
        return (found.int() + 2 ** (self.bits - 1)).to(torch.uint8)


class PackQuantized(SignedNumbers):
    """The weight of a module whose numbers are packed in words.

    Raises:
        ArgumentError: a tensor is missing, or the shapes or groups fit no weight of 4 or 8 bits.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, module: str) -> None:
        super().__init__(checkpoint, module)
        num_rows, num_words = self.matrix_of("weight_packed", INT32)
        self.check("weight_shape", INTEGERS, 2)
        shape = self.read("weight_shape", slice(0, 2)).tolist()
        fitting = [b for b in BITS if words_of(slice(0, shape[1]), b).stop == num_words]
        if shape[0] != num_rows or len(fitting) != 1:
            raise self.wrong("weight_packed", INT32)
        self.shape, self.bits = (num_rows, shape[1]), fitting[0]
        self.set_groups()
        if self.has("weight_g_idx"):
            self.check("weight_g_idx", INTEGERS, shape[1])
            groups = self.read("weight_g_idx", slice(0, shape[1])).long()
            num_groups = self.num_groups
            if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
                raise ArgumentError(
                    f"tensor {shown(f'{module}.weight_g_idx')} must have numbers of the "
                    f"{num_groups} groups, got {int(groups.min())} to {int(groups.max())}"
                )
            if not torch.equal(groups, torch.arange(shape[1]) // self.group_size):
                self.groups = groups

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        """See `PackedNumbers.numbers`."""
        words = self.read("weight_packed", rows, words_of(columns, self.bits))
        return unpacked(words, self.bits)[:, within_words(columns, self.bits)]

    def zeros(self, rows: slice, groups: slice) -> Tensor | None:
        """See `PackedNumbers.zeros`."""
        if not self.has(ZERO) or self._checkpoint.dtype(f"{self.module}.{ZERO}") != "I32":
            return self.signed_zeros(rows, groups)
        words = self.read(ZERO, words_of(rows, self.bits), groups).t()
        return unpacked(words, self.bits)[:, within_words(rows, self.bits)].t()


class IntQuantized(SignedNumbers):
    """The weight of a module with int8 numbers, as they are.

    Raises:
        ArgumentError: the scales fit no weight of this shape.
    """

    bits = 8

    def __init__(self, checkpoint: SafetensorsCheckpoint, module: str) -> None:
        super().__init__(checkpoint, module)
        num_rows, num_columns = self.matrix_of("weight", ("I8",))
        self.shape = num_rows, num_columns
        self.set_groups()

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        """See `PackedNumbers.numbers`."""
        return (self.read("weight", rows, columns).short() + 128).to(torch.uint8)

    def zeros(self, rows: slice, groups: slice) -> Tensor | None:
        """See `PackedNumbers.zeros`."""
        return self.signed_zeros(rows, groups)


class Fp8Weight(QuantizedWeight):
    """An fp8 weight with a scale for each row or one for all, of any library.

    Raises:
        ArgumentError: the scales fit no weight of this shape.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, module: str) -> None:
        super().__init__(checkpoint, module, (*TENSORS, "weight_scale_inv", ZERO, INPUT_ZERO))
        num_rows, num_columns = self.matrix_of("weight", ("F8_E4M3",))
        self.shape = num_rows, num_columns
        self._scale = "weight_scale" if self.has("weight_scale") else "weight_scale_inv"
        shape = self.shape_of(self._scale, FLOATS)
        self._is_one_scale = shape in ((), (1,), (1, 1))
        if not self._is_one_scale and shape not in ((num_rows,), (num_rows, 1)):
            raise self.wrong(self._scale, FLOATS)
        self._dims = len(shape)

    def row_scales(self, rows: slice) -> Tensor:
        """float32 [n]."""
        if self._is_one_scale:
            scale = self.read(self._scale).reshape(1)
            return scale.float().expand(len(range(self.shape[0])[rows]))
        return self.read(self._scale, *(rows, slice(0, 1))[: self._dims]).flatten().float()

    def fp8_values(self, rows: slice, columns: slice) -> Tensor:
        """A part of the numbers, in fp8."""
        return self.read("weight", rows, columns)

    def values(self, rows: slice, columns: slice) -> Tensor:
        """See `QuantizedWeight.values`."""
        return self.fp8_values(rows, columns).float() * self.row_scales(rows).unsqueeze(1)
