"""Weights of AWQ checkpoints (Lin et al. 2023, arXiv 2306.00978), in the layout "gemm" of AutoAWQ.

Of a module [N, K] with groups of G columns:

    qweight  int32 [K, N / 8], eight numbers of 4 bits in a word
    qzeros   int32 [K / G, N / 8]
    scales   float16 [K / G, N]

From the lowest bits of a word on, its numbers are those of the rows 0, 2, 4, 6, 1, 3, 5, 7.
"""

import torch
from torch import Tensor

from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.quantization_config import Quantization
from nanovllm.models.quantized_weight import (
    FLOATS,
    INT32,
    PackedNumbers,
    within_words,
    words_of,
)

ROWS = [0, 2, 4, 6, 1, 3, 5, 7]  # of the numbers in a word, from its lowest bits on


class AwqWeight(PackedNumbers):
    """The weight of an AWQ module.

    Raises:
        ArgumentError: a tensor is missing, or of another shape than the others ask for.
    """

    bits = 4

    def __init__(
        self, checkpoint: SafetensorsCheckpoint, module: str, quantization: Quantization
    ) -> None:
        super().__init__(checkpoint, module, ("qweight", "qzeros", "scales"))
        num_columns, num_words = self.matrix_of("qweight", INT32)
        self.shape = num_words * 8, num_columns
        size = quantization.group_size or -1
        self.group_size = num_columns if size == -1 else size
        self.check("scales", FLOATS, self.num_groups, self.shape[0])
        form = quantization.weight_format
        if self.has("qzeros") or form is None or form.has_zeros:
            self.check("qzeros", INT32, self.num_groups, num_words)

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        """See `PackedNumbers.numbers`."""
        return self._unpacked("qweight", columns, rows)

    def scales(self, rows: slice, groups: slice) -> Tensor:
        """See `PackedNumbers.scales`."""
        return self.read("scales", groups, rows).t()

    def zeros(self, rows: slice, groups: slice) -> Tensor | None:
        """See `PackedNumbers.zeros`."""
        return self._unpacked("qzeros", groups, rows) if self.has("qzeros") else None

    def _unpacked(self, suffix: str, columns: slice, rows: slice) -> Tensor:
        words = self.read(suffix, columns, words_of(rows, 4)).t().contiguous()
        numbers = torch.empty(len(words), 8, words.shape[1], dtype=torch.uint8)
        for place, row in enumerate(ROWS):
            numbers[:, row] = (words >> 4 * place) & 15
        return numbers.flatten(0, 1)[within_words(rows, 4)]
