"""Decode attention that makes its queries, keys and values itself, for steps with few rows.

It takes the place of the kernels of `rope` and of `decode_attention`, with the results of both, bit
for bit. Every program makes the queries of its row and KV head. The one whose split has the newest
token makes its key and value as well, writes them to the cache, and attends to them from its
registers. No other program reads that slot.

A split's last tile is read before the wait for the kernel ahead. Its keys and values, but for the
newest token's, were written by earlier steps, before the kernel of this step's plan. No kernel
behind that one starts before it has ended (`await_previous_alone`). So they are complete, as the
plan and the tables are. A decode step may write to no other slot than that of a row's newest token.
"""

import torch
import triton.language as tl

from nanovllm.kernels.device import device_limits
from nanovllm.kernels.triton.attention_scores import check_sinks, load_sinks, score_scales, tanh
from nanovllm.kernels.triton.decode_attention import (
    BEGIN,
    END,
    FIRST_ITEM,
    ITEM_SIZE,
    MERGE_ELEMENTS,
    NUM_SPLITS,
    NUM_WARPS,
    ROW,
    TILE,
    DecodePlan,
    choose_tile_and_stages,
    cutting_window,
    merge_splits,
    plan_of_layer,
)
from nanovllm.kernels.triton.launch import (
    await_previous,
    jit,
    next_power_of_2,
    overlap_options,
    release_next,
)
from nanovllm.kernels.triton.linear import load_summed, parts_of
from nanovllm.kernels.triton.rope import finite
from nanovllm.kernels.types import DecodeMetadata, HeadInputs, KVCache

MAX_ROWS = 32  # of a step; 0: off, for an ablation
MAX_GROUP = 7  # query heads of a KV head: with the key's they are at most 8
MATRIX_ROWS = 16  # of a matrix product's operand
IDLE_WAIT = True  # programs without a split wait for the kernel ahead; all others do


