"""EXAONE 4.0 (LG AI Research 2025, arXiv 2507.11407): norms of q and k, and after the blocks.

Where some layers have windows, those without one do not rotate: see `Family.rope_layers`."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import GatedMLP
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.olmo2 import POST_NORMS
from nanovllm.models.post_norm import PostNormLayer
from nanovllm.models.qwen3 import Qwen3Attention


class Exaone4ForCausalLM(CausalLM):
    """EXAONE 4.0 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> PostNormLayer:
        """See `CausalLM.new_layer`."""
        attention = Qwen3Attention(config, cos_sin, context, index)
        return PostNormLayer(config, context, attention, GatedMLP(config, context), POST_NORMS)
