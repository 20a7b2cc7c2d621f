"""Causal paged attention over ragged sequences (FlashAttention-2's loop) in Triton.

A program owns BLOCK_M consecutive queries of one head of one sequence and walks over the keys, all
of which (a cached prefix and the new tokens alike) are read back from the cache by pages. Tiles of
keys that every query sees come first and need no mask; the tiles on the diagonal follow.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# (BLOCK_M queries, BLOCK_N keys, warps, stages) for a head of up to 128 / 256 elements. On an H200,
# 4 x 4096 tokens, head_dim 128: (128, 128, 8, 5) with bulk copies 474 TFLOP/s, (128, 64, 8, 5) 425,
# without bulk copies 416 and 401, with 3 stages 387 and 335.
HOPPER_CONFIGS = {128: (128, 128, 8, 5), 256: (64, 32, 4, 2)}
# Devices with less shared memory than Hopper's 228 KiB.
HALF_CONFIGS = {128: (128, 64, 8, 3), 256: (64, 32, 4, 2)}
# float32 products are exact multiply-adds: small tiles keep them in registers and shared memory.
FLOAT32_CONFIGS = {128: (32, 32, 8, 1), 256: (32, 16, 8, 1)}


@triton.jit
def _attend(
    acc,
    running_max,
    running_sum,
    q,
    key_cache,
    value_cache,
    key_tiles,
    value_tiles,
    table,
    kv_head,
    tile_offsets,  # [BLOCK_N, D] element offsets within a page of this KV head
    in_dim,
    q_pos,  # [BLOCK_M]
    begin,
    end,
    len_k,
    scale_log2,
    stride_block,
    stride_slot,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM_IS_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One pass of the online softmax over the keys [begin, end), in tiles within a page."""
    token = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        block = tl.load(table + start // BLOCK_SIZE)
        base = block.to(tl.int64) * stride_block + (start % BLOCK_SIZE) * stride_slot
        if key_tiles is not None and not MASKED:
            slot = block * BLOCK_SIZE + start % BLOCK_SIZE
            k = key_tiles.load([slot, kv_head * HEAD_DIM])
            v = value_tiles.load([slot, kv_head * HEAD_DIM])
        elif MASKED or DIM_IS_PADDED:
            # Never read past the context: an unwritten slot may hold NaN.
            kv_mask = (token < len_k - start)[:, None] & in_dim[None, :]
            k = tl.load(key_cache + base + tile_offsets, mask=kv_mask, other=0.0)
            v = tl.load(value_cache + base + tile_offsets, mask=kv_mask, other=0.0)
        else:
            k = tl.load(key_cache + base + tile_offsets)
            v = tl.load(value_cache + base + tile_offsets)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = (start + token)[None, :] <= q_pos[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        # Finite from the first tile on: it holds position 0, which every query sees.
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        correction = tl.exp2(running_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(p, axis=1)
        acc = acc * correction[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        running_max = new_max
    return acc, running_max, running_sum


# Tables and lengths may be slices of one packed buffer: no recompilation for their alignment.
@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["block_tables", "cu_seqlens_q", "cu_seqlens_k"],
)
def _prefill_kernel(
    out,  # [T, Hq, D]
    query,  # [T, Hq, D]
    key_cache,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    value_cache,
    key_tiles,  # the caches as [num_slots, Hkv * D] tensor descriptors of [BLOCK_N, D], or None
    value_tiles,
    block_tables,  # [S, W] int32
    cu_seqlens_q,  # [S + 1] int32
    cu_seqlens_k,
    scale_log2,  # softmax scale * log2(e): the exponentials are powers of two
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
    head = tl.program_id(1)
    kv_head = head // GROUP
    seq = tl.program_id(2).to(tl.int64)
    q_begin = tl.load(cu_seqlens_q + seq)
    len_q = tl.load(cu_seqlens_q + seq + 1) - q_begin
    len_k = tl.load(cu_seqlens_k + seq + 1) - tl.load(cu_seqlens_k + seq)
    # The last queries see the most keys: they start first, so that no heavy tile comes last.
    tile = tl.cdiv(len_q, BLOCK_M) - 1 - tl.program_id(0)
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
    acc, running_max, running_sum = _attend(
        acc,
        running_max,
        running_sum,
        q,
        key_cache,
        value_cache,
        key_tiles,
        value_tiles,
        table,
        kv_head,
        tile_offsets,
        in_dim,
        q_pos,
        0,
        unmasked_end,
        len_k,
        scale_log2,
        stride_block,
        stride_slot,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_N,
        HEAD_DIM < PADDED_DIM,
        MASKED=False,
    )
    acc, running_max, running_sum = _attend(
        acc,
        running_max,
        running_sum,
        q,
        key_cache,
        value_cache,
        key_tiles,
        value_tiles,
        table,
        kv_head,
        tile_offsets,
        in_dim,
        q_pos,
        unmasked_end,
        end,
        len_k,
        scale_log2,
        stride_block,
        stride_slot,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_N,
        HEAD_DIM < PADDED_DIM,
        MASKED=True,
    )
    acc = acc / running_sum[:, None]
    out_pointers = out + (q_row * NUM_HEADS + head) * HEAD_DIM + dim[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=q_mask)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    *,
    config: tuple[int, int, int, int] | None = None,
    use_tensor_descriptors: bool | None = None,
) -> torch.Tensor:
    """query [T, Hq, D] -> [T, Hq, D]; see `Ops.prefill_attention`. FlashAttention-2 (Dao 2023).

    On Hopper, unmasked tiles of keys and values come by bulk tensor copies instead of pointers.
    `config` = (BLOCK_M, BLOCK_N, warps, stages) and `use_tensor_descriptors` override the choice.
    """
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out
    assert query.stride(2) == 1 and key_cache.stride(3) == 1
    assert key_cache.stride() == value_cache.stride()
    if config is None:
        configs = HOPPER_CONFIGS if _is_hopper(query.device) else HALF_CONFIGS
        if query.dtype == torch.float32:
            configs = FLOAT32_CONFIGS
        config = configs[128 if head_dim <= 128 else 256]
    block_m, block_n, num_warps, num_stages = config
    block_n = min(block_n, block_size)
    assert block_n >= 16 and block_size % block_n == 0
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    if use_tensor_descriptors is None:
        is_half = query.dtype != torch.float32
        use_tensor_descriptors = is_half and head_dim <= 128 and _is_hopper(query.device)
    key_tiles = value_tiles = None
    if use_tensor_descriptors and head_dim == padded_dim:
        key_tiles, value_tiles = (
            TensorDescriptor.from_tensor(
                cache.view(-1, num_kv_heads * head_dim), [block_n, head_dim]
            )
            for cache in (key_cache, value_cache)
        )
    num_seqs = cu_seqlens_q.shape[0] - 1
    _prefill_kernel[(triton.cdiv(max_seqlen_q, block_m), num_heads, num_seqs)](
        out,
        query,
        key_cache,
        value_cache,
        key_tiles,
        value_tiles,
        block_tables,
        cu_seqlens_q,
        cu_seqlens_k,
        scale * 1.4426950408889634,
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
