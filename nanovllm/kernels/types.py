"""The data that models, backends and the engine hand each other; nothing else is imported here.

T tokens, S sequences, B rows, D head_dim, Hq query and Hkv KV heads. A cache slot is
block_id * block_size + offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest number of FP8_DTYPE
FP8_MIN_AMAX = 2.0**-100  # a head whose elements are all below is stored as zeros
FP8_MIN_CAPABILITY = (8, 9)  # of a GPU that converts FP8_DTYPE
PACKED_RUN = 8  # neighbouring columns that as many int16 of a `PackedWeight` hold
DRAW_GROUP = 8  # neighbouring token ids, from a multiple of it on, that race as one in `Ops.sample`
FP8_BLOCK = 128  # rows and columns of a weight's block that has a scale of its own
ATTENTION_EXTRAS = frozenset({"window", "softcap", "sinks"})  # of `Ops.attend`


class PartialSums(NamedTuple):
    """A tensor [T, N] in parts that the op which reads it adds up, and then rounds to `dtype`."""

    parts: Tensor  # float32 [P, T, N], or of `dtype`: added up in float32
    dtype: torch.dtype


LinearOutput = Tensor | PartialSums


class Product(NamedTuple):
    """x weight^T [T, N], left to the operation that reads it: one kernel may do both."""

    x: Tensor  # [T, K]
    weight: Tensor  # [N, K]


LateOutput = LinearOutput | Product


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] of a linear layer in 4 or 8 bits; N is a multiple of 16, K of 32.

        weight[n, k] = (number[n, k] - zero[n, k // group_size]) * scale[n, k // group_size]

    Attributes:
        numbers: uint8 [N, K * bits / 8], contiguous. Each 16 bytes of a row are 8 = PACKED_RUN
            little-endian int16, which hold a chunk of 32 columns in 4 bits each, or of 16 columns
            in 8 bits: int16 number i, from its lowest bits on, the chunk's columns i, i + 8, ...
        scales: [N, K / group_size], in the model's dtype.
        zeros: uint8 [N, K / group_size]; None: 2^(bits - 1) everywhere, so that it is symmetric.
        order: int32 [K], the column of x that each column of the weight multiplies, which GPTQ
            calls act-order; None: the same.
        bits: 4 or 8.
        group_size: a multiple of 32 that divides K; K itself where a row has one scale.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.numbers.shape[0], self.numbers.shape[1] * 8 // self.bits

    def rows(self, part: slice) -> "PackedWeight":
        """Some of the rows, as views."""
        zeros = None if self.zeros is None else self.zeros[part]
        return replace(self, numbers=self.numbers[part], scales=self.scales[part], zeros=zeros)


@dataclass(frozen=True)
class LoRAWeights:
    """Of S adapters the low-rank terms of one weight [N, K] (Hu et al. 2021, arXiv 2106.09685).

    The weight's rows are those of P projections of one input, which have terms of their own. Of
    adapter s, projection p adds b[s, its rows] @ a[s, p * R : (p + 1) * R] @ x. A smaller rank
    than R is filled up with zeros.

    Attributes:
        a: [S, P * R, K]; None: x is that product already.
        b: [S, N, R], the adapter's scale included.
        rows: the first row and the end of each projection.
    """

    a: Tensor | None
    b: Tensor
    rows: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int:
        """R, a power of two and at least 16."""
        return self.b.shape[2]


class ClampedSwiGLU(NamedTuple):
    """gate, up -> (up + 1) * gate * sigmoid(alpha * gate), of numbers within the limit.

    gate is at most `limit`, up is between -limit and limit (OpenAI 2025, arXiv 2508.10925).
    """

    alpha: float
    limit: float


def summed(x: LinearOutput) -> Tensor:
    """x [T, N] as one tensor."""
    return x if isinstance(x, Tensor) else x.parts.sum(0).to(x.dtype)


def split_columns(x: LinearOutput, sizes: Sequence[int]) -> list[LinearOutput]:
    """x [T, N] as views of so many neighbouring columns each."""
    if isinstance(x, Tensor):
        return list(x.split(sizes, dim=-1))
    return [PartialSums(parts, x.dtype) for parts in x.parts.split(sizes, dim=-1)]


@dataclass(frozen=True)
class Unreduced:
    """This rank's term of a sum over all ranks, also where there is one rank.

    Only `TensorParallel.add_rms_norm` and `all_reduce` take it. No other operation does, so that a
    term cannot pass for the sum.
    """

    term: LinearOutput  # [T, N]


class HeadInputs(NamedTuple):
    """What a layer makes the queries, keys and values of its new tokens of.

    As in `Ops.qk_norm_rope_store`.
    """

    qkv: LateOutput
    q_norm_weight: Tensor | None
    k_norm_weight: Tensor | None
    eps: float
    cos_sin: Tensor
    positions: Tensor


class KVCacheSpec(NamedTuple):
    """An attention layer's memory of each token, on one rank."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None  # a query sees the last so many tokens, its own included; None: all


