"""The attention function that transformers' modules call: over the paged cache, by masks as rules.

The masks that transformers makes come here as functions of positions, so sliding windows and chunks
hold at any length. A call whose mask is causal, or a sliding window, goes to the backend's kernels.
All others are computed by plain torch operations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nanovllm.kernels.select import MAX_TRITON_HEAD_DIM
from nanovllm.kernels.types import (
    AttentionMetadata,
    DecodeMetadata,
    KVCacheSpec,
    PrefillMetadata,
)
from nanovllm.layers.attention import Attention
from nanovllm.layers.context import ModelContext

ATTENTION, PROBE = "nanovllm", "nanovllm_probe"  # by transformers' names of implementations
MAX_SCORE_ELEMENTS = 2**24  # attention scores alive at a time
MAX_MASK_ELEMENTS = 2**20  # of a mask that is compared with a sliding window
COMPARED_QUERIES = 256


class Mask:
    """Which keys a query sees, by their positions in the sequence: transformers' mask function."""

    def __init__(self, function: Callable[[int, int, Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """[..., Lq] and [..., Lk] -> bool [..., Lq, Lk]."""
        q, k = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
        return self.function(0, 0, q, k) & (k <= q)

    def __getattr__(self, name: str) -> object:
        raise AttributeError("it makes a mask of its own out of transformers' one")

    def __getitem__(self, index: object) -> "Mask":
        parts = index if isinstance(index, tuple) else (index,)
        if all(part in (slice(None), slice(0, None)) for part in parts):
            return self
        raise TypeError("it makes a mask of its own out of transformers' one")


def window_of(mask: Mask, length: int, device: torch.device) -> int | None:
    """The W for which a query at p sees p - W < k <= p; None if `mask` is no such window.

    Positions below `length` count, so full causal attention has W = length. The last query tells
    W. Then the rows of many queries are compared: the first ones, those around W, and some in
    between, which a mask of chunks fails.
    """
    keys = torch.arange(length, device=device)
    window = int(mask(keys[-1:], keys).sum())
    near = torch.arange(-COMPARED_QUERIES // 4, COMPARED_QUERIES // 4, device=device)
    between = torch.linspace(0, length - 1, COMPARED_QUERIES, device=device).long()
    queries = torch.cat([near, near + window, between]).clamp(0, length - 1).unique()
    for part in queries.split(max(1, MAX_MASK_ELEMENTS // length)):
        distance = part.unsqueeze(1) - keys
        if not torch.equal(mask(part, keys), (distance >= 0) & (distance < window)):
            return None
    return window


class Scoring(NamedTuple):
    """How an attention function makes scores of products, and weights of scores."""

    mask: Mask
    scale: float  # multiplies the products
    softcap: float | None  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None  # [Hq], a score for each head that takes its part and has no value


def _padded(x: Tensor, dim: int) -> Tensor:
    """x [..., D] with zeros behind each row, [..., dim]."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


class AttentionCalls:
    """The calls of the attention function in one pass through the module, in their order."""

    def __init__(self) -> None:
        self.paged: list[PagedAttention] = []
        self.metadata: AttentionMetadata
        self.no_positions: Tensor  # [T] int32 zeros
        self._index = 0

    def begin(self, metadata: AttentionMetadata) -> None:
        """A pass begins."""
        self.metadata, self._index = metadata, 0
        self.no_positions = torch.zeros_like(metadata.slot_mapping, dtype=torch.int32)

    def next(self) -> "PagedAttention":
        """The next call's attention."""
        self._index += 1
        return self.paged[self._index - 1]

    @property
    def is_complete(self) -> bool:
        """Whether the pass has made all of its calls."""
        return self._index == len(self.paged)


class PagedAttention(Attention):
    """One call of the attention function: K/V into the cache, and attention over it.

    Keys and values of different sizes are stored in the larger one's, zeros behind the others.

    Args:
        num_kv_heads: of this rank.
        head_dims: those of keys and values.
        context: of the rank.
        window: of the call's mask, see `window_of`; None: it is no window.
        extras: those of ATTENTION_EXTRAS, beside a window, that the call has.

    Attributes:
        obstacle: why the backend does not compute it, but plain torch operations do; None: it does.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dims: tuple[int, int],
        context: ModelContext,
        window: int | None,
        extras: set[str],
    ) -> None:
        dim, length = max(head_dims), context.max_model_len
        spec = KVCacheSpec(num_kv_heads, dim, context.kv_cache_dtype or context.dtype)
        no_rotation = torch.ones(1, dim, device=context.device)
        no_rotation[:, dim // 2 :] = 0  # cosines of 1, sines of 0
        if window is not None and (length is None or window < length):
            extras = extras | {"window"}
        missing = extras - context.ops.attention_extras
        obstacle = None
        if window is None:
            obstacle = "its mask is neither causal nor a sliding window"
        elif dim > MAX_TRITON_HEAD_DIM or dim % 2:
            obstacle = f"its heads have {dim} elements"
        elif missing:
            obstacle = f"it has {' and '.join(sorted(missing))}"
        super().__init__(spec, no_rotation, context)
        self.obstacle = obstacle
        self.window = window if "window" in extras else None  # the cache keeps all tokens

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, calls: AttentionCalls
    ) -> Tensor:
        """query [T, Hq, Dk], key [T, Hkv, Dk], value [T, Hkv, Dv] -> [T, Hq, Dv]."""
        dim = self.cache_spec.head_dim
        stored = torch.cat([_padded(key, dim), _padded(value, dim)], 1)
        if self.obstacle is not None:
            return self._run_in_torch(query, stored, value.shape[-1], scoring, calls.metadata)
        metadata = calls.metadata
        # A projection without query heads: only the store is wanted, and nothing is rotated.
        self.ops.qk_norm_rope_store(
            stored.flatten(1),
            None,
            None,
            1.0,
            self.cos_sin,
            calls.no_positions,
            self.cache,
            metadata.slot_mapping,
        )
        if metadata.copies is not None:
            self.ops.copy_units(self.cache, metadata.copies)
        return self.ops.attend(
            _padded(query, dim).contiguous(),
            self.cache,
            metadata,
            scoring.scale,
            window=self.window,
            softcap=scoring.softcap,
            sinks=scoring.sinks,
        )[..., : value.shape[-1]]

    # ---- by plain torch operations --------------------------------------------------------------

    def _run_in_torch(
        self,
        query: Tensor,
        stored: Tensor,
        value_dim: int,
        scoring: Scoring,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """The same with any mask; stored [T, 2 Hkv, D] are the keys, then the values."""
        is_written = metadata.slot_mapping >= 0
        slots = metadata.slot_mapping[is_written]
        for heads, memory in zip(stored[is_written].chunk(2, 1), self.cache[:2], strict=True):
            assert memory is not None
            memory.view(-1, *memory.shape[2:])[slots] = heads.to(memory.dtype)
        if metadata.copies is not None:
            self.ops.copy_units(self.cache, metadata.copies)
        out = query.new_empty(*query.shape[:2], value_dim)
        if isinstance(metadata, DecodeMetadata):
            self._decode(query, scoring, metadata, out)
        else:
            self._prefill(query, scoring, metadata, out)
        return out

    def _prefill(
        self,
        query: Tensor,
        scoring: Scoring,
        metadata: PrefillMetadata,
        out: Tensor,
    ) -> None:
        """A sequence at a time, and of its queries as many as the scores' memory allows."""
        block_size = self.cache.key.shape[1]
        q_ends, k_ends = metadata.cu_seqlens_q.tolist(), metadata.cu_seqlens_k.tolist()
        for seq, table in enumerate(metadata.block_tables):
            q_begin, q_end = q_ends[seq : seq + 2]
            len_k = k_ends[seq + 1] - k_ends[seq]
            pages = table[: -(-len_k // block_size)].long()
            key, value = (m[pages].flatten(0, 1)[:len_k].transpose(0, 1) for m in self.cache[:2])
            positions = torch.arange(len_k, device=query.device)
            rows = max(1, MAX_SCORE_ELEMENTS // (query.shape[1] * len_k))
            for begin in range(q_begin, q_end, rows):
                end = min(begin + rows, q_end)
                first, last = begin - q_end + len_k, end - q_end + len_k
                out[begin:end] = attention(
                    query[begin:end].transpose(0, 1),
                    key[:, :last, : query.shape[-1]],
                    value[:, :last, : out.shape[-1]],
                    scoring.mask(positions[first:last], positions[:last]),
                    scoring,
                ).transpose(0, 1)

    def _decode(
        self,
        query: Tensor,
        scoring: Scoring,
        metadata: DecodeMetadata,
        out: Tensor,
    ) -> None:
        """Slices of rows, each padded to the slice's longest context."""
        num_heads, block_size = query.shape[1], self.cache.key.shape[1]
        lens = metadata.context_lens.tolist()
        rows = max(1, MAX_SCORE_ELEMENTS // max(1, max(lens) * num_heads * query.shape[-1]))
        for begin in range(0, len(lens), rows):
            part = slice(begin, begin + rows)
            length = metadata.context_lens[part].long().unsqueeze(1)  # [b, 1]
            positions = torch.arange(max(1, max(lens[part])), device=query.device)
            # Past its end a row reads its own first slot: a masked NaN would spoil the product.
            places = torch.where(positions < length, positions, 0)
            pages = metadata.block_tables[part].long().gather(1, places // block_size)
            slots = pages * block_size + places % block_size
            key, value = (m.flatten(0, 1)[slots].transpose(1, 2) for m in self.cache[:2])
            out[part] = attention(
                query[part].unsqueeze(2),
                key[..., : query.shape[-1]],
                value[..., : out.shape[-1]],
                scoring.mask(length - 1, positions.expand_as(places)).unsqueeze(1),
                scoring,
            ).squeeze(2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scoring: Scoring,
) -> Tensor:
    """query [..., Hq, Lq, Dk], key [..., Hkv, Lk, Dk], value [..., Hkv, Lk, Dv] -> [..., Lq, Dv].

    Args:
        query: as above.
        key: as above.
        value: as above.
        visible: bool, which key each query sees; of a shape that broadcasts to [..., Hq, Lq, Lk].
        scoring: how the products become weights; its mask is not read.
    """
    group = query.shape[-3] // key.shape[-3]
    key, value = (x.to(query.dtype).repeat_interleave(group, -3) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.float().masked_fill(~visible, torch.finfo(torch.float32).min)
    if scoring.sinks is not None:
        sink = scoring.sinks.float().view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1).to(query.dtype)
    return weights[..., : key.shape[-2]] @ value


def _mask(*args: object, mask_function: Callable[..., Tensor], **kwargs: object) -> Mask:
    """For transformers' mask interface."""
    return Mask(mask_function)


def _run(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """For transformers' attention interface: query [1, Hq, T, Dk] -> [1, T, Hq, Dv]."""
    assert isinstance(attention_mask, Mask)
    calls = module.attention_calls
    assert isinstance(calls, AttentionCalls)
    paged = calls.next()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scoring = Scoring(attention_mask, scale, softcap, s_aux)
    return paged.run(query, key, value, scoring, calls).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _run)
AttentionMaskInterface.register(ATTENTION, _mask)
AttentionMaskInterface.register(PROBE, _mask)
