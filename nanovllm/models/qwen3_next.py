"""Qwen3-Next (Qwen team 2025): Qwen3.5's layers, with a dense MLP in some of them."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP
from nanovllm.models.hybrid import hybrid_layer
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen2_moe import SharedExpertMLP


class Qwen3NextForCausalLM(CausalLM):
    """Qwen3-Next with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        mlp = SharedExpertMLP if config.is_sparse(index) else GatedMLP
        return hybrid_layer(config, cos_sin, context, index, mlp(config, context))
