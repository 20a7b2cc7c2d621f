"""Every operation of `Ops` in plain PyTorch: the CPU path and the oracle of the kernel tests.

Runs on any device, in float32, float16 and bfloat16. Low-precision rounding follows the order of
Hugging Face's Qwen3. Memory stays bounded for long prompts and large batches; inputs are never
changed in place, and unwritten cache slots (which may hold NaN) never reach a result.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from nanovllm.kernels import row_state, torch_delta_rule, torch_lora
from nanovllm.kernels.attention_steps import AttentionInSteps
from nanovllm.kernels.cache_units import COPY_UNIT
from nanovllm.kernels.types import (
    ATTENTION_EXTRAS,
    DRAW_GROUP,
    FP8_BLOCK,
    FP8_DTYPE,
    FP8_MAX,
    FP8_MIN_AMAX,
    PACKED_RUN,
    AttentionMetadata,
    ClampedSwiGLU,
    DecodeInputs,
    DecodeMetadata,
    KVCache,
    LinearOutput,
    PackedWeight,
    PrefillMetadata,
    summed,
)

MAX_SCORE_ELEMENTS = 2**26  # attention scores alive at a time in prefill
MAX_GATHER_ELEMENTS = 2**24  # keys (and as many values) copied out of the cache at a time in decode
MAX_SAMPLE_ELEMENTS = 2**21  # logits that get noise at a time


# Norms and activation


def rms_norm(x: LinearOutput, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis: x / sqrt(mean(x^2) + eps) * weight, normalised in float32."""
    x = summed(x)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if weight.dtype != x.dtype:
        return (normed * weight).to(x.dtype)
    return normed.to(x.dtype) * weight


def add_rms_norm(
    x: LinearOutput, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual sum in x.dtype, then its norm. x, residual [T, H] -> (norm [T, H], sum [T, H])."""
    total = summed(x) + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: LinearOutput) -> torch.Tensor:
    """SwiGLU: gate_up [T, 2I] -> silu(gate) * up [T, I]."""
    gate, up = summed(gate_up).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_and_mul(gate_up: LinearOutput, is_tanh: bool) -> torch.Tensor:
    """GeGLU: gate_up [T, 2I] -> gelu(gate) * up [T, I]."""
    gate, up = summed(gate_up).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh" if is_tanh else "none").mul_(up)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    return F.linear(x, weight, bias)


def vocab_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [B, H], weight [V, H] -> [B, V], in `out` if it is given."""
    return torch.mm(x, weight.t(), out=out)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K], fp8 weight [N, K] -> [T, N], with x as it is; see `Ops.fp8_linear`."""
    return F.linear(x, dequantize_weight(weight, scales).to(x.dtype), bias)


def dequantize_weight(
    weight: torch.Tensor, scales: torch.Tensor, first: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """fp8 [N, K] with scales as in `Ops.fp8_linear` -> float32 [N, K].

    first: the first row and column of `weight` in what the scales of blocks begin with.
    """
    if scales.dim() == 1:
        return weight.float() * scales.unsqueeze(1)
    rows, columns = (
        (torch.arange(size, device=weight.device) + start) // FP8_BLOCK
        for size, start in zip(weight.shape, first, strict=True)
    )
    return weight.float() * scales.float()[rows][:, columns]


# Packed weights


def packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K], packed weight [N, K], bias [N] -> [T, N]; see `Ops.packed_linear`."""
    return F.linear(x, dequantize_packed(weight, x.dtype), bias)


def dequantize_packed(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in `dtype`, computed in float32, its columns in the order of x's."""
    numbers = unpack_numbers(weight.numbers, weight.bits).float()
    groups = numbers.unflatten(1, (-1, weight.group_size))
    zeros: float | torch.Tensor = 2.0 ** (weight.bits - 1)
    if weight.zeros is not None:
        zeros = weight.zeros.unsqueeze(2).float()
    values = ((groups - zeros) * weight.scales.unsqueeze(2).float()).to(dtype).flatten(1)
    if weight.order is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.order.long(), values)


