"""Sums over the GPUs of one host in one Triton kernel, which also adds the residual and normalises.

Every rank writes its rows into the memory of all ranks and waits for theirs in its own. All ranks
must make the same calls in the same order, with equally many rows. A CUDA graph may hold any of
them: what changes from call to call is kept on the device.
"""

# There is no barrier and no flag, the values that come are the signal.
#
# A channel carries one row of each call. It has NUM_SLOTS slots, which its calls take in turn; a
# slot has an entry for each rank's row, and one for the sum. A free slot is filled with EMPTY, a
# number that is never sent, so a row has come when none of its elements is EMPTY. In a channel's
# call k a rank
#
#   1. writes its row into its entry of slot k % 3 of every rank,
#   2. polls its own slot k % 3 until all rows have come, and sums them in an order that is the same
#      on all ranks,
#   3. empties its own slot (k - 1) % 3, which it read in its call before.
#
# The others fill that slot again in call k + 2, and it is empty by then: a rank that sends in call
# k + 2 has received the rows of call k + 1, which the others sent after the end of their kernel k.
# Channels do not depend on each other, so each call may have another number of rows.
#
# Programs wait for the programs of the same row on the other GPUs, so they must not keep these from
# running. They send before they wait, and every GPU starts them in the order of their rows: the
# first row that is not done is under way everywhere.

import triton.language as tl

from nanovllm.kernels.triton.launch import await_previous, jit, release_next
from nanovllm.kernels.triton.linear import load_summed

NUM_SLOTS = tl.constexpr(3)
POLLS_PER_LOOK_AT_ABORT = tl.constexpr(1024)
MAX_TOKEN_ID = tl.constexpr(0x7FFFFFFF)


@jit
def _load_peers(addresses, NUM_RANKS: tl.constexpr, PADDED_RANKS: tl.constexpr):
    """The ranks and their addresses, [PADDED_RANKS, 1]. No kernel writes addresses."""
    rank = tl.arange(0, PADDED_RANKS)[:, None]
    return rank, tl.load(addresses + rank, mask=rank < NUM_RANKS, other=0)


@jit
def _send(bits, peers, offset, mask):
    """Write the integers `bits` [N] at elements `offset` [N] of the peers' memory, off `mask` not.

    mask [PADDED_RANKS, N] chooses the ranks, too.
    """
    memory = tl.multiple_of(peers.to(tl.pointer_type(bits.dtype)), (16, 16))
    pointers = memory + offset[None, :]
    tl.store(pointers, tl.broadcast_to(bits[None, :], pointers.shape), mask=mask)


@jit
def _receive(pointers, mask, abort):
    """The integers at `pointers` once none of them is EMPTY, or the host aborts; 0 off `mask`."""
    EMPTY: tl.constexpr = -(2 ** (pointers.dtype.element_ty.primitive_bitwidth - 1))
    bits = tl.load(pointers, mask=mask, other=0, volatile=True)
    missing = tl.max((bits == EMPTY).to(tl.int32))
    num_polls = 0
    while missing != 0:
        bits = tl.load(pointers, mask=mask, other=0, volatile=True)
        missing = tl.max((bits == EMPTY).to(tl.int32))
        num_polls += 1
        is_time = num_polls % POLLS_PER_LOOK_AT_ABORT == 0
        is_aborted = tl.load(abort, mask=is_time, other=0, volatile=True) != 0
        missing = tl.where(is_aborted, 0, missing)
    return bits


@jit
def _next_slot(next_slots, channel):
    """The channel's slot of this call, and that of the call before, to be emptied in this one."""
    # Past the multiprocessor's own cache, which may remember an older number.
    slot = tl.load(next_slots + channel, cache_modifier=".cg")
    return slot, (slot + NUM_SLOTS - 1) % NUM_SLOTS


