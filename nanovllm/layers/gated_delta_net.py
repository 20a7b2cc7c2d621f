"""Gated delta nets (Yang et al. 2024, arXiv 2412.06464): linear attention with a state.

A head remembers a sequence in one matrix, whatever the sequence's length. Each token lets it fade,
and moves what it holds for the token's key towards the token's value. A short convolution mixes
neighbouring tokens first.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.kernels.types import (
    AttentionMetadata,
    RecurrentState,
    StateSpec,
    Unreduced,
    split_columns,
)
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.weights import (
    Heads,
    column_shards,
    new_norm_weight,
    new_parameter,
    new_parameter_of_heads,
    shape_of,
)


class DeltaNetSizes(NamedTuple):
    """Of a gated delta net, over all ranks."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a key head
    value_dim: int  # of a value head
    kernel_size: int  # of the convolution
    is_by_key_head: bool = False  # see `heads_of_all`

    def state_spec(self, tp_size: int, dtype: torch.dtype) -> StateSpec:
        """The state on one rank, which has its part of the heads."""
        key_size = self.num_key_heads * self.key_dim
        value_size = self.num_value_heads * self.value_dim
        return StateSpec(
            (2 * key_size + value_size) // tp_size,
            self.kernel_size,
            self.num_value_heads // tp_size,
            self.key_dim,
            self.value_dim,
            dtype,
        )


class GatedDeltaNet(nn.Module):
    """One layer's, in the place of attention. The runner sets `state`, as `state_spec` says.

    The ranks share out the key heads, each with its value heads. The first product, which feeds the
    gates as well, keeps the model's dtype where others are in fp8 or packed.

    Args:
        hidden_size: features of a token.
        sizes: see `DeltaNetSizes`.
        eps: of the norm.
        context: what the rank's layers are built with.
    """

    state: RecurrentState

    def __init__(
        self, hidden_size: int, sizes: DeltaNetSizes, eps: float, context: ModelContext
    ) -> None:
        super().__init__()
        self.ops, self.eps = context.ops, eps
        self.state_spec = sizes.state_spec(context.tp.size, context.dtype)
        key = Heads(sizes.num_key_heads, sizes.key_dim, (), "in_proj_qkv")
        value = Heads(sizes.num_value_heads, sizes.value_dim, (), "in_proj_qkv")
        mixed = {"query": key, "key": key, "value": value}
        heads = mixed | {
            "in_proj_z": value._replace(fused_name=None),
            "in_proj_b": Heads(sizes.num_value_heads, 1),
            "in_proj_a": Heads(sizes.num_value_heads, 1),
        }
        if sizes.is_by_key_head:
            heads = heads_of_all(sizes, context.tp.size)
        plain = replace(context, fp8_scales=None, weight_format=None)
        self.in_proj = ColumnParallelLinear(hidden_size, heads, False, plain)
        channels = {name: part._replace(fused_name="") for name, part in mixed.items()}
        self.conv1d = DepthwiseConvolution(sizes.kernel_size, channels, context)
        num_heads = sizes.num_value_heads
        self.A_log = new_parameter_of_heads(num_heads, 1, context, torch.float32)
        self.dt_bias = new_parameter_of_heads(num_heads, 1, context, torch.float32)
        self.norm = GatedNorm(sizes.value_dim, context)
        value_size = sizes.num_value_heads * sizes.value_dim
        self.out_proj = RowParallelLinear(value_size, hidden_size, False, context)

    def forward(self, x: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Unreduced:
        """x [T, hidden_size] -> this rank's term of [T, hidden_size]."""
        ops, spec = self.ops, self.state_spec
        value_size = spec.num_heads * spec.value_dim
        columns = spec.num_channels, value_size, spec.num_heads, spec.num_heads
        qkv, z, beta, decay = split_columns(self.in_proj(x), columns)
        kernels = self.conv1d.weight.flatten(1)
        mixed = ops.causal_conv1d(qkv, kernels, self.state.conv, metadata)
        out = ops.gated_delta_rule(
            mixed, beta, decay, self.A_log, self.dt_bias, self.state.recurrent, metadata
        )
        return self.out_proj(ops.gated_rms_norm(out, z, self.norm.weight, self.eps))


def heads_of_all(sizes: DeltaNetSizes, num_ranks: int) -> dict[str, Heads]:
    """The projections of a checkpoint that has the rows of each key head together.

    Those of a key head are q, k, v, z of in_proj_qkvz, v and z of its value heads, and b, a of
    in_proj_ba. All rows of a rank are one "head", in an order with the rows of each kind together.
    """
    num_key_heads = sizes.num_key_heads // num_ranks
    group = sizes.num_value_heads // sizes.num_key_heads
    value_size = group * sizes.value_dim

    def by_kind(*kinds: int) -> Heads:
        """Of projections whose key heads have so many rows of each kind."""
        of_head = list(range(sum(kinds)))
        order: list[int] = []
        for i, number in enumerate(kinds):
            rows = of_head[sum(kinds[:i]) :][:number]
            order += [head * len(of_head) + j for head in range(num_key_heads) for j in rows]
        return Heads(num_ranks, len(order), tuple(order))

    return {
        "in_proj_qkvz": by_kind(sizes.key_dim, sizes.key_dim, value_size, value_size),
        "in_proj_ba": by_kind(group, group),
    }


class DepthwiseConvolution(nn.Module):
    """The weights [C, 1, K] of a convolution with a kernel for each of this rank's channels."""

    def __init__(self, kernel_size: int, channels: dict[str, Heads], context: ModelContext) -> None:
        super().__init__()
        one = slice(0, 1)
        shards = {}
        for name, shard in column_shards(kernel_size, channels, context.tp).items():
            num_rows, (source, taps) = shard.full_shape[0], shard.source
            shards[name] = replace(
                shard,
                full_shape=(num_rows, 1, kernel_size),
                source=(source, one, taps),
                target=(shard.target[0], one, taps),
            )
        self.weight = new_parameter(shape_of(shards), shards, context.dtype, context.device)


class GatedNorm(nn.Module):
    """The weight [Dv] of the norm of each head's output."""

    def __init__(self, value_dim: int, context: ModelContext) -> None:
        super().__init__()
        self.weight = new_norm_weight(value_dim, context)
