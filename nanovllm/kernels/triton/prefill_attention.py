"""Causal paged attention over ragged sequences (FlashAttention's loop) in Triton.

A program owns BLOCK_M consecutive queries of one head of one sequence and walks over the keys, all
of which (a cached prefix and the new tokens alike) are read back from the cache by pages. Tiles of
keys that every query sees come first and need no mask; the tiles on the diagonal follow. On Hopper
`_attend_by_bulk_copies` does the walk; `_attend` does it elsewhere, for float32 and an fp8 cache.
Hopper's plain case has a kernel of its own: hopper_prefill.py.

In a layer with a window the walk begins at the first tile that one of the queries sees, and the
tiles that not all of them see, at its begin too, have a mask.
"""

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels import types
from nanovllm.kernels.triton import hopper_prefill
from nanovllm.kernels.triton.attention_scores import (
    LARGEST,
    check_sinks,
    load_sinks,
    score_scales,
    tanh,
)
from nanovllm.kernels.triton.launch import cdiv, is_hopper, jit, next_power_of_2
from nanovllm.kernels.types import KVCache, PrefillMetadata

# (BLOCK_M queries, BLOCK_N keys, warps, stages) for a head of up to 128 / 256 elements.
HOPPER_CONFIGS = {128: (128, 128, 8, 5), 256: (64, 32, 4, 2)}
# The same of an fp8 cache, whose tiles come by pointers and lie in shared memory in both dtypes.
HOPPER_FP8_CONFIGS = {128: (128, 64, 8, 6), 256: (64, 32, 4, 2)}
# Devices with less shared memory than Hopper's 228 KiB.
HALF_CONFIGS = {128: (128, 64, 8, 3), 256: (64, 32, 4, 2)}
# float32 products are exact multiply-adds: small tiles keep them in registers and shared memory.
FLOAT32_CONFIGS = {128: (32, 32, 8, 1), 256: (32, 16, 8, 1)}
FP8_MAX = tl.constexpr(types.FP8_MAX)


@jit
def _softmax(scores, running_max, running_sum, scale_log2):
    """A step of the online softmax: scores [BLOCK_M, BLOCK_N] -> p of the same shape.

    Also the factor for everything summed up before, and the new running maximum and sum.
    """
    new_max = tl.maximum(running_max, tl.max(scores, axis=1) * scale_log2)
    correction = tl.exp2(running_max - new_max)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    return p, correction, new_max, running_sum * correction + tl.sum(p, axis=1)


