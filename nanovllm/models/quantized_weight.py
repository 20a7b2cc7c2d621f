"""The weights of a checkpoint's quantised modules, whole numbers or not, as the loader wants them.

Each format has a file with its `QuantizedWeight`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nanovllm.errors import ArgumentError, shown
from nanovllm.kernels.torch_ops import pack_numbers
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.models.checkpoint import SafetensorsCheckpoint

FLOATS = ("BF16", "F16", "F32")
INT32 = ("I32",)


class QuantizedWeight(ABC):
    """A linear module's weight [N, K] that its checkpoint stores in fewer bits.

    Args:
        checkpoint: the files.
        module: the module's name in them.
        suffixes: the ends of the names of the tensors that the weight is made of.

    Attributes:
        shape: (N, K).
        tensors: the names of these tensors, as far as there are.
    """

    shape: tuple[int, int]

    def __init__(
        self, checkpoint: SafetensorsCheckpoint, module: str, suffixes: tuple[str, ...]
    ) -> None:
        self._checkpoint, self.module = checkpoint, module
        names = (f"{module}.{end}" for end in suffixes)
        self.tensors = [name for name in names if checkpoint.has(name)]

    @abstractmethod
    def values(self, rows: slice, columns: slice) -> Tensor:
        """A part of the weight in float32."""

    def has(self, suffix: str) -> bool:
        """Whether the module has the tensor of this name."""
        return f"{self.module}.{suffix}" in self.tensors

    def shape_of(self, suffix: str, dtypes: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of one of its tensors; ArgumentError if it is missing or of another dtype."""
        if not self.has(suffix):
            raise ArgumentError(f"missing tensors: {shown(f'{self.module}.{suffix}')}")
        return self._checkpoint.shape(f"{self.module}.{suffix}", dtypes)

    def matrix_of(self, suffix: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        """The shape of a matrix; ArgumentError as of `shape_of`, or if it is none."""
        shape = self.shape_of(suffix, dtypes)
        if len(shape) != 2 or min(shape) < 1:
            raise self.wrong(suffix, dtypes)
        return shape[0], shape[1]

    def vector_of(self, suffix: str, dtypes: tuple[str, ...]) -> int:
        """The length of a vector; ArgumentError as of `shape_of`, or if it is none."""
        shape = self.shape_of(suffix, dtypes)
        if len(shape) != 1 or shape[0] < 1:
            raise self.wrong(suffix, dtypes)
        return shape[0]

    def read(self, suffix: str, *index: slice) -> Tensor:
        """A part of one of its tensors."""
        return self._checkpoint.read(f"{self.module}.{suffix}", index)

    def check(self, suffix: str, dtypes: tuple[str, ...], *shape: int) -> None:
        """ArgumentError if a tensor has not this shape or none of these dtypes."""
        found = self.shape_of(suffix, dtypes)
        if found != shape:
            raise ArgumentError(
                f"tensor {shown(f'{self.module}.{suffix}')} has shape {shown(list(found))}, "
                f"the others of its module ask for {shown(list(shape))}"
            )

    def wrong(self, suffix: str, dtypes: tuple[str, ...]) -> ArgumentError:
        """The error for a tensor whose shape fits no weight of the format."""
        name = f"{self.module}.{suffix}"
        found = list(self._checkpoint.shape(name, dtypes))
        return ArgumentError(f"tensor {shown(name)} has shape {shown(found)}, which fits no weight")


class PackedNumbers(QuantizedWeight):
    """A weight of whole numbers, `bits` each: (number - zero) * scale, a pair for each group.

    Attributes:
        bits: 4 or 8.
        group_size: columns of a group; the last group may have fewer.
        groups: int64 [K], the group of each column; None: `group_size` neighbours are one.
    """

    bits: int
    group_size: int
    groups: Tensor | None = None

    @abstractmethod
    def numbers(self, rows: slice, columns: slice) -> Tensor:
        """uint8 [n, k]."""

    @abstractmethod
    def scales(self, rows: slice, groups: slice) -> Tensor:
        """[n, g], of any floating dtype."""

    @abstractmethod
    def zeros(self, rows: slice, groups: slice) -> Tensor | None:
        """uint8 [n, g]; None: 2^(bits - 1)."""

    @property
    def num_groups(self) -> int:
        """Groups of a row."""
        if self.groups is not None:
            return int(self.groups.max()) + 1
        return -(-self.shape[1] // self.group_size)

    def values(self, rows: slice, columns: slice) -> Tensor:
        """See `QuantizedWeight.values`."""
        size = self.group_size
        numbers = self.numbers(rows, columns).float()
        if self.groups is None and columns.start % size == 0 and numbers.shape[1] % size == 0:
            part = slice(columns.start // size, columns.stop // size)
            scales, zeros = self._scales_and_zeros(rows, part)
            groups = numbers.unflatten(1, (-1, size))
            return groups.sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2)).flatten(1)
        group_of = self.groups
        if group_of is None:
            group_of = torch.arange(self.shape[1]) // size
        group_of = group_of[columns]
        first, last = int(group_of.min()), int(group_of.max())
        scales, zeros = self._scales_and_zeros(rows, slice(first, last + 1))
        group_of = group_of - first
        return numbers.sub_(zeros[:, group_of]).mul_(scales[:, group_of])

    def _scales_and_zeros(self, rows: slice, groups: slice) -> tuple[Tensor, Tensor]:
        scales, zeros = self.scales(rows, groups).float(), self.zeros(rows, groups)
        if zeros is None:
            return scales, torch.full_like(scales, 2.0 ** (self.bits - 1))
        return scales, zeros.float()

    def fits(self, form: WeightFormat) -> bool:
        """Whether it can stay packed so; then `packed` gives what `WeightFormat` names."""
        size = self.shape[1] if form.group_size == -1 else form.group_size
        if self.bits != form.bits or self.shape[1] % size or size % 2 or self.shape[0] == 0:
            return False
        if self.groups is None and self.group_size != size:
            return False
        if self.groups is not None:
            groups = self.groups[self.order()] if form.has_order else self.groups
            if not torch.equal(groups, torch.arange(self.shape[1]) // size):
                return False
        return form.has_zeros or self._has_middle_zeros()

    def packed(self, kind: str, form: WeightFormat, index: tuple[slice, ...]) -> Tensor:
        """A part of the tensor `kind` ("numbers", "scales", ...) of a weight that `fits`."""
        if kind == "order":
            return self.order().int()[index[0]]
        rows, columns = index
        if kind == "scales":
            return self.scales(rows, columns)
        if kind == "zeros":
            zeros = self.zeros(rows, columns)
            if zeros is not None:
                return zeros
            shape = len(range(self.shape[0])[rows]), len(range(self.num_groups)[columns])
            return torch.full(shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        each = 8 // self.bits
        columns = slice(columns.start * each, columns.stop * each)
        if form.has_order:
            numbers = self.numbers(rows, slice(0, self.shape[1]))[:, self.order()[columns]]
        else:
            numbers = self.numbers(rows, columns)
        return pack_numbers(numbers, self.bits)

    def packed_shape(self, kind: str) -> tuple[int, ...]:
        """The shape of the whole tensor `kind`."""
        n, k = self.shape
        if kind == "order":
            return (k,)
        return n, (k * self.bits // 8 if kind == "numbers" else self.num_groups)

    def order(self) -> Tensor:
        """int64 [K], the columns with those of a group side by side."""
        if self.groups is None:
            return torch.arange(self.shape[1])
        return torch.argsort(self.groups, stable=True)

    def _has_middle_zeros(self) -> bool:
        zeros = self.zeros(slice(0, self.shape[0]), slice(0, self.num_groups))
        return zeros is None or bool((zeros == 2 ** (self.bits - 1)).all())


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [n, W] -> uint8 [n, W * 32 / bits], the numbers from the lowest bits of each on."""
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), 2).flatten(1)


def words_of(part: slice, bits: int) -> slice:
    """The int32 words that hold the numbers `part`."""
    each = 32 // bits
    return slice(part.start // each, -(-part.stop // each))


def within_words(part: slice, bits: int) -> slice:
    """Where the numbers `part` are among those of their words."""
    first = part.start // (32 // bits) * (32 // bits)
    return slice(part.start - first, part.stop - first)
