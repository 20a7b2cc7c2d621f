"""What packing makes of weights, by plain maths, and checkpoints in memory that are packed."""

import torch

from nanovllm.kernels.torch_ops import unpack_numbers
from nanovllm.kernels.types import PackedWeight

GROUP_SIZES = (128, 64, 32)


def through_groups(weight: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """weight [N, K] as quantization="int4" or "int8" keeps it in a float32 model."""
    n, k = weight.shape
    if n % 16 or k % 32:
        return weight.float()
    group_size = next(size for size in GROUP_SIZES if k % size == 0)
    groups = weight.float().view(n, -1, group_size)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = groups.abs().amax(-1, keepdim=True) / (highest + 0.5)
    return ((groups / scales).round().clamp(lowest, highest) * scales).view(n, k)


def random_packed(
    n: int, k: int, bits: int, group_size: int, has_zeros: bool, has_order: bool, seed: int
) -> dict[str, torch.Tensor]:
    """The tensors of a module [n, k], by the ends of their names; see `WeightFormat`."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes, num_groups = k * bits // 8, k // group_size
    tensors = {
        "numbers": torch.randint(256, (n, num_bytes), dtype=torch.uint8, generator=generator),
        "scales": torch.rand(n, num_groups, generator=generator) + 0.1,
    }
    if has_zeros:
        size = (n, num_groups)
        tensors["zeros"] = torch.randint(2**bits, size, dtype=torch.uint8, generator=generator)
    if has_order:
        tensors["order"] = torch.randperm(k, generator=generator).int()
    return tensors


def packed_weight(tensors: dict[str, torch.Tensor], bits: int, group_size: int) -> PackedWeight:
    zeros, order = tensors.get("zeros"), tensors.get("order")
    return PackedWeight(tensors["numbers"], tensors["scales"], zeros, order, bits, group_size)


def values_of(weight: PackedWeight) -> torch.Tensor:
    """The weight [N, K] in float64, an element at a time, columns in the order of x's."""
    n, k = weight.shape
    numbers = unpack_numbers(weight.numbers, weight.bits).tolist()
    scales = weight.scales.double().tolist()
    zeros = None if weight.zeros is None else weight.zeros.tolist()
    order = range(k) if weight.order is None else weight.order.tolist()
    values = torch.empty(n, k, dtype=torch.float64)
    for row in range(n):
        for column in range(k):
            group = column // weight.group_size
            zero = 2 ** (weight.bits - 1) if zeros is None else zeros[row][group]
            values[row, order[column]] = (numbers[row][column] - zero) * scales[row][group]
    return values
