"""Gemma 2 (Gemma team 2024, arXiv 2408.00118): norms around the blocks, soft caps, windows."""

from torch import Tensor, nn

from nanovllm.layers.context import ModelContext
from nanovllm.models.decoder import GatedMLP, SelfAttention
from nanovllm.models.gemma import GemmaForCausalLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.post_norm import PostNormLayer

PRE_NORMS = ("input_layernorm", "pre_feedforward_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma 2 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> nn.Module:
        """See `CausalLM.new_layer`."""
        bias = config.attention_bias
        attention = SelfAttention(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        mlp = GatedMLP(config, context)
        return PostNormLayer(config, context, attention, mlp, POST_NORMS, PRE_NORMS)