def pack_numbers(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values uint8 [N, K] below 2^bits -> `PackedWeight.numbers`."""
    if bits == 8:
        return values.unflatten(1, (-1, 2, PACKED_RUN)).transpose(2, 3).flatten(1)
    low, high = values.unflatten(1, (-1, 2, 2, PACKED_RUN)).unbind(3)
    return (low | high << 4).transpose(2, 3).flatten(1)


def unpack_numbers(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """`PackedWeight.numbers` -> uint8 [N, K]."""
    runs = numbers.unflatten(1, (-1, PACKED_RUN, 2)).transpose(2, 3)
    return (runs if bits == 8 else torch.stack((runs & 15, runs >> 4), 3)).flatten(1)


def quantize_packed(
    weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype | None = None
) -> PackedWeight:
    """weight [N, K] rounded to the nearest of 2^bits numbers, which lie around zero.

    A group's scale is max |w| / (2^(bits - 1) - 1/2), rounded to `dtype` (None: the weight's). Its
    numbers are w / scale, rounded and held within -2^(bits - 1) and 2^(bits - 1) - 1. So the step
    is 1/15 of the range from -max |w| to max |w| with 4 bits. A NaN makes its group NaN.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    middle = 2.0 ** (bits - 1)
    largest = groups.abs().amax(2)
    # CUDA multiplies by the inverse of a Python number: the largest would fall off its tie.
    scales = (largest / largest.new_tensor(middle - 0.5)).to(dtype or weight.dtype)
    divisors = scales.float().masked_fill(scales == 0, 1).unsqueeze(2)
    numbers = (groups / divisors).round_().clamp_(-middle, middle - 1).nan_to_num_() + middle
    packed = pack_numbers(numbers.to(torch.uint8).flatten(1), bits)
    return PackedWeight(packed, scales, None, None, bits, group_size)


# Mixture of experts


def experts(
    x: torch.Tensor,
    router_logits: LinearOutput,
    gate_up_weight: torch.Tensor | PackedWeight,
    down_weight: torch.Tensor | PackedWeight,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    gate_up_scales: torch.Tensor | None = None,
    down_scales: torch.Tensor | None = None,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    swiglu: ClampedSwiGLU | None = None,
) -> torch.Tensor:
    """x [T, H], router_logits [T, E] -> [T, H], an expert at a time; see `Ops.experts`."""
    probabilities = summed(router_logits).softmax(-1, dtype=torch.float32)
    num_experts = probabilities.shape[1]
    weights, ids = probabilities.topk(num_experts_per_tok)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.to(x.dtype)
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        gate_up, down = (
            _weight_of_expert(weight, scales, expert, num_experts, x.dtype)
            for weight, scales in ((gate_up_weight, gate_up_scales), (down_weight, down_scales))
        )
        first_bias, second_bias = (
            None if bias is None else bias.view(num_experts, -1)[expert]
            for bias in (gate_up_bias, down_bias)
        )
        tokens, slots = torch.where(ids == expert)
        inner = F.linear(x[tokens], gate_up, first_bias)
        inner = silu_and_mul(inner) if swiglu is None else clamped_swiglu(inner, swiglu)
        y = F.linear(inner, down, second_bias)
        out.index_add_(0, tokens, y * weights[tokens, slots].unsqueeze(1))
    return out


def clamped_swiglu(gate_up: torch.Tensor, swiglu: ClampedSwiGLU) -> torch.Tensor:
    """gate_up [T, 2I], gate first -> [T, I]; see `ClampedSwiGLU`."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * swiglu.alpha))


def _weight_of_expert(
    weight: torch.Tensor | PackedWeight,
    scales: torch.Tensor | None,
    expert: int,
    num_experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[N, K] in `dtype` of weight [num_experts * N, K]."""
    if isinstance(weight, PackedWeight):
        size = weight.shape[0] // num_experts
        return dequantize_packed(weight.rows(slice(expert * size, (expert + 1) * size)), dtype)
    part = weight.view(num_experts, -1, weight.shape[1])[expert]
    if scales is None:
        return part
    scales_of_experts = scales.view(num_experts, -1, *scales.shape[1:])
    return dequantize_weight(part, scales_of_experts[expert]).to(dtype)


