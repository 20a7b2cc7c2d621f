"""A sparse MLP: a router sends each token to a few of many small gated MLPs, the experts.

Each rank holds a slice of every expert, as it does of a dense MLP. Parameters keep the experts'
weights one below another; module names are those of the checkpoints' tensors.
"""

from torch import Tensor, nn

from nanovllm.kernels.types import LinearOutput, Unreduced
from nanovllm.layers.context import Layer, ModelContext
from nanovllm.layers.fp8_weights import keeps_fp8, new_linear_weight
from nanovllm.layers.weights import Shard, new_parameter, whole


class SparseMLP(Layer[[Tensor], Unreduced]):
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


class Router(Layer[[Tensor], LinearOutput]):
    """Scores the experts; every rank holds it whole, in the model's dtype."""

    def __init__(self, num_experts: int, hidden_size: int, context: ModelContext) -> None:
        super().__init__()
        self.ops = context.ops
        shape = num_experts, hidden_size
        self.weight = new_parameter(shape, whole(shape), context.dtype, context.device)

    def forward(self, x: Tensor) -> LinearOutput:
        """x [T, hidden_size] -> [T, num_experts], the logits of their probabilities."""
        return self.ops.linear(x, self.weight, None)


class Experts(nn.Module):
    """This rank's slices of the experts' weights, as `Ops.experts` takes them."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, context: ModelContext
    ) -> None:
        super().__init__()
        size = intermediate_size // context.tp.size
        part = slice(context.tp.rank * size, (context.tp.rank + 1) * size)
        columns = slice(0, hidden_size)
        gate_up_shards, down_shards = {}, {}
        for expert in range(num_experts):
            for i, name in enumerate(("gate_proj", "up_proj")):
                first = (2 * expert + i) * size
                gate_up_shards[f"{expert}.{name}"] = Shard(
                    (intermediate_size, hidden_size),
                    (part, columns),
                    (slice(first, first + size), columns),
                )
            first = expert * hidden_size
            down_shards[f"{expert}.down_proj"] = Shard(
                (hidden_size, intermediate_size),
                (slice(0, hidden_size), part),
                (slice(first, first + hidden_size), slice(0, size)),
            )
        gate_up = (num_experts * 2 * size, hidden_size), gate_up_shards
        down = (num_experts * hidden_size, size), down_shards
        is_fp8 = keeps_fp8(*gate_up, context) and keeps_fp8(*down, context)  # both or none
        self.gate_up_proj = ExpertWeights(*gate_up, context, is_fp8)
        self.down_proj = ExpertWeights(*down, context, is_fp8)


class ExpertWeights(nn.Module):
    """One weight of all experts, with its scales if it is fp8."""

    def __init__(
        self,
        shape: tuple[int, int],
        shards: dict[str, Shard],
        context: ModelContext,
        may_be_fp8: bool,
    ) -> None:
        super().__init__()
        self.weight, self.weight_scale = new_linear_weight(shape, shards, context, may_be_fp8)
