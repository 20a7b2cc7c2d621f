"""Decode attention for Hopper, in Gluon: few query heads meet many tokens.

The tokens of a tile are the rows of the matrix instructions, so that few query heads are not padded
to 16. Tiles of keys and values come into a ring by bulk tensor copies, those that earlier steps
wrote before the wait for the kernel ahead; see fused_decode.py for why they may. Barriers are
those of hopper_prefill.py. Splits, and what becomes of their results, are those of
decode_attention.py.

Keys and values of a plain cache are multiplied from shared memory. Keys of an fp8 cache are
multiplied as they are, too: a query head in bfloat16 is, but for what is 2^-18 of its largest
element, the sum of two e4m3 numbers, which are neighbouring columns of the product. Values become
float16 in the registers that the matrix instruction reads: the even columns of the output are its
first 64 rows, the odd ones the others.
"""

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.triton.decode_items import (
    BEGIN,
    END,
    FIRST_ITEM,
    ITEM_SIZE,
    NUM_SPLITS,
    ROW,
)
from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import (
    is_hopper,
    next_power_of_2,
    overlap_options,
    with_dry_runs,
)
from nanovllm.kernels.types import FP8_DTYPE, FP8_MAX, DecodeMetadata, KVCache

HEAD_DIM = 128
MAX_GROUP = 8  # query heads of a KV head
TILE = 64  # tokens
MOST_ROW_HEADS = 1024  # of a plain cache, with which it is the faster kernel
PROGRAMS_PER_SM = 2  # of a plain cache, for which a plan cuts splits
NUM_STAGES = 3  # tiles in the ring
FEW_STAGES, FEW_ROW_HEADS = 4, 256  # of an fp8 cache, up to so many row-heads
MERGE_ELEMENTS = 1024  # of partial outputs that a program merges at a time
SCALES_LAYOUT = gl.NVMMASharedLayout(0, 32, 2)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

FP8_LARGEST = gl.constexpr(FP8_MAX)
REST = gl.constexpr(16.0)  # what a query's second number is multiplied by
MOVED = gl.constexpr(256.0)  # by which `_as_float16` gives too little
# Triton 3.9 has another name for it than 3.6.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
MOVE_BITS = gl.constexpr(
    """{
    .reg .b32 high, low;
    shl.b32 high, $1, $2;
    shr.u32 low, high, 1;
    and.b32 low, low, 0x3F803F80;
    lop3.b32 $0, high, 0x80008000, low, 0xEA;
    }"""
)


