"""Layers of models that mix tokens by gated delta nets in some layers, by attention in others.

Qwen3.5's (Qwen team 2026) have attention in every fourth layer, and multiply it by a gate.
"""

import torch
from torch import Tensor, nn

from nanovllm.kernels.types import AttentionMetadata, StateSpec, Unreduced, split_columns, summed
from nanovllm.layers.attention import Attention, at_logits_indices
from nanovllm.layers.context import ModelContext
from nanovllm.layers.gated_delta_net import DeltaNetSizes, GatedDeltaNet
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_order import HeadNorm, rotary_order
from nanovllm.layers.weights import Heads
from nanovllm.models.decoder import DecoderLayer, kv_cache_spec
from nanovllm.models.head_config import causal_lm_of
from nanovllm.models.model_config import ModelConfig


def delta_net_sizes(config: ModelConfig) -> DeltaNetSizes:
    """Those of the model's gated delta nets."""
    return DeltaNetSizes(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        is_by_key_head="Qwen3NextForCausalLM" in map(causal_lm_of, config.architectures),
    )


def state_specs(config: ModelConfig, tp_size: int, dtype: torch.dtype) -> list[StateSpec]:
    """Of each gated delta net of the model, on one rank."""
    num_layers = sum(map(config.is_delta_net, range(config.num_hidden_layers)))
    return [delta_net_sizes(config).state_spec(tp_size, dtype)] * num_layers


def hybrid_layer(
    config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int, mlp: nn.Module
) -> DecoderLayer:
    """Layer `index`, of the kind that the configuration says."""
    if not config.is_delta_net(index):
        return DecoderLayer(config, context, GatedAttention(config, cos_sin, context, index), mlp)
    sizes = delta_net_sizes(config)
    delta_net = GatedDeltaNet(config.hidden_size, sizes, config.rms_norm_eps, context)
    return DeltaNetLayer(config, context, delta_net, mlp)


class DeltaNetLayer(DecoderLayer):
    """A layer with a gated delta net, which checkpoints name "linear_attn"."""

    def __init__(
        self, config: ModelConfig, context: ModelContext, delta_net: GatedDeltaNet, mlp: nn.Module
    ) -> None:
        super().__init__(config, context, delta_net, mlp)
        del self.self_attn
        self.linear_attn = delta_net
        # What `forward` calls, without names of its own for the weights.
        object.__setattr__(self, "self_attn", delta_net)


class GatedAttention(nn.Module):
    """Grouped-query self-attention with norms of q and k, times sigmoid of a gate.

    The checkpoint's q_proj has for each head the rows of q, then those of the gate. They are loaded
    with all gates first, so that q, k and v lie side by side.
    """

    def __init__(
        self, config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> None:
        super().__init__()
        self.ops = context.ops
        size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        num_ranks, eps = context.tp.size, config.rms_norm_eps
        order = rotary_order(head_dim, config.rope_of(index))
        key = Heads(config.num_key_value_heads, head_dim, order)
        num_heads = config.num_attention_heads // num_ranks
        rows = gates_first(num_heads, order or tuple(range(head_dim)))
        # The rank's rows of q_proj are one "head" in this order.
        heads = {
            "q_proj": Heads(num_ranks, len(rows), rows),
            "k_proj": key,
            "v_proj": key._replace(order=()),
        }
        self.qkv_proj = ColumnParallelLinear(size, heads, bias, context)
        self.o_proj = RowParallelLinear(config.num_attention_heads * head_dim, size, bias, context)
        dtype = context.kv_cache_dtype or context.dtype
        spec = kv_cache_spec(config, num_ranks, dtype, index)
        self.attn = Attention(spec, cos_sin, context)
        self.q_norm = HeadNorm(head_dim, eps, context, order, config.norm_weight_offset)
        self.k_norm = HeadNorm(head_dim, eps, context, order, config.norm_weight_offset)
        query_size = num_heads * head_dim
        self.columns = query_size, query_size + 2 * spec.num_kv_heads * head_dim

    def forward(self, x: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Unreduced:
        """x [T, hidden_size] -> this rank's term of [T, hidden_size], at `logits_indices`."""
        gate, qkv = split_columns(self.qkv_proj(x), self.columns)
        out = self.attn(
            qkv, positions, metadata, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        )
        if metadata.logits_indices is not None:
            gate = at_logits_indices(summed(gate), metadata)
        return self.o_proj(self.ops.sigmoid_gate(out, gate))


def gates_first(num_heads: int, order: tuple[int, ...]) -> tuple[int, ...]:
    """The order in which rows are loaded of which each head has q's D and then the gate's D.

    order: of q's rows.
    """
    size = len(order)
    heads = range(0, 2 * num_heads * size, 2 * size)
    gates = (head + size + i for head in heads for i in range(size))
    queries = (head + i for head in heads for i in order)
    return (*gates, *queries)
