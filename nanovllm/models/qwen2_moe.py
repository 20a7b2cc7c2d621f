"""Qwen1.5-MoE and Qwen2-MoE (Qwen team 2024, arXiv 2407.10671): Qwen2 with experts.

One more expert is every token's, times a gate's sigmoid. Some layers may keep the dense MLP."""

from dataclasses import replace

from torch import Tensor

from nanovllm.kernels.types import Unreduced, summed
from nanovllm.layers.context import ModelContext
from nanovllm.layers.moe import Router, SparseMLP
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class Qwen2MoeForCausalLM(CausalLM):
    """Qwen2-MoE with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = SelfAttention(
            config, cos_sin, context, index, qkv_bias=config.qkv_bias, output_bias=False
        )
        mlp = SharedExpertMLP if config.is_sparse(index) else GatedMLP
        return DecoderLayer(config, context, attention, mlp(config, context))


class SharedExpertMLP(SparseMLP):
    """The sparse MLP's output plus that of an expert of every token, times its gate's sigmoid."""

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            config.norm_topk_prob,
            context,
        )
        shared = replace(config, intermediate_size=config.shared_expert_intermediate_size)
        self.shared_expert = GatedMLP(shared, context)
        self.shared_expert_gate = Router(1, config.hidden_size, context)

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> this rank's term of [T, hidden_size]."""
        gate = summed(self.shared_expert_gate(x)).sigmoid()
        shared = summed(self.shared_expert(x).term)
        return Unreduced(summed(super().forward(x).term) + gate * shared)