# Rotary embedding and the cache


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + D/2) of x [T, H, D]; cos, sin [T, 1, D/2] in x.dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of `qk_norm_rope_store` without side effects: -> query [T, Hq, D], key [T, Hkv, D].

    Hugging Face's order: norm, cos and sin rounded to the dtype, q * cos + rotate_half(q) * sin.
    """
    heads = qkv.unflatten(-1, (-1, head_dim))
    query = heads[:, : -2 * num_kv_heads]
    key = heads[:, -2 * num_kv_heads : -num_kv_heads]
    if q_norm_weight is not None:
        query = rms_norm(query, q_norm_weight, eps)
    if k_norm_weight is not None:
        key = rms_norm(key, k_norm_weight, eps)
    cos, sin = cos_sin[positions.long()].to(qkv.dtype).unsqueeze(1).chunk(2, dim=-1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def qk_norm_rope_store(
    qkv: LinearOutput,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    *,
    pure_part: Callable[..., tuple[torch.Tensor, torch.Tensor]] = qk_norm_rope,
) -> torch.Tensor:
    """Norms and rotates q and k, writes K/V to their slots; see `Ops.qk_norm_rope_store`.

    `pure_part` is `qk_norm_rope` or its compiled form; the store depends on the slots' values.
    """
    qkv = summed(qkv)
    num_kv_heads, head_dim = cache.key.shape[2:]
    query, key = pure_part(
        qkv, q_norm_weight, k_norm_weight, eps, cos_sin, positions, num_kv_heads, head_dim
    )
    value = qkv.unflatten(-1, (-1, head_dim))[:, -num_kv_heads:]
    is_stored = slot_mapping >= 0
    store(key[is_stored], value[is_stored], cache, slot_mapping[is_stored])
    return query


def store(key: torch.Tensor, value: torch.Tensor, cache: KVCache, slots: torch.Tensor) -> None:
    """Writes key and value [T, Hkv, D] to slots [T] of the cache."""
    block_size, num_kv_heads, head_dim = cache.key.shape[1:]
    for heads, (memory, scales) in zip((key, value), halves(cache), strict=True):
        if scales is not None:
            heads, scales[slots // block_size, :, slots % block_size] = quantize(heads)
        memory.view(-1, num_kv_heads, head_dim)[slots] = heads


def copy_units(cache: KVCache, copies: torch.Tensor) -> None:
    """See `Ops.copy_units`; a part of the copies at a time, for the memory."""
    if len(copies) == 0:
        return
    unit_elements = COPY_UNIT * cache.key[0, 0].numel()
    for part in copies.long().split(max(1, MAX_GATHER_ELEMENTS // unit_elements)):
        targets, sources = part.unbind(1)
        for memory in cache[:2]:
            units = memory.view(-1, unit_elements).view(torch.uint8)
            units[targets] = units[sources]
    copy_scales(cache, copies)


def copy_scales(cache: KVCache, copies: torch.Tensor) -> None:
    """The part of `Ops.copy_units` that is about scales, if there are any."""
    for scales in cache[2:]:
        if scales is not None:
            units = scales.unflatten(2, (-1, COPY_UNIT))  # [num_blocks, Hkv, U, COPY_UNIT]
            block, unit = copies.long() // units.shape[2], copies.long() % units.shape[2]
            units[block[:, 0], :, unit[:, 0]] = units[block[:, 1], :, unit[:, 1]]


def halves(cache: KVCache) -> tuple[tuple[torch.Tensor, torch.Tensor | None], ...]:
    """Keys with their scales, and values with theirs."""
    return (cache.key, cache.key_scales), (cache.value, cache.value_scales)


def quantize(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """heads [T, Hkv, D] -> (FP8_DTYPE [T, Hkv, D], scales float32 [T, Hkv]); see `Ops`."""
    amax = heads.float().abs().amax(-1, keepdim=True)
    is_nonzero = amax > FP8_MIN_AMAX
    scales = torch.where(is_nonzero, amax * (1 / FP8_MAX), 1)
    inverse = torch.where(is_nonzero, FP8_MAX / amax, 1)
    return (heads.float() * inverse).to(FP8_DTYPE), scales.squeeze(-1)


def dequantize(
    heads: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What was read from the cache [..., Hkv, D], with scales [..., Hkv] if it is fp8."""
    if scales is None:
        return heads
    return (heads.float() * scales.unsqueeze(-1)).to(dtype)


