"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783) and what has their shape, such as SmolLM2.

Biases are the config's choice; Meta's own models have none."""

import torch

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class LlamaForCausalLM(CausalLM):
    """Llama with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: torch.Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        bias = config.attention_bias
        attention = SelfAttention(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        return DecoderLayer(config, context, attention, GatedMLP(config, context, config.mlp_bias))
