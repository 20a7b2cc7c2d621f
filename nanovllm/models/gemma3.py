"""Gemma 3's text model (Gemma team 2025, arXiv 2503.19786): Gemma 2 with norms of q and k.

Layers with a window have rotary embeddings of their own. There is no soft cap of scores."""

from torch import Tensor, nn

from nanovllm.layers.context import ModelContext
from nanovllm.models.decoder import GatedMLP
from nanovllm.models.gemma import GemmaForCausalLM
from nanovllm.models.gemma2 import POST_NORMS, PRE_NORMS
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.post_norm import PostNormLayer
from nanovllm.models.qwen3 import Qwen3Attention


class Gemma3ForCausalLM(GemmaForCausalLM):
    """Gemma 3's text model with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> nn.Module:
        """See `CausalLM.new_layer`."""
        attention = Qwen3Attention(config, cos_sin, context, index)
        mlp = GatedMLP(config, context)
        return PostNormLayer(config, context, attention, mlp, POST_NORMS, PRE_NORMS)
