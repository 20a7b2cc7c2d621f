"""Linear layers, split over the tensor-parallel ranks by output (column) or by input (row)."""

import torch
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
    """A projection whose input is split over the ranks: each computes a term of the output.

    `RMSNorm.add`, which comes next in every layer, sums them over the ranks.
    """

    def __init__(
        self, input_size: int, output_size: int, bias: bool, context: ModelContext
    ) -> None:
        super().__init__()
        self.ops = context.ops
        self.rank = context.tp.rank
        size = input_size // context.tp.size
        rows, start = slice(0, output_size), self.rank * size
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
        """x [T, input_size / ranks] -> this rank's term of [T, output_size]."""
        return self.ops.linear(x, self.weight, self.bias if self.rank == 0 else None)
