"""Decode attention that makes its queries, keys and values itself, for Hopper, in Gluon.

It is what `fused_decode` is, but for the order of sums. The keys and values of a split's first
tiles are copied to shared memory before the wait for the kernel ahead, by bulk tensor copies. Why
they are complete, kernels/triton/fused_decode.py says. What the copies bring of the newest token,
which is being written meanwhile, is replaced before it is used.
"""

from functools import cache as remember
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.triton.attention_scores import score_scales
from nanovllm.kernels.triton.decode_attention import (
    BEGIN,
    END,
    FIRST_ITEM,
    ITEM_SIZE,
    NUM_SPLITS,
    ROW,
    cutting_window,
    plan_of_layer,
)
from nanovllm.kernels.triton.fused_decode import MATRIX_ROWS, fits
from nanovllm.kernels.triton.hopper_prefill import DTYPES, HEAD_DIMS, start_copy
from nanovllm.kernels.triton.launch import (
    is_hopper,
    next_power_of_2,
    overlap_options,
    with_dry_runs,
)
from nanovllm.kernels.triton.linear import parts_of
from nanovllm.kernels.types import DecodeMetadata, HeadInputs, KVCache

ENABLED = True  # off for an ablation
Q_ROWS = gl.constexpr(MATRIX_ROWS)
# Triton 3.9 has another name for it than 3.6.
await_threads = getattr(gl, "barrier", None) or gl.thread_barrier


class DecodeTile(NamedTuple):
    """What a program reads at a time, and how."""

    tokens: int
    num_warps: int
    num_stages: int  # tiles in shared memory


# By the most queries (rows times query heads). Shared memory has room for two programs of the first
# on a multiprocessor, for four of the second.
TILES = {2048: DecodeTile(64, 2, 3), 2**31: DecodeTile(32, 1, 3)}
MIN_BLOCK_SIZE = 32


@gluon.jit
def _start_tile(tiles, ring, slot, column, stage):
    """Copies of the keys and values of TILE slots."""
    key_tiles, value_tiles = tiles
    keys, values, full = ring
    barrier = full.index(stage)
    mbarrier.expect(barrier, key_tiles.block_type.nbytes + value_tiles.block_type.nbytes)
    start_copy(key_tiles, [slot, column], barrier, keys.index(stage))
    start_copy(value_tiles, [slot, column], barrier, values.index(stage))


