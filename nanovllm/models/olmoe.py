"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): experts, and norms of all of q and of k."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.olmo2 import Olmo2Attention
from nanovllm.models.qwen3_moe import sparse_mlp


class OlmoeForCausalLM(CausalLM):
    """OLMoE with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = Olmo2Attention(config, cos_sin, context, index)
        return DecoderLayer(config, context, attention, sparse_mlp(config, context))
