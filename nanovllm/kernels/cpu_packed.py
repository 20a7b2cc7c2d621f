"""Products with weights of 4 and 8 bits on the CPU, by torch's own kernels where they are fast."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

KERNEL_GROUP_SIZES = (32, 64, 128, 256)  # of torch's product of 4 bits
MAX_TOKENS = 32  # for more a weight is converted, some rows at a time
CHUNK_ELEMENTS = 2**18  # of a weight that are float32 at a time: they stay in the cache


class Packed(Protocol):
    """A weight [N, K] of (number - zero) * scale; see `PackedWeight`."""

    @property
    def numbers(self) -> torch.Tensor:
        """uint8 [N, K], or [N, K / 2] with two in a byte, the lower half first."""

    @property
    def scales(self) -> torch.Tensor:
        """[N, K / group_size]."""

    @property
    def zeros(self) -> torch.Tensor | None:
        """uint8 [N, K / group_size]; None: 2^(bits - 1)."""

    @property
    def order(self) -> torch.Tensor | None:
        """int32 [K], the column of x that each column multiplies; None: the same."""

    @property
    def bits(self) -> int:
        """4 or 8."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""


class _Repacked(NamedTuple):
    """What torch's kernel reads."""

    numbers: torch.Tensor
    scales: torch.Tensor
    version: int  # of the weight's numbers


class PackedProducts:
    """`Ops.packed_linear`; keeps each weight's numbers in the kernels' order beside the weight.

    float32 has no fast kernel in torch: the weight is converted.
    """

    def __init__(self) -> None:
        self._repacked = WeakTensorKeyDictionary()

    def __call__(
        self, x: torch.Tensor, weight: Packed, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, K], weight [N, K], bias [N] -> [T, N]."""
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        if x.dtype != torch.bfloat16 or len(x) > MAX_TOKENS or not has_kernel(weight):
            return _converted_linear(x, weight, bias)
        repacked: _Repacked | None = self._repacked.get(weight.numbers)
        if repacked is None or repacked.version != weight.numbers._version:
            repacked = _repack(weight)
            self._repacked[weight.numbers] = repacked
        numbers, scales, _ = repacked
        if weight.bits == 4:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), numbers, weight.group_size, scales
            )
        else:
            out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), numbers, scales)
        return out if bias is None else out.add_(bias)


def has_kernel(weight: Packed) -> bool:
    """Whether torch has a product for the weight's groups."""
    if weight.bits == 4:
        return weight.group_size in KERNEL_GROUP_SIZES and len(weight.numbers) % 32 == 0
    return weight.zeros is None and weight.scales.shape[1] == 1


def _repack(weight: Packed) -> _Repacked:
    version = weight.numbers._version
    if weight.bits == 8:
        signed = (weight.numbers ^ 128).view(torch.int8)
        return _Repacked(signed, weight.scales.squeeze(1).bfloat16(), version)
    numbers = torch.stack((weight.numbers & 15, weight.numbers >> 4), 2).flatten(1).int()
    scales = weight.scales.float()
    # The kernel computes (number - 8) * scale + shift.
    shifts = torch.zeros_like(scales)
    if weight.zeros is not None:
        shifts = (8 - weight.zeros.float()) * scales
    both = torch.stack((scales.t(), shifts.t()), 2).bfloat16().contiguous()  # [K / G, N, 2]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return _Repacked(packed, both, version)


def _converted_linear(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in float32 with some rows of the weight at a time, rounded to x's dtype."""
    num_rows = len(weight.numbers)
    x32, out = x.float(), x.new_empty(len(x), num_rows)
    rows = max(1, CHUNK_ELEMENTS // x.shape[1])
    for begin in range(0, num_rows, rows):
        part = slice(begin, begin + rows)
        numbers = weight.numbers[part]
        if weight.bits == 4:
            numbers = torch.stack((numbers & 15, numbers >> 4), 2).flatten(1)
        groups = numbers.float().unflatten(1, (-1, weight.group_size))
        if weight.zeros is None:
            groups -= 2.0 ** (weight.bits - 1)
        else:
            groups -= weight.zeros[part].unsqueeze(2).float()
        groups *= weight.scales[part].unsqueeze(2).float()
        values = groups.flatten(1).to(x.dtype).float()  # rounded as the weight would be
        out[:, part] = F.linear(x32, values, None if bias is None else bias[part].float())
    return out
