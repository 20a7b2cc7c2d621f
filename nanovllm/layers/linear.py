"""Linear layers, split over the tensor-parallel ranks by output (column) or by input (row)."""

from torch import Tensor

from nanovllm.kernels.types import LinearOutput, Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear_weight import LinearWeight
from nanovllm.layers.weights import HeadsByName, Shard, column_shards, new_bias, row_shards


class _Linear(LinearWeight):
    """A weight [rows, columns] and a bias, all of this rank."""

    def __init__(self, shards: dict[str, Shard], bias: bool, context: ModelContext) -> None:
        super().__init__(shards, context)
        self.bias = new_bias(shards, context) if bias else None


class ColumnParallelLinear(_Linear):
    """Several projections of one input, merged; each rank computes its heads of each output.

    Args:
        input_size: features of x.
        heads: of each projection. Where there are fewer heads than ranks, several ranks hold the
            same one.
        bias: whether the checkpoint has biases.
        context: see `ModelContext`.
    """

    def __init__(
        self, input_size: int, heads: HeadsByName, bias: bool, context: ModelContext
    ) -> None:
        super().__init__(column_shards(input_size, heads, context.tp), bias, context)

    def forward(self, x: Tensor) -> LinearOutput:
        """x [T, input_size] -> [T, features of this rank's heads]."""
        return self.multiply(x, self.bias)


class RowParallelLinear(_Linear):
    """A projection whose input is split over the ranks: each computes a term of the output.

    `RMSNorm.add` or `TensorParallel.all_reduce` sums the terms.
    """

    def __init__(
        self, input_size: int, output_size: int, bias: bool, context: ModelContext
    ) -> None:
        super().__init__(row_shards(input_size, output_size, context.tp), bias, context)
        self.rank = context.tp.rank

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, input_size / ranks] -> this rank's term of [T, output_size]."""
        return Unreduced(self.multiply_later(x, self.bias if self.rank == 0 else None))
