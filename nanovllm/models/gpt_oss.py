"""gpt-oss (OpenAI 2025, arXiv 2508.10925): attention sinks, windows in turn, clamped experts."""

from torch import Tensor, nn

from nanovllm.kernels.types import ClampedSwiGLU, Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.moe import Router
from nanovllm.layers.stacked_experts import StackedExperts
from nanovllm.layers.weights import new_parameter_of_heads
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer, SelfAttention
from nanovllm.models.model_config import ModelConfig


class GptOssAttention(SelfAttention):
    """Self-attention with a score for each head that takes attention and gives nothing."""

    def __init__(
        self, config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> None:
        bias, num_heads = config.attention_bias, config.num_attention_heads
        sinks = new_parameter_of_heads(num_heads, 1, context, context.dtype)
        super().__init__(
            config, cos_sin, context, index, qkv_bias=bias, output_bias=bias, sinks=sinks
        )
        self.sinks = sinks  # the checkpoint's name; `attn` has the same


class GptOssMLP(nn.Module):
    """The most probable experts, whose probabilities are the softmax of their logits alone."""

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__()
        num_experts, size = config.num_experts, config.hidden_size
        self.num_experts_per_tok = config.num_experts_per_tok
        self.router = Router(num_experts, size, context, bias=True)
        swiglu = ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit)
        inner_size = config.moe_intermediate_size
        self.experts = StackedExperts(num_experts, size, inner_size, swiglu, context)

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> this rank's term of [T, hidden_size]."""
        return Unreduced(self.experts(x, self.router(x), self.num_experts_per_tok))


class GptOssForCausalLM(CausalLM):
    """gpt-oss with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """See `CausalLM.new_layer`."""
        attention = GptOssAttention(config, cos_sin, context, index)
        return DecoderLayer(config, context, attention, GptOssMLP(config, context))