@jit
def _rotated(x, paired, weight, paired_weight, cos, sin, is_first_half, eps, WIDTH: tl.constexpr):
    """Norm and rotation of heads x [ROWS, WIDTH], as `_qk_norm_rope_store_kernel` has them.

    paired: of each element the one that the rotation pairs it with; its weight likewise. Weights
    are of x's dtype.
    """
    dtype: tl.constexpr = x.dtype
    x = x.to(tl.float32)
    paired = paired.to(tl.float32)
    squares = tl.sum((x * x).to(tl.float64), axis=1, keep_dims=True).to(tl.float32)
    inverse_rms = tl.rsqrt(squares / WIDTH + eps)
    x *= inverse_rms
    paired *= inverse_rms
    x = x.to(dtype).to(tl.float32)
    paired = paired.to(dtype).to(tl.float32)
    x = (x * weight.to(tl.float32)).to(dtype).to(tl.float32)
    paired = (paired * paired_weight.to(tl.float32)).to(dtype).to(tl.float32)
    x_cos = (x * cos.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    paired_sin = (paired * sin.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return tl.where(is_first_half, x_cos - paired_sin, x_cos + paired_sin).to(dtype)


@jit
def _row_of(x, row, member):
    """Row `row` of x [ROWS, D], bit for bit -> [D]."""
    bits = tl.where((member == row)[:, None], x.to(tl.int16, bitcast=True), 0).to(tl.int32)
    return tl.sum(bits, axis=0).to(tl.int16).to(x.dtype, bitcast=True)


@jit
def _attend_tile(q, k, v, in_context, running_max, running_sum, acc, scale_log2, tanh_scale):
    """One iteration of `_decode_kernel`."""
    product_scale = scale_log2 if tanh_scale is None else tanh_scale
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * product_scale
    if tanh_scale is not None:
        scores = tanh(scores) * scale_log2
    scores = tl.where(in_context[None, :], scores, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, axis=1))
    correction = tl.exp2(running_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    running_sum = running_sum * correction + tl.sum(p, axis=1)
    acc = acc * correction[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return new_max, running_sum, acc


@jit(
    do_not_specialize=["batch_size", "stride_table"],
    do_not_specialize_on_alignment=["block_tables", "positions", "slot_mapping"],
)
def _fused_decode_kernel(
    out,  # as in `_decode_kernel`, and so are the others that have names of its own
    partial,
    partial_lse,
    arrivals,
    items,
    qkv,  # [B, (Hq + 2 Hkv) * D]
    q_norm_weight,  # [D], and that of k too
    k_norm_weight,
    cos_sin,  # [max_position, D] float32
    positions,  # [B] int32
    slot_mapping,  # [B] int64
    eps,
    key_cache,
    value_cache,
    block_tables,
    sinks,
    scale_log2,
    tanh_scale,
    batch_size,
    stride_qkv,
    stride_part,
    stride_block,
    stride_slot,
    stride_kv_head,
    stride_table,
    NUM_PARTS: tl.constexpr,  # of qkv
    GROUP: tl.constexpr,
    X_ROWS: tl.constexpr,  # heads that a program makes, padded
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MERGE_GROUP: tl.constexpr,
    MERGE_PARTS: tl.constexpr,
    WINDOWED: tl.constexpr,
    IDLE_WAIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = out.dtype.element_ty
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    item_index = tl.program_id(1)
    item = items + item_index * ITEM_SIZE
    row = tl.load(item + ROW, cache_modifier=".cg").to(tl.int64)
    begin = tl.load(item + BEGIN, cache_modifier=".cg")
    end = tl.load(item + END, cache_modifier=".cg")
    first_item = tl.load(item + FIRST_ITEM, cache_modifier=".cg")
    num_splits = tl.load(item + NUM_SPLITS, cache_modifier=".cg")
    if num_splits == 0:
        if IDLE_WAIT:
            await_previous(OVERLAP)
        return
    table = block_tables + row * stride_table
    has_newest = (item_index == first_item + num_splits - 1) & (end > begin)
    num_old = end - has_newest.to(tl.int32)

    member = tl.arange(0, PADDED_GROUP)
    dim = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, TILE)
    head = kv_head * GROUP + member
    in_group = (member < GROUP)[:, None]
    tile_offsets = token[:, None] * stride_slot + dim[None, :] + kv_head * stride_kv_head

    first_token = begin
    if WINDOWED:
        begin = begin // TILE * TILE
    last = begin + tl.maximum(end - begin - 1, 0) // TILE * TILE
    block = tl.load(table + last // BLOCK_SIZE, cache_modifier=".cg").to(tl.int64)
    base = block * stride_block + (last % BLOCK_SIZE) * stride_slot
    is_old = token < num_old - last
    if WINDOWED:
        is_old &= token >= first_token - last
    # Earlier steps wrote them: they come before the wait.
    k_last = tl.load(
        key_cache + base + tile_offsets, mask=is_old[:, None], other=0.0, cache_modifier=".cg"
    )
    v_last = tl.load(
        value_cache + base + tile_offsets, mask=is_old[:, None], other=0.0, cache_modifier=".cg"
    )
    position = tl.load(positions + row, cache_modifier=".cg").to(tl.int64)
    slot = tl.load(slot_mapping + row, cache_modifier=".cg")
    is_first_half = (dim < HALF)[None, :]
    paired_dim = tl.where(dim < HALF, dim + HALF, dim - HALF)
    angle = cos_sin + position * HEAD_DIM + (dim % HALF)[None, :]
    cos = tl.load(angle, cache_modifier=".cg")
    sin = tl.load(angle + HALF, cache_modifier=".cg")
    # The group's query heads, then its key head, then padding.
    x_row = tl.arange(0, X_ROWS)
    is_key = (x_row == GROUP)[:, None]
    norm_weight = tl.where(is_key, k_norm_weight, q_norm_weight)
    weight = tl.load(norm_weight + dim[None, :], cache_modifier=".cg")
    paired_weight = tl.load(norm_weight + paired_dim[None, :], cache_modifier=".cg")
    k_head = num_kv_heads * GROUP + kv_head
    x_head = tl.where(is_key, k_head, (kv_head * GROUP + x_row)[:, None])
    x_pointers = qkv + row * stride_qkv + x_head * HEAD_DIM + dim[None, :]
    paired_pointers = qkv + row * stride_qkv + x_head * HEAD_DIM + paired_dim[None, :]
    in_heads = (x_row <= GROUP)[:, None]
    v_pointers = qkv + row * stride_qkv + (k_head + num_kv_heads) * HEAD_DIM + dim

    running_max = tl.full([PADDED_GROUP], -1e38, tl.float32)  # finite, so that no tile gives NaN
    running_sum = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, HEAD_DIM], tl.float32)
    if sinks is not None:
        is_first = (member >= 0) & (item_index == first_item)
        running_max = tl.where(is_first, load_sinks(sinks, head, member < GROUP), running_max)
        running_sum = tl.where(is_first, 1.0, running_sum)

    await_previous(OVERLAP)
    x = load_summed(x_pointers, in_heads, stride_part, NUM_PARTS, dtype)
    paired = load_summed(paired_pointers, in_heads, stride_part, NUM_PARTS, dtype)
    v_new = load_summed(v_pointers, dim >= 0, stride_part, NUM_PARTS, dtype)
    x = _rotated(x, paired, weight, paired_weight, cos, sin, is_first_half, eps, HEAD_DIM)
    # The rows again and again, to fill a matrix product's operand.
    q = tl.broadcast_to(x[None, :, :], [PADDED_GROUP // X_ROWS, X_ROWS, HEAD_DIM])
    q = tl.reshape(q, [PADDED_GROUP, HEAD_DIM])
    if has_newest:
        k_new = _row_of(x, GROUP, x_row)
        v_new = finite(v_new)
        is_newest = (token == num_old - last)[:, None]
        k_last = tl.where(is_newest, k_new[None, :], k_last)
        v_last = tl.where(is_newest, v_new[None, :], v_last)
        if slot >= 0:
            to = slot * stride_slot + kv_head * stride_kv_head + dim
            tl.store(key_cache + to, k_new)
            tl.store(value_cache + to, v_new)
    for start in tl.range(begin, last, TILE):
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        tile_base = block * stride_block + (start % BLOCK_SIZE) * stride_slot
        in_context = token < last - start
        if WINDOWED:
            in_context &= token >= first_token - start
        k = tl.load(key_cache + tile_base + tile_offsets, mask=in_context[:, None], other=0.0)
        v = tl.load(value_cache + tile_base + tile_offsets, mask=in_context[:, None], other=0.0)
        running_max, running_sum, acc = _attend_tile(
            q, k, v, in_context, running_max, running_sum, acc, scale_log2, tanh_scale
        )
    in_context = token < end - last
    if WINDOWED:
        in_context &= token >= first_token - last
    running_max, running_sum, acc = _attend_tile(
        q, k_last, v_last, in_context, running_max, running_sum, acc, scale_log2, tanh_scale
    )

    acc = acc / tl.where(running_sum == 0, 1.0, running_sum)[:, None]
    num_heads = num_kv_heads * GROUP
    if num_splits == 1:
        out_offsets = (row * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out + out_offsets, acc.to(dtype), mask=in_group)
    else:
        index = item_index.to(tl.int64) * num_heads + head
        lse = running_max + tl.log2(running_sum)
        tl.store(partial + index[:, None] * HEAD_DIM + dim[None, :], acc, mask=in_group)
        tl.store(partial_lse + index, lse, mask=member < GROUP)
        # As in `_decode_kernel`.
        tl.debug_barrier()
        arrived = tl.atomic_add(
            arrivals + row * num_kv_heads + kv_head, 1, sem="acq_rel", scope="gpu"
        )
        if (arrived + 1) % num_splits == 0:
            merge_splits(
                out, partial, partial_lse, row, kv_head, first_item, num_splits,
                0, 0, batch_size, GROUP, MERGE_GROUP, HEAD_DIM, HEAD_DIM, MERGE_PARTS,
            )  # fmt: skip


def _has_norms(heads: HeadInputs) -> bool:
    """Whether q and k have norm weights, of the dtype of what they multiply.

    Otherwise the compiler fuses other multiplications into sums than in the kernel of `rope`, and
    the last bits may differ.
    """
    dtype = parts_of(heads.qkv)[3]
    norms = heads.q_norm_weight, heads.k_norm_weight
    return all(weight is not None and weight.dtype == dtype for weight in norms)


def fuses(heads: HeadInputs, cache: KVCache, metadata: DecodeMetadata, window: int | None) -> bool:
    """Whether `fused_decode` takes the place of the separate kernels."""
    return len(metadata.slot_mapping) <= MAX_ROWS and fits(heads, cache, metadata, window)


def fits(
    heads: HeadInputs,
    cache: KVCache,
    metadata: DecodeMetadata,
    window: int | None,
    max_group: int = MAX_GROUP,
) -> bool:
    """Whether decode attention may make the heads of a step, whatever its number of rows.

    Not in the last layer of a prefill, whose K/V are those of many tokens, and not where common
    tokens are read once for all rows.
    """
    plan = metadata.plan
    num_kv_heads, head_dim = cache.key.shape[2:]
    group = parts_of(heads.qkv)[0].shape[1] // (head_dim * num_kv_heads) - 2
    return (
        metadata.logits_indices is None
        and isinstance(plan, DecodePlan)
        and (
            plan.num_common_tokens is None
            or cutting_window(window, metadata.block_tables, cache.key.shape[1]) is not None
        )
        and group <= max_group
        and cache.key_scales is None
        and cache.key.dtype != torch.float32
        and head_dim == next_power_of_2(head_dim)
        and _has_norms(heads)
    )


def fused_decode(
    heads: HeadInputs,
    cache: KVCache,
    metadata: DecodeMetadata,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor:
    """[B, Hq, D]; see `Ops.attention`, where `fuses` says so.

    The last two arguments override the tuned choices.
    """
    qkv, q_norm_weight, k_norm_weight, eps, cos_sin, positions = heads
    qkv, num_parts, stride_part, dtype = parts_of(qkv)
    key_cache, value_cache = cache[:2]
    block_tables = metadata.block_tables
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    batch_size = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    out = torch.empty((batch_size, num_heads, head_dim), dtype=dtype, device=qkv.device)
    if batch_size == 0:
        return out
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    check_sinks(sinks, num_heads)
    scale_log2, tanh_scale = score_scales(scale, softcap)
    window = cutting_window(window, block_tables, block_size)
    plan = plan_of_layer(cache, metadata, window)
    num_items, tile = len(plan.items), plan.tile
    group = num_heads // num_kv_heads
    padded_group = MATRIX_ROWS
    if num_stages is None:
        shared_memory = device_limits(qkv.device).shared_memory
        tile, num_stages = choose_tile_and_stages(tile, padded_group, head_dim, 2, 2, shared_memory)
    shape = (num_items, num_heads)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=qkv.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    merge_group = next_power_of_2(group)
    _fused_decode_kernel[(num_kv_heads, num_items)](
        out,
        partial,
        partial_lse,
        plan.arrivals,
        plan.items,
        qkv,
        q_norm_weight,
        k_norm_weight,
        cos_sin,
        positions,
        metadata.slot_mapping,
        eps,
        key_cache,
        value_cache,
        block_tables,
        sinks,
        scale_log2,
        tanh_scale,
        batch_size,
        qkv.stride(0),
        stride_part,
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        NUM_PARTS=num_parts,
        GROUP=group,
        X_ROWS=next_power_of_2(group + 1),
        PADDED_GROUP=padded_group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tile,
        MERGE_GROUP=merge_group,
        MERGE_PARTS=max(1, MERGE_ELEMENTS // (merge_group * head_dim)),
        WINDOWED=window is not None,
        IDLE_WAIT=IDLE_WAIT,
        num_warps=num_warps or (NUM_WARPS if tile <= TILE else 2 * NUM_WARPS),
        num_stages=num_stages,
        **overlap_options(qkv.device),
    )
    return out
