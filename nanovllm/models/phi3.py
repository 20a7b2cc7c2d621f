"""Phi-3, Phi-3.5 and Phi-4 (Microsoft 2024, arXiv 2404.14219, 2412.08905), dense.

The checkpoint has q, k and v in one tensor, and gate and up in another. Phi-4-mini rotates a part
of each head.
"""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.layers.rotary_order import rotary_order
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


class Phi3ForCausalLM(CausalLM):
    """Phi-3 or Phi-4 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        order = rotary_order(config.head_dim, config.rope_of(index))
        attention = SelfAttention(
            config,
            cos_sin,
            context,
            index,
            qkv_bias=False,
            output_bias=False,
            head_order=order,
            fused_qkv="",
        )
        return DecoderLayer(config, context, attention, GatedMLP(config, context, fused=""))
