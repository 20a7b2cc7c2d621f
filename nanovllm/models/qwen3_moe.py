"""Qwen3-MoE (Qwen team 2025, arXiv 2505.09388): Qwen3 with a mixture of experts for its MLP.

Some layers may keep the dense MLP."""

import torch

from nanovllm.layers.context import ModelContext
from nanovllm.layers.moe import SparseMLP
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3Attention


class Qwen3MoeForCausalLM(CausalLM):
    """Qwen3-MoE with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: torch.Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = Qwen3Attention(config, cos_sin, context, index)
        mlp = sparse_mlp(config, context) if config.is_sparse(index) else GatedMLP(config, context)
        return DecoderLayer(config, context, attention, mlp)


def sparse_mlp(config: ModelConfig, context: ModelContext) -> SparseMLP:
    """The experts of a layer."""
    return SparseMLP(
        config.num_experts,
        config.num_experts_per_tok,
        config.hidden_size,
        config.moe_intermediate_size,
        config.norm_topk_prob,
        context,
    )
