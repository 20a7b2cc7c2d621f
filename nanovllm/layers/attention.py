"""Attention over the paged KV cache, and what a step tells it about its sequences."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from nanovllm.kernels.ops import Ops
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
    ) -> torch.Tensor:
        """query [T, Hq, D] -> [T, Hq, D]."""


@dataclass(frozen=True)
class PrefillMetadata:
    """Several new tokens of each of S sequences, one sequence after another."""

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor  # [S, W] int32
    cu_seqlens_q: torch.Tensor  # [S + 1] int32
    cu_seqlens_k: torch.Tensor  # [S + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int

    def attend(
        self,
        ops: Ops,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
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
        )


@dataclass(frozen=True)
class DecodeMetadata:
    """One new token of each of T sequences."""

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor  # [T, W] int32
    context_lens: torch.Tensor  # [T] int32

    def attend(
        self,
        ops: Ops,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """query [T, Hq, D] -> [T, Hq, D]."""
        return ops.decode_attention(
            query, key_cache, value_cache, self.block_tables, self.context_lens, scale
        )


class Attention(nn.Module):
    """Rotation, KV write and attention; the runner sets `key_cache` and `value_cache`.

    Caches are [num_blocks, block_size, num_kv_heads, head_dim].
    """

    key_cache: torch.Tensor
    value_cache: torch.Tensor

    def __init__(self, head_dim: int, cos_sin: torch.Tensor, context: ModelContext) -> None:
        super().__init__()
        self.ops = context.ops
        self.scale = head_dim**-0.5
        self.cos_sin = cos_sin

    def forward(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        q_norm_weight: torch.Tensor | None = None,
        k_norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hkv) * D], positions [T] int32 -> [T, Hq * D].

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
        )
        out = metadata.attend(self.ops, query, self.key_cache, self.value_cache, self.scale)
        return out.flatten(1)
