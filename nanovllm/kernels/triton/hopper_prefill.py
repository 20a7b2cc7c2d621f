"""Causal paged attention for Hopper, in Gluon: one warp copies, two warpgroups compute.

FlashAttention-3 (Shah et al. 2024) with pages. An item of work is 128 consecutive queries of one
head of one sequence, 64 for each warpgroup. Where sequences have few queries it is 64 of them, of
two heads with the same keys. As many programs as there are multiprocessors take items, each the
next one whenever it is ready, from a counter in global memory. The copying warp takes them, tells
the warpgroups, and brings an item's queries, then tile after tile of keys and values, by bulk
tensor copies into a ring of shared memory. It runs ahead into the next item. A warpgroup starts the
product of its queries with the keys of a tile, beside it the product of the last tile's p with its
values, and computes the softmax while the latter runs.

Every buffer in shared memory has two barriers: "full" when its bytes are there, "free" when all who
read it are done. The n-th use of a barrier completes its n-th phase, and one waits for a phase by
its parity. A new barrier counts as if the phase before the first had completed.
"""

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia import hopper

from nanovllm.kernels.triton.launch import cdiv, is_hopper, num_multiprocessors, with_dry_runs
from nanovllm.kernels.types import KVCache, PrefillMetadata

BLOCK_M = 64  # queries of a warpgroup
BLOCK_N = 128  # keys of a tile
NUM_STAGES = 2  # tiles of keys, and of values, in the ring
# Of a thread of a computing warpgroup, and of the copying one: 504 for the three roles.
COMPUTING_REGISTERS, COPYING_REGISTERS = 240, 24
HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Triton 3.8 has another name for it than 3.6 and 3.7.
start_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _item(
    number,
    work,  # cu_seqlens_q, cu_seqlens_k, num_seqs, most items of a head of a sequence
    IS_COUNTED: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    ITEM_HEADS: gl.constexpr,  # heads of an item: 1 or 2
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Where an item's queries and keys are; no tiles if there is nothing to do.

    The last queries of all sequences, which see the most keys, come first. Then it is sequence by
    sequence, in the order of falling work, so that the L2 cache holds the keys and values in use.
    Without a counter all are in the order of falling work, so that each program gets about as much.
    """
    cu_seqlens_q, cu_seqlens_k, num_seqs, most_items = work
    ROWS: gl.constexpr = 2 * BLOCK_M // ITEM_HEADS
    NUM_PLACES: gl.constexpr = NUM_HEADS // ITEM_HEADS
    head = number % NUM_PLACES * ITEM_HEADS
    block = number // NUM_PLACES
    if IS_COUNTED:
        later = gl.maximum(block - num_seqs, 0)
        later_items = gl.maximum(most_items - 1, 1)
        is_last_block = block < num_seqs
        seq = gl.where(is_last_block, block, later // later_items)
        place = gl.where(is_last_block, 0, later % later_items + 1)
    else:
        seq, place = block % num_seqs, block // num_seqs
    is_item = number < NUM_PLACES * num_seqs * most_items
    seq = gl.minimum(seq, num_seqs - 1)
    q_begin = gl.load(cu_seqlens_q + seq)
    len_q = gl.load(cu_seqlens_q + seq + 1) - q_begin
    len_k = gl.load(cu_seqlens_k + seq + 1) - gl.load(cu_seqlens_k + seq)
    first_row = (gl.cdiv(len_q, ROWS) - 1 - place) * ROWS
    num_cached = len_k - len_q
    end = gl.minimum(len_k, num_cached + first_row + ROWS)
    num_tiles = gl.where(is_item & (first_row >= 0), gl.cdiv(end, BLOCK_N), 0)
    return head, seq, q_begin, len_q, num_cached, first_row, num_tiles


@gluon.jit
def _take(number, counter, num_items):
    """The number of this program's item after `number`; at least `num_items` if there is none."""
    num_programs, program = gl.num_programs(0), gl.program_id(0)
    if counter is None:  # in turn, every other round backwards
        turn = number // num_programs + 1
        number = turn * num_programs
        number += gl.where(turn % 2 == 0, program, num_programs - 1 - program)
    else:
        number = num_items
        if num_programs < num_items:  # else every program has had its only one
            number = num_programs + gl.atomic_add(counter, 1, sem="relaxed")
    return number


@gluon.jit
def _find_item(
    number,
    counter,
    work,
    NUM_HEADS: gl.constexpr,
    ITEM_HEADS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Item `number` or, if it has no tiles, the next of this program's that has; see `_item`."""
    num_items = NUM_HEADS // ITEM_HEADS * work[2] * work[3]
    head, seq, q_begin, len_q, num_cached, first_row, num_tiles = _item(
        number, work, counter is not None, NUM_HEADS, ITEM_HEADS, BLOCK_M, BLOCK_N
    )
    while (num_tiles == 0) & (number < num_items):
        number = _take(number, counter, num_items)
        head, seq, q_begin, len_q, num_cached, first_row, num_tiles = _item(
            number, work, counter is not None, NUM_HEADS, ITEM_HEADS, BLOCK_M, BLOCK_N
        )
    return number, head, seq, q_begin, len_q, num_cached, first_row, num_tiles


@gluon.jit
def _put(places, place, value):
    """Write an integer to shared memory, by the copying warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    places.index(place).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _get(places, place):
    """Read it, by a computing warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(places.index(place).load(layout), axis=0)


@gluon.jit
def _announce(board, number, head, q_begin, len_q, num_cached, first_row, num_tiles):
    """Tell the warpgroups what this program's n-th item is; without tiles it is the end."""
    places, full, free = board
    buffer = number % 2
    mbarrier.wait(free.index(buffer), (number // 2 + 1) & 1)
    _put(places, buffer * 6, head)
    _put(places, buffer * 6 + 1, q_begin)
    _put(places, buffer * 6 + 2, len_q)
    _put(places, buffer * 6 + 3, num_cached)
    _put(places, buffer * 6 + 4, first_row)
    _put(places, buffer * 6 + 5, num_tiles)
    mbarrier.arrive(full.index(buffer))


@gluon.jit
def _announced(board, number):
    """What this program's n-th item is."""
    places, full, free = board
    buffer = number % 2
    mbarrier.wait(full.index(buffer), (number // 2) & 1)
    head = _get(places, buffer * 6)
    q_begin = _get(places, buffer * 6 + 1)
    len_q = _get(places, buffer * 6 + 2)
    num_cached = _get(places, buffer * 6 + 3)
    first_row = _get(places, buffer * 6 + 4)
    num_tiles = _get(places, buffer * 6 + 5)
    mbarrier.arrive(free.index(buffer))
    return head, q_begin, len_q, num_cached, first_row, num_tiles


@gluon.jit
def _slot(table, tile, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where a tile's first key and value are in the cache."""
    start = tile * BLOCK_N
    return gl.load(table + start // BLOCK_SIZE) * BLOCK_SIZE + start % BLOCK_SIZE


@gluon.jit
def _copy_tile(tiles, buffers, full, free, number, slot, column, STAGES: gl.constexpr):
    """Start the copy of the n-th tile of keys or values, once its place in the ring is free."""
    stage = number % STAGES
    barrier = full.index(stage)
    mbarrier.wait(free.index(stage), (number // STAGES + 1) & 1)
    mbarrier.expect(barrier, tiles.block_type.nbytes)
    # The last tile may reach past the context: what lies there is finite, and p is 0.
    start_copy(tiles, [slot, column], barrier, buffers.index(stage))


@gluon.jit
def _copy(
    tiles,  # the descriptors of queries, keys and values
    query_buffers,  # two for each half in turn: queries, full, free
    ring,  # keys, full, free; values, full, free
    board,  # of `_announce`: places, full, free
    counter,
    block_tables,
    stride_table,
    work,  # of `_item`
    NUM_HEADS: gl.constexpr,
    ITEM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The copying warp: takes items, and copies their queries, keys and values.

    A tile's keys go ahead of the values of the tile before: they are needed, and free, earlier.
    """
    query_tiles, key_tiles, value_tiles = tiles
    queries, query_full, query_free = query_buffers
    keys, key_full, key_free, values, value_full, value_free = ring
    num_items = NUM_HEADS // ITEM_HEADS * work[2] * work[3]
    items_done = 0
    number = 0  # of the tile, of all items
    item = gl.program_id(0)
    item, head, seq, q_begin, len_q, num_cached, first_row, num_tiles = _find_item(
        item, counter, work, NUM_HEADS, ITEM_HEADS, BLOCK_M, BLOCK_N
    )
    _announce(board, 0, head, q_begin, len_q, num_cached, first_row, num_tiles)
    while num_tiles > 0:
        for half in gl.static_range(2):
            buffer = items_done % 2 * 2 + half
            full = query_full.index(buffer)
            mbarrier.wait(query_free.index(buffer), (items_done // 2 + 1) & 1)
            mbarrier.expect(full, query_tiles.block_type.nbytes)
            # Rows past the sequence are others' queries, or zeros: nothing is stored of them.
            if ITEM_HEADS == 2:
                place = [q_begin + first_row, (head + half) * HEAD_DIM]
            else:
                place = [q_begin + first_row + half * BLOCK_M, head * HEAD_DIM]
            start_copy(query_tiles, place, full, queries.index(buffer))
        items_done += 1
        item_tiles = num_tiles
        table = block_tables + seq.to(gl.int64) * stride_table
        column = head // GROUP * HEAD_DIM
        slot = _slot(table, 0, BLOCK_SIZE, BLOCK_N)
        _copy_tile(key_tiles, keys, key_full, key_free, number, slot, column, STAGES)
        # Early enough that nobody waits for it.
        item = _take(item, counter, num_items)
        item, head, seq, q_begin, len_q, num_cached, first_row, num_tiles = _find_item(
            item, counter, work, NUM_HEADS, ITEM_HEADS, BLOCK_M, BLOCK_N
        )
        _announce(board, items_done, head, q_begin, len_q, num_cached, first_row, num_tiles)
        for tile in range(1, item_tiles):
            next_slot = _slot(table, tile, BLOCK_SIZE, BLOCK_N)
            _copy_tile(key_tiles, keys, key_full, key_free, number + 1, next_slot, column, STAGES)
            _copy_tile(value_tiles, values, value_full, value_free, number, slot, column, STAGES)
            slot = next_slot
            number += 1
        _copy_tile(value_tiles, values, value_full, value_free, number, slot, column, STAGES)
        number += 1


@gluon.jit
def _start_scores(queries, keys, key_full, tile, STAGES: gl.constexpr, layout: gl.constexpr):
    """The product of the queries with the n-th tile of keys, which goes on meanwhile."""
    BLOCK_M: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    stage = tile % STAGES
    mbarrier.wait(key_full.index(stage), (tile // STAGES) & 1)
    transposed = keys.index(stage).permute((1, 0))
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(queries, transposed, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_sums(p, values, value_full, tile, acc, STAGES: gl.constexpr):
    """acc + the product of p with the n-th tile of values, which goes on meanwhile."""
    stage = tile % STAGES
    mbarrier.wait(value_full.index(stage), (tile // STAGES) & 1)
    return warpgroup_mma(p, values.index(stage), acc, is_async=True)


@gluon.jit
def _masked(scores, start, q_pos, layout: gl.constexpr):
    """-inf for the keys from `start` on that are behind their query."""
    BLOCK_N: gl.constexpr = scores.shape[1]
    token = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    return gl.where((start + token)[None, :] <= q_pos[:, None], scores, float("-inf"))


@gluon.jit
def _softmax(scores, running_max, running_sum, scale_log2):
    """A step of the online softmax: scores [BLOCK_M, BLOCK_N] -> p of the same shape.

    Also the factor for everything summed up before, and the new running maximum and sum.
    """
    new_max = gl.maximum(running_max, gl.max(scores, axis=1) * scale_log2)
    correction = gl.exp2(running_max - new_max)
    p = gl.exp2(scores * scale_log2 - new_max[:, None])
    return p, correction, new_max, running_sum * correction + gl.sum(p, axis=1)


@gluon.jit
def _walk(
    state,  # sums, running maximum and sum of p, and p of the tile before `first`
    # Of the warpgroup: queries, their barrier, its parity, ring, tiles done before, positions of
    # queries, scale.
    item,
    first,
    last,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
    scores_layout: gl.constexpr,
    p_layout: gl.constexpr,
):
    """The item's tiles [first, last): each one's scores, and the sums of the one before."""
    acc, running_max, running_sum, p = state
    queries, query_full, query_parity, ring, tiles_done, q_pos, scale_log2 = item
    keys, key_full, key_free, values, value_full, value_free = ring
    for tile in range(first, last):
        number = tiles_done + tile
        scores = _start_scores(queries, keys, key_full, number, STAGES, scores_layout)
        acc = _start_sums(p, values, value_full, number - 1, acc, STAGES)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(key_free.index(number % STAGES))
        if MASKED:
            scores = _masked(scores, tile * keys.shape[1], q_pos, scores_layout)
        new_p, correction, running_max, running_sum = _softmax(
            scores, running_max, running_sum, scale_log2
        )
        new_p = gl.convert_layout(new_p.to(p.dtype), p_layout)
        # The assembler would wait for the sums before it computes the softmax, to have registers
        # free early. A branch between them keeps it from that: a wait for what came long ago.
        mbarrier.wait(query_full, query_parity)
        acc, p, new_p = warpgroup_mma_wait(0, [acc, p, new_p])  # until then p's registers are read
        mbarrier.arrive(value_free.index((number - 1) % STAGES))
        acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = new_p
    return acc, running_max, running_sum, p


@gluon.jit
def _compute(
    out,
    query_buffers,
    ring,
    board,
    scale_log2,
    HALF: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    ITEM_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A computing warpgroup: its half of all of this program's items."""
    all_queries, all_query_full, all_query_free = query_buffers
    keys, key_full, key_free, values, value_full, value_free = ring
    BLOCK_M: gl.constexpr = all_queries.shape[1]
    HEAD_DIM: gl.constexpr = all_queries.shape[2]
    BLOCK_N: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = all_queries.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    # 16 bytes of a row for each thread.
    out_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    items_done = 0
    tiles_done = 0
    head, q_begin, len_q, num_cached, first_row, num_tiles = _announced(board, 0)
    while num_tiles > 0:
        buffer, query_parity = items_done % 2 * 2 + HALF, (items_done // 2) & 1
        queries, query_full = all_queries.index(buffer), all_query_full.index(buffer)
        if ITEM_HEADS == 2:
            head += HALF
        else:
            first_row += HALF * BLOCK_M
        q_pos = num_cached + first_row + gl.arange(0, BLOCK_M, layout=rows_layout)
        mbarrier.wait(query_full, query_parity)
        scores = _start_scores(queries, keys, key_full, tiles_done, STAGES, scores_layout)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(key_free.index(tiles_done % STAGES))
        # Every query sees key 0: no row of the first tile is masked as a whole.
        scores = _masked(scores, 0, q_pos, scores_layout)
        running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, rows_layout)
        running_sum = gl.zeros([BLOCK_M], gl.float32, rows_layout)
        acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, acc_layout)
        first_p, _correction, running_max, running_sum = _softmax(
            scores, running_max, running_sum, scale_log2
        )
        p = gl.convert_layout(first_p.to(dtype), p_layout)
        # Up to its own position every row sees all keys. The tiles behind are the diagonal's.
        num_unmasked = gl.minimum((num_cached + first_row + 1) // BLOCK_N, num_tiles)
        num_unmasked = gl.maximum(num_unmasked, 1)
        state = (acc, running_max, running_sum, p)
        item = (queries, query_full, query_parity, ring, tiles_done, q_pos, scale_log2)
        state = _walk(state, item, 1, num_unmasked, False, STAGES, scores_layout, p_layout)
        acc, running_max, running_sum, p = _walk(
            state, item, num_unmasked, num_tiles, True, STAGES, scores_layout, p_layout
        )
        mbarrier.arrive(all_query_free.index(buffer))
        items_done += 1
        tiles_done += num_tiles
        acc = _start_sums(p, values, value_full, tiles_done - 1, acc, STAGES)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(value_free.index((tiles_done - 1) % STAGES))
        acc = acc / gl.convert_layout(running_sum, gl.SliceLayout(1, acc_layout))[:, None]
        row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, out_layout))
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, out_layout))
        out_row = ((q_begin + row).to(gl.int64) * NUM_HEADS + head) * HEAD_DIM
        values_of_rows = gl.convert_layout(acc.to(dtype), out_layout)
        mask = (row < len_q)[:, None]
        gl.store(out + out_row[:, None] + dim[None, :], values_of_rows, mask=mask)
        head, q_begin, len_q, num_cached, first_row, num_tiles = _announced(board, items_done)


# Tables and lengths may be slices of one packed buffer: no recompilation for their alignment.
@with_dry_runs
@gluon.jit(
    do_not_specialize=["num_seqs", "most_items", "stride_table"],
    do_not_specialize_on_alignment=[
        *("block_tables", "cu_seqlens_q", "cu_seqlens_k", "bounds", "counter")
    ],
)
def _hopper_prefill_kernel(
    out,  # [T, NUM_HEADS, HEAD_DIM]
    query_tiles,  # [T, NUM_HEADS * HEAD_DIM], tensor descriptor of [BLOCK_M, HEAD_DIM]
    key_tiles,  # the caches as [num_slots, Hkv * HEAD_DIM], of [BLOCK_N, HEAD_DIM]
    value_tiles,
    block_tables,  # [num_seqs, W] int32
    cu_seqlens_q,  # [num_seqs + 1] int32
    cu_seqlens_k,
    bounds,  # [3] int32 or None: see `PrefillMetadata`
    counter,  # [1] int32, 0: items taken after each program's first; None: they go round
    num_seqs,
    most_items,
    scale_log2,  # of `score_scales`
    stride_table,
    NUM_HEADS: gl.constexpr,
    ITEM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = key_tiles.dtype
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [4, BLOCK_M, HEAD_DIM], query_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], value_tiles.layout)
    query_full = gl.allocate_shared_memory(gl.int64, [4, 1], barriers)
    query_free = gl.allocate_shared_memory(gl.int64, [4, 1], barriers)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    scalars: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    item_places = gl.allocate_shared_memory(gl.int32, [2 * 6, 1], scalars)
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    item_free = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    for buffer in gl.static_range(4):
        mbarrier.init(query_full.index(buffer), count=1)
        mbarrier.init(query_free.index(buffer), count=1)
    for buffer in gl.static_range(2):
        mbarrier.init(item_full.index(buffer), count=1)
        mbarrier.init(item_free.index(buffer), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=2)  # both warpgroups read each tile
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=2)
    if bounds is not None:
        num_seqs = gl.load(bounds)
        most_items = gl.cdiv(gl.load(bounds + 1), 2 * BLOCK_M // ITEM_HEADS)
    ring = (keys, key_full, key_free, values, value_full, value_free)
    board = (item_places, item_full, item_free)
    work = (cu_seqlens_q, cu_seqlens_k, num_seqs, most_items)
    query_buffers = (queries, query_full, query_free)
    tiles = (query_tiles, key_tiles, value_tiles)
    gl.warp_specialize(
        [
            (
                _compute,
                (out, query_buffers, ring, board, scale_log2, 0, NUM_HEADS, ITEM_HEADS, STAGES),
            ),
            (
                _compute,
                (out, query_buffers, ring, board, scale_log2, 1, NUM_HEADS, ITEM_HEADS, STAGES),
            ),
            (
                _copy,
                (
                    tiles,
                    query_buffers,
                    ring,
                    board,
                    counter,
                    block_tables,
                    stride_table,
                    work,
                    NUM_HEADS,
                    ITEM_HEADS,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    BLOCK_M,
                    BLOCK_N,
                    STAGES,
                ),
            ),
        ],
        [4, 1],  # warps of the second and the third
        [COMPUTING_REGISTERS, COPYING_REGISTERS],
    )


def takes(query: torch.Tensor, cache: KVCache) -> bool:
    """Whether `hopper_prefill` computes queries [T, Hq, D] over this cache."""
    return (
        is_hopper(query.device)
        and query.dtype in DTYPES
        and cache.key_scales is None
        and query.shape[2] in HEAD_DIMS
        and cache.key.shape[1] % BLOCK_N == 0
    )


@cache
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> Any:
    """Of a tile [rows, head_dim] in shared memory, as matrix instructions read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], DTYPES[dtype])


class _Tiles(hopper.TensorDescriptor):  # type: ignore[misc]
    """A descriptor made without checks: they take the host long, and the driver has its own."""

    def __post_init__(self) -> None:
        """Check nothing."""


def _tiles(tensor: torch.Tensor, shape: list[int], stride: int, block: list[int]) -> Any:
    """A descriptor of tiles `block` of a matrix `shape`, whose rows are `stride` elements apart."""
    return _Tiles(tensor, shape, [stride, 1], block, _layout(*block, tensor.dtype))


def hopper_prefill(
    query: torch.Tensor, cache: KVCache, metadata: PrefillMetadata, scale_log2: float
) -> torch.Tensor:
    """query [T, Hq, D] -> [T, Hq, D] as `prefill_attention`, for what `takes` allows."""
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = cache.key.shape[1:3]
    assert query.stride(1) == head_dim and query.stride(2) == 1
    assert cache.key.is_contiguous() and cache.value.is_contiguous()
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    width = num_kv_heads * head_dim
    cache_shape = [cache.key.shape[0] * block_size, width]
    group, num_seqs = num_heads // num_kv_heads, metadata.cu_seqlens_q.shape[0] - 1
    # Pairs spare short sequences half of a tile; long ones are faster without.
    is_short = num_tokens <= BLOCK_M * num_seqs
    item_heads = 2 if is_short and group % 2 == 0 else 1
    most_items = cdiv(metadata.max_seqlen_q, 2 * BLOCK_M // item_heads)
    num_items = num_heads // item_heads * num_seqs * most_items
    num_programs = min(num_multiprocessors(query.device), num_items)
    # Small steps are CUDA graphs, with bounds. To zero a counter takes them more than it saves.
    counter = None
    if metadata.bounds is None:  # without more items than programs nobody looks at the counter
        counter = metadata.cu_seqlens_q
        if num_programs < num_items:
            counter = torch.zeros(1, dtype=torch.int32, device=query.device)
    _hopper_prefill_kernel[(num_programs,)](
        out,
        _tiles(query, [num_tokens, num_heads * head_dim], query.stride(0), [BLOCK_M, head_dim]),
        _tiles(cache.key, cache_shape, width, [BLOCK_N, head_dim]),
        _tiles(cache.value, cache_shape, width, [BLOCK_N, head_dim]),
        metadata.block_tables,
        metadata.cu_seqlens_q,
        metadata.cu_seqlens_k,
        metadata.bounds,
        counter,
        num_seqs,
        most_items,
        scale_log2,
        metadata.block_tables.stride(0),
        NUM_HEADS=num_heads,
        ITEM_HEADS=item_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        STAGES=NUM_STAGES,
        COMPUTING_REGISTERS=COMPUTING_REGISTERS,
        COPYING_REGISTERS=COPYING_REGISTERS,
        num_warps=4,
    )
    return out
