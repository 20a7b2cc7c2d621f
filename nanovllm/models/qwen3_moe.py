"""Qwen3-MoE (Qwen team 2025, arXiv 2505.09388): Qwen3 with a mixture of experts for its MLP.

Some layers may keep the dense MLP."""

import torch
from transformers import PretrainedConfig

from nanovllm.layers.context import ModelContext
from nanovllm.layers.moe import SparseMLP
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP
from nanovllm.models.moe_config import is_sparse
from nanovllm.models.qwen3 import Qwen3Attention


class Qwen3MoeForCausalLM(CausalLM):
    """Qwen3-MoE with its LM head."""

    @staticmethod
    def new_layer(
        config: PretrainedConfig, cos_sin: torch.Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = Qwen3Attention(config, cos_sin, context)
        mlp = (SparseMLP if is_sparse(config, index) else GatedMLP)(config, context)
        return DecoderLayer(config, context, attention, mlp)
