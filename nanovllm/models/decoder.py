"""The decoder that the model families share, in the order that it computes.

A family's own file says what its layers are made of. Module names are those of the checkpoints'
tensors.
"""

import torch
from torch import Tensor, nn

from nanovllm.kernels.types import AttentionMetadata, KVCacheSpec, Unreduced
from nanovllm.layers.attention import Attention, at_logits_indices
from nanovllm.layers.context import ModelContext
from nanovllm.layers.embedding import VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.weights import Heads
from nanovllm.models.extras import activation, gated_linear, linear_later
from nanovllm.models.model_config import ModelConfig


class Decoder(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig, context: ModelContext, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context)
        self.embedding_multiplier = config.embedding_multiplier
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, context, config.norm_weight_offset
        )

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """input_ids and positions [T] int32 -> [T, hidden_size], the last tokens' of a prefill."""
        x: Tensor | Unreduced | None = None
        residual = self.embed_tokens(input_ids)
        if self.embedding_multiplier != 1:
            residual = residual * self.embedding_multiplier
        *layers, last_layer = self.layers
        for layer in layers:
            x, residual = layer(x, residual, positions, metadata)
        added, residual = last_layer(x, residual, positions, metadata.last_tokens or metadata)
        return self.norm.add(added, residual)[0]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP; the residual sum travels beside the normalised activations.

    `self_attn(x, positions, metadata)` and `mlp(x)` give this rank's terms, which norms sum.
    """

    def __init__(
        self, config: ModelConfig, context: ModelContext, self_attn: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        size, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_weight_offset
        self.input_layernorm = RMSNorm(size, eps, context, offset)
        self.post_attention_layernorm = RMSNorm(size, eps, context, offset)

    def forward(
        self, x: Unreduced | None, residual: Tensor, positions: Tensor, metadata: AttentionMetadata
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


def kv_cache_spec(config: ModelConfig, tp_size: int, dtype: torch.dtype, index: int) -> KVCacheSpec:
    """Layer `index`'s cache on one rank; with more ranks than KV heads, every rank holds one."""
    num_kv_heads = max(config.num_key_value_heads // tp_size, 1)
    return KVCacheSpec(num_kv_heads, config.head_dim, dtype, config.layer_windows[index])


class SelfAttention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) of one layer.

    The ranks share out the heads. With more ranks than KV heads, several hold the same one.

    Args:
        config: the model's configuration.
        cos_sin: of `cos_sin_table`.
        context: what the rank's layers are built with.
        index: the layer's number.
        qkv_bias: whether q_proj, k_proj and v_proj have biases.
        output_bias: whether o_proj has one.
        head_order: of q and k, see `rotary_order`.
        fused_qkv: `Heads.fused_name` of q_proj, k_proj and v_proj.
        sinks: of this rank's heads, see `Ops.attend`.
    """

    def __init__(
        self,
        config: ModelConfig,
        cos_sin: Tensor,
        context: ModelContext,
        index: int,
        *,
        qkv_bias: bool,
        output_bias: bool,
        head_order: tuple[int, ...] = (),
        fused_qkv: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        super().__init__()
        size, num_heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        key = Heads(config.num_key_value_heads, head_dim, head_order, fused_qkv)
        query, value = key._replace(number=num_heads), key._replace(order=())
        heads = {"q_proj": query, "k_proj": key, "v_proj": value}
        self.qkv_proj = ColumnParallelLinear(size, heads, qkv_bias, context)
        self.o_proj = RowParallelLinear(num_heads * head_dim, size, output_bias, context)
        dtype = context.kv_cache_dtype or context.dtype
        spec = kv_cache_spec(config, context.tp.size, dtype, index)
        scale, softcap = config.attention_scale, config.attn_logit_softcapping
        self.attn = Attention(spec, cos_sin, context, scale, softcap, sinks)

    def forward(self, x: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size], at `logits_indices`."""
        return self.o_proj(self.attn(linear_later(self.qkv_proj, x), positions, metadata))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), with biases or without.

    fused: `Heads.fused_name` of gate_proj and up_proj.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        bias: bool = False,
        fused: str | None = None,
    ) -> None:
        super().__init__()
        self.activate = activation(config, context.ops)
        size, inner_size = config.hidden_size, config.intermediate_size
        heads = dict.fromkeys(("gate_proj", "up_proj"), Heads(inner_size, 1, (), fused))
        self.gate_up_proj = ColumnParallelLinear(size, heads, bias, context)
        self.down_proj = RowParallelLinear(inner_size, size, bias, context)

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size]."""
        return self.down_proj(gated_linear(self.gate_up_proj, self.activate, x))