@jit
def _to_bits(x, bits_type: tl.constexpr):
    """x's bits as integers, none of them EMPTY: that is -0.0, which is sent as 0.0."""
    EMPTY: tl.constexpr = -(2 ** (bits_type.primitive_bitwidth - 1))
    bits = x.to(bits_type, bitcast=True)
    return tl.where(bits == EMPTY, 0, bits)


@jit
def _sum_over_ranks(
    own,  # [PADDED_WIDTH], this rank's row
    column,
    in_row,
    channel,
    rank,
    peers,
    memory,  # [channels, NUM_SLOTS, NUM_ENTRIES, WIDTH] integers: this rank's
    next_slots,  # [channels] int32
    abort,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    TWO_SHOT: tl.constexpr,
):
    """The sum of all ranks' `own`, rounded once to their type; equal to the bit on every rank."""
    dtype: tl.constexpr = own.dtype
    bits_type: tl.constexpr = memory.dtype.element_ty
    EMPTY: tl.constexpr = -(2 ** (bits_type.primitive_bitwidth - 1))
    slot, previous = _next_slot(next_slots, channel)
    first = (channel * NUM_SLOTS + slot).to(tl.int64) * (NUM_ENTRIES * WIDTH)
    bits = _to_bits(own, bits_type)
    rows = memory + first + rank * WIDTH + column[None, :]  # [PADDED_RANKS, PADDED_WIDTH]
    mask = (rank < NUM_RANKS) & in_row[None, :]
    if TWO_SHOT:
        # The owner of the row sums it and sends the sum to all.
        owner = channel % NUM_RANKS
        _send(bits, peers, first + RANK * WIDTH + column, mask & (rank == owner))
        if owner == RANK:
            y = tl.sum(_receive(rows, mask, abort).to(dtype, bitcast=True).to(tl.float32), axis=0)
            _send(_to_bits(y.to(dtype), bits_type), peers, first + NUM_RANKS * WIDTH + column, mask)
        total_bits = _receive(memory + first + NUM_RANKS * WIDTH + column, in_row, abort)
        total = total_bits.to(dtype, bitcast=True)
    else:
        _send(bits, peers, first + RANK * WIDTH + column, mask)
        y = tl.sum(_receive(rows, mask, abort).to(dtype, bitcast=True).to(tl.float32), axis=0)
        total = y.to(dtype)
    first = (channel * NUM_SLOTS + previous).to(tl.int64) * (NUM_ENTRIES * WIDTH)
    empty = tl.full(column.shape, EMPTY, bits_type)
    for entry in tl.static_range(NUM_ENTRIES):
        tl.store(memory + first + entry * WIDTH + column, empty, mask=in_row)
    tl.store(next_slots + channel, (slot + 1) % NUM_SLOTS)
    return total


