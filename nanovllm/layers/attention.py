"""Attention over the paged KV cache, and what a step tells it about its sequences."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nanovllm.kernels.ops import Ops, Product
from nanovllm.layers.context import ModelContext


class AttentionMetadata(Protocol):
    """A step's view of the cache: where new K/V go, and how queries attend."""

    slot_mapping: torch.Tensor  # [T] int64; -1: not written

    def attend(
        self,
        ops: Ops,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, Hq, D] -> [T, Hq, D]."""

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [T, ...] whose attention output is wanted; mostly all."""

    def of_last_layer(self) -> "AttentionMetadata":
        """The metadata for the model's last layer, after which not all tokens matter."""


@dataclass(frozen=True)
class PrefillMetadata:
    """Several new tokens of each of S sequences, one sequence after another.

    With `last_layer` only the tokens to sample from matter after the last layer.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor  # [S, W] int32
    cu_seqlens_q: torch.Tensor  # [S + 1] int32
    cu_seqlens_k: torch.Tensor  # [S + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    last_layer: "LastTokensMetadata | None" = None  # None: all tokens matter

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """All rows of x [T, ...]."""
        return x

    def of_last_layer(self) -> "PrefillMetadata | LastTokensMetadata":
        """The tokens to sample from attend, all K/V are stored."""
        return self.last_layer or self

    def attend(
        self,
        ops: Ops,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, Hq, D] -> [T, Hq, D]; K/V, the new ones too, are read from the cache."""
        return ops.prefill_attention(
            query,
            key_cache,
            value_cache,
            self.block_tables,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            scale,
            key_scales,
            value_scales,
        )


@dataclass(frozen=True)
class DecodeMetadata:
    """One new token of each of T sequences."""

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor  # [T, W] int32
    context_lens: torch.Tensor  # [T] int32
    plan: Any = None  # of `Ops.plan_decode`

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """All rows of x [T, ...]."""
        return x

    def of_last_layer(self) -> "DecodeMetadata":
        """The same: every token is sampled from."""
        return self

    def attend(
        self,
        ops: Ops,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, Hq, D] -> [T, Hq, D]."""
        return ops.decode_attention(
            query,
            key_cache,
            value_cache,
            self.block_tables,
            self.context_lens,
            scale,
            key_scales,
            value_scales,
            self.plan,
        )


@dataclass(frozen=True, kw_only=True)
class LastTokensMetadata(DecodeMetadata):
    """N of a prefill's T tokens, each the last of its sequence; the K/V of all T are stored."""

    last_tokens: torch.Tensor  # [N] int32, index among the T tokens

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, ...] -> [N, ...]."""
        return x.index_select(0, self.last_tokens)


class Attention(nn.Module):
    """Rotation, KV write and attention; the runner sets the caches and, with fp8, their scales.

    Caches are [num_blocks, block_size, num_kv_heads, head_dim], scales float32
    [num_blocks, num_kv_heads, block_size].
    """

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def __init__(self, head_dim: int, cos_sin: torch.Tensor, context: ModelContext) -> None:
        super().__init__()
        self.ops = context.ops
        self.scale = head_dim**-0.5
        self.cos_sin = cos_sin

    def forward(
        self,
        qkv: Product,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        q_norm_weight: torch.Tensor | None = None,
        k_norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hkv) * D], positions [T] int32 -> [T, Hq * D], the wanted rows of it.

        With norm weights ([D] each), q and k are RMS-normalised per head before the rotation.
        """
        query = self.ops.qk_norm_rope_store(
            qkv,
            q_norm_weight,
            k_norm_weight,
            eps,
            self.cos_sin,
            positions,
            self.key_cache,
            self.value_cache,
            metadata.slot_mapping,
            self.key_scales,
            self.value_scales,
        )
        out = metadata.attend(
            self.ops,
            metadata.wanted(query),
            self.key_cache,
            self.value_cache,
            self.scale,
            self.key_scales,
            self.value_scales,
        )
        return out.flatten(1)
