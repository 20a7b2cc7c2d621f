"""Granite 3's mixtures of experts (IBM 2024): Granite with experts in every layer."""

from typing import ClassVar

from torch import Tensor, nn

from nanovllm.kernels.types import Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.moe import Router, new_expert_weights
from nanovllm.layers.stacked_experts import stacked_shards
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer
from nanovllm.models.extras import scaled
from nanovllm.models.granite import GraniteAttention
from nanovllm.models.model_config import ModelConfig


class GraniteMoeMLP(nn.Module):
    """A sparse MLP whose checkpoint has one tensor for all experts, gate's rows before up's.

    The probabilities of a token's experts are the softmax of their logits alone. The output is
    multiplied before it is added to the residual.
    """

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__()
        self.ops, self.multiplier = context.ops, config.residual_multiplier
        self.num_experts_per_tok = config.num_experts_per_tok
        num_experts, hidden_size = config.num_experts, config.hidden_size
        inner_size = config.moe_intermediate_size
        input_shards, output_shards = stacked_shards(
            num_experts, hidden_size, inner_size, context.tp, is_transposed=False
        )
        self.router = Router(num_experts, hidden_size, context)
        self.input_linear, self.output_linear = new_expert_weights(
            input_shards, output_shards, context
        )

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> this rank's term of [T, hidden_size]."""
        gate_up, down = self.input_linear, self.output_linear
        term = self.ops.experts(
            x,
            self.router(x),
            gate_up.weight,
            down.weight,
            self.num_experts_per_tok,
            True,
            gate_up.weight_scale,
            down.weight_scale,
        )
        return scaled(Unreduced(term), self.multiplier)


class GraniteMoeForCausalLM(CausalLM):
    """Granite-MoE with its LM head."""

    checkpoint_names: ClassVar[dict[str, str]] = {
        "mlp": "block_sparse_moe",
        "router": "router.layer",
    }

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = GraniteAttention(config, cos_sin, context, index)
        return DecoderLayer(config, context, attention, GraniteMoeMLP(config, context))