@gluon.jit
def _slot_of(table, start, BLOCK_SIZE: gl.constexpr):
    """Where a tile begins that lies within a block."""
    block = gl.load(table + start // BLOCK_SIZE, cache_modifier=".cg")
    return block * BLOCK_SIZE + start % BLOCK_SIZE


@gluon.jit
def _softmax(scores, state, scale_log2):
    """A step of the online softmax: p, and the state with the sums before scaled down to it.

    p is summed up for each column of a tile, so that no step adds up over the warps.
    """
    running_max, sums, acc = state
    scores = scores * scale_log2
    new_max = gl.maximum(running_max, gl.max(scores, axis=1))
    correction = gl.exp2(running_max - new_max)[:, None]
    p = gl.exp2(scores - new_max[:, None])
    return p, new_max, sums * correction + p, acc * correction


@gluon.jit
def _rotated(x, paired, weight, paired_weight, cos, sin, is_first_half, eps, WIDTH: gl.constexpr):
    """Norm and rotation of heads x, as in kernels/triton/fused_decode.py."""
    dtype: gl.constexpr = x.dtype
    x = x.to(gl.float32)
    paired = paired.to(gl.float32)
    squares = gl.sum((x * x).to(gl.float64), axis=1).to(gl.float32)
    inverse_rms = gl.rsqrt(squares / WIDTH + eps)[:, None]
    x = (x * inverse_rms).to(dtype).to(gl.float32)
    paired = (paired * inverse_rms).to(dtype).to(gl.float32)
    x = (x * weight.to(gl.float32)).to(dtype).to(gl.float32)
    paired = (paired * paired_weight.to(gl.float32)).to(dtype).to(gl.float32)
    x_cos = (x * cos.to(dtype).to(gl.float32)).to(dtype).to(gl.float32)
    paired_sin = (paired * sin.to(dtype).to(gl.float32)).to(dtype).to(gl.float32)
    return gl.where(is_first_half, x_cos - paired_sin, x_cos + paired_sin).to(dtype)


@gluon.jit
def _load_summed(pointers, mask, other, part_stride, NUM_PARTS: gl.constexpr, dtype: gl.constexpr):
    """`linear.load_summed`."""
    x = gl.load(pointers, mask=mask, other=other)
    if NUM_PARTS > 1:
        x = x.to(gl.float32)
        for part in gl.static_range(1, NUM_PARTS):
            x += gl.load(pointers + part * part_stride, mask=mask, other=other).to(gl.float32)
    return x.to(dtype)


@with_dry_runs
@gluon.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["block_tables", "positions", "slot_mapping"],
)
def _hopper_fused_decode_kernel(
    out,  # as in `_fused_decode_kernel`, and so are the others that have names of its own
    partial,
    partial_lse,
    arrivals,
    items,
    qkv,
    q_norm_weight,
    k_norm_weight,
    cos_sin,
    positions,
    slot_mapping,
    eps,
    key_cache,
    value_cache,
    key_tiles,  # the caches as [num_slots, Hkv * D], tensor descriptors of [TILE, D]
    value_tiles,
    block_tables,
    scale_log2,
    stride_qkv,
    stride_part,  # None: qkv is in one part
    stride_table,
    NUM_PARTS: gl.constexpr,
    GROUP: gl.constexpr,
    X_ROWS: gl.constexpr,
    MERGE_GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    HALF: gl.constexpr = HEAD_DIM // 2
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = key_tiles.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    dim_layout: gl.constexpr = gl.SliceLayout(0, x_layout)

    kv_head = gl.program_id(0)
    item_index = gl.program_id(1)
    item = items + item_index * ITEM_SIZE
    row = gl.load(item + ROW, cache_modifier=".cg").to(gl.int64)
    begin = gl.load(item + BEGIN, cache_modifier=".cg")
    end = gl.load(item + END, cache_modifier=".cg")
    first_item = gl.load(item + FIRST_ITEM, cache_modifier=".cg")
    num_splits = gl.load(item + NUM_SPLITS, cache_modifier=".cg")
    if num_splits == 0:
        if OVERLAP:
            gdc_wait()
        return
    table = block_tables + row * stride_table
    has_newest = (item_index == first_item + num_splits - 1) & (end > begin)
    num_tiles = gl.cdiv(end - begin, TILE)

    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], value_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for barrier in gl.static_range(STAGES):
        mbarrier.init(full.index(barrier), count=1)
    ring = (keys, values, full)
    tiles = (key_tiles, value_tiles)
    column = kv_head * HEAD_DIM
    # Earlier steps wrote them, but for the newest token's: they come before the wait.
    for early in gl.static_range(STAGES):
        if early < num_tiles:
            early_slot = _slot_of(table, begin + early * TILE, BLOCK_SIZE)
            _start_tile(tiles, ring, early_slot, column, early)

    position = gl.load(positions + row, cache_modifier=".cg").to(gl.int64)
    slot = gl.load(slot_mapping + row, cache_modifier=".cg")
    dim = gl.arange(0, HEAD_DIM, layout=dim_layout)
    paired_dim = gl.where(dim < HALF, dim + HALF, dim - HALF)
    is_first_half = (dim < HALF)[None, :]
    cos = gl.load(cos_sin + position * HEAD_DIM + dim % HALF)[None, :]
    sin = gl.load(cos_sin + position * HEAD_DIM + HALF + dim % HALF)[None, :]
    x_row = gl.arange(0, X_ROWS, layout=gl.SliceLayout(1, x_layout))
    is_key = (x_row == GROUP)[:, None]
    weight = gl.where(
        is_key, gl.load(k_norm_weight + dim)[None, :], gl.load(q_norm_weight + dim)[None, :]
    )
    paired_weight = gl.where(
        is_key,
        gl.load(k_norm_weight + paired_dim)[None, :],
        gl.load(q_norm_weight + paired_dim)[None, :],
    )
    k_head = NUM_KV_HEADS * GROUP + kv_head
    x_head = gl.where(x_row == GROUP, k_head, kv_head * GROUP + x_row)
    x_begin = qkv + row * stride_qkv
    in_heads = (x_row <= GROUP)[:, None]
    if OVERLAP:
        gdc_wait()
    x_pointers = x_begin + (x_head * HEAD_DIM)[:, None] + dim[None, :]
    x = _load_summed(x_pointers, in_heads, 0.0, stride_part, NUM_PARTS, dtype)
    paired_pointers = x_begin + (x_head * HEAD_DIM)[:, None] + paired_dim[None, :]
    paired = _load_summed(paired_pointers, in_heads, 0.0, stride_part, NUM_PARTS, dtype)
    v_pointers = x_begin + (k_head + NUM_KV_HEADS) * HEAD_DIM + dim
    v_new = _load_summed(v_pointers, None, None, stride_part, NUM_PARTS, dtype)
    x = _rotated(x, paired, weight, paired_weight, cos, sin, is_first_half, eps, HEAD_DIM)
    v_new = gl.where(gl.abs(v_new.to(gl.float32)) < float("inf"), v_new, 0.0).to(dtype)
    bits = gl.where(is_key, x.to(gl.int16, bitcast=True), 0).to(gl.int32)
    k_new = gl.sum(bits, axis=0).to(gl.int16).to(dtype, bitcast=True)
    if has_newest & (slot >= 0):
        to = slot * (NUM_KV_HEADS * HEAD_DIM) + column + dim
        gl.store(key_cache + to, k_new)
        gl.store(value_cache + to, v_new)
    # The rows again and again, to fill a matrix product's operand.
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    queries = gl.allocate_shared_memory(dtype, [Q_ROWS, HEAD_DIM], plain)
    for i in gl.static_range(Q_ROWS // X_ROWS):
        queries.slice(i * X_ROWS, X_ROWS).store(x)
    q = queries.load(a_layout)

    running_max = gl.full([Q_ROWS], -1e38, gl.float32, row_layout)
    sums = gl.zeros([Q_ROWS, TILE], gl.float32, mma)
    acc = gl.zeros([Q_ROWS, HEAD_DIM], gl.float32, mma)
    zeros = gl.zeros([Q_ROWS, TILE], gl.float32, mma)
    for tile in range(num_tiles - 1):
        stage = tile % STAGES
        start_ahead = begin + gl.minimum(tile + STAGES, num_tiles - 1) * TILE
        slot_ahead = _slot_of(table, start_ahead, BLOCK_SIZE)
        mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
        scores = mma_v2(q, keys.index(stage).permute((1, 0)).load(b_layout), zeros)
        state = (running_max, sums, acc)
        p, running_max, sums, acc = _softmax(scores, state, scale_log2)
        p = gl.convert_layout(p.to(dtype), a_layout)
        acc = mma_v2(p, values.index(stage).load(b_layout), acc)
        await_threads()
        if tile + STAGES < num_tiles:
            _start_tile(tiles, ring, slot_ahead, column, stage)
    if num_tiles > 0:
        last = num_tiles - 1
        stage = last % STAGES
        mbarrier.wait(full.index(stage), (last // STAGES) & 1)
        newest = gl.where(has_newest, end - 1 - begin - last * TILE, -1)
        k = keys.index(stage).permute((1, 0)).load(b_layout)
        k_token = gl.arange(0, TILE, layout=gl.SliceLayout(0, b_layout))
        k_column = gl.convert_layout(k_new, gl.SliceLayout(1, b_layout))
        k = gl.where((k_token == newest)[None, :], k_column[:, None], k)
        scores = mma_v2(q, k, zeros)
        token = gl.arange(0, TILE, layout=gl.SliceLayout(0, mma))
        in_context = token < end - begin - last * TILE
        scores = gl.where(in_context[None, :], scores, float("-inf"))
        state = (running_max, sums, acc)
        p, running_max, sums, acc = _softmax(scores, state, scale_log2)
        p = gl.convert_layout(p.to(dtype), a_layout)
        v = values.index(stage).load(b_layout)
        v_token = gl.arange(0, TILE, layout=gl.SliceLayout(1, b_layout))
        v_row = gl.convert_layout(v_new, gl.SliceLayout(0, b_layout))
        v = gl.where((v_token == newest)[:, None], v_row[None, :], v)
        acc = mma_v2(p, v, acc)

    running_sum = gl.sum(sums, axis=1)
    acc = acc / gl.where(running_sum == 0, 1.0, running_sum)[:, None]
    member = gl.arange(0, Q_ROWS, layout=row_layout)
    out_dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, mma))
    head = kv_head * GROUP + member
    num_heads: gl.constexpr = NUM_KV_HEADS * GROUP
    in_group = (member < GROUP)[:, None] & (out_dim >= 0)[None, :]
    if num_splits == 1:
        pointers = out + ((row * num_heads + head) * HEAD_DIM)[:, None] + out_dim[None, :]
        gl.store(pointers, acc.to(dtype), mask=in_group)
    else:
        index = item_index.to(gl.int64) * num_heads + head
        gl.store(partial + (index * HEAD_DIM)[:, None] + out_dim[None, :], acc, mask=in_group)
        gl.store(partial_lse + index, running_max + gl.log2(running_sum), mask=member < GROUP)
        await_threads()
        arrived = gl.atomic_add(
            arrivals + row * NUM_KV_HEADS + kv_head, 1, sem="acq_rel", scope="gpu"
        )
        if (arrived + 1) % num_splits == 0:
            merge_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
            merge_rows: gl.constexpr = gl.SliceLayout(1, merge_layout)
            of_group = gl.arange(0, MERGE_GROUP, layout=merge_rows)
            merge_head = kv_head * GROUP + of_group
            merge_dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, merge_layout))
            is_head = of_group < GROUP
            merged_max = gl.full([MERGE_GROUP], -1e30, gl.float32, merge_rows)
            merged_sum = gl.zeros([MERGE_GROUP], gl.float32, merge_rows)
            merged = gl.zeros([MERGE_GROUP, HEAD_DIM], gl.float32, merge_layout)
            mask = is_head[:, None] & (merge_dim >= 0)[None, :]
            for part in range(num_splits):
                at = (first_item + part).to(gl.int64) * num_heads + merge_head
                lse = gl.load(
                    partial_lse + at, mask=is_head, other=float("-inf"), cache_modifier=".cg"
                )
                pointers = partial + (at * HEAD_DIM)[:, None] + merge_dim[None, :]
                part_out = gl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
                new_max = gl.maximum(merged_max, lse)
                correction = gl.exp2(merged_max - new_max)
                share = gl.exp2(lse - new_max)
                merged_sum = merged_sum * correction + share
                merged = merged * correction[:, None] + part_out * share[:, None]
                merged_max = new_max
            merged = merged / gl.where(merged_sum == 0, 1.0, merged_sum)[:, None]
            at = (row * num_heads + merge_head) * HEAD_DIM
            gl.store(out + at[:, None] + merge_dim[None, :], merged.to(dtype), mask=mask)


@remember
def _layout(tile: int, head_dim: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([tile, head_dim], DTYPES[dtype])


def takes(heads: HeadInputs, cache: KVCache, metadata: DecodeMetadata, window: int | None) -> bool:
    """Whether `hopper_fused_decode` takes the place of the separate kernels."""
    num_slots, head_dim = cache.key.shape[1], cache.key.shape[3]
    return (
        ENABLED
        and is_hopper(cache.key.device)
        and fits(heads, cache, metadata, window)
        and cutting_window(window, metadata.block_tables, num_slots) is None
        and head_dim in HEAD_DIMS
        and num_slots % MIN_BLOCK_SIZE == 0
    )


def hopper_fused_decode(
    heads: HeadInputs,
    cache: KVCache,
    metadata: DecodeMetadata,
    scale: float,
    *,
    tile: DecodeTile | None = None,
) -> torch.Tensor:
    """[B, Hq, D]; see `Ops.attention`, where `takes` says so.

    The last argument overrides the tuned choice.
    """
    qkv, q_norm_weight, k_norm_weight, eps, cos_sin, positions = heads
    qkv, num_parts, stride_part, dtype = parts_of(qkv)
    assert cache.key.is_contiguous() and cache.value.is_contiguous()
    key_cache, value_cache = cache[:2]
    num_blocks, block_size, num_kv_heads, head_dim = key_cache.shape
    batch_size = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    out = torch.empty((batch_size, num_heads, head_dim), dtype=dtype, device=qkv.device)
    plan = plan_of_layer(cache, metadata, None)
    if tile is None:
        num_queries = batch_size * num_heads
        tile = next(tile for most, tile in TILES.items() if num_queries <= most)
    num_items, tokens = len(plan.items), min(tile.tokens, plan.tile)
    group = num_heads // num_kv_heads
    partial = torch.empty((num_items, num_heads, head_dim), dtype=torch.float32, device=qkv.device)
    partial_lse = torch.empty((num_items, num_heads), dtype=torch.float32, device=qkv.device)
    scale_log2, _ = score_scales(scale, None)
    width = num_kv_heads * head_dim
    shape, layout = [num_blocks * block_size, width], _layout(tokens, head_dim, dtype)
    _hopper_fused_decode_kernel[(num_kv_heads, num_items)](
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
        TensorDescriptor(key_cache, shape, [width, 1], [tokens, head_dim], layout),
        TensorDescriptor(value_cache, shape, [width, 1], [tokens, head_dim], layout),
        metadata.block_tables,
        scale_log2,
        qkv.stride(0),
        stride_part if num_parts > 1 else None,
        metadata.block_tables.stride(0),
        NUM_PARTS=num_parts,
        GROUP=group,
        X_ROWS=max(2 * tile.num_warps, next_power_of_2(group + 1)),
        MERGE_GROUP=next_power_of_2(group),
        HEAD_DIM=head_dim,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        TILE=tokens,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **overlap_options(qkv.device),
    )
    return out
