"""Products with weights of 4 and 8 bits on the CPU, by torch's own kernels where they are fast."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from nanovllm.kernels.torch_ops import dequantize_packed, unpack_numbers
from nanovllm.kernels.types import PackedWeight

KERNEL_GROUP_SIZES = (32, 64, 128, 256)  # of torch's product of 4 bits
MAX_TOKENS = 64  # for more a weight is converted, some rows at a time
CHUNK_ELEMENTS = 2**18  # of a weight that are float32 at a time: they stay in the cache


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
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
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


def has_kernel(weight: PackedWeight) -> bool:
    """Whether torch has a product for the weight's groups."""
    if weight.bits == 4:
        return weight.group_size in KERNEL_GROUP_SIZES and len(weight.numbers) % 32 == 0
    return weight.zeros is None and weight.scales.shape[1] == 1


def _repack(weight: PackedWeight) -> _Repacked:
    version = weight.numbers._version
    numbers = unpack_numbers(weight.numbers, weight.bits)
    if weight.bits == 8:
        signed = (numbers ^ 128).view(torch.int8)
        return _Repacked(signed, weight.scales.squeeze(1).bfloat16(), version)
    scales = weight.scales.float()
    # The kernel computes (number - 8) * scale + shift.
    shifts = torch.zeros_like(scales)
    if weight.zeros is not None:
        shifts = (8 - weight.zeros.float()) * scales
    both = torch.stack((scales.t(), shifts.t()), 2).bfloat16().contiguous()  # [K / G, N, 2]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
    return _Repacked(packed, both, version)


def _converted_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product in float32 with some rows of the weight at a time, rounded to x's dtype."""
    in_order = replace(weight, order=None)  # as x is
    out = x.new_empty(len(x), len(weight.numbers))
    return in_chunks(x, lambda part: dequantize_packed(in_order.rows(part), x.dtype), out, bias)


def in_chunks(
    x: torch.Tensor,
    rows_of: Callable[[slice], torch.Tensor],
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] times a weight [N, K] into `out` [T, N], some of its rows in float32 at a time.

    rows_of: gives some rows of the weight, in any dtype.
    """
    x32 = x.float()
    rows = max(1, CHUNK_ELEMENTS // x.shape[1])
    for begin in range(0, out.shape[1], rows):
        part = slice(begin, begin + rows)
        bias32 = None if bias is None else bias[part].float()
        out[:, part] = F.linear(x32, rows_of(part).float(), bias32)
    return out
