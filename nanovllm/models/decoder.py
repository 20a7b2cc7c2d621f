"""The decoder that the model families share, in the order that it computes.

A family's own file says what its layers are made of. Module names are those of the checkpoints'
tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanovllm.kernels.types import AttentionMetadata, KVCacheSpec, Unreduced
from nanovllm.layers.attention import Attention, at_logits_indices
from nanovllm.layers.context import Layer, ModelContext
from nanovllm.layers.embedding import VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import cos_sin_table
from nanovllm.models.model_config import ModelConfig


class Decoder(nn.Module):
    """Embedding, decoder layers, final norm.

    Args:
        config: the model's configuration.
        context: what the rank's layers are built with.
        new_layer: makes a layer from `config`, the table of `cos_sin_table`, `context` and the
            layer's index.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        new_layer: "Callable[[ModelConfig, Tensor, ModelContext, int], DecoderLayer]",
    ) -> None:
        super().__init__()
        cos_sin = cos_sin_table(
            config.head_dim,
            context.max_model_len or config.max_positions,
            config.rope_parameters,
            context.device,
        )
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context)
        self.layers = nn.ModuleList(
            new_layer(config, cos_sin, context, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """input_ids and positions [T] int32 -> [T, hidden_size], the last tokens' of a prefill."""
        x: Unreduced | None = None
        residual = self.embed_tokens(input_ids)
        for layer in self.layers[:-1]:
            x, residual = layer(x, residual, positions, metadata)
        x, residual = self.layers[-1](x, residual, positions, metadata.last_tokens or metadata)
        return self.norm.add(x, residual)[0]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP; the residual sum travels beside the normalised activations."""

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        self_attn: "SelfAttention",
        mlp: Layer[[Tensor], Unreduced],
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)

    def forward(
        self,
        x: Unreduced | None,
        residual: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[Unreduced, Tensor]:
        """(x, residual) [T, hidden_size] each -> the same for the next layer, at `logits_indices`.

        x is what is to be added to the residual; the first layer has none.
        """
        if x is None:
            normed = self.input_layernorm(residual)
        else:
            normed, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(normed, positions, metadata)
        residual = at_logits_indices(residual, metadata)
        normed, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(normed), residual


def kv_cache_spec(config: ModelConfig, tp_size: int, dtype: torch.dtype) -> KVCacheSpec:
    """A layer's cache on one rank; with more ranks than KV heads, every rank holds one."""
    return KVCacheSpec(max(config.num_key_value_heads // tp_size, 1), config.head_dim, dtype)


class SelfAttention(Layer[[Tensor, Tensor, AttentionMetadata], Unreduced]):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) of one layer.

    Query heads are split over the ranks. So are KV heads; with more ranks than KV heads,
    several ranks hold the same one.

    Args:
        config: the model's configuration.
        cos_sin: of `cos_sin_table`.
        context: what the rank's layers are built with.
        qkv_bias: whether q_proj, k_proj and v_proj have biases.
        output_bias: whether o_proj has one.
    """

    def __init__(
        self,
        config: ModelConfig,
        cos_sin: Tensor,
        context: ModelContext,
        *,
        qkv_bias: bool,
        output_bias: bool,
    ) -> None:
        super().__init__()
        tp, head_dim = context.tp, config.head_dim
        total_heads, total_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q_size = total_heads // tp.size * head_dim
        spec = kv_cache_spec(config, tp.size, context.kv_cache_dtype or context.dtype)
        kv_size = spec.num_kv_heads * head_dim
        first_kv = tp.rank * total_kv_heads // tp.size * head_dim
        kv_slice = (total_kv_heads * head_dim, first_kv, kv_size)
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            {
                "q_proj": (total_heads * head_dim, tp.rank * q_size, q_size),
                "k_proj": kv_slice,
                "v_proj": kv_slice,
            },
            qkv_bias,
            context,
        )
        self.o_proj = RowParallelLinear(
            total_heads * head_dim, config.hidden_size, output_bias, context
        )
        self.attn = Attention(spec, cos_sin, context)

    def forward(self, x: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size], at `logits_indices`."""
        return self.o_proj(self.attn(self.qkv_proj(x), positions, metadata))


class GatedMLP(Layer[[Tensor], Unreduced]):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), with biases or without."""

    def __init__(self, config: ModelConfig, context: ModelContext, bias: bool = False) -> None:
        super().__init__()
        self.ops = context.ops
        size = config.intermediate_size // context.tp.size
        part = (config.intermediate_size, context.tp.rank * size, size)
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size, {"gate_proj": part, "up_proj": part}, bias, context
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias, context
        )

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size]."""
        return self.down_proj(self.ops.silu_and_mul(self.gate_up_proj(x)))