@jit
def all_reduce_kernel(
    out,  # [T, WIDTH]
    x,  # [T, WIDTH], in NUM_PARTS parts
    residual,  # [T, WIDTH] or None
    weight,  # [WIDTH] or None
    memory,
    addresses,
    next_slots,
    abort,
    stride_x,
    stride_part,
    stride_residual,
    eps,
    NUM_PARTS: tl.constexpr,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    ADD_AND_NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    channel = tl.program_id(0)
    row = channel.to(tl.int64)
    column = tl.arange(0, PADDED_WIDTH)
    in_row = column < WIDTH
    dtype: tl.constexpr = out.dtype.element_ty
    rank, peers = _load_peers(addresses, NUM_RANKS, PADDED_RANKS)
    if ADD_AND_NORM:
        w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    await_previous(OVERLAP)
    own = load_summed(x + row * stride_x + column, in_row, stride_part, NUM_PARTS, dtype)
    if ADD_AND_NORM:
        residual_pointers = residual + row * stride_residual + column
        residual_row = tl.load(residual_pointers, mask=in_row, other=0.0)
    y = _sum_over_ranks(
        own,
        column,
        in_row,
        channel,
        rank,
        peers,
        memory,
        next_slots,
        abort,
        RANK,
        NUM_RANKS,
        NUM_ENTRIES,
        WIDTH,
        TWO_SHOT,
    )
    if ADD_AND_NORM:
        # As in kernels/triton/norm.py, to the bit.
        y += residual_row
        tl.store(residual_pointers, y, mask=in_row)
        y = y.to(tl.float32)
        mean_square = tl.sum(y * y, axis=0) / WIDTH
        y = y * tl.rsqrt(mean_square + eps)
        if weight.dtype.element_ty == dtype:
            y = y.to(dtype).to(tl.float32)
        y *= w
    tl.store(out + row * WIDTH + column, y.to(dtype), mask=in_row)


@jit(
    do_not_specialize=["first_token_id", "num_held"],
    do_not_specialize_on_alignment=["input_ids"],  # a slice of a packed buffer
)
def embedding_kernel(
    out,  # [T, WIDTH]
    input_ids,  # [T] int32
    weight,  # [num_held, WIDTH], the rows of token ids from first_token_id on
    memory,
    addresses,
    next_slots,
    abort,
    first_token_id,
    num_held,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    channel = tl.program_id(0)
    column = tl.arange(0, PADDED_WIDTH)
    in_row = column < WIDTH
    rank, peers = _load_peers(addresses, NUM_RANKS, PADDED_RANKS)
    await_previous(OVERLAP)
    held_id = tl.load(input_ids + channel) - first_token_id
    own = tl.zeros([PADDED_WIDTH], weight.dtype.element_ty)
    if (held_id >= 0) & (held_id < num_held):
        own = tl.load(weight + held_id.to(tl.int64) * WIDTH + column, mask=in_row, other=0.0)
    total = _sum_over_ranks(
        own,
        column,
        in_row,
        channel,
        rank,
        peers,
        memory,
        next_slots,
        abort,
        RANK,
        NUM_RANKS,
        NUM_ENTRIES,
        WIDTH,
        TWO_SHOT,
    )
    tl.store(out + channel.to(tl.int64) * WIDTH + column, total, mask=in_row)


@jit(do_not_specialize=["num_rows"])
def argmax_kernel(
    out,  # [B] int32
    scores,  # [B] float32
    token_ids,  # [B] int32
    memory,  # [channels, NUM_SLOTS, NUM_RANKS, ROWS] int64
    addresses,
    next_slots,
    abort,
    num_rows,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rank, peers = _load_peers(addresses, NUM_RANKS, PADDED_RANKS)
    await_previous(OVERLAP)
    channel = tl.program_id(0)
    column = tl.arange(0, ROWS)
    row = channel * ROWS + column
    in_batch = row < num_rows
    # The score's bits in an order-preserving form, then the id reversed. Never EMPTY, whose
    # reversed id is 0.
    bits = tl.load(scores + row, mask=in_batch, other=0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    reversed_id = MAX_TOKEN_ID - tl.load(token_ids + row, mask=in_batch, other=0)
    packed = (ordered << 32) | reversed_id.to(tl.int64)

    EMPTY: tl.constexpr = -(2**63)
    slot, previous = _next_slot(next_slots, channel)
    first = (channel * NUM_SLOTS + slot) * (NUM_RANKS * ROWS)
    mask = (rank < NUM_RANKS) & in_batch[None, :]
    _send(packed, peers, first + RANK * ROWS + column, mask)
    packed = _receive(memory + first + rank * ROWS + column[None, :], mask, abort)
    best = tl.max(tl.where(mask, packed, EMPTY), axis=0)
    first = (channel * NUM_SLOTS + previous) * (NUM_RANKS * ROWS)
    empty = tl.full(column.shape, EMPTY, tl.int64)
    for entry in tl.static_range(NUM_RANKS):
        tl.store(memory + first + entry * ROWS + column, empty)
    tl.store(next_slots + channel, (slot + 1) % NUM_SLOTS)
    token_id = MAX_TOKEN_ID - (best & 0xFFFFFFFF).to(tl.int32)
    tl.store(out + row, token_id, mask=in_batch)
