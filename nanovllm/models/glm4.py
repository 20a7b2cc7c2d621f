"""GLM-4 of 2025 (GLM-4-0414, GLM-Z1): GLM with norms after attention and MLP as well."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import GatedMLP
from nanovllm.models.glm import glm_attention
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.post_norm import PostNormLayer

POST_NORMS = "post_self_attn_layernorm", "post_mlp_layernorm"
PRE_NORMS = "input_layernorm", "post_attention_layernorm"


class Glm4ForCausalLM(CausalLM):
    """GLM-4-0414 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> PostNormLayer:
        """See `CausalLM.new_layer`."""
        attention = glm_attention(config, cos_sin, context, index)
        mlp = GatedMLP(config, context, fused="")
        return PostNormLayer(config, context, attention, mlp, POST_NORMS, PRE_NORMS)
