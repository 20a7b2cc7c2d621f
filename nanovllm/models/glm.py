"""GLM-4 of 2024 (GLM team 2024, arXiv 2406.12793), as GLM-4-9B-chat.

The first half of a head is rotated, in pairs of neighbours. Gate and up are one tensor.
"""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.layers.rotary_order import rotary_order
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig


def glm_attention(
    config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
) -> SelfAttention:
    """The self-attention of layer `index`, with neighbours rotated.

    q, k and v have biases if the config says so.
    """
    return SelfAttention(
        config,
        cos_sin,
        context,
        index,
        qkv_bias=config.attention_bias,
        output_bias=False,
        head_order=rotary_order(config.head_dim, config.rope_of(index), interleaved=True),
    )


class GlmForCausalLM(CausalLM):
    """GLM-4-9B with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = glm_attention(config, cos_sin, context, index)
        return DecoderLayer(config, context, attention, GatedMLP(config, context, fused=""))
