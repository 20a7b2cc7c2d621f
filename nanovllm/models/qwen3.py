"""Qwen3 dense (Qwen team 2025, arXiv 2505.09388): q and k are normalised per head, then rotated."""

from torch import Tensor

from nanovllm.kernels.types import AttentionMetadata, Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.norm import RMSNorm
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.extras import linear_later
from nanovllm.models.model_config import ModelConfig


class Qwen3Attention(SelfAttention):
    """Self-attention with an RMS norm for query heads and one for key heads."""

    def __init__(
        self, config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> None:
        bias = config.attention_bias
        super().__init__(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        size, eps, offset = config.head_dim, config.rms_norm_eps, config.norm_weight_offset
        self.q_norm = RMSNorm(size, eps, context, offset)
        self.k_norm = RMSNorm(size, eps, context, offset)

    def forward(self, x: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size], at `logits_indices`."""
        qkv = linear_later(self.qkv_proj, x)
        norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        return self.o_proj(self.attn(qkv, positions, metadata, *norms))


class Qwen3ForCausalLM(CausalLM):
    """Qwen3 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = Qwen3Attention(config, cos_sin, context, index)
        return DecoderLayer(config, context, attention, GatedMLP(config, context))
