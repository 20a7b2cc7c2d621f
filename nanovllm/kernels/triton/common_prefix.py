"""Attention of a whole decode batch to the leading tokens that all its rows share, in Triton.

The queries of all rows and of a KV head's group stand together in the tiles of a matrix product, so
the shared keys and values are read once for BLOCK_M queries instead of once for each row. The
outputs are partial: decode attention merges them with what the rows attend to on their own.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels import types
from nanovllm.kernels.triton.attention_scores import score_scales, tanh
from nanovllm.kernels.triton.launch import (
    await_previous_alone,
    jit,
    num_multiprocessors,
    overlap_options,
    release_next,
)
from nanovllm.kernels.types import KVCache

BLOCK_M = 64  # queries of a program
TILE = 64  # tokens per iteration
NUM_WARPS = 4
NUM_STAGES = 4
PROGRAMS_PER_SM = 1  # the prefix is split over the keys while there are not more programs
MAX_SPLITS = 8

FP8_MAX = tl.constexpr(types.FP8_MAX)


@jit(
    do_not_specialize=["num_queries"],
    do_not_specialize_on_alignment=["block_table", "partial", "partial_lse"],
)
def _common_prefix_kernel(
    partial,  # float32 [num_splits, B, Hq, D]
    partial_lse,  # float32 [num_splits, B, Hq]: log2 of the softmax's denominator
    query,  # [B, Hq, D]
    key_cache,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    value_cache,
    key_scales,  # [num_blocks, Hkv, BLOCK_SIZE] float32 if the caches are fp8, else None
    value_scales,
    block_table,  # [W] int32, of any row
    num_common_tokens,  # [1] int32
    scale_log2,  # of `score_scales`
    tanh_scale,
    num_queries,  # B * GROUP
    stride_query,
    stride_head,
    stride_block,
    stride_slot,
    stride_kv_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The decode kernel comes when all programs are past this: it reads before it waits itself.
    await_previous_alone(OVERLAP)
    release_next(OVERLAP)
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    num_tokens = tl.load(num_common_tokens)
    num_tiles = tl.cdiv(num_tokens, TILE)
    begin = num_tiles * split // num_splits * TILE
    end = tl.minimum(num_tiles * (split + 1) // num_splits * TILE, num_tokens)

    # Queries in the order (row, member of the group).
    index = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (index // GROUP).to(tl.int64)
    head = kv_head * GROUP + index % GROUP
    dim = tl.arange(0, PADDED_DIM)
    token = tl.arange(0, TILE)
    in_dim = dim < HEAD_DIM
    q_mask = (index < num_queries)[:, None] & in_dim[None, :]
    q_offsets = (row * stride_query + head * stride_head)[:, None] + dim[None, :]
    q = tl.load(query + q_offsets, mask=q_mask, other=0.0)
    if key_scales is not None and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # fp8 converts to float16 in one instruction

    tile_offsets = token[:, None] * stride_slot + dim[None, :] + kv_head * stride_kv_head
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for start in tl.range(begin, end, TILE):
        block = tl.load(block_table + start // BLOCK_SIZE).to(tl.int64)
        base = block * stride_block + (start % BLOCK_SIZE) * stride_slot
        in_prefix = token < end - start  # the last tile may reach past it
        kv_mask = in_prefix[:, None] & in_dim[None, :]
        k = tl.load(key_cache + base + tile_offsets, mask=kv_mask, other=0.0).to(q.dtype)
        v = tl.load(value_cache + base + tile_offsets, mask=kv_mask, other=0.0).to(q.dtype)
        product_scale = scale_log2 if tanh_scale is None else tanh_scale
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * product_scale  # [BLOCK_M, TILE]
        if key_scales is not None:
            scale_offsets = (
                (block * num_kv_heads + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + token
            )
            scores *= tl.load(key_scales + scale_offsets, mask=in_prefix, other=0.0)[None, :]
        if tanh_scale is not None:
            scores = tanh(scores) * scale_log2
        scores = tl.where(in_prefix[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        correction = tl.exp2(running_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(p, axis=1)
        if key_scales is not None:
            # FP8_MAX, divided out at the end, keeps a half-precision p clear of the subnormals.
            value_scale = tl.load(value_scales + scale_offsets, mask=in_prefix, other=0.0)
            p *= (value_scale * FP8_MAX)[None, :]
        acc = acc * correction[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        running_max = new_max
    if key_scales is not None:
        acc /= FP8_MAX

    # A split without a tile has weight 0: zeros, and the log of 0.
    acc = acc / tl.where(running_sum == 0, 1.0, running_sum)[:, None]
    num_rows = num_queries // GROUP
    out_row = (split * num_rows + row) * num_kv_heads * GROUP + head
    tl.store(partial + out_row[:, None] * HEAD_DIM + dim[None, :], acc, mask=q_mask)
    lse = running_max + tl.log2(running_sum)
    tl.store(partial_lse + out_row, lse, mask=index < num_queries)


def choose_prefix_splits(
    batch_size: int, num_heads: int, num_kv_heads: int, device: torch.device
) -> int:
    """Splits of the prefix over its keys; it depends on the shapes only, for CUDA graphs."""
    num_queries = batch_size * (num_heads // num_kv_heads)
    num_programs = triton.cdiv(num_queries, BLOCK_M) * num_kv_heads
    wanted = PROGRAMS_PER_SM * num_multiprocessors(device) // num_programs
    return max(1, min(wanted, MAX_SPLITS))


def attend_to_common_prefix(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    num_common_tokens: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Attention of query [B, Hq, D] to the first num_common_tokens [1] int32 of block_table.

    Writes, for each of S splits of these tokens, the normalised outputs to `partial`
    [S, B, Hq, D] and the base-2 logarithm of the softmax's denominator to `partial_lse` [S, B, Hq]
    (-inf for a split without tokens), both float32 and contiguous. Scale and softcap as in
    `Ops.attend`; sinks are counted by whoever merges.
    """
    num_splits, batch_size, num_heads, head_dim = partial.shape
    key_cache, value_cache, key_scales, value_scales = cache
    block_size, num_kv_heads = key_cache.shape[1:3]
    assert partial.is_contiguous() and partial_lse.is_contiguous()
    assert query.stride(2) == 1 and key_cache.stride(3) == 1
    assert key_cache.stride() == value_cache.stride()
    group = num_heads // num_kv_heads
    block_m, tile, num_stages = BLOCK_M, min(TILE, block_size), NUM_STAGES
    if head_dim > 128:
        tile, num_stages = min(32, block_size), 2
    if query.dtype == torch.float32:  # exact multiply-adds: small tiles stay in registers
        block_m, tile, num_stages = 16, 16, 1
    assert tile >= 16 and block_size % tile == 0
    num_queries = batch_size * group
    scale_log2, tanh_scale = score_scales(scale, softcap)
    _common_prefix_kernel[(num_kv_heads, triton.cdiv(num_queries, block_m), num_splits)](
        partial,
        partial_lse,
        query,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        block_table,
        num_common_tokens,
        scale_log2,
        tanh_scale,
        num_queries,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        TILE=tile,
        num_warps=NUM_WARPS,
        num_stages=num_stages,
        **overlap_options(query.device),
    )
