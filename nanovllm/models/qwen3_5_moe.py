"""Qwen3.5's mixtures of experts (Qwen team 2026), their text model.

One more expert is everybody's."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer
from nanovllm.models.hybrid import hybrid_layer
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen2_moe import SharedExpertMLP


class Qwen3_5MoeForCausalLM(CausalLM):
    """Qwen3.5-MoE with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        return hybrid_layer(config, cos_sin, context, index, SharedExpertMLP(config, context))
