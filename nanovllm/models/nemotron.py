"""Nemotron-4 and Minitron (NVIDIA 2024, arXiv 2402.16819, 2407.14679): a part of heads rotates.

Layer norms are stored less 1. The MLP has no gate and a squared ReLU."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.layers.rotary_order import rotary_order
from nanovllm.models.decoder import SelfAttention
from nanovllm.models.layer_norms import LayerNormCausalLM, LayerNormLayer
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.plain_mlp import PlainMLP


class NemotronForCausalLM(LayerNormCausalLM):
    """Nemotron with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> LayerNormLayer:
        """See `CausalLM.new_layer`."""
        bias = config.attention_bias
        order = rotary_order(config.head_dim, config.rope_of(index))
        attention = SelfAttention(
            config, cos_sin, context, index, qkv_bias=bias, output_bias=bias, head_order=order
        )
        return LayerNormLayer(config, context, attention, PlainMLP(config, context))
