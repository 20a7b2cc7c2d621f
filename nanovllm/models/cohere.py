"""Command R (Cohere 2024): attention and MLP side by side, layer norms, rotated neighbours."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.layers.rotary_order import rotary_order
from nanovllm.models.decoder import GatedMLP, SelfAttention
from nanovllm.models.layer_norms import LayerNormCausalLM, ParallelLayer
from nanovllm.models.model_config import ModelConfig


class CohereForCausalLM(LayerNormCausalLM):
    """Command R with its LM head."""

    norm_bias = False

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> ParallelLayer:
        """See `CausalLM.new_layer`."""
        bias = config.attention_bias
        order = rotary_order(config.head_dim, config.rope_of(index), interleaved=True)
        attention = SelfAttention(
            config, cos_sin, context, index, qkv_bias=bias, output_bias=bias, head_order=order
        )
        return ParallelLayer(config, context, attention, GatedMLP(config, context))
