"""Weights of GPTQ checkpoints (Frantar et al. 2022, arXiv 2210.17323), of AutoGPTQ and GPTQModel.

Of a module [N, K] in B bits with groups of G columns:

    qweight  int32 [K * B / 32, N], 32 / B columns in a word, the first in its lowest bits
    qzeros   int32 [K / G, N * B / 32], 32 / B rows in a word
    scales   [K / G, N]
    g_idx    int32 [K], the group of each column; with act-order (`desc_act`) in any order

The checkpoint format "gptq" has zeros less one, "gptq_v2" the zeros themselves.
"""

import torch
from torch import Tensor

from nanovllm.errors import ArgumentError, shown
from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.quantization_config import BITS, Quantization
from nanovllm.models.quantized_weight import (
    FLOATS,
    INT32,
    PackedNumbers,
    unpacked,
    within_words,
    words_of,
)

ONES = {4: 0x11111111, 8: 0x01010101}  # a one in each number of a word


class GptqWeight(PackedNumbers):
    """The weight of a GPTQ module. Its bits and groups are those of its tensors.

    Raises:
        ArgumentError: a tensor is missing, or the shapes or groups fit no weight of 4 or 8 bits.
    """

    def __init__(
        self, checkpoint: SafetensorsCheckpoint, module: str, quantization: Quantization
    ) -> None:
        super().__init__(checkpoint, module, ("qweight", "qzeros", "scales", "g_idx"))
        self._offset, self._has_carries = quantization.zero_offset, quantization.has_carries
        num_words, num_rows = self.matrix_of("qweight", INT32)
        num_columns = self.vector_of("g_idx", INT32)
        self.bits = num_words * 32 // num_columns
        if self.bits not in BITS or num_words * 32 != num_columns * self.bits:
            raise self.wrong("qweight", INT32)
        self.shape = num_rows, num_columns
        num_groups, _ = self.matrix_of("scales", FLOATS)
        self.check("scales", FLOATS, num_groups, num_rows)
        self.check("qzeros", INT32, num_groups, words_of(slice(0, num_rows), self.bits).stop)
        groups = self.read("g_idx", slice(0, num_columns)).long()
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise ArgumentError(
                f"tensor {shown(f'{module}.g_idx')} must have numbers of the {num_groups} groups, "
                f"got {int(groups.min())} to {int(groups.max())}"
            )
        self.group_size = -(-num_columns // num_groups)
        if not torch.equal(groups, torch.arange(num_columns) // self.group_size):
            self.groups = groups

    @property
    def num_groups(self) -> int:
        """Groups of a row."""
        return self.shape_of("scales", FLOATS)[0]

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        """See `PackedNumbers.numbers`."""
        words = self.read("qweight", words_of(columns, self.bits), rows).t()
        return unpacked(words, self.bits)[:, within_words(columns, self.bits)]

    def scales(self, rows: slice, groups: slice) -> Tensor:
        """See `PackedNumbers.scales`."""
        return self.read("scales", groups, rows).t()

    def zeros(self, rows: slice, groups: slice) -> Tensor | None:
        """See `PackedNumbers.zeros`.

        GPTQModel takes the ones from whole words, AutoGPTQ from each number alone. They differ
        where a zero is 0.
        """
        words = self.read("qzeros", groups, words_of(rows, self.bits))
        if self._offset and self._has_carries:
            words = words + ONES[self.bits]
        zeros = unpacked(words, self.bits)
        if self._offset and not self._has_carries:
            zeros = (zeros + 1) & (2**self.bits - 1)
        return zeros[:, within_words(rows, self.bits)].t()
