"""Qwen2 and Qwen2.5 (Qwen team 2024, arXiv 2407.10671, 2412.15115): q, k and v have biases."""

import torch

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class Qwen2ForCausalLM(CausalLM):
    """Qwen2 or Qwen2.5 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: torch.Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = SelfAttention(config, cos_sin, context, index, qkv_bias=True, output_bias=False)
        return DecoderLayer(config, context, attention, GatedMLP(config, context))
