"""Gemma (Gemma team 2024, arXiv 2403.08295): GELU, norm weights beside 1, scaled embeddings."""

import torch
from torch import Tensor, nn

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class GemmaForCausalLM(CausalLM):
    """Gemma with its LM head."""

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__(config, context)
        # Rounded to the embeddings' dtype, as in training: 55.5 in bfloat16 for 3072 features.
        multiplier = torch.tensor(config.hidden_size**0.5, device="cpu").to(context.dtype)
        self.model.embedding_multiplier = multiplier.item()

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> nn.Module:
        """See `CausalLM.new_layer`."""
        bias = config.attention_bias
        attention = SelfAttention(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        return DecoderLayer(config, context, attention, GatedMLP(config, context))