# Attention


def attend(
    query: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `Ops.attend`."""
    if isinstance(metadata, PrefillMetadata):
        return prefill_attention(
            query, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
        )
    return decode_attention(
        query, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
    )


def prefill_attention(
    query: torch.Tensor,
    cache: KVCache,
    metadata: PrefillMetadata,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last positions over its pages, a sequence at a time.

    query [T, Hq, D] -> [T, Hq, D]; softmax in float32.
    """
    num_heads = query.shape[1]
    block_size, num_kv_heads = cache.key.shape[1:3]
    group = num_heads // num_kv_heads
    out = torch.empty_like(query)
    q_ends, k_ends = metadata.cu_seqlens_q.tolist(), metadata.cu_seqlens_k.tolist()
    for seq, table in enumerate(metadata.block_tables):
        q_begin, q_end = q_ends[seq : seq + 2]
        len_k = k_ends[seq + 1] - k_ends[seq]
        num_cached = len_k - (q_end - q_begin)
        first_page = first_visible(num_cached, window) // block_size
        begin_k = first_page * block_size  # the keys from here on are copied out of the cache
        pages = table[first_page : -(-len_k // block_size)].long()
        keys, values = (
            dequantize(
                memory.index_select(0, pages),
                None if scales is None else scales[pages].transpose(1, 2),
                query.dtype,
            )
            .flatten(0, 1)[: len_k - begin_k]
            # [Hkv, G, len_k - begin_k, D]: each KV head seen by its group without a copy.
            .permute(1, 0, 2)[:, None]
            .expand(-1, group, -1, -1)
            for memory, scales in halves(cache)
        )
        rows = max(1, MAX_SCORE_ELEMENTS // max(1, num_heads * len_k))
        for begin in range(q_begin, q_end, rows):
            end = min(begin + rows, q_end)
            first, last = begin - q_begin + num_cached, end - q_begin + num_cached
            # No key before the first query's window: its slot may hold anything, NaN too.
            first_k = first_visible(first, window)
            seen = slice(first_k - begin_k, last - begin_k)
            # From position 0 on, SDPA's own causal mask is the right one.
            is_causal = first == 0 and (window is None or window >= last)
            mask = None
            if not is_causal or softcap is not None or sinks is not None:
                q_pos = torch.arange(first, last, device=query.device).unsqueeze(1)
                k_pos = torch.arange(first_k, last, device=query.device)
                mask = k_pos <= q_pos
                if window is not None:
                    mask &= k_pos > q_pos - window
            grouped = query[begin:end].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
            if mask is None or not (query.is_cuda or softcap is not None or sinks is not None):
                attended = F.scaled_dot_product_attention(
                    grouped,
                    keys[:, :, seen],
                    values[:, :, seen],
                    attn_mask=mask,
                    is_causal=is_causal,
                    scale=scale,
                )  # [Hkv, G, rows, D]
            else:
                attended = masked_attention(
                    grouped, keys[:, 0, seen], values[:, 0, seen], mask, scale, softcap, sinks
                )
            out[begin:end] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def first_visible(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if window is None else max(0, position + 1 - window)


def masked_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a mask, and perhaps a soft cap and sinks; see `Ops.attend`.

    On CUDA SDPA with a mask reads beyond it, or gives other numbers, for lengths such as 257 (torch
    2.11, float32), so that no mask is passed there.

    Scores and softmax are in float32 (float64 for such a query), weights rounded to the dtype.

    Args:
        query: [..., Hkv, G, M, D].
        keys: [..., Hkv, N, D].
        values: the same.
        mask: which keys a query sees, bool, of a shape that broadcasts to [..., Hkv, G, M, N].
        scale: multiplies the products.
        softcap: a bound of the scores.
        sinks: [Hkv * G].

    Returns:
        [..., Hkv, G, M, D].
    """
    num_kv_heads, group, rows = query.shape[-4:-1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.flatten(-3, -2).to(dtype) @ keys.to(dtype).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(-2, (group, rows)).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).clamp(max=torch.finfo(dtype).max)  # inf takes everything
        sink = sink.view(num_kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]].to(values.dtype)
    return (weights.flatten(-3, -2) @ values).unflatten(-2, (group, rows))


def decode_attention(
    query: torch.Tensor,
    cache: KVCache,
    metadata: DecodeMetadata,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per row over its pages; query [B, Hq, D] -> [B, Hq, D].

    Works on slices of rows, padded to the slice's longest context. A row of length 0 gives zeros.
    """
    batch_size = query.shape[0]
    block_size, num_kv_heads, head_dim = cache.key.shape[1:]
    out = torch.empty_like(query)
    context_lens = metadata.context_lens
    seen_lens = context_lens if window is None else context_lens.clamp(max=window)
    lens = seen_lens.tolist()
    per_row = max(lens, default=0) * num_kv_heads * head_dim
    rows = max(1, MAX_GATHER_ELEMENTS // max(1, per_row))
    for begin in range(0, batch_size, rows):
        part = slice(begin, min(begin + rows, batch_size))
        length = seen_lens[part].long().unsqueeze(1)  # [b, 1]
        first = context_lens[part].long().unsqueeze(1) - length
        index = torch.arange(max(1, max(lens[part])), device=query.device)
        visible = index < length  # [b, L]
        # Past its end a row reads the first slot it sees: a masked NaN would spoil the product.
        position = first + torch.where(visible, index, 0)
        pages = metadata.block_tables[part].long().gather(1, position // block_size)
        offset = position % block_size
        slots = pages * block_size + offset
        keys, values = (
            dequantize(
                # Whole rows at a time, five times as fast as indexing by slots.
                memory.flatten(0, 1).index_select(0, slots.view(-1)).unflatten(0, slots.shape),
                None if scales is None else scales[pages, :, offset],
                query.dtype,
            ).transpose(1, 2)  # [b, Hkv, L, D]
            for memory, scales in halves(cache)
        )
        grouped = query[part].unflatten(1, (num_kv_heads, -1))  # [b, Hkv, G, D]
        is_ragged = min(lens[part]) < max(lens[part])
        if softcap is None and sinks is None and not (is_ragged and query.is_cuda):
            attended = F.scaled_dot_product_attention(
                grouped,
                keys,
                values,
                attn_mask=visible[:, None, None] if is_ragged else None,
                scale=scale,
            )
        else:
            mask = visible[:, None, None, None]
            attended = masked_attention(
                grouped.unsqueeze(3), keys, values, mask, scale, softcap, sinks
            ).squeeze(3)
        out[part] = attended.flatten(1, 2).masked_fill(length.unsqueeze(2) == 0, 0)
    return out


def plan_decode(
    cache: KVCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    num_common_tokens: torch.Tensor | None = None,
    window: int | None = None,
) -> None:
    """None: `decode_attention` divides the work itself."""


# Sampling


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit integer hash lowbias32 by Chris Wellons; int32 arithmetic wraps around."""
    x = x ^ _shift_right(x, 16)
    x = x * 0x7FEB352D
    x = x ^ _shift_right(x, 15)
    x = x * (0x846CA68B - 2**32)
    return x ^ _shift_right(x, 16)


def exponentials(
    seeds: torch.Tensor, positions: torch.Tensor, numbers: torch.Tensor, of_tokens: bool
) -> torch.Tensor:
    """log2(e) times a draw from the exponential distribution of rate 1, float32 [B, N].

    Each is a function of (seed, position, number) alone. Groups and tokens draw from two streams.

    Args:
        seeds: [B, 2] int32.
        positions: [B] int32.
        numbers: int32 [N] or [B, N], of groups or of tokens.
        of_tokens: which of the streams.
    """
    # Every draw walks over the 32-bit integers from a start and in steps of its own, a step for
    # each number, and hashes them: lowbias32 without its outermost shift.
    start = _mix(seeds[:, 0] ^ _mix(positions))
    step = _mix(seeds[:, 1] ^ start) | 1
    if of_tokens:
        start = _mix(start ^ step)
    bits = start.unsqueeze(1) + (numbers + 1) * step.unsqueeze(1)
    bits = (bits ^ _shift_right(bits, 16)) * 0x7FEB352D
    bits = (bits ^ _shift_right(bits, 15)) * (0x846CA68B - 2**32)
    # v in (0, 1): the bits as an unsigned number. log1p keeps the digits of a small v: the winners.
    v = (bits.long() & 0xFFFFFFFF).float() * (2.0**-32 - 2.0**-56) + 2.0**-33
    return -torch.log1p(-v) * math.log2(math.e)


def _in_groups(logits: torch.Tensor, thresholds: torch.Tensor | None) -> torch.Tensor:
    """logits [B, V] -> float32 [B, DRAW_GROUP, V / DRAW_GROUP rounded up]: a column is a group.

    What never wins is -inf.
    """
    padding = -logits.shape[1] % DRAW_GROUP
    if padding:
        logits = F.pad(logits, (0, padding), value=-torch.inf)
    columns = logits.unflatten(1, (-1, DRAW_GROUP)).transpose(1, 2).contiguous().float()
    columns = columns.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if thresholds is not None:
        columns = columns.masked_fill(columns < thresholds.view(-1, 1, 1), -torch.inf)
    return columns


def _rates(temperatures: torch.Tensor) -> torch.Tensor:
    """log2(e) / temperature, [B, 1]; any number for greedy rows."""
    return math.log2(math.e) / torch.where(temperatures > 0, temperatures, 1).unsqueeze(1)


def group_scores(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_group: int,
) -> torch.Tensor:
    """log2(W) - log2(E): the argmax is a draw of a group with odds W. [B, G, N] -> float32 [B, N].

    W is the sum of exp(logit / temperature) over the G tokens of a group, and E an exponential.
    Temperature 0 scores the largest logit. logits are float32 and without NaN.
    """
    largest = logits.amax(1)
    reference = largest.clamp(-3e38, 3e38)  # finite: no inf - inf
    rates = _rates(temperatures)
    weights = (logits - reference.unsqueeze(1)).mul_(rates.unsqueeze(1)).exp2_()
    weight = reduce(torch.add, weights.unbind(1))  # in one order, however many groups there are
    numbers = torch.arange(logits.shape[2], device=logits.device, dtype=torch.int32) + first_group
    noise = torch.log2(exponentials(seeds, positions, numbers, of_tokens=False))
    scores = torch.log2(weight) + (reference * rates - noise)
    return torch.where((temperatures > 0).unsqueeze(1), scores, largest)


def token_scores(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
) -> torch.Tensor:
    """The same among the tokens of a group: logits float32 [B, G], of token_ids int32 [B, G]."""
    distance = logits - logits.amax(1, keepdim=True).clamp(-3e38, 3e38)
    noise = torch.log2(exponentials(seeds, positions, token_ids, of_tokens=True))
    scores = distance * _rates(temperatures) - noise
    return torch.where((temperatures > 0).unsqueeze(1), scores, logits)


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_token_id: int,
    vocab_size: int,
    thresholds: torch.Tensor | None = None,
    *,
    scores_part: Callable[..., torch.Tensor] = group_scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel-max sampling: (scores [B] float32, token_ids [B] int32); see `Ops.sample`.

    Adding -log(-log(u)) of uniform u to log-odds and taking the largest draws with these odds
    (Gumbel 1954). It is a race: of exponentials with rates w the first is i with odds w_i, and it
    comes after an exponential time with rate sum(w), whichever it is. So a group of tokens can race
    as one with the sum of their weights, and the winner's tokens race again among themselves.

    A NaN never wins; a slice that is all padding and a row that is skipped score -inf.
    `scores_part` is `group_scores` or its compiled form.
    """
    assert first_token_id % DRAW_GROUP == 0
    batch_size = logits.shape[0]
    scores = logits.new_full((batch_size,), -torch.inf, dtype=torch.float32)
    columns = torch.zeros(batch_size, dtype=torch.int32, device=logits.device)
    logits = logits[:, : max(0, vocab_size - first_token_id)]
    num_columns = logits.shape[1]
    if num_columns > 0 and batch_size > 0:
        hot = bool((temperatures > 0).any())
        in_group = torch.arange(DRAW_GROUP, device=logits.device, dtype=torch.int32)
        rows = max(1, MAX_SAMPLE_ELEMENTS // num_columns)
        for begin in range(0, batch_size, rows):
            part = slice(begin, begin + rows)
            draw = temperatures[part], seeds[part], positions[part]
            groups = _in_groups(logits[part], None if thresholds is None else thresholds[part])
            if hot:
                scored = scores_part(groups, *draw, first_token_id // DRAW_GROUP)
            else:
                scored = groups.amax(1)
            best = scored.argmax(dim=1, keepdim=True)  # the first of equals
            scores[part] = scored.gather(1, best).squeeze(1)
            tokens = groups.gather(2, best.unsqueeze(1).expand(-1, DRAW_GROUP, 1)).squeeze(2)
            first = best.int() * DRAW_GROUP
            if hot:
                tokens = token_scores(tokens, *draw, first + in_group + first_token_id)
            columns[part] = first.squeeze(1) + tokens.argmax(dim=1)
        scores.masked_fill_(temperatures < 0, -torch.inf)
    return scores, (columns + first_token_id).clamp(max=vocab_size - 1)


def filter_thresholds(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """The smallest logit of each row that survives, by sorting; see `Ops.filter_thresholds`."""
    logits = logits[:, :vocab_size]
    batch_size, num_columns = logits.shape
    thresholds = logits.new_full((batch_size,), -torch.inf, dtype=torch.float32)
    rows = max(1, MAX_SAMPLE_ELEMENTS // max(1, num_columns))
    for begin in range(0, batch_size if num_columns else 0, rows):
        part = slice(begin, begin + rows)
        values = logits[part].float()
        values = values.masked_fill(values.isnan(), -torch.inf).sort(descending=True).values
        largest = values[:, :1].clamp(min=torch.finfo(torch.float32).min)
        k, p = top_k[part].long().unsqueeze(1), top_p[part].unsqueeze(1)
        temperature = torch.where(temperatures[part] > 0, temperatures[part], 1).unsqueeze(1)
        lowest = largest + temperature * min_p[part].unsqueeze(1).log()
        # min_p and top_k keep a prefix, so top_k's rank is the same with or without min_p.
        has_k = (k > 0) & (k < num_columns)
        kth_largest = values.gather(1, torch.where(has_k, k - 1, 0))
        lowest = torch.where(has_k, torch.maximum(lowest, kth_largest), lowest)
        weights = ((values - largest) / temperature).double().exp()  # in proportion to p
        weights = weights.masked_fill(values < lowest, 0)
        sums = weights.cumsum(1)
        # Those whose predecessors do not reach p; the last of them crosses it.
        num_kept = (sums - weights < p * sums[:, -1:]).sum(1, keepdim=True)
        crossing = values.gather(1, (num_kept - 1).clamp(min=0))
        lowest = torch.where(p < 1, torch.maximum(lowest, crossing), lowest)
        is_random = temperatures[part] > 0
        thresholds[part] = torch.where(is_random, lowest.squeeze(1), -torch.inf)
    return thresholds


# Row table


def gather_decode_inputs(
    row_table: torch.Tensor, rows: torch.Tensor, block_size: int
) -> DecodeInputs:
    """Reads a batch's inputs from the row table [R, BLOCK_TABLE + W] int32; rows [B] int32."""
    state = row_table[rows.long()]
    length = state[:, row_state.LENGTH]
    live = length > 0
    position = torch.where(live, length - 1, 0)
    block_tables = state[:, row_state.BLOCK_TABLE :].contiguous()
    page = block_tables.gather(1, (position // block_size).long().unsqueeze(1)).squeeze(1).long()
    return DecodeInputs(
        input_ids=torch.where(live, state[:, row_state.LAST_TOKEN], 0),
        positions=position,
        slot_mapping=torch.where(live, page * block_size + position % block_size, -1),
        context_lens=length.contiguous(),
        block_tables=block_tables,
        temperatures=state[:, row_state.TEMPERATURE].contiguous().view(torch.float32),
        seeds=state[:, row_state.SEED : row_state.SEED + 2].contiguous(),
    )


def write_back(
    row_table: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor | None = None,
) -> None:
    """Makes the sampled tokens [B] the rows' last ones; positions [B] are their inputs'."""
    live = rows != row_table.shape[0] - 1
    if temperatures is not None:
        live &= temperatures >= 0
    index = rows[live].long()
    row_table[index, row_state.LAST_TOKEN] = token_ids[live]
    row_table[index, row_state.LENGTH] = positions[live] + 2


Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


def _compiled(function: Callable[Inputs, Output], compiles: bool) -> Callable[Inputs, Output]:
    return torch.compile(function, dynamic=True) if compiles else function


class TorchOps(AttentionInSteps):
    """`Ops` in plain PyTorch; the elementwise parts go through torch.compile if `compiles`."""

    has_fp8_products = False
    supports_cuda_graphs = False
    reads_common_blocks_once = False
    attention_extras = ATTENTION_EXTRAS

    linear = staticmethod(linear)
    vocab_linear = staticmethod(vocab_linear)
    fp8_linear = staticmethod(fp8_linear)
    packed_linear = staticmethod(packed_linear)
    experts = staticmethod(experts)
    copy_units = staticmethod(copy_units)
    attend = staticmethod(attend)
    sigmoid_gate = staticmethod(torch_delta_rule.sigmoid_gate)
    causal_conv1d = staticmethod(torch_delta_rule.causal_conv1d)
    gated_delta_rule = staticmethod(torch_delta_rule.gated_delta_rule)
    gated_rms_norm = staticmethod(torch_delta_rule.gated_rms_norm)
    plan_decode = staticmethod(plan_decode)
    plan_adapters = staticmethod(torch_lora.plan_adapters)
    add_adapters = staticmethod(torch_lora.add_adapters)
    filter_thresholds = staticmethod(filter_thresholds)
    gather_decode_inputs = staticmethod(gather_decode_inputs)
    write_back = staticmethod(write_back)

    def __init__(self, compiles: bool = False) -> None:
        self.rms_norm = _compiled(rms_norm, compiles)
        self.add_rms_norm = _compiled(add_rms_norm, compiles)
        self.silu_and_mul = _compiled(silu_and_mul, compiles)
        self.gelu_and_mul = _compiled(gelu_and_mul, compiles)
        self.qk_norm_rope_store: Callable[..., torch.Tensor] = partial(
            qk_norm_rope_store, pure_part=_compiled(qk_norm_rope, compiles)
        )
        self.sample: Callable[..., tuple[torch.Tensor, torch.Tensor]] = partial(
            sample, scores_part=_compiled(group_scores, compiles)
        )

    def gated_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Ops.gated_linear`."""
        return self.silu_and_mul(self.linear(x, weight))
