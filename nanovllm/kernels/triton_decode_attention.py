"""Paged attention of one query per row (flash-decoding) in Triton, bound by KV bandwidth.

A program reads one KV head's keys and values for one split of one row's context, for the whole
group of query heads at once. The grid depends on the batch size and table width only, so it can be
captured in a CUDA graph: the splits' ranges come from the context lengths inside the kernel.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton_launch import await_previous, overlap_options

TILE = 64  # tokens per iteration; lies within one page
SMALL_BATCH_TILE = 32
SMALL_BATCH = 256  # row-heads (rows times KV heads) up to which the smaller tile wins
NUM_WARPS = 2
NUM_STAGES = 6  # of which Triton gives the block table's load some: two tiles are in flight
MIN_SPLIT_TOKENS = 64  # for 8 row-heads, see `choose_min_split`
MAX_MIN_SPLIT_TOKENS = 512
PROGRAMS_PER_SM = 16  # the grid aims at this many programs per multiprocessor: a few waves
MAX_SPLITS = 64
STAGE_BYTES = 32768  # a deeper pipeline only while a stage's keys and values stay within this


@triton.jit
def _split_size(length, num_splits, min_split, TILE: tl.constexpr):
    """Tokens per split, at least `min_split`: whole tiles, only the last live one is shorter."""
    tokens = tl.cdiv(tl.cdiv(length, num_splits), TILE) * TILE
    return tl.maximum(tokens, min_split)


# Tables and lengths may be slices of one packed buffer: no recompilation for their alignment.
@triton.jit(
    do_not_specialize=["num_splits", "min_split", "stride_table"],
    do_not_specialize_on_alignment=["block_tables", "context_lens"],
)
def _decode_kernel(
    out,  # [B, Hq, D], or with SPLIT float32 [B, Hq, num_splits, D]
    out_lse,  # with SPLIT float32 [B, Hq, num_splits]: log2 of the softmax's denominator
    query,  # [B, Hq, D]
    key_cache,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    value_cache,
    block_tables,  # [B, W] int32
    context_lens,  # [B] int32
    scale_log2,  # softmax scale * log2(e): the exponentials are powers of two
    num_splits,
    min_split,
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
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(context_lens + row)
    begin = 0
    end = length
    if SPLIT:
        size = _split_size(length, num_splits, min_split, TILE)
        begin = split * size
        end = tl.minimum(begin + size, length)
        if begin >= length:
            return

    # The group of query heads that share this KV head, padded to the 16 rows tl.dot needs.
    member = tl.arange(0, PADDED_GROUP)
    dim = tl.arange(0, PADDED_DIM)
    token = tl.arange(0, TILE)
    in_dim = dim < HEAD_DIM
    head = kv_head * GROUP + member
    q_mask = (member < GROUP)[:, None] & in_dim[None, :]
    q_offsets = head[:, None] * stride_head + dim[None, :]
    q = tl.load(query + row * stride_query + q_offsets, mask=q_mask, other=0.0)

    table = block_tables + row * stride_table
    tile_offsets = token[:, None] * stride_slot + dim[None, :] + kv_head * stride_kv_head
    running_max = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    running_sum = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for start in tl.range(begin, end, TILE):
        # begin and TILE keep a tile within one page: one block id, one int64 base address.
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        base = block * stride_block + (start % BLOCK_SIZE) * stride_slot
        in_context = token < end - start
        kv_mask = in_context[:, None] & in_dim[None, :]
        k = tl.load(key_cache + base + tile_offsets, mask=kv_mask, other=0.0)
        v = tl.load(value_cache + base + tile_offsets, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [group, TILE]
        scores = tl.where(in_context[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))  # finite: a tile has a token
        correction = tl.exp2(running_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(p, axis=1)
        acc = acc * correction[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        running_max = new_max

    # A row of length 0 gives zeros.
    acc = acc / tl.where(running_sum == 0, 1.0, running_sum)[:, None]
    out_row = row * tl.num_programs(0) * GROUP + head  # [group]: index over (B, Hq)
    if SPLIT:
        out_row = out_row * num_splits + split
        lse = running_max + tl.log2(running_sum)
        tl.store(out_lse + out_row, lse, mask=member < GROUP)
    out_pointers = out + out_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=q_mask)


@triton.jit(
    do_not_specialize=["num_splits", "min_split"],
    do_not_specialize_on_alignment=["context_lens"],
)
def _combine_kernel(
    out,  # [B, Hq, D]
    partial,  # float32 [B, Hq, num_splits, D]
    partial_lse,  # float32 [B, Hq, num_splits]
    context_lens,  # [B] int32
    num_splits,
    min_split,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Averages the splits' outputs, weighted by the shares of the softmax's denominator."""
    await_previous(OVERLAP)
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(context_lens + row)
    out_row = row * tl.num_programs(0) + head
    split = tl.arange(0, PADDED_SPLITS)
    dim = tl.arange(0, PADDED_DIM)
    in_dim = dim < HEAD_DIM
    # Splits that begin past the context wrote nothing and are not read.
    live = split < tl.cdiv(length, _split_size(length, num_splits, min_split, TILE))
    index = out_row * num_splits + split
    lse = tl.load(partial_lse + index, mask=live, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    weight = tl.where(live, tl.exp2(lse - largest), 0.0)
    total = tl.sum(weight, axis=0)
    weight = weight / tl.where(total == 0, 1.0, total)
    pointers = partial + index[:, None] * HEAD_DIM + dim[None, :]
    values = tl.load(pointers, mask=live[:, None] & in_dim[None, :], other=0.0)
    result = tl.sum(values * weight[:, None], axis=0)
    tl.store(out + out_row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=in_dim)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_min_split(batch_size: int, num_kv_heads: int) -> int:
    """Tokens of the shortest split worth its combination: the more rows, the longer."""
    wanted = MIN_SPLIT_TOKENS * triton.cdiv(batch_size * num_kv_heads, 8)
    return min(wanted, MAX_MIN_SPLIT_TOKENS)


def choose_num_splits(batch_size: int, num_kv_heads: int, capacity: int, num_sms: int) -> int:
    """Splits per row for a table of `capacity` tokens a row: enough programs for a few waves."""
    wanted = PROGRAMS_PER_SM * num_sms // (batch_size * num_kv_heads)
    most = triton.cdiv(capacity, choose_min_split(batch_size, num_kv_heads))
    return max(1, min(wanted, most, MAX_SPLITS))


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    num_splits: int | None = None,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor:
    """query [B, Hq, D] -> [B, Hq, D]; see `Ops.decode_attention`. Flash-decoding (Dao et al. 2023).

    The keyword arguments override the tuned choices.
    """
    batch_size, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    out = torch.empty((batch_size, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if batch_size == 0:
        return out
    if tile is None:
        tile = SMALL_BATCH_TILE if batch_size * num_kv_heads <= SMALL_BATCH else TILE
    tile = min(tile, block_size)
    min_split = max(choose_min_split(batch_size, num_kv_heads), tile)
    assert tile >= 16 and block_size % tile == 0 and min_split % tile == 0
    assert query.stride(2) == 1 and key_cache.stride(3) == 1
    assert key_cache.stride() == value_cache.stride()
    if num_splits is None:
        capacity = block_tables.shape[1] * block_size
        num_sms = _multiprocessors(query.device)
        num_splits = choose_num_splits(batch_size, num_kv_heads, capacity, num_sms)
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    if num_stages is None:
        stage_bytes = 2 * tile * padded_dim * key_cache.element_size()
        num_stages = max(2, min(NUM_STAGES, NUM_STAGES * STAGE_BYTES // stage_bytes))
    split = num_splits > 1
    partial, partial_lse = out, out
    if split:
        shape = (batch_size, num_heads, num_splits)
        partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        partial_lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    group = num_heads // num_kv_heads
    _decode_kernel[(num_kv_heads, batch_size, num_splits)](
        partial,
        partial_lse,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        scale * 1.4426950408889634,
        num_splits,
        min_split,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        GROUP=group,
        PADDED_GROUP=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_SIZE=block_size,
        TILE=tile,
        SPLIT=split,
        num_warps=num_warps or NUM_WARPS,
        num_stages=num_stages,
        **overlap_options(query.device),
    )
    if split:
        _combine_kernel[(num_heads, batch_size)](
            out,
            partial,
            partial_lse,
            context_lens,
            num_splits,
            min_split,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            PADDED_SPLITS=triton.next_power_of_2(num_splits),
            TILE=tile,
            num_warps=4,
            **overlap_options(query.device),
        )
    return out