@jit
def _attend(
    acc,
    running_max,
    running_sum,
    q,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    table,
    kv_head,
    tile_offsets,  # [BLOCK_N, D] element offsets within a page of this KV head
    in_dim,
    q_pos,  # [BLOCK_M]
    begin,
    end,
    len_k,
    window,
    scale_log2,
    tanh_scale,
    stride_block,
    stride_slot,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM_IS_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One pass of the online softmax over the keys [begin, end), in tiles within a page.

    Tiles of an fp8 cache are converted after the load; K's scales multiply the scores, V's p.
    """
    token = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        base = block * stride_block + (start % BLOCK_SIZE) * stride_slot
        if MASKED or DIM_IS_PADDED:
            # Never read past the context: an unwritten slot may hold NaN.
            kv_mask = (token < len_k - start)[:, None] & in_dim[None, :]
            k = tl.load(key_cache + base + tile_offsets, mask=kv_mask, other=0.0)
            v = tl.load(value_cache + base + tile_offsets, mask=kv_mask, other=0.0)
        else:
            k = tl.load(key_cache + base + tile_offsets)
            v = tl.load(value_cache + base + tile_offsets)
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if key_scales is not None:
            block_scales = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
            scale_offsets = block_scales + start % BLOCK_SIZE + token
            if MASKED:
                in_context = token < len_k - start
                key_scale = tl.load(key_scales + scale_offsets, mask=in_context, other=0.0)
                value_scale = tl.load(value_scales + scale_offsets, mask=in_context, other=0.0)
            else:
                key_scale = tl.load(key_scales + scale_offsets)
                value_scale = tl.load(value_scales + scale_offsets)
            scores = scores * key_scale[None, :]
        if tanh_scale is not None:
            scores = tanh(scores * tanh_scale)
        if MASKED:
            visible = (start + token)[None, :] <= q_pos[:, None]
            if window is not None:
                visible &= (start + token)[None, :] > q_pos[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        p, correction, running_max, running_sum = _softmax(
            scores, running_max, running_sum, scale_log2
        )
        if key_scales is not None:
            # FP8_MAX, divided out at the end, keeps a half-precision p clear of the subnormals.
            p = p * (value_scale * FP8_MAX)[None, :]
        acc = acc * correction[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, running_max, running_sum


@jit
def _attend_by_bulk_copies(
    acc,
    running_max,
    running_sum,
    q,
    key_tiles,
    value_tiles,
    table,
    column,  # of this KV head within a slot
    q_pos,
    begin,
    unmasked_begin,
    unmasked_end,
    end,
    window,
    scale_log2,
    tanh_scale,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The whole walk over the keys [begin, end), tiles by Hopper's bulk copies, masked ones too."""
    token = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        # The last tile may reach past the context: what lies there is finite, and p is 0.
        slot = tl.load(table + start // BLOCK_SIZE) * BLOCK_SIZE + start % BLOCK_SIZE
        k = key_tiles.load([slot, column])
        v = value_tiles.load([slot, column])
        scores = tl.dot(q, tl.trans(k))
        if tanh_scale is not None:
            scores = tanh(scores * tanh_scale)
        is_masked = start >= unmasked_end
        if window is not None:
            is_masked |= start < unmasked_begin
        if is_masked:
            visible = (start + token)[None, :] <= q_pos[:, None]
            if window is not None:
                visible &= (start + token)[None, :] > q_pos[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        p, correction, running_max, running_sum = _softmax(
            scores, running_max, running_sum, scale_log2
        )
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
    return acc, running_sum


# Tables and lengths may be slices of one packed buffer: no recompilation for their alignment.
@jit(
    do_not_specialize=["stride_table", "window"],
    do_not_specialize_on_alignment=["block_tables", "cu_seqlens_q", "cu_seqlens_k"],
)
def _prefill_kernel(
    out,  # [T, Hq, D]
    query,  # [T, Hq, D]
    key_cache,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    value_cache,
    key_tiles,  # the caches as [num_slots, Hkv * D] tensor descriptors of [BLOCK_N, D], or None
    value_tiles,
    key_scales,  # [num_blocks, Hkv, BLOCK_SIZE] float32 if the caches are fp8, else None
    value_scales,
    block_tables,  # [S, W] int32
    cu_seqlens_q,  # [S + 1] int32
    cu_seqlens_k,
    sinks,  # [Hq] or None
    window,  # int or None: see `Ops.attend`
    scale_log2,  # of `score_scales`
    tanh_scale,
    stride_query,
    stride_head,
    stride_block,
    stride_slot,
    stride_kv_head,
    stride_table,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0)
    kv_head = head // GROUP
    seq = tl.program_id(2).to(tl.int64)
    q_begin = tl.load(cu_seqlens_q + seq)
    len_q = tl.load(cu_seqlens_q + seq + 1) - q_begin
    len_k = tl.load(cu_seqlens_k + seq + 1) - tl.load(cu_seqlens_k + seq)
    # The last queries see the most keys: all heads start there, so that no heavy tile comes last.
    tile = tl.cdiv(len_q, BLOCK_M) - 1 - tl.program_id(1)
    if tile < 0:
        return

    first_row = tile * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    token = tl.arange(0, BLOCK_N)
    in_dim = dim < HEAD_DIM
    q_mask = (row < len_q)[:, None] & in_dim[None, :]
    q_row = (q_begin + row).to(tl.int64)[:, None]
    q = tl.load(
        query + q_row * stride_query + head * stride_head + dim[None, :], mask=q_mask, other=0.0
    )

    if key_scales is not None and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # fp8 converts to float16 in one instruction

    num_cached = len_k - len_q
    q_pos = num_cached + row
    end = tl.minimum(len_k, num_cached + first_row + BLOCK_M)
    # Keys up to the first row's own position are seen by every row of the tile.
    unmasked_end = (num_cached + first_row + 1) // BLOCK_N * BLOCK_N
    table = block_tables + seq * stride_table
    tile_offsets = token[:, None] * stride_slot + dim[None, :] + kv_head * stride_kv_head
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    begin = 0
    unmasked_begin = 0
    if window is not None:
        first_visible = num_cached + first_row + 1 - window  # to the first row
        begin = tl.maximum(first_visible, 0) // BLOCK_N * BLOCK_N
        # Keys from the last row's first one on are in every row's window.
        unmasked_begin = tl.cdiv(tl.maximum(first_visible + BLOCK_M - 1, 0), BLOCK_N) * BLOCK_N
        unmasked_begin = tl.minimum(unmasked_begin, unmasked_end)
        # Finite, as a row may see nothing of its first tiles.
        running_max = tl.full([BLOCK_M], -LARGEST, tl.float32)
    if sinks is not None:
        running_max = tl.zeros([BLOCK_M], tl.float32) + load_sinks(sinks, head, True)
        running_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    if key_tiles is not None:
        acc, running_sum = _attend_by_bulk_copies(
            acc,
            running_max,
            running_sum,
            q,
            key_tiles,
            value_tiles,
            table,
            kv_head * HEAD_DIM,
            q_pos,
            begin,
            unmasked_begin,
            unmasked_end,
            end,
            window,
            scale_log2,
            tanh_scale,
            BLOCK_SIZE,
            BLOCK_N,
        )
    else:
        # The window's edge, what every row sees, the diagonal.
        bounds = (begin, unmasked_begin, unmasked_end, end)
        for part in tl.static_range(1 if window is None else 0, 3):
            acc, running_max, running_sum = _attend(
                acc,
                running_max,
                running_sum,
                q,
                key_cache,
                value_cache,
                key_scales,
                value_scales,
                table,
                kv_head,
                tile_offsets,
                in_dim,
                q_pos,
                bounds[part],
                bounds[part + 1],
                len_k,
                window,
                scale_log2,
                tanh_scale,
                stride_block,
                stride_slot,
                NUM_HEADS // GROUP,
                BLOCK_SIZE,
                BLOCK_N,
                HEAD_DIM < PADDED_DIM,
                MASKED=part != 1,
            )
    if key_scales is not None:
        running_sum = running_sum * FP8_MAX
    acc = acc / running_sum[:, None]
    out_pointers = out + (q_row * NUM_HEADS + head) * HEAD_DIM + dim[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=q_mask)


def prefill_attention(
    query: torch.Tensor,
    cache: KVCache,
    metadata: PrefillMetadata,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    config: tuple[int, int, int, int] | None = None,
    use_tensor_descriptors: bool | None = None,
) -> torch.Tensor:
    """query [T, Hq, D] -> [T, Hq, D]; see `Ops.attend`. FlashAttention-2 (Dao 2023).

    On Hopper `hopper_prefill` computes what it takes, without window, soft cap and sinks. Else keys
    and values come by bulk tensor copies there instead of pointers, unless the cache is fp8.
    `config` = (BLOCK_M, BLOCK_N, warps, stages) and `use_tensor_descriptors` override the choice.
    """
    key_cache, value_cache, key_scales, value_scales = cache
    block_tables = metadata.block_tables
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    if num_tokens == 0:
        return torch.empty_like(query)
    assert query.stride(2) == 1 and key_cache.stride(3) == 1
    assert key_cache.stride() == value_cache.stride()
    check_sinks(sinks, num_heads)
    scale_log2, tanh_scale = score_scales(scale, softcap)
    if window is not None and window >= metadata.max_seqlen_k:
        window = None  # it cuts no sequence
    is_plain = window is None and softcap is None and sinks is None
    has_choice = config is None and use_tensor_descriptors is None
    if is_plain and has_choice and hopper_prefill.takes(query, cache):
        return hopper_prefill.hopper_prefill(query, cache, metadata, scale_log2)
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if config is None:
        hopper_configs = HOPPER_CONFIGS if key_scales is None else HOPPER_FP8_CONFIGS
        configs = hopper_configs if is_hopper(query.device) else HALF_CONFIGS
        if query.dtype == torch.float32:
            configs = FLOAT32_CONFIGS
        config = configs[128 if head_dim <= 128 else 256]
    block_m, block_n, num_warps, num_stages = config
    block_n = min(block_n, block_size)
    assert block_n >= 16 and block_size % block_n == 0
    padded_dim = max(16, next_power_of_2(head_dim))
    if use_tensor_descriptors is None:
        is_half = query.dtype != torch.float32
        use_tensor_descriptors = is_half and head_dim <= 128 and is_hopper(query.device)
    key_tiles = value_tiles = None
    if use_tensor_descriptors and head_dim == padded_dim and key_scales is None:
        key_tiles, value_tiles = (
            TensorDescriptor.from_tensor(
                cache.view(-1, num_kv_heads * head_dim), [block_n, head_dim]
            )
            for cache in (key_cache, value_cache)
        )
    num_seqs = metadata.cu_seqlens_q.shape[0] - 1
    _prefill_kernel[(num_heads, cdiv(metadata.max_seqlen_q, block_m), num_seqs)](
        out,
        query,
        key_cache,
        value_cache,
        key_tiles,
        value_tiles,
        key_scales,
        value_scales,
        block_tables,
        metadata.cu_seqlens_q,
        metadata.cu_seqlens_k,
        sinks,
        window,
        scale_log2,
        tanh_scale,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out
