"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with experts in every layer."""

from typing import ClassVar

import torch

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, SelfAttention
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3_moe import sparse_mlp


class MixtralForCausalLM(CausalLM):
    """Mixtral with its LM head."""

    checkpoint_names: ClassVar[dict[str, str]] = {
        "mlp": "block_sparse_moe",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
    }

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: torch.Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = SelfAttention(
            config, cos_sin, context, index, qkv_bias=False, output_bias=False
        )
        return DecoderLayer(config, context, attention, sparse_mlp(config, context))
