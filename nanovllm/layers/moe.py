"""A sparse MLP: a router sends each token to a few of many small gated MLPs, the experts.

Each rank holds a slice of every expert, as it does of a dense MLP. Parameters keep the experts'
weights one below another; module names are those of the checkpoints' tensors.
"""

from dataclasses import replace

from torch import Tensor, nn

from nanovllm.kernels.types import LinearOutput, Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear_weight import LinearWeight, is_compact
from nanovllm.layers.weights import Shard, column_shards, new_whole_parameter, row_shards


class SparseMLP(nn.Module):
    """Sum over a token's most probable experts of probability * expert (Shazeer et al. 2017,
    arXiv 1701.06538)."""

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        norm_topk_prob: bool,
        context: ModelContext,
    ) -> None:
        super().__init__()
        self.ops = context.ops
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.gate = Router(num_experts, hidden_size, context)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, context)

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> this rank's term of [T, hidden_size]."""
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        term = self.ops.experts(
            x,
            self.gate(x),
            gate_up.weight,
            down.weight,
            self.num_experts_per_tok,
            self.norm_topk_prob,
            gate_up.weight_scale,
            down.weight_scale,
        )
        return Unreduced(term)


class Router(nn.Module):
    """Scores the experts; every rank holds it whole, in the model's dtype."""

    def __init__(
        self, num_experts: int, hidden_size: int, context: ModelContext, bias: bool = False
    ) -> None:
        super().__init__()
        self.ops = context.ops
        self.weight = new_whole_parameter((num_experts, hidden_size), context)
        self.bias = new_whole_parameter((num_experts,), context) if bias else None

    def forward(self, x: Tensor) -> LinearOutput:
        """x [T, hidden_size] -> [T, num_experts], the logits of their probabilities."""
        return self.ops.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """This rank's slices of the experts' weights, as `Ops.experts` takes them."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, context: ModelContext
    ) -> None:
        super().__init__()
        heads = {
            f"{expert}.{name}": (intermediate_size, 1)
            for expert in range(num_experts)
            for name in ("gate_proj", "up_proj")
        }
        gate_up_shards = column_shards(hidden_size, heads, context.tp)
        names = [f"{expert}.down_proj" for expert in range(num_experts)]
        down_shards = row_shards(intermediate_size, hidden_size, context.tp, names)
        self.gate_up_proj, self.down_proj = new_expert_weights(gate_up_shards, down_shards, context)


class ExpertWeights(LinearWeight):
    """One weight of all experts."""


def new_expert_weights(
    gate_up_shards: dict[str, Shard], down_shards: dict[str, Shard], context: ModelContext
) -> tuple[ExpertWeights, ExpertWeights]:
    """The two weights of all experts, of one kind, as `Ops.experts` takes them.

    Experts whose columns have an order of their own are not packed.
    """
    if context.weight_format is not None and context.weight_format.has_order:
        context = replace(context, weight_format=None)
    is_plain = not (is_compact(gate_up_shards, context) and is_compact(down_shards, context))
    gate_up = ExpertWeights(gate_up_shards, context, is_plain)
    down = ExpertWeights(down_shards, context, is_plain)
    gate_up.same_kind = down.same_kind = [gate_up, down]
    return gate_up, down
