"""Attention on the CPU: a sequence at a time, reading its keys and values where they lie.

A batch of rows padded to one length, as `torch_ops` has them for decoding, would be copied out of
the cache in every step and layer: three times the traffic of reading it once.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.torch_ops import (
    MAX_SCORE_ELEMENTS,
    dequantize,
    first_visible,
    masked_attention,
)
from nanovllm.kernels.types import AttentionMetadata, KVCache, PrefillMetadata


class Span(NamedTuple):
    """The new tokens of a sequence, and the cache blocks of what they see."""

    begin: int  # index of the first among the step's queries
    end: int  # one past the last
    length: int  # tokens of the sequence, these included
    first_block: int  # number within the sequence of the first block that they see
    blocks: list[int]  # from that one on

    @property
    def follow_one_another(self) -> bool:
        """Whether the blocks lie side by side in the cache."""
        return self.blocks == list(range(self.blocks[0], self.blocks[-1] + 1))


def spans_of(metadata: AttentionMetadata, window: int | None, block_size: int) -> list[Span]:
    """What each sequence of a step computes; a row of length 0 has no span."""
    if isinstance(metadata, PrefillMetadata):
        ends, all_ends = metadata.cu_seqlens_q.tolist(), metadata.cu_seqlens_k.tolist()
        lengths = [end - begin for begin, end in pairwise(all_ends)]
    else:
        lengths = metadata.context_lens.tolist()
        ends = list(range(len(lengths) + 1))
    spans = []
    for row, (length, table) in enumerate(zip(lengths, metadata.block_tables, strict=True)):
        begin, end = ends[row : row + 2]
        if length and end > begin:
            first_block = first_visible(length - (end - begin), window) // block_size
            blocks = table[first_block : -(-length // block_size)].tolist()
            spans.append(Span(begin, end, length, first_block, blocks))
    return spans


def _read(
    memory: torch.Tensor, scales: torch.Tensor | None, span: Span, dtype: torch.dtype
) -> torch.Tensor:
    """The span's keys or values [n, Hkv, D]: a view, if its blocks follow one another."""
    num_tokens = span.length - span.first_block * memory.shape[1]
    if span.follow_one_another:
        heads = memory[span.blocks[0] : span.blocks[-1] + 1]
    else:
        heads = torch.cat([memory[block : block + 1] for block in span.blocks])
    heads = heads.flatten(0, 1)[:num_tokens]
    if scales is not None:
        scales = scales[span.blocks].transpose(1, 2).flatten(0, 1)[:num_tokens]
    return dequantize(heads, scales, dtype)


def attend(
    query: torch.Tensor,
    cache: KVCache,
    spans: list[Span],
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Ops.attend` of the sequences in `spans`, which are of the same window."""
    block_size, num_kv_heads = cache.key.shape[1:3]
    if softcap is None and sinks is None and all(s.end - s.begin == 1 for s in spans):
        return _attend_single(query, cache, spans, scale, window)
    out = query.new_zeros(query.shape)
    grouped = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, T, D]
    grouped_out = out.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    is_plain = softcap is None and sinks is None
    for span in spans:
        keys, values = (
            _read(memory, scales, span, query.dtype).transpose(0, 1)
            for memory, scales in torch_ops.halves(cache)
        )
        first_k = span.first_block * block_size  # the position of keys[:, 0]
        offset = span.length - span.end  # from a query's index to its position
        per_row = span.length * (1 if is_plain else query.shape[1])
        rows = max(1, MAX_SCORE_ELEMENTS // per_row)
        for begin in range(span.begin, span.end, rows):
            end = min(begin + rows, span.end)
            first, last = begin + offset, end + offset  # positions
            # No key before the first query's window: its slot may hold anything, NaN too.
            seen = slice(first_visible(first, window) - first_k, last - first_k)
            part = grouped[:, :, begin:end]
            key, value = keys[:, seen], values[:, seen]
            is_causal = first == 0 and (window is None or window >= last)
            mask = None
            if not (is_causal and is_plain):
                q_pos = torch.arange(first, last).unsqueeze(1)
                k_pos = torch.arange(seen.start + first_k, last)
                mask = k_pos <= q_pos
                if window is not None:
                    mask &= k_pos > q_pos - window
            if is_plain:
                group = part.shape[1]
                attended = F.scaled_dot_product_attention(
                    part,
                    key[:, None].expand(-1, group, -1, -1),
                    value[:, None].expand(-1, group, -1, -1),
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                )
            else:
                assert mask is not None
                attended = masked_attention(part, key, value, mask, scale, softcap, sinks)
            grouped_out[:, :, begin:end] = attended
    return out


def _attend_single(
    query: torch.Tensor, cache: KVCache, spans: list[Span], scale: float, window: int | None
) -> torch.Tensor:
    """`attend` of one query for each sequence, as in decoding: it sees all keys of its window."""
    block_size, num_kv_heads = cache.key.shape[1:3]
    # [B, Hkv, G, D]: the heads of a group are the rows of one product.
    grouped = query.unflatten(1, (num_kv_heads, -1))
    # [1, Hkv, slots, D]
    halves = [memory.flatten(0, 1).transpose(0, 1)[None] for memory in cache[:2]]
    out = torch.zeros_like(grouped) if len(spans) < len(query) else torch.empty_like(grouped)
    for span in spans:
        first = first_visible(span.length - 1, window)
        skipped, num_seen = first - span.first_block * block_size, span.length - first
        if cache.key_scales is None and span.follow_one_another:
            start = span.blocks[0] * block_size + skipped
            key, value = (half.narrow(2, start, num_seen) for half in halves)
        else:
            key, value = (
                _read(memory, scales, span, query.dtype)[skipped:].transpose(0, 1)[None]
                for memory, scales in torch_ops.halves(cache)
            )
        part = grouped.narrow(0, span.begin, 1)
        attended = F.scaled_dot_product_attention(part, key, value, scale=scale)
        out.narrow(0, span.begin, 1).copy_(attended)
    return out.flatten(1, 2)
