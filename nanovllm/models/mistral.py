"""Mistral (Jiang et al. 2023, arXiv 2310.06825): no biases, and mostly a sliding window."""

import torch

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class MistralForCausalLM(CausalLM):
    """Mistral with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: torch.Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = SelfAttention(
            config, cos_sin, context, index, qkv_bias=False, output_bias=False
        )
        return DecoderLayer(config, context, attention, GatedMLP(config, context))