class KVCache(NamedTuple):
    """One layer's keys and values in blocks, in the model's dtype or in FP8_DTYPE with scales.

    An element of an fp8 cache is its number times the scale of its token and head, which is the
    head's largest magnitude / FP8_MAX (1 below FP8_MIN_AMAX).
    """

    key: Tensor  # [num_blocks, block_size, Hkv, D]
    value: Tensor
    key_scales: Tensor | None = None  # float32 [num_blocks, Hkv, block_size]; None: not fp8
    value_scales: Tensor | None = None


class StateSpec(NamedTuple):
    """A gated delta net's memory of each sequence, whatever its length, on one rank."""

    num_channels: int  # of the convolution: C
    kernel_size: int  # K
    num_heads: int  # value heads: Hv
    key_dim: int  # Dk
    value_dim: int  # Dv
    dtype: torch.dtype  # of the model


class RecurrentState(NamedTuple):
    """One layer's memory of the sequences, by their rows in the row table; the last is padding."""

    conv: Tensor  # [rows, C, K - 1], the newest inputs of the convolution, the oldest first
    recurrent: Tensor  # [rows, Hv, Dk, Dv] float32


@dataclass(frozen=True)
class DecodeMetadata:
    """One query of each of B sequences. It attends to all tokens up to its own.

    In a decode step the queries are the T new tokens. In the last layer of a prefill they are those
    at `logits_indices`, the last of each sequence, while the K/V of all T tokens are stored.
    """

    slot_mapping: Tensor  # [T] int64, cache slots of the tokens' K/V; -1: not written
    block_tables: Tensor  # [B, W] int32
    context_lens: Tensor  # [B] int32, tokens to attend to; 0: a padded row
    plan: object = None  # of `Ops.plan_decode`
    logits_indices: Tensor | None = None  # [B] int32; None: all T tokens
    rows: Tensor | None = None  # [B] int32, in the row table; None: in the last layer of a prefill
    copies: Tensor | None = None  # in the last layer of a prefill: as in `PrefillMetadata`
    # The same for the layers of the other cache groups: see `Config.cache_windows`.
    further_groups: "tuple[DecodeMetadata, ...]" = ()
    last_tokens: ClassVar[None] = None


@dataclass(frozen=True)
class PrefillMetadata:
    """Several new tokens, the last ones, of each of S sequences, one sequence after another."""

    slot_mapping: Tensor  # [T] int64, cache slots of the tokens' K/V; -1: not written
    block_tables: Tensor  # [S, W] int32
    cu_seqlens_q: Tensor  # [S + 1] int32, where each sequence's new tokens begin and the last end
    cu_seqlens_k: Tensor  # [S + 1] int32, the same of all its tokens
    max_seqlen_q: int
    max_seqlen_k: int
    rows: Tensor | None = None  # [S] int32, in the row table; None: no layer has a `StateSpec`
    last_tokens: DecodeMetadata | None = None  # for the last layer; None: all tokens matter after
    copies: Tensor | None = None  # [C, 2] int32, of `Ops.copy_units`, once the tokens are stored
    # [3] int32: S, max_seqlen_q and max_seqlen_k, where the shapes and numbers here are only bounds
    # of them and the other sequences are empty; None: they are not.
    bounds: Tensor | None = None
    further_groups: "tuple[PrefillMetadata, ...]" = ()  # as in `DecodeMetadata`
    logits_indices: ClassVar[None] = None


AttentionMetadata = PrefillMetadata | DecodeMetadata


class DecodeInputs(NamedTuple):
    """A decode step's inputs, read from the row table: B rows of W blocks.

    A padded slot has token 0, position 0, slot -1, length 0, temperature 0.
    """

    input_ids: Tensor  # [B] int32
    positions: Tensor  # [B] int32, index of the input token in its sequence
    slot_mapping: Tensor  # [B] int64, cache slot of the input token's K/V; -1: none
    context_lens: Tensor  # [B] int32, tokens to attend to, the input token included
    block_tables: Tensor  # [B, W] int32
    temperatures: Tensor  # [B] float32
    seeds: Tensor  # [B, 2] int32
