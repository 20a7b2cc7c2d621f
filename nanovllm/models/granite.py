"""Granite 3 (IBM 2024): Llama with multipliers of embeddings, scores, outputs and logits."""

from torch import Tensor

from nanovllm.kernels.types import AttentionMetadata, Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.extras import scaled
from nanovllm.models.model_config import ModelConfig


class GraniteAttention(SelfAttention):
    """Self-attention whose output is multiplied before it is added to the residual."""

    def __init__(
        self, config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> None:
        bias = config.attention_bias
        super().__init__(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size], at `logits_indices`."""
        return scaled(super().forward(x, positions, metadata), self.multiplier)


class GraniteMLP(GatedMLP):
    """An MLP whose output is multiplied before it is added to the residual."""

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__(config, context, config.mlp_bias)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size]."""
        return scaled(super().forward(x), self.multiplier)


class GraniteForCausalLM(CausalLM):
    """Granite with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = GraniteAttention(config, cos_sin, context, index)
        return DecoderLayer(config, context, attention, GraniteMLP(config, context))
