"""Helium (Kyutai 2025): Llama that rotates pairs of neighbours."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.layers.rotary_order import rotary_order
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class HeliumForCausalLM(CausalLM):
    """Helium with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = SelfAttention(
            config,
            cos_sin,
            context,
            index,
            qkv_bias=config.attention_bias,
            output_bias=False,
            head_order=rotary_order(config.head_dim, config.rope_of(index), interleaved=True),
        )
        return DecoderLayer(config, context, attention, GatedMLP(config, context, config.mlp_bias))
