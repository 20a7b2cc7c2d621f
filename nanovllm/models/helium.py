"""Helium (Kyutai 2025): Llama that rotates pairs of neighbours."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP
from nanovllm.models.glm import glm_attention
from nanovllm.models.model_config import ModelConfig


class HeliumForCausalLM(CausalLM):
    """Helium with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = glm_attention(config, cos_sin, context, index)
        return DecoderLayer(config, context, attention, GatedMLP(config, context, config.mlp_bias))
