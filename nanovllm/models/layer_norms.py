"""Decoder layers with layer norms: before attention and MLP, or one before both at once."""

from torch import Tensor, nn

from nanovllm.kernels.types import AttentionMetadata, Unreduced, summed
from nanovllm.layers.attention import at_logits_indices
from nanovllm.layers.context import ModelContext
from nanovllm.layers.layer_norm import LayerNorm
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import DecoderLayer
from nanovllm.models.model_config import ModelConfig


def layer_norm(config: ModelConfig, context: ModelContext, bias: bool) -> LayerNorm:
    """A layer norm of hidden states."""
    size, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_weight_offset
    return LayerNorm(size, eps, context, bias, offset)


class LayerNormCausalLM(CausalLM):
    """A language model whose norms are layer norms; `norm_bias` says whether they have biases."""

    norm_bias = True

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__(config, context)
        self.model.add_module("norm", layer_norm(config, context, self.norm_bias))


class LayerNormLayer(DecoderLayer):
    """A decoder layer whose norms are layer norms with biases."""

    def __init__(
        self, config: ModelConfig, context: ModelContext, self_attn: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__(config, context, self_attn, mlp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(name, layer_norm(config, context, bias=True))


class ParallelLayer(nn.Module):
    """Attention and MLP of one normalised input; their sum is added to the residual.

    So the ranks sum both at once. Arguments are those of `DecoderLayer`.
    """

    def __init__(
        self, config: ModelConfig, context: ModelContext, self_attn: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = layer_norm(config, context, bias=False)

    def forward(
        self, x: Unreduced | None, residual: Tensor, positions: Tensor, metadata: AttentionMetadata
    ) -> tuple[Unreduced, Tensor]:
        """As of `DecoderLayer`."""
        if x is None:
            normed = self.input_layernorm(residual)
        else:
            normed, residual = self.input_layernorm.add(x, residual)
        attended = summed(self.self_attn(normed, positions, metadata).term)
        normed = at_logits_indices(normed, metadata)
        x = Unreduced(attended + summed(self.mlp(normed).term))
        return x, at_logits_indices(residual, metadata)
