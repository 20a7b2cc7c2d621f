"""Seed-OSS (ByteDance 2025): Llama with a choice of its own for the bias after attention."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class SeedOssForCausalLM(CausalLM):
    """Seed-OSS with its LM head."""

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
            output_bias=config.attention_out_bias,
        )
        return DecoderLayer(config, context, attention, GatedMLP(config, context, config.mlp_bias))
