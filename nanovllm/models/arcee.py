"""Arcee (AFM-4.5B, Arcee 2025): Llama whose MLP has no gate and a squared ReLU."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, SelfAttention
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.plain_mlp import PlainMLP


class ArceeForCausalLM(CausalLM):
    """Arcee with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        bias = config.attention_bias
        attention = SelfAttention(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        return DecoderLayer(config, context, attention, PlainMLP(config, context))
