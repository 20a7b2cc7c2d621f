"""Experts whose checkpoints have one tensor for the weights of all of them; some with biases."""

from dataclasses import replace

from torch import Tensor, nn

from nanovllm.kernels.types import ClampedSwiGLU, LinearOutput
from nanovllm.layers.context import ModelContext
from nanovllm.layers.moe import new_expert_weights
from nanovllm.layers.weights import Parameter, Shard, new_parameter, shape_of
from nanovllm.parallel.tensor_parallel import TensorParallel


class StackedExperts(nn.Module):
    """This rank's slices of the experts' weights and biases.

    The checkpoint's `gate_up_proj` [E, hidden_size, 2 * intermediate_size] has gate's and up's
    features in turn, its `down_proj` is [E, intermediate_size, hidden_size]. Here gate comes before
    up, and both are transposed, as `Ops.experts` takes them. The names of biases end with "_bias".
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        swiglu: ClampedSwiGLU,
        context: ModelContext,
    ) -> None:
        super().__init__()
        self.ops, self.swiglu, self.rank = context.ops, swiglu, context.tp.rank
        gate_up_shards, down_shards = stacked_shards(
            num_experts, hidden_size, intermediate_size, context.tp, is_transposed=True
        )
        self.gate_up_proj, self.down_proj = new_expert_weights(gate_up_shards, down_shards, context)
        for module in (self.gate_up_proj, self.down_proj):
            module.loaded.tensor_name = ""
        self.gate_up_proj_bias = _new_bias(gate_up_shards, context)
        self.down_proj_bias = _new_bias(down_shards, context)

    def forward(
        self, x: Tensor, router_logits: LinearOutput, num_experts_per_tok: int
    ) -> LinearOutput:
        """x [T, hidden_size], router_logits [T, E] -> this rank's term of [T, hidden_size].

        A token's probabilities are the softmax of the logits of its experts.
        """
        return self.ops.experts(
            x,
            router_logits,
            self.gate_up_proj.weight,
            self.down_proj.weight,
            num_experts_per_tok,
            True,
            self.gate_up_proj.weight_scale,
            self.down_proj.weight_scale,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias if self.rank == 0 else None,
            swiglu=self.swiglu,
        )


def stacked_shards(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    tp: TensorParallel,
    is_transposed: bool,
) -> tuple[dict[str, Shard], dict[str, Shard]]:
    """Of a tensor with gate and up of all experts, and of one with their down, this rank's slices.

    The checkpoint's matrices are [2 * intermediate_size, hidden_size], gate before up, and
    [hidden_size, intermediate_size]. With `is_transposed` they are the transposes of these, and
    gate's and up's features come in turn.
    """
    size = intermediate_size // tp.size
    start = tp.rank * size
    everything = slice(0, hidden_size)

    def shard(expert: int, rows: slice, columns: slice, first: int, shape: list[int]) -> Shard:
        """Of the matrix of an expert its rows and columns, which go to rows from `first` on."""
        source = [rows, columns]
        num_columns = columns.stop - columns.start
        num_rows = len(range(rows.start, rows.stop, rows.step or 1))
        return Shard(
            (num_experts, *(shape[::-1] if is_transposed else shape)),
            (slice(expert, expert + 1), *(source[::-1] if is_transposed else source)),
            (slice(first, first + num_rows), slice(0, num_columns)),
            fused_name="",
            is_transposed=is_transposed,
        )

    gate_up, down = {}, {}
    for expert in range(num_experts):
        for i in range(2):  # gate and up
            begin = i * intermediate_size + start
            rows = slice(begin, begin + size)
            if is_transposed:
                rows = slice(2 * start + i, 2 * (start + size), 2)
            shape = [2 * intermediate_size, hidden_size]
            gate_up[f"{expert}.{i}"] = shard(
                expert, rows, everything, (2 * expert + i) * size, shape
            )
        columns, shape = slice(start, start + size), [hidden_size, intermediate_size]
        down[f"{expert}"] = shard(expert, everything, columns, expert * hidden_size, shape)
    return gate_up, down


def _new_bias(weight_shards: dict[str, Shard], context: ModelContext) -> Parameter:
    """The bias of a weight with these shards: [E, rows] in the checkpoint, [E * rows] here."""
    shards = {
        name: replace(
            shard,
            full_shape=shard.full_shape[::2],
            source=shard.source[::2],
            target=shard.target[:1],
            is_transposed=False,
        )
        for name, shard in weight_shards.items()
    }
    return new_parameter(shape_of(shards), shards, context.dtype, context.device)
