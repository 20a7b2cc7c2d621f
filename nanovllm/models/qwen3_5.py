"""Qwen3.5 dense (Qwen team 2026), its text model: three gated delta nets for each attention."""

from torch import Tensor

from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, GatedMLP
from nanovllm.models.hybrid import hybrid_layer
from nanovllm.models.model_config import ModelConfig


class Qwen3_5ForCausalLM(CausalLM):
    """Qwen3.5 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        return hybrid_layer(config, cos_sin, context, index, GatedMLP(config, context))
