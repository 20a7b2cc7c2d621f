"""StarCoder2 (Lozhkov et al. 2024, arXiv 2402.19173): layer norms, an MLP without a gate."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.decoder import SelfAttention
from nanovllm.models.layer_norms import LayerNormCausalLM, LayerNormLayer
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.plain_mlp import PlainMLP


class Starcoder2ForCausalLM(LayerNormCausalLM):
    """StarCoder2 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> LayerNormLayer:
        """See `CausalLM.new_layer`."""
        bias = config.attention_bias
        attention = SelfAttention(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        mlp = PlainMLP(config, context, ("c_fc", "c_proj"))
        return LayerNormLayer(config, context, attention, mlp)