@gluon.jit
def _start_tile(tiles, ring, table, start, tile, kv_head, BLOCK_SIZE: gl.constexpr):
    """The copies of the n-th tile, whose first token is `start`."""
    buffers, full = ring
    stage = tile % full.shape[0]
    # The last tile may reach past the context: what lies there counts for nothing.
    block = gl.load(table + start // BLOCK_SIZE)
    slot = block * BLOCK_SIZE + start % BLOCK_SIZE
    is_full = full.index(stage)
    num_bytes: gl.constexpr = _num_bytes(tiles)
    mbarrier.expect(is_full, num_bytes)
    for i in gl.static_range(2):
        column = kv_head * tiles[i].block_shape[1]
        start_copy(tiles[i], [slot, column], is_full, buffers[i].index(stage))
    for i in gl.static_range(2, len(tiles)):
        place = [block * gl.num_programs(0) + kv_head, start % BLOCK_SIZE]
        start_copy(tiles[i], place, is_full, buffers[i].index(stage))


@gluon.constexpr_function
def _num_bytes(tiles: Any) -> int:
    return sum(tile.block_type.nbytes for tile in tiles)


@gluon.jit
def _store_as_fp8(queries, q, scale_log2):
    """A group's queries q [COLUMNS, HEAD_DIM], each of them twice; what their scores are times."""
    q = q.to(gl.float32)
    # Times a power of 2 that brings the largest to at least 128 and below 256.
    exponent = gl.max(gl.abs(q), axis=1).to(gl.int32, bitcast=True) >> 23
    exponent = gl.maximum(exponent, 8)
    q *= ((261 - exponent) << 23).to(gl.float32, bitcast=True)[:, None]
    upper = q.to(gl.float8e4nv)
    rest = ((q - upper.to(gl.float32)) * REST).to(gl.float8e4nv)
    is_rest = gl.arange(0, queries.shape[0], exponent.type.layout) % 2 == 1
    upper_bits, rest_bits = upper.to(gl.int8, bitcast=True), rest.to(gl.int8, bitcast=True)
    bits = gl.where(is_rest[:, None], rest_bits, upper_bits)
    queries.store(bits.to(gl.float8e4nv, bitcast=True))
    scale = ((exponent - 7) << 23).to(gl.float32, bitcast=True)
    return scale * gl.where(is_rest, scale_log2 / REST, scale_log2)


@gluon.jit
def _as_float16(values, layout: gl.constexpr):
    """A tile's fp8 values [TILE, 64] of int16 -> [128, TILE] in float16, divided by MOVED.

    First the even columns, then the odd ones. The bits go where float16 has them, whose exponents
    are larger by 8; NaN becomes finite.
    """
    HALF: gl.constexpr = values.shape[1]
    TILE: gl.constexpr = values.shape[0]
    halves: gl.constexpr = _halves_layout(HALF, TILE)
    words = values.permute((1, 0)).load(gl.SliceLayout(0, halves))
    # An even column's bits are moved to where an odd one's are.
    half = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, halves)))
    by = gl.where(half == 0, 8, 0)[:, None][:, :, None]
    words, by = gl.broadcast(words[None, :, :], by)
    result = gl.inline_asm_elementwise(
        MOVE_BITS, "=r,r,r,r", [words, by], dtype=gl.float16, is_pure=True, pack=2
    )
    return gl.convert_layout(result.reshape([2 * HALF, TILE]), layout)


@gluon.constexpr_function
def _halves_layout(half: int, tile: int) -> Any:
    """Of [2, half, tile]: as a matrix instruction's first operand [2 * half, tile] is."""
    registers = [[0, 0, 1], [0, 8, 0], *([0, 0, 2**i] for i in range(3, tile.bit_length() - 1))]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        [*registers, [1, 0, 0]], lanes, [[0, 16, 0], [0, 32, 0]], [], [2, half, tile]
    )


