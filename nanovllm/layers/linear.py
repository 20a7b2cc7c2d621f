"""Linear layers, split over the tensor-parallel ranks by output (column) or by input (row)."""

from torch import Tensor, nn

from nanovllm.kernels.types import LinearOutput, Unreduced
from nanovllm.layers.context import Layer, ModelContext
from nanovllm.layers.fp8_weights import new_linear_weight
from nanovllm.layers.weights import Shard, new_parameter


class _Linear(nn.Module):
    """A weight [rows, columns], with its scales if it is fp8, and a bias, all of this rank."""

    def __init__(
        self,
        shape: tuple[int, int],
        weight_shards: dict[str, Shard],
        bias_shards: dict[str, Shard] | None,
        context: ModelContext,
    ) -> None:
        super().__init__()
        self.ops = context.ops
        self.weight, self.weight_scale = new_linear_weight(shape, weight_shards, context)
        self.bias = (
            new_parameter(shape[:1], bias_shards, context.dtype, context.device)
            if bias_shards
            else None
        )

    def _multiply(self, x: Tensor, bias: Tensor | None) -> LinearOutput:
        if self.weight_scale is None:
            return self.ops.linear(x, self.weight, bias)
        return self.ops.fp8_linear(x, self.weight, self.weight_scale, bias)


class ColumnParallelLinear(_Linear, Layer[[Tensor], LinearOutput]):
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
        shape = offset, input_size
        super().__init__(shape, weight_shards, bias_shards if bias else None, context)

    def forward(self, x: Tensor) -> LinearOutput:
        """x [T, input_size] -> [T, sum of this rank's row counts]."""
        return self._multiply(x, self.bias)


class RowParallelLinear(_Linear, Layer[[Tensor], Unreduced]):
    """A projection whose input is split over the ranks: each computes a term of the output.

    `RMSNorm.add` or `TensorParallel.all_reduce` sums the terms.
    """

    def __init__(
        self, input_size: int, output_size: int, bias: bool, context: ModelContext
    ) -> None:
        rank, size = context.tp.rank, input_size // context.tp.size
        rows, start = slice(0, output_size), rank * size
        shard = Shard(
            (output_size, input_size), (rows, slice(start, start + size)), (rows, slice(0, size))
        )
        bias_shard = Shard((output_size,), (rows,), (rows,))
        bias_shards = {"": bias_shard} if bias else None
        super().__init__((output_size, size), {"": shard}, bias_shards, context)
        self.rank = rank

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, input_size / ranks] -> this rank's term of [T, output_size]."""
        return Unreduced(self._multiply(x, self.bias if self.rank == 0 else None))
