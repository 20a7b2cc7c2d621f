"""Linear layers, split over the tensor-parallel ranks by output (column) or by input (row)."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.ops import Product
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import Shard, new_parameter


class ColumnParallelLinear(nn.Module):
    """Several projections of one input, merged; each rank computes a slice of each output.

    Args:
        input_size: features of x.
        slices: checkpoint module name -> (full output size, this rank's first row, its row count).
        bias: whether the checkpoint has biases.
    """

    def __init__(
        self,
        input_size: int,
        slices: dict[str, tuple[int, int, int]],
        bias: bool,
        context: ModelContext,
    ) -> None:
        super().__init__()
        self.ops = context.ops
        columns = slice(0, input_size)
        weight_shards, bias_shards = {}, {}
        offset = 0
        for name, (full_size, start, size) in slices.items():
            source, target = slice(start, start + size), slice(offset, offset + size)
            weight_shards[name] = Shard(
                (full_size, input_size), (source, columns), (target, columns)
            )
            bias_shards[name] = Shard((full_size,), (source,), (target,))
            offset += size
        self.weight = new_parameter(
            (offset, input_size), weight_shards, context.dtype, context.device
        )
        self.bias = (
            new_parameter((offset,), bias_shards, context.dtype, context.device) if bias else None
        )

    def forward(self, x: torch.Tensor) -> Product:
        """x [T, input_size] -> [T, sum of this rank's row counts]."""
        return self.ops.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A projection whose input is split over the ranks; the partial outputs are summed."""

    def __init__(
        self, input_size: int, output_size: int, bias: bool, context: ModelContext
    ) -> None:
        super().__init__()
        self.ops = context.ops
        self.tp = context.tp
        size = input_size // self.tp.size
        rows, start = slice(0, output_size), self.tp.rank * size
        shard = Shard(
            (output_size, input_size), (rows, slice(start, start + size)), (rows, slice(0, size))
        )
        self.weight = new_parameter((output_size, size), {"": shard}, context.dtype, context.device)
        bias_shard = Shard((output_size,), (rows,), (rows,))
        self.bias = (
            new_parameter((output_size,), {"": bias_shard}, context.dtype, context.device)
            if bias
            else None
        )

    def forward(self, x: torch.Tensor) -> Product:
        """x [T, input_size / ranks] -> [T, output_size]."""
        if self.tp.size == 1:
            return self.ops.linear(x, self.weight, self.bias)
        y = self.tp.all_reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias
