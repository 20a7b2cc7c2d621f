"""Paged attention of one query per row (flash-decoding) in Triton, bound by KV bandwidth.

Contexts are cut into splits of about one size, however unequal the rows are; `plan_decode` lists
the splits on the device, once a step. A program reads one split of one KV head, for the whole group
of query heads; the last program of a row to finish merges the row's splits. Every grid depends on
the batch size, the table's width and the window only, so all can be captured in a CUDA graph.

In a layer with a window the splits divide what the query sees, and no tile before it is read.

On Hopper hopper_decode.py has another kernel for the plain case, with the same plans.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels import types
from nanovllm.kernels.device import device_limits
from nanovllm.kernels.triton import hopper_decode
from nanovllm.kernels.triton.attention_scores import check_sinks, load_sinks, score_scales, tanh
from nanovllm.kernels.triton.common_prefix import attend_to_common_prefix, choose_prefix_splits
from nanovllm.kernels.triton.decode_items import (
    BEGIN,
    END,
    FIRST_ITEM,
    ITEM_SIZE,
    NUM_SPLITS,
    ROW,
)
from nanovllm.kernels.triton.fp8 import unpack_pairs
from nanovllm.kernels.triton.launch import (
    await_previous,
    await_previous_alone,
    is_gpu,
    jit,
    num_multiprocessors,
    overlap_options,
    release_next,
)
from nanovllm.kernels.types import FP8_DTYPE, DecodeMetadata, KVCache

TILE = 64  # tokens per iteration; lies within one page
SMALL_BATCH_TILE = 32  # also behind a common prefix, where most rows have few tokens
ONE_ROW_TILE = 128  # in half precision, where the keys and values of two tiles fit
ONE_ROW = 8  # row-heads up to which it wins: one row of Qwen3-0.6B
FP8_TILE_FACTOR = 2  # a tile of an fp8 cache has as many bytes
SMALL_BATCH = 256  # row-heads (rows times KV heads) up to which the smaller tile wins
NUM_WARPS = 2
NUM_STAGES = 6  # of which Triton gives the block table's load some: two tiles are in flight
STAGE_BYTES = 32768  # a deeper pipeline only while a stage's keys and values stay within this
# Splits are as long as this many programs per multiprocessor allow: few row-heads, many.
PROGRAMS_PER_SM = {128: 6, 2**31: 3}
# A split costs its merge: at least 2 tokens for each row-head, within these bounds.
MIN_SPLIT_TOKENS = (128, 512)
MERGE_ELEMENTS = 4096  # of partial outputs that a program merges at a time
MIN_TILE = 16  # what a matrix product needs
TWO_TILES_ROOM = 16384  # bytes of shared memory beside two tiles
OTHER_SHARED_BYTES = 512  # block ids, and what warps exchange for a maximum

FP8_MAX = tl.constexpr(types.FP8_MAX)


class DecodePlan(NamedTuple):
    """How a step's decode attention is divided among programs, the same in layers of one kind.

    Layers of another kind have a plan in `others`, made when the first of them asks for it.
    """

    items: torch.Tensor  # [P, ITEM_SIZE] int32
    arrivals: torch.Tensor  # [B, Hkv] int32, splits finished; a multiple of NUM_SPLITS in between
    num_common_tokens: torch.Tensor | None  # [1] int32, see `Ops.plan_decode`
    tile: int  # tokens; splits begin at multiples, but for a row's first one
    window: int | None
    others: "dict[tuple[int, int | None], DecodePlan]"  # by (KV heads, window)


@jit(
    do_not_specialize=["batch_size", "num_items", "target", "num_kv_heads", "min_tiles", "window"],
    do_not_specialize_on_alignment=["context_lens"],
)
def _plan_kernel(
    items,  # [num_items, ITEM_SIZE] int32
    arrivals,  # [batch_size, num_kv_heads] int32
    context_lens,  # [batch_size] int32
    num_common_tokens,  # [1] int32 or None
    batch_size,
    num_items,
    target,  # splits that a long batch is cut into, apart from each row's rounding
    num_kv_heads,
    min_tiles,  # of a split, in a row that has several
    window,  # int or None: see `Ops.attend`
    TILE: tl.constexpr,
    PADDED_BATCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous_alone(OVERLAP)  # decode kernels read the plan before they wait
    row = tl.arange(0, PADDED_BATCH)
    in_batch = row < batch_size
    length = tl.load(context_lens + row, mask=in_batch, other=0)
    own_begin = 0  # the first token that the row reads by itself
    if num_common_tokens is not None:
        own_begin = tl.load(num_common_tokens)
    if window is not None:
        own_begin = tl.maximum(length - window, 0)
    first_token = own_begin // TILE * TILE
    num_tiles = tl.cdiv(tl.maximum(length - first_token, 0), TILE)
    tiles_per_split = tl.maximum(tl.cdiv(tl.sum(num_tiles, axis=0), target), min_tiles)
    # At least one, so that a row of length 0 gets its zeros; no split is without a tile else.
    num_splits = tl.where(in_batch, tl.maximum(tl.cdiv(num_tiles, tiles_per_split), 1), 0)
    first_item = tl.cumsum(num_splits, axis=0) - num_splits
    for split in range(tl.max(num_splits, axis=0)):
        item = items + (first_item + split) * ITEM_SIZE
        exists = split < num_splits
        divisor = tl.maximum(num_splits, 1)
        begin = first_token + num_tiles * split // divisor * TILE
        end = tl.minimum(first_token + num_tiles * (split + 1) // divisor * TILE, length)
        begin = tl.maximum(begin, own_begin)
        tl.store(item + ROW, row, mask=exists)
        tl.store(item + BEGIN, begin, mask=exists)
        tl.store(item + END, end, mask=exists)
        tl.store(item + FIRST_ITEM, first_item, mask=exists)
        tl.store(item + NUM_SPLITS, num_splits, mask=exists)
    num_used = tl.sum(num_splits, axis=0)
    for begin_item in range(num_used, num_items, PADDED_BATCH):
        unused = begin_item + row
        tl.store(items + unused * ITEM_SIZE + NUM_SPLITS, 0, mask=unused < num_items)
    for kv_head in range(num_kv_heads):
        tl.store(arrivals + row * num_kv_heads + kv_head, 0, mask=in_batch)
    # A release: decode kernels, which start after this one has ended, see all of the above.
    tl.debug_barrier()
    tl.atomic_xchg(arrivals, 0, sem="acq_rel", scope="gpu")


@jit
def merge_splits(
    out,  # [B, Hq, D]
    partial,
    partial_lse,
    row,
    kv_head,
    first_item,
    num_splits,
    prefix_items,
    num_prefix_splits,
    batch_size,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Averages a row's partial outputs, weighted by their shares of the softmax's denominator.

    They are those of its splits and of the common prefix's.
    """
    num_heads = tl.num_programs(0) * GROUP
    num_parts = num_splits + num_prefix_splits
    member = tl.arange(0, PADDED_GROUP)
    head = kv_head * GROUP + member
    dim = tl.arange(0, PADDED_DIM)
    in_head = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    running_max = tl.full([PADDED_GROUP], -1e30, tl.float32)  # finite, so that no weight is NaN
    running_sum = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for begin in range(0, num_parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        prefix_item = prefix_items + (part - num_splits) * batch_size + row
        item = tl.where(part < num_splits, first_item + part, prefix_item).to(tl.int64)
        index = item[:, None] * num_heads + head[None, :]  # [PARTS, group]
        exists = (part < num_parts)[:, None] & (member < GROUP)[None, :]
        # Other programs wrote them: not from this multiprocessor's own cache.
        lse = tl.load(partial_lse + index, mask=exists, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(
            partial + index[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=(part < num_parts)[:, None, None] & in_head[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(running_max, tl.max(lse, axis=0))
        correction = tl.exp2(running_max - new_max)
        weight = tl.exp2(lse - new_max[None, :])
        running_sum = running_sum * correction + tl.sum(weight, axis=0)
        acc = acc * correction[:, None] + tl.sum(values * weight[:, :, None], axis=0)
        running_max = new_max
    result = acc / tl.where(running_sum == 0, 1.0, running_sum)[:, None]
    out_pointers = out + (row * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_pointers, result.to(out.dtype.element_ty), mask=in_head)


@jit
def add_prefix(
    acc,
    running_max,
    running_sum,
    partial,
    partial_lse,
    index,  # of the first part's rows
    stride_part,
    num_parts,
    in_group,
    dim,
    HEAD_DIM: tl.constexpr,
):
    """A row's only split goes on with the partial outputs of the common prefix."""
    running_max = tl.maximum(running_max, -1e30)  # finite, so that no weight is NaN
    for part in range(num_parts):
        item = index + part * stride_part
        lse = tl.load(partial_lse + item, mask=in_group, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(
            partial + item[:, None] * HEAD_DIM + dim[None, :],
            mask=in_group[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(running_max, lse)
        correction = tl.exp2(running_max - new_max)
        weight = tl.exp2(lse - new_max)
        running_sum = running_sum * correction + weight
        acc = acc * correction[:, None] + values * weight[:, None]
        running_max = new_max
    return acc, running_max, running_sum


# Tables may be slices of one packed buffer: no recompilation for their alignment.
@jit(
    do_not_specialize=["batch_size", "num_prefix_splits", "stride_table"],
    do_not_specialize_on_alignment=["block_tables"],
)
def _decode_kernel(
    out,  # [B, Hq, D]
    partial,  # float32 [P + num_prefix_splits * B, Hq, D]: outputs of splits that are to be merged
    partial_lse,  # float32 [P + num_prefix_splits * B, Hq]: log2 of their softmax's denominator
    arrivals,  # [B, Hkv] int32
    items,  # [P, ITEM_SIZE] int32
    query,  # [B, Hq, D]
    key_cache,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    value_cache,  # the same, but if it is fp8 int16 [num_blocks, BLOCK_SIZE, Hkv, D / 2]
    key_scales,  # [num_blocks, Hkv, BLOCK_SIZE] float32 if the caches are fp8, else None
    value_scales,
    block_tables,  # [B, W] int32
    sinks,  # [Hq] or None
    scale_log2,  # of `score_scales`
    tanh_scale,
    batch_size,
    num_prefix_splits,
    stride_query,
    stride_head,
    stride_block,
    stride_slot,
    stride_kv_head,
    stride_table,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MERGE_GROUP: tl.constexpr,
    MERGE_PARTS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BEGINS_IN_TILE: tl.constexpr,  # whether splits may begin within a tile
    # Whether the kernel ahead is the common prefix's. It let this one come when it had waited, so
    # that queries, keys and values are there; its own results are read when this one has waited.
    AFTER_PREFIX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    # Values of an fp8 cache come in pairs, and give the even and the odd columns of the output.
    IS_FP8: tl.constexpr = key_scales is not None
    PACKED: tl.constexpr = 2 if IS_FP8 else 1
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    item_index = tl.program_id(1)
    # The plan and the tables are complete since `_plan_kernel`.
    item = items + item_index * ITEM_SIZE
    row = tl.load(item + ROW, cache_modifier=".cg").to(tl.int64)
    begin = tl.load(item + BEGIN, cache_modifier=".cg")
    end = tl.load(item + END, cache_modifier=".cg")
    first_item = tl.load(item + FIRST_ITEM, cache_modifier=".cg")
    num_splits = tl.load(item + NUM_SPLITS, cache_modifier=".cg")
    table = block_tables + row * stride_table
    if not AFTER_PREFIX:
        await_previous(OVERLAP)
    if num_splits == 0:
        if AFTER_PREFIX:
            await_previous(OVERLAP)
        return

    # The group of query heads that share this KV head, padded to the 16 rows tl.dot needs.
    member = tl.arange(0, PADDED_GROUP)
    dim = tl.arange(0, PADDED_DIM)
    token = tl.arange(0, TILE)
    in_dim = dim < HEAD_DIM
    head = kv_head * GROUP + member
    q_mask = (member < GROUP)[:, None] & in_dim[None, :]
    q_offsets = head[:, None] * stride_head + dim[None, :]
    q_pointers = query + row * stride_query + q_offsets
    q = tl.load(q_pointers, mask=q_mask, other=0.0, cache_modifier=".cg" if AFTER_PREFIX else "")
    if IS_FP8 and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # fp8 converts to float16 in one instruction

    tile_offsets = token[:, None] * stride_slot + dim[None, :] + kv_head * stride_kv_head
    value_dim = tl.arange(0, PADDED_DIM // PACKED)
    in_value_dim = value_dim < HEAD_DIM // PACKED
    value_offsets = token[:, None] * (stride_slot // PACKED) + value_dim[None, :]
    value_offsets += kv_head * (stride_kv_head // PACKED)
    running_max = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    running_sum = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, PADDED_DIM // PACKED], tl.float32)
    if IS_FP8:
        acc_odd = tl.zeros([PADDED_GROUP, PADDED_DIM // PACKED], tl.float32)
    if sinks is not None:
        # The row's first split counts them.
        is_first = (member >= 0) & (item_index == first_item)
        running_max = tl.where(is_first, load_sinks(sinks, head, member < GROUP), running_max)
        running_sum = tl.where(is_first, 1.0, running_sum)
    first_token = begin
    if BEGINS_IN_TILE:
        begin = begin // TILE * TILE
    for start in tl.range(begin, end, TILE):
        # begin and TILE keep a tile within one page: one block id, one int64 base address.
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        base = block * stride_block + (start % BLOCK_SIZE) * stride_slot
        in_context = token < end - start
        if BEGINS_IN_TILE:
            in_context &= token >= first_token - start
        k_mask = in_context[:, None] & in_dim[None, :]
        v_mask = in_context[:, None] & in_value_dim[None, :]
        k = tl.load(key_cache + base + tile_offsets, mask=k_mask, other=0.0).to(q.dtype)
        v = tl.load(value_cache + base // PACKED + value_offsets, mask=v_mask, other=0)
        product_scale = scale_log2 if tanh_scale is None else tanh_scale
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * product_scale  # [group, TILE]
        if IS_FP8:
            scale_offsets = (
                (block * num_kv_heads + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE + token
            )
            scores *= tl.load(key_scales + scale_offsets, mask=in_context, other=0.0)[None, :]
        if tanh_scale is not None:
            scores = tanh(scores) * scale_log2
        scores = tl.where(in_context[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))  # finite: a tile has a token
        correction = tl.exp2(running_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(p, axis=1)
        acc = acc * correction[:, None]
        if IS_FP8:
            # FP8_MAX, divided out at the end, keeps a half-precision p clear of the subnormals.
            value_scale = tl.load(value_scales + scale_offsets, mask=in_context, other=0.0)
            p = (p * (value_scale * FP8_MAX)[None, :]).to(q.dtype)
            v_even, v_odd = unpack_pairs(v, ASSEMBLY)
            acc = tl.dot(p, v_even.to(q.dtype), acc, input_precision="ieee")
            acc_odd = acc_odd * correction[:, None]
            acc_odd = tl.dot(p, v_odd.to(q.dtype), acc_odd, input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        running_max = new_max
    if IS_FP8:
        acc = tl.interleave(acc, acc_odd) / FP8_MAX

    num_heads = num_kv_heads * GROUP
    if AFTER_PREFIX:
        await_previous(OVERLAP)
        if num_splits == 1:
            acc, running_max, running_sum = add_prefix(
                acc,
                running_max,
                running_sum,
                partial,
                partial_lse,
                (tl.num_programs(1) + row) * num_heads + head,
                batch_size * num_heads,
                num_prefix_splits,
                member < GROUP,
                dim,
                HEAD_DIM,
            )
    # A row of length 0 gives zeros.
    acc = acc / tl.where(running_sum == 0, 1.0, running_sum)[:, None]
    if num_splits == 1:
        out_offsets = (row * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out + out_offsets, acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        index = item_index.to(tl.int64) * num_heads + head
        lse = running_max + tl.log2(running_sum)
        tl.store(partial + index[:, None] * HEAD_DIM + dim[None, :], acc, mask=q_mask)
        tl.store(partial_lse + index, lse, mask=member < GROUP)
        # All threads have stored before one of them announces it; the program that makes the
        # row's count complete then sees every split. No layer leaves an incomplete count.
        tl.debug_barrier()
        arrived = tl.atomic_add(
            arrivals + row * num_kv_heads + kv_head, 1, sem="acq_rel", scope="gpu"
        )
        if (arrived + 1) % num_splits == 0:
            merge_splits(
                out,
                partial,
                partial_lse,
                row,
                kv_head,
                first_item,
                num_splits,
                tl.num_programs(1),
                num_prefix_splits,
                batch_size,
                GROUP,
                MERGE_GROUP,
                HEAD_DIM,
                PADDED_DIM,
                MERGE_PARTS,
            )


def cutting_window(window: int | None, block_tables: torch.Tensor, block_size: int) -> int | None:
    """The window, or None where no sequence of these tables is longer."""
    return None if window is None or window >= block_tables.shape[1] * block_size else window


def plan_decode(
    cache: KVCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    num_common_tokens: torch.Tensor | None = None,
    window: int | None = None,
    *,
    tile: int | None = None,
    programs_per_sm: int | None = None,
    min_split: int | None = None,
) -> DecodePlan:
    """The plan of a step for `decode_attention`; see `Ops.plan_decode`.

    The keyword arguments override the tuned choices.
    """
    (batch_size,) = context_lens.shape
    key_cache = cache.key
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    row_heads = batch_size * num_kv_heads
    is_for_hopper = num_common_tokens is None and hopper_decode.suits(cache, batch_size)
    if tile is None:
        has_prefix = num_common_tokens is not None and window is None
        tile = SMALL_BATCH_TILE if has_prefix or row_heads <= SMALL_BATCH else TILE
        tile *= FP8_TILE_FACTOR if key_cache.dtype == FP8_DTYPE else 1
        two_tiles = 4 * ONE_ROW_TILE * triton.next_power_of_2(head_dim) * key_cache.element_size()
        has_room = two_tiles + TWO_TILES_ROOM <= device_limits(key_cache.device).shared_memory
        if row_heads <= ONE_ROW and key_cache.element_size() == 2 and has_room:
            tile = ONE_ROW_TILE
        if is_for_hopper:
            tile = hopper_decode.TILE
    tile = min(tile, block_size)
    assert tile >= MIN_TILE and block_size % tile == 0
    if min_split is None:
        shortest, longest = MIN_SPLIT_TOKENS
        min_split = max(shortest, min(2 * row_heads, longest))
    min_tiles = max(1, min_split // tile)
    window = cutting_window(window, block_tables, block_size)
    if programs_per_sm is None:
        programs_per_sm = next(n for most, n in PROGRAMS_PER_SM.items() if row_heads <= most)
        if is_for_hopper and key_cache.dtype != FP8_DTYPE:
            programs_per_sm = hopper_decode.PROGRAMS_PER_SM
    num_programs = programs_per_sm * num_multiprocessors(key_cache.device)
    target = max(1, num_programs // num_kv_heads)
    # The plan's splits are at most target + batch_size; short tables and windows have fewer.
    most_tiles = block_tables.shape[1] * block_size // tile
    if window is not None:
        most_tiles = min(most_tiles, triton.cdiv(window - 1, tile) + 1)
    most_splits = triton.cdiv(most_tiles, min_tiles)
    num_items = min(target + batch_size, most_splits * batch_size)
    device = context_lens.device
    items = torch.empty((num_items, ITEM_SIZE.value), dtype=torch.int32, device=device)
    arrivals = torch.empty((batch_size, num_kv_heads), dtype=torch.int32, device=device)
    if batch_size > 0:
        _plan_kernel[(1,)](
            items,
            arrivals,
            context_lens,
            num_common_tokens if window is None else None,
            batch_size,
            num_items,
            target,
            num_kv_heads,
            min_tiles,
            window,
            TILE=tile,
            PADDED_BATCH=max(128, triton.next_power_of_2(batch_size)),
            num_warps=4,
            **overlap_options(device),
        )
    return DecodePlan(items, arrivals, num_common_tokens, tile, window, {})


def shared_bytes(
    tile: int,
    num_stages: int,
    padded_group: int,
    padded_dim: int,
    query_itemsize: int,
    cache_itemsize: int,
) -> int:
    """The shared memory that Triton gives `_decode_kernel`, rounded up a little.

    That is the keys and values of the tiles in flight (with the scales of an fp8 cache), the
    group's queries, and its p or a tile of fp8 that becomes float32. Half of the stages but the
    first are the block table's.
    """
    scale_bytes = 2 * 4 if cache_itemsize == 1 else 0
    in_flight = max(1, (num_stages - 1) // 2)
    tiles = in_flight * tile * (2 * padded_dim * cache_itemsize + scale_bytes)
    queries = padded_group * padded_dim * query_itemsize
    p = padded_group * tile * query_itemsize
    widened = tile * padded_dim * 4 if (query_itemsize, cache_itemsize) == (4, 1) else 0
    return tiles + queries + max(p, widened) + OTHER_SHARED_BYTES


def choose_tile_and_stages(
    tile: int,
    padded_group: int,
    padded_dim: int,
    query_itemsize: int,
    cache_itemsize: int,
    shared_memory: int,
) -> tuple[int, int]:
    """The plan's tile, or a part of it, and the stages whose `shared_bytes` are there.

    Stages are given up first. What has been measured, on GPUs with 227 KiB, is nowhere cut.
    """
    while True:
        stage_bytes = 2 * tile * padded_dim * cache_itemsize
        most = max(2, min(NUM_STAGES, NUM_STAGES * STAGE_BYTES // stage_bytes))
        for num_stages in range(most, 1, -1):
            sizes = padded_group, padded_dim, query_itemsize, cache_itemsize
            if shared_bytes(tile, num_stages, *sizes) <= shared_memory:
                return tile, num_stages
        if tile == MIN_TILE:
            return tile, 2
        tile //= 2


def plan_of_layer(cache: KVCache, metadata: DecodeMetadata, window: int | None) -> DecodePlan:
    """The step's plan for a layer's number of KV heads and window; makes it if there is none."""
    tables, context_lens = metadata.block_tables, metadata.context_lens
    if metadata.plan is None:
        return plan_decode(cache, tables, context_lens, window=window)
    assert isinstance(metadata.plan, DecodePlan)
    plan, num_kv_heads = metadata.plan, cache.key.shape[2]
    if (plan.arrivals.shape[1], plan.window) == (num_kv_heads, window):
        return plan
    if (num_kv_heads, window) not in plan.others:
        other = plan_decode(cache, tables, context_lens, plan.num_common_tokens, window)
        plan.others[num_kv_heads, window] = other
    return plan.others[num_kv_heads, window]


def decode_attention(
    query: torch.Tensor,
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
    """query [B, Hq, D] -> [B, Hq, D]; see `Ops.attend`. Flash-decoding (Dao et al. 2023).

    The last two arguments override the tuned choices.
    """
    key_cache, value_cache, key_scales, value_scales = cache
    block_tables = metadata.block_tables
    batch_size, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    out = torch.empty((batch_size, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if batch_size == 0:
        return out
    assert query.stride(2) == 1 and key_cache.stride(3) == 1
    assert key_cache.stride() == value_cache.stride()
    check_sinks(sinks, num_heads)
    scale_log2, tanh_scale = score_scales(scale, softcap)
    window = cutting_window(window, block_tables, block_size)
    plan = plan_of_layer(cache, metadata, window)
    num_common_tokens = plan.num_common_tokens if window is None else None
    num_items, tile = len(plan.items), plan.tile
    group = num_heads // num_kv_heads
    # A product has at least 16 columns; with fp8 it has half of the head's.
    is_fp8 = key_scales is not None
    padded_dim = max(32 if is_fp8 else 16, triton.next_power_of_2(head_dim))
    has_choice = num_warps is None and num_stages is None
    merge_group = triton.next_power_of_2(group)
    merge_parts = max(1, MERGE_ELEMENTS // (merge_group * padded_dim))
    padded_group = max(16, triton.next_power_of_2(group))
    if num_stages is None:
        tile, num_stages = choose_tile_and_stages(
            tile,
            padded_group,
            padded_dim,
            query.element_size(),
            key_cache.element_size(),
            device_limits(query.device).shared_memory,
        )
    num_prefix_splits = 0
    if num_common_tokens is not None:
        num_prefix_splits = choose_prefix_splits(batch_size, num_heads, num_kv_heads, query.device)
    shape = (num_items + num_prefix_splits * batch_size, num_heads)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if num_common_tokens is not None:
        attend_to_common_prefix(
            partial[num_items:].view(num_prefix_splits, *query.shape),
            partial_lse[num_items:].view(num_prefix_splits, *query.shape[:2]),
            query,
            cache,
            block_tables[0],
            num_common_tokens,
            scale,
            softcap,
        )
    is_plain = window is None and softcap is None and sinks is None and num_common_tokens is None
    if is_plain and has_choice and hopper_decode.takes(query, cache, plan.tile):
        hopper_decode.hopper_decode(
            out,
            partial,
            partial_lse,
            plan.arrivals,
            plan.items,
            plan.tile,
            query,
            cache,
            metadata,
            scale_log2,
            num_prefix_splits,
        )
        return out
    _decode_kernel[(num_kv_heads, num_items)](
        out,
        partial,
        partial_lse,
        plan.arrivals,
        plan.items,
        query,
        key_cache,
        value_cache.view(torch.int16) if is_fp8 else value_cache,
        key_scales,
        value_scales,
        block_tables,
        sinks,
        scale_log2,
        tanh_scale,
        batch_size,
        num_prefix_splits,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        GROUP=group,
        PADDED_GROUP=padded_group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_SIZE=block_size,
        TILE=tile,
        MERGE_GROUP=merge_group,
        MERGE_PARTS=merge_parts,
        ASSEMBLY=is_gpu(query.device),
        BEGINS_IN_TILE=window is not None or num_common_tokens is not None,
        AFTER_PREFIX=num_common_tokens is not None,
        num_warps=num_warps or (NUM_WARPS if tile <= TILE else 2 * NUM_WARPS),
        num_stages=num_stages,
        **overlap_options(query.device),
    )
    return out