@gluon.jit
def _clear_outside(values, in_context):
    """Zeros for the values of tokens that are not in the context: p = 0 does not do for NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    is_value = gl.convert_layout(in_context, gl.SliceLayout(1, layout))[:, None]
    values.store(gl.where(is_value, values.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _merge(
    out,
    partial,
    partial_lse,
    row,
    kv_head,
    first_item,
    num_splits,
    num_prefix_splits,
    batch_size,
    GROUP: gl.constexpr,
    PADDED_GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PARTS: gl.constexpr,
):
    """`decode_attention.merge_splits`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 1, 32], [1, 1, 4], [2, 1, 0])
    parts_layout: gl.constexpr = gl.SliceLayout(2, layout)
    group_layout: gl.constexpr = gl.SliceLayout(0, layout)
    heads_layout: gl.constexpr = gl.SliceLayout(1, group_layout)
    num_heads = gl.num_programs(0) * GROUP
    num_parts = num_splits + num_prefix_splits
    head = kv_head * GROUP + gl.arange(0, PADDED_GROUP, gl.SliceLayout(0, parts_layout))
    in_group = head < kv_head * GROUP + GROUP
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, group_layout))
    running_max = gl.full([PADDED_GROUP], -1e30, gl.float32, heads_layout)
    running_sum = gl.zeros([PADDED_GROUP], gl.float32, heads_layout)
    acc = gl.zeros([PADDED_GROUP, HEAD_DIM], gl.float32, group_layout)
    for begin in range(0, num_parts, PARTS):
        part = begin + gl.arange(0, PARTS, gl.SliceLayout(1, parts_layout))
        prefix_item = gl.num_programs(1) + (part - num_splits) * batch_size + row
        item = gl.where(part < num_splits, first_item + part, prefix_item).to(gl.int64)
        index = item[:, None] * num_heads + head[None, :]
        exists = (part < num_parts)[:, None] & in_group[None, :]
        lse = gl.load(partial_lse + index, mask=exists, other=float("-inf"), cache_modifier=".cg")
        values = gl.load(
            partial + (index * HEAD_DIM)[:, :, None] + dim[None, :][None, :, :],
            mask=exists[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        largest = gl.convert_layout(gl.max(lse, axis=0), heads_layout)
        new_max = gl.maximum(running_max, largest)
        correction = gl.exp2(running_max - new_max)
        in_parts = gl.convert_layout(new_max, gl.SliceLayout(0, parts_layout))
        weight = gl.exp2(lse - in_parts[None, :])
        added = gl.convert_layout(gl.sum(weight, axis=0), heads_layout)
        running_sum = running_sum * correction + added
        acc = acc * correction[:, None] + gl.sum(values * weight[:, :, None], axis=0)
        running_max = new_max
    result = acc / gl.where(running_sum == 0, 1.0, running_sum)[:, None]
    head = kv_head * GROUP + gl.arange(0, PADDED_GROUP, heads_layout)
    pointers = out + (row * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    mask = (head < kv_head * GROUP + GROUP)[:, None] & (dim >= 0)[None, :]
    gl.store(pointers, result.to(out.dtype.element_ty), mask=mask)


# Tables may be slices of one packed buffer: no recompilation for their alignment.
@with_dry_runs
@gluon.jit(
    do_not_specialize=["batch_size", "num_prefix_splits", "stride_table"],
    do_not_specialize_on_alignment=["block_tables"],
)
def _hopper_decode_kernel(
    out,  # as in `decode_attention._decode_kernel`, and so are the others of its names
    partial,
    partial_lse,
    arrivals,
    items,
    query,
    key_tiles,  # the keys as [num_slots, Hkv * HEAD_DIM], tensor descriptor of [TILE, HEAD_DIM]
    value_tiles,  # the same, but if they are fp8 int16 and half as many columns
    key_scale_tiles,  # of an fp8 cache [num_blocks * Hkv, BLOCK_SIZE], of [1, TILE], else None
    value_scale_tiles,
    block_tables,
    scale_log2,
    batch_size,
    num_prefix_splits,
    stride_query,
    stride_head,
    stride_table,
    GROUP: gl.constexpr,
    COLUMNS: gl.constexpr,  # of a product with keys: 8 or 16
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    MERGE_GROUP: gl.constexpr,
    MERGE_PARTS: gl.constexpr,
    EARLY: gl.constexpr,  # whether a row's newest token is the only one that this step writes
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    TILE: gl.constexpr = key_tiles.block_shape[0]
    HEAD_DIM: gl.constexpr = key_tiles.block_shape[1]
    VALUES: gl.constexpr = value_tiles.block_shape[1]
    IS_FP8: gl.constexpr = key_scale_tiles is not None
    OF_HEAD: gl.constexpr = 2 if IS_FP8 else 1  # columns
    key_type: gl.constexpr = key_tiles.dtype
    p_type: gl.constexpr = gl.float16 if IS_FP8 else key_type
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, COLUMNS, 16 * OF_HEAD]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    columns_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, HEAD_DIM], key_type)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, TILE], p_type)
    keys = gl.allocate_shared_memory(key_type, [STAGES, TILE, HEAD_DIM], key_tiles.layout)
    values = gl.allocate_shared_memory(
        value_tiles.dtype, [STAGES, TILE, VALUES], value_tiles.layout
    )
    queries = gl.allocate_shared_memory(key_type, [COLUMNS, HEAD_DIM], query_layout)
    p_buffer = gl.allocate_shared_memory(p_type, [COLUMNS, TILE], p_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    buffers = (keys, values)
    tiles = (key_tiles, value_tiles)
    if IS_FP8:
        scales: gl.constexpr = [STAGES, 1, TILE]
        key_scales = gl.allocate_shared_memory(gl.float32, scales, key_scale_tiles.layout)
        value_scales = gl.allocate_shared_memory(gl.float32, scales, value_scale_tiles.layout)
        buffers += (key_scales, value_scales)  # type: ignore[assignment]
        tiles += (key_scale_tiles, value_scale_tiles)  # type: ignore[assignment]
    ring = (buffers, full)
    kv_head = gl.program_id(0)
    num_kv_heads = gl.num_programs(0)
    item_index = gl.program_id(1)
    # The plan and the tables are complete since the plan's kernel.
    item = items + item_index * ITEM_SIZE
    row = gl.load(item + ROW, cache_modifier=".cg").to(gl.int64)
    begin = gl.load(item + BEGIN, cache_modifier=".cg")
    end = gl.load(item + END, cache_modifier=".cg")
    first_item = gl.load(item + FIRST_ITEM, cache_modifier=".cg")
    num_splits = gl.load(item + NUM_SPLITS, cache_modifier=".cg")
    if num_splits > 0:
        table = block_tables + row * stride_table
        num_tiles = gl.cdiv(gl.maximum(end - begin, 0), TILE)
        # A row's last tile has the newest token.
        num_early = gl.maximum(gl.minimum(num_tiles - 1, STAGES), 0) if EARLY else 0
        for tile in range(num_early):
            _start_tile(tiles, ring, table, begin + tile * TILE, tile, kv_head, BLOCK_SIZE)
        if OVERLAP:
            gdc_wait()
        for tile in range(num_early, gl.minimum(num_tiles, STAGES)):
            _start_tile(tiles, ring, table, begin + tile * TILE, tile, kv_head, BLOCK_SIZE)

        column = gl.arange(0, COLUMNS, gl.SliceLayout(1, rows_layout))
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, rows_layout))
        head = kv_head * GROUP + column // OF_HEAD
        q_pointers = query + row * stride_query + head[:, None] * stride_head + dim[None, :]
        q = gl.load(q_pointers, mask=(column < OF_HEAD * GROUP)[:, None], other=0.0)
        token = gl.arange(0, TILE, gl.SliceLayout(1, scores_layout))
        if IS_FP8:
            column_scale = _store_as_fp8(queries, q, scale_log2)
            column_scale = gl.convert_layout(column_scale, columns_layout)
        else:
            queries.store(q)
        fence_async_shared()
        running_max = gl.full([COLUMNS], float("-inf"), gl.float32, columns_layout)
        zeros = gl.zeros([TILE, COLUMNS], gl.float32, scores_layout)
        sums = zeros  # of p, of each token of a tile
        acc = gl.zeros([HEAD_DIM, COLUMNS], gl.float32, acc_layout)
        for tile in range(num_tiles):
            stage = tile % STAGES
            start = begin + tile * TILE
            in_context = token < end - start
            mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
            scores = warpgroup_mma(
                keys.index(stage), queries.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            if IS_FP8:
                key_scale = key_scales.index(stage).reshape([TILE]).load(token.type.layout)
                value_scale = value_scales.index(stage).reshape([TILE]).load(token.type.layout)
                v = _as_float16(values.index(stage), gl.DotOperandLayout(0, acc_layout, 2))
                scores = warpgroup_mma_wait(0, [scores]) * column_scale[None, :]
                # The scores of a head are the sum of two columns, for both of them.
                upper, rest = gl.split(scores.reshape([TILE, COLUMNS // 2, 2]))
                scores = gl.join(upper + rest, upper + rest).reshape([TILE, COLUMNS])
                scores = gl.convert_layout(scores, scores_layout) * key_scale[:, None]
            else:
                v = values.index(stage)
                if start + TILE > end:
                    _clear_outside(v, in_context)
                scores = warpgroup_mma_wait(0, [scores]) * scale_log2
            scores = gl.where(in_context[:, None], scores, float("-inf"))
            new_max = gl.maximum(running_max, gl.max(scores, axis=0))
            if IS_FP8:
                barrier()  # all have read the stage
                if tile + STAGES < num_tiles:
                    later = tile + STAGES
                    _start_tile(
                        tiles, ring, table, begin + later * TILE, later, kv_head, BLOCK_SIZE
                    )
            correction = gl.exp2(running_max - new_max)
            running_max = new_max
            p = gl.exp2(scores - new_max[None, :])
            sums = sums * correction[None, :] + p
            if IS_FP8:
                # FP8_MAX, divided out at the end, keeps p clear of the subnormals.
                p *= (gl.where(in_context, value_scale, 0.0) * FP8_LARGEST)[:, None]
            p_buffer.store(p.to(p_type).permute((1, 0)))
            fence_async_shared()
            acc = acc * gl.convert_layout(correction, gl.SliceLayout(0, acc_layout))[None, :]
            p_columns = p_buffer.permute((1, 0))
            if IS_FP8:
                acc = warpgroup_mma(v, p_columns, acc, is_async=True)
                acc, v = warpgroup_mma_wait(0, [acc, v])  # v's registers are read until then
            else:
                acc = warpgroup_mma(v.permute((1, 0)), p_columns, acc, is_async=True)
                acc = warpgroup_mma_wait(0, [acc])
                barrier()
                if tile + STAGES < num_tiles:
                    later = tile + STAGES
                    _start_tile(
                        tiles, ring, table, begin + later * TILE, later, kv_head, BLOCK_SIZE
                    )

        denominator = gl.sum(sums, axis=0)
        share = (MOVED / FP8_LARGEST if IS_FP8 else 1.0) / gl.where(
            denominator == 0, 1.0, denominator
        )
        acc = acc * gl.convert_layout(share, gl.SliceLayout(0, acc_layout))[None, :]
        num_heads = num_kv_heads * GROUP
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, acc_layout))
        acc_row = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, acc_layout))
        # Of an fp8 cache the even columns of the output come first.
        acc_dim = acc_row % (HEAD_DIM // OF_HEAD) * OF_HEAD + acc_row // (HEAD_DIM // OF_HEAD)
        offsets = (column // OF_HEAD)[None, :] * HEAD_DIM + acc_dim[:, None]
        is_own = (column % OF_HEAD == 0) & (column < OF_HEAD * GROUP)
        mask = is_own[None, :] & (acc_row >= 0)[:, None]
        if num_splits + num_prefix_splits == 1:
            to = out + (row * num_heads + kv_head * GROUP) * HEAD_DIM
            gl.store(to + offsets, acc.to(out.dtype.element_ty), mask=mask)
        else:
            part = item_index.to(gl.int64) * num_heads + kv_head * GROUP
            gl.store(partial + part * HEAD_DIM + offsets, acc, mask=mask)
            of_sum = gl.arange(0, COLUMNS, columns_layout)
            is_sum = (of_sum % OF_HEAD == 0) & (of_sum < OF_HEAD * GROUP)
            lse = running_max + gl.log2(denominator)
            gl.store(partial_lse + part + of_sum // OF_HEAD, lse, mask=is_sum)
            # As in `_decode_kernel`.
            barrier()
            arrived = gl.atomic_add(
                arrivals + row * num_kv_heads + kv_head, 1, sem="acq_rel", scope="gpu"
            )
            if (arrived + 1) % num_splits == 0:
                _merge(
                    out, partial, partial_lse, row, kv_head, first_item, num_splits,
                    num_prefix_splits, batch_size, GROUP, MERGE_GROUP, HEAD_DIM, MERGE_PARTS,
                )  # fmt: skip
    elif OVERLAP:
        gdc_wait()


def suits(cache: KVCache, num_rows: int) -> bool:
    """Whether it is for a step of so many rows over this cache."""
    block_size, num_kv_heads, head_dim = cache.key.shape[1:]
    is_in_range = num_rows * num_kv_heads <= MOST_ROW_HEADS
    return (
        is_hopper(cache.key.device)
        and (cache.key.dtype == FP8_DTYPE or (cache.key.dtype in DTYPES and is_in_range))
        and head_dim == HEAD_DIM
        and block_size % TILE == 0
    )


def takes(query: torch.Tensor, cache: KVCache, tile: int) -> bool:
    """Whether `hopper_decode` computes queries [B, Hq, D] over this cache in such tiles."""
    dtype = torch.bfloat16 if cache.key_scales is not None else cache.key.dtype
    return (
        suits(cache, len(query))
        and query.dtype == dtype
        and query.shape[1] <= MAX_GROUP * cache.key.shape[2]
        and tile % TILE == 0
    )


@cache
def _layout(tile: int, width: int, dtype: Any) -> Any:
    """Of a tile in shared memory, as matrix instructions read it."""
    return gl.NVMMASharedLayout.get_default_for([tile, width], dtype)


def _tiles(cache: torch.Tensor, tile: int, dtype: Any) -> TensorDescriptor:
    """A descriptor of tiles of one KV head of a cache [num_blocks, BLOCK_SIZE, Hkv, width]."""
    num_blocks, block_size, num_kv_heads, width = cache.shape
    row = num_kv_heads * width
    shape, layout = [num_blocks * block_size, row], _layout(tile, width, dtype)
    return TensorDescriptor(cache.view(shape), shape, [row, 1], [tile, width], layout)


def _scale_tiles(scales: torch.Tensor | None, tile: int) -> TensorDescriptor:
    """A descriptor of the scales [num_blocks, Hkv, BLOCK_SIZE] of a tile's tokens."""
    assert scales is not None
    shape = [scales.shape[0] * scales.shape[1], scales.shape[2]]
    return TensorDescriptor(scales.view(shape), shape, [shape[1], 1], [1, tile], SCALES_LAYOUT)


def hopper_decode(
    out: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    arrivals: torch.Tensor,
    items: torch.Tensor,
    tile: int,
    query: torch.Tensor,
    cache: KVCache,
    metadata: DecodeMetadata,
    scale_log2: float,
    num_prefix_splits: int,
) -> None:
    """What `decode_attention` launches for what `takes` allows, instead of its own kernel."""
    batch_size, num_heads, head_dim = query.shape
    block_size, num_kv_heads = cache.key.shape[1:3]
    assert cache.key.is_contiguous() and cache.value.is_contiguous()
    is_fp8 = cache.key_scales is not None
    if is_fp8:
        pairs = cache.value.view(torch.int16)
        tiles = _tiles(cache.key, tile, gl.float8e4nv), _tiles(pairs, tile, gl.int16)
        scale_tiles = _scale_tiles(cache.key_scales, tile), _scale_tiles(cache.value_scales, tile)
    else:
        dtype = DTYPES[cache.key.dtype]
        tiles = _tiles(cache.key, tile, dtype), _tiles(cache.value, tile, dtype)
        scale_tiles = None, None
    group = num_heads // num_kv_heads
    merge_group = next_power_of_2(group)
    _hopper_decode_kernel[(num_kv_heads, len(items))](
        out,
        partial,
        partial_lse,
        arrivals,
        items,
        query,
        *tiles,
        *scale_tiles,
        metadata.block_tables,
        scale_log2,
        batch_size,
        num_prefix_splits,
        query.stride(0),
        query.stride(1),
        metadata.block_tables.stride(0),
        GROUP=group,
        COLUMNS=8 if group <= (4 if is_fp8 else 8) else 16,
        BLOCK_SIZE=block_size,
        STAGES=FEW_STAGES if is_fp8 and batch_size * num_kv_heads <= FEW_ROW_HEADS else NUM_STAGES,
        MERGE_GROUP=merge_group,
        MERGE_PARTS=max(1, MERGE_ELEMENTS // (merge_group * head_dim)),
        EARLY=metadata.logits_indices is None,
        num_warps=4,
        **overlap_options(query.device),
    )
