"""Top-k, top-p and min-p in Triton: a search for the smallest logit that survives, without a sort.

A pass over a row counts the values above a few pivots and sums their probabilities: that narrows a
bracket around the threshold. The first pivots come from a sample. What is left in a narrow bracket
is collected, and searched by one program. Passes are bound by arithmetic, 19 instructions a logit.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.launch import await_previous, jit, overlap_options

NUM_PASSES = 4  # launches of a program for each chunk of each row; a row's last one collects
CHUNK = 8192
NUM_WARPS = 4
TILE = 512  # logits that a program compares at a time,
UNROLL = 4  # and how many such loads are in flight
CAPACITY = 2048  # values that are collected at most
SAMPLE = 4096
SAMPLE_BLOCK = 32  # neighbours in the sample
SAMPLE_STEPS = 10  # bisections; the sample's quantiles need not be exact
SAMPLE_WARPS = 8
MAXIMUM_TILE = 16384
FINISH_WARPS = 8

# Low bits in which the float32 images of all values of a dtype agree.
GRAIN_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
NUM_PIVOTS = tl.constexpr(4)  # `_compare` is written out for four
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
INF = tl.constexpr(float("inf"))
# Every other step leaves a fifth of the keys between lo and hi, 2^32 at first, in two searches.
MAX_STEPS = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)

# A row's record: float32 [RECORD_SIZE]. Its threshold is in [lo, hi): of the values >= lo there are
# enough, of those >= hi too few. First top-k's threshold is searched by counts, then, among what it
# leaves, top-p's by mass: the sum of exp((value - maximum) / temperature).
STATUS = tl.constexpr(0)
BY_COUNT = tl.constexpr(1)  # 1: the search for top-k's threshold
TARGET = tl.constexpr(2)  # the count or mass that is enough
LO = tl.constexpr(3)
HI = tl.constexpr(4)
COUNT_LO = tl.constexpr(5)  # of the values >= lo
COUNT_HI = tl.constexpr(6)
MASS_LO = tl.constexpr(7)
MASS_HI = tl.constexpr(8)
MAXIMUM = tl.constexpr(9)
GUESS = tl.constexpr(10)  # where pivots begin, if lo is lower: few values are less
PIVOTS = tl.constexpr(11)
RECORD_SIZE = tl.constexpr(16)

DONE = tl.constexpr(0)  # the threshold is written
MEASURED = tl.constexpr(1)  # the last pass has measured what lies above the pivots
COLLECTED = tl.constexpr(2)  # a pass has collected the values in the bracket

# What a pass writes for each chunk: float32 [PARTIAL_SIZE].
COUNTS = tl.constexpr(0)
MASSES = tl.constexpr(NUM_PIVOTS.value)  # relative to
REFERENCE = tl.constexpr(2 * NUM_PIVOTS.value)
PARTIAL_SIZE = tl.constexpr(2 * NUM_PIVOTS.value + 1)


@jit
def _to_key(value, GRAIN: tl.constexpr):
    """Integers in the order of the floats, neighbours for neighbours of the logits' dtype."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF) >> GRAIN
    return tl.where(bits < 0, -magnitude, magnitude)


@jit
def _from_key(key, GRAIN: tl.constexpr):
    magnitude = (tl.abs(key) << GRAIN).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -magnitude, magnitude)


@jit
def _at(vector, index: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, NUM_PIVOTS) == index, vector, 0))


@jit
def _compare(values, pivots, reference, rate):
    """1 for each of values [N] that is >= each pivot [4], and its mass: two float32 [N, 4].

    The reference is >= all values. NaN counts as -inf.
    """
    values = tl.maximum(values, -INF)
    mass = tl.exp2((values - reference) * rate)
    above0 = (values >= _at(pivots, 0)).to(tl.float32)
    above1 = (values >= _at(pivots, 1)).to(tl.float32)
    above2 = (values >= _at(pivots, 2)).to(tl.float32)
    above3 = (values >= _at(pivots, 3)).to(tl.float32)
    counts = tl.join(tl.join(above0, above2), tl.join(above1, above3))
    masses = tl.join(tl.join(above0 * mass, above2 * mass), tl.join(above1 * mass, above3 * mass))
    shape: tl.constexpr = [values.shape[0], NUM_PIVOTS]
    return tl.reshape(counts, shape), tl.reshape(masses, shape)


@jit
def _measure(logits, begin, end, pivots, reference, rate, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """How many of logits[begin:end] are >= each pivot, and their mass: two float32 [4].

    Sums are made in the same order for every pivot, so a lower pivot never has less mass.
    """
    counts = tl.zeros([TILE, NUM_PIVOTS], tl.float32)
    masses = tl.zeros([TILE, NUM_PIVOTS], tl.float32)
    column = begin + tl.arange(0, TILE)
    for _ in range(begin, end, TILE * UNROLL):
        for _ in tl.static_range(UNROLL):
            values = tl.load(logits + column, mask=column < end, other=-INF).to(tl.float32)
            more_counts, more_masses = _compare(values, pivots, reference, rate)
            counts += more_counts
            masses += more_masses
            column += TILE
    return tl.sum(counts, 0), tl.sum(masses, 0)


@jit
def _collect(slots, logits, begin, end, lo, hi, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Copy those of logits[begin:end] in [lo, hi) to slots, in a fixed order; their number."""
    num_inside = tl.zeros([TILE], tl.int32)
    column = begin + tl.arange(0, TILE)
    for _ in range(begin, end, TILE * UNROLL):
        for _ in tl.static_range(UNROLL):
            values = tl.load(logits + column, mask=column < end, other=-INF).to(tl.float32)
            num_inside += ((values >= lo) & (values < hi)).to(tl.int32)
            column += TILE
    slot = tl.cumsum(num_inside, 0) - num_inside
    column = begin + tl.arange(0, TILE)
    for _ in range(begin, end, TILE * UNROLL):
        for _ in tl.static_range(UNROLL):
            values = tl.load(logits + column, mask=column < end, other=-INF)
            is_inside = (values.to(tl.float32) >= lo) & (values.to(tl.float32) < hi)
            tl.store(slots + slot, values, mask=is_inside)
            slot += is_inside.to(tl.int32)
            column += TILE
    return tl.sum(num_inside, 0)


@jit
def _narrow(bracket, pivots, counts, masses):
    """The bracket, given what lies above the pivots."""
    by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi = bracket
    enough = tl.where(by_count > 0, counts, masses) >= target
    lo = tl.maximum(lo, tl.max(tl.where(enough, pivots, -INF), 0))
    hi = tl.minimum(hi, tl.min(tl.where(enough, INF, pivots), 0))
    count_lo = tl.minimum(count_lo, tl.min(tl.where(enough, counts, INF), 0))
    count_hi = tl.maximum(count_hi, tl.max(tl.where(enough, 0, counts), 0))
    mass_lo = tl.minimum(mass_lo, tl.min(tl.where(enough, masses, INF), 0))
    mass_hi = tl.maximum(mass_hi, tl.max(tl.where(enough, 0, masses), 0))
    return by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi


@jit
def _is_open(bracket, top_p, GRAIN: tl.constexpr):
    """Whether the threshold may be higher than lo."""
    by_count, target, lo, hi, count_lo, count_hi, _, _ = bracket
    has_room = _to_key(hi, GRAIN).to(tl.int64) - _to_key(lo, GRAIN) > 1
    is_needed = tl.where(by_count > 0, count_lo != target, top_p < 1)
    return has_room & (count_lo - count_hi > 1) & is_needed


@jit
def _advance(bracket, top_p, GRAIN: tl.constexpr):
    """Whether the search goes on, and its bracket: if top-k's threshold is found, top-p's."""
    by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi = bracket
    is_found = (by_count > 0) & (_is_open(bracket, top_p, GRAIN) == 0) & (top_p < 1)
    by_count = tl.where(is_found, 0.0, by_count)
    target = tl.where(is_found, top_p * mass_lo, target)
    hi = tl.where(is_found, INF, hi)
    count_hi = tl.where(is_found, 0.0, count_hi)
    mass_hi = tl.where(is_found, 0.0, mass_hi)
    bracket = by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi
    return _is_open(bracket, top_p, GRAIN), bracket


@jit
def _choose_pivots(bracket, guess, maximum, by_key, GRAIN: tl.constexpr):
    """Pivots strictly between lo and hi, evenly by value, or by key.

    By value is better, but could go on for long where values differ by magnitudes.
    """
    _, _, lo, hi, _, _, _, _ = bracket
    index = tl.arange(0, NUM_PIVOTS) + 1
    lo_key = _to_key(lo, GRAIN)
    hi_key = _to_key(hi, GRAIN)
    begin = tl.maximum(lo, guess)
    step = (tl.minimum(hi, maximum) - begin) / (NUM_PIVOTS + 1)
    key_step = hi_key // (NUM_PIVOTS + 1) - lo_key // (NUM_PIVOTS + 1)
    key = tl.where(by_key, lo_key + index * key_step, _to_key(begin + index * step, GRAIN))
    is_narrow = hi_key.to(tl.int64) - lo_key <= NUM_PIVOTS + 1
    key = tl.where(is_narrow, lo_key + index, key)
    return _from_key(tl.minimum(tl.maximum(key, lo_key + 1), hi_key - 1), GRAIN)


@jit
def _load_bracket(record):
    return (
        tl.load(record + BY_COUNT),
        tl.load(record + TARGET),
        tl.load(record + LO),
        tl.load(record + HI),
        tl.load(record + COUNT_LO),
        tl.load(record + COUNT_HI),
        tl.load(record + MASS_LO),
        tl.load(record + MASS_HI),
    )


@jit
def _store_bracket(record, bracket):
    by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi = bracket
    tl.store(record + BY_COUNT, by_count)
    tl.store(record + TARGET, target)
    tl.store(record + LO, lo)
    tl.store(record + HI, hi)
    tl.store(record + COUNT_LO, count_lo)
    tl.store(record + COUNT_HI, count_hi)
    tl.store(record + MASS_LO, mass_lo)
    tl.store(record + MASS_HI, mass_hi)


@jit(do_not_specialize_on_alignment=["temperatures", "top_k", "top_p", "min_p"])
def _start_kernel(
    thresholds,  # [B] float32
    records,  # [B, RECORD_SIZE] float32
    logits,  # [B, V]
    temperatures,
    top_k,
    top_p,
    min_p,
    stride_logits,
    num_valid,
    SAMPLE: tl.constexpr,
    SAMPLE_BLOCK: tl.constexpr,
    SAMPLE_STEPS: tl.constexpr,
    MAXIMUM_TILE: tl.constexpr,
    GRAIN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Apply min-p, and choose the first pivots by a sample of the row; a program for each row."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    ratio = tl.load(min_p + row)
    logits += row * stride_logits
    record = records + row * RECORD_SIZE
    has_k = (temperature > 0) & (k > 0) & (k < num_valid)
    has_p = (temperature > 0) & (p < 1)

    lowest = LOWEST
    threshold = -INF
    if (temperature > 0) & (ratio > 0):
        maximum = -INF
        for begin in range(0, num_valid, MAXIMUM_TILE):
            column = begin + tl.arange(0, MAXIMUM_TILE)
            tile = tl.load(logits + column, mask=column < num_valid, other=-INF)
            maximum = tl.maximum(maximum, tl.max(tile, 0).to(tl.float32))
        lowest = tl.maximum(maximum + temperature * tl.log(ratio), LOWEST)
        threshold = lowest
    tl.store(thresholds + row, threshold)

    status = DONE
    if has_k | has_p:
        status = MEASURED
        rate = LOG2_E / temperature
        index = tl.arange(0, SAMPLE)
        stride = tl.maximum(SAMPLE_BLOCK, num_valid // (SAMPLE // SAMPLE_BLOCK))
        column = index // SAMPLE_BLOCK * stride + index % SAMPLE_BLOCK
        in_row = column < num_valid
        sample = tl.load(logits + column, mask=in_row, other=-INF).to(tl.float32)
        sample = tl.where(sample >= lowest, sample, -INF)
        maximum = tl.maximum(tl.max(sample, 0), LOWEST)
        minimum = tl.minimum(tl.min(tl.where(sample == -INF, INF, sample), 0), maximum)
        mass = tl.exp2((sample - maximum) * rate)
        if has_k:
            center = k * (tl.sum(in_row.to(tl.float32), 0) / num_valid)
            deviation = tl.sqrt(center) + 1
        else:
            center = p * tl.sum(mass, 0)
            deviation = tl.sqrt(p * (1 - p) * tl.sum(mass * mass, 0))
        # The sample's threshold, three standard deviations on either side, and all that counts.
        pivot = tl.arange(0, NUM_PIVOTS)
        target = center + (pivot - 2) * 3 * deviation
        lo = tl.zeros([NUM_PIVOTS], tl.float32) + minimum
        hi = tl.zeros([NUM_PIVOTS], tl.float32) + maximum
        for _ in range(SAMPLE_STEPS):
            middle = 0.5 * lo + 0.5 * hi
            counts, masses = _compare(sample, middle, maximum, rate)
            enough = tl.where(has_k, tl.sum(counts, 0), tl.sum(masses, 0)) >= target
            lo = tl.where(enough, middle, lo)
            hi = tl.where(enough, hi, middle)
        lo = _from_key(_to_key(lo, GRAIN), GRAIN)
        tl.store(record + PIVOTS + pivot, tl.where((pivot > 0) & (lo >= lowest), lo, lowest))
        tl.store(record + GUESS, minimum)
        # What is known of a row before it is measured. The first pass finds top-p's target.
        by_count = has_k.to(tl.float32)
        _store_bracket(record, (by_count, k.to(tl.float32), lowest, INF, INF, 0.0, INF, 0.0))
    tl.store(record + STATUS, status)


@jit
def _take_in(
    record,  # of the row, before the pass that wrote `partials`
    partials,  # [num_chunks, PARTIAL_SIZE] of the row
    num_chunks,
    rate,
    top_p,
    IS_FIRST: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Whether the row's search goes on after a pass, its bracket and the row's maximum."""
    bracket = _load_bracket(record)
    pivot = tl.arange(0, NUM_PIVOTS)
    pivots = tl.load(record + PIVOTS + pivot)
    chunk = tl.arange(0, PADDED_CHUNKS)
    is_chunk = chunk < num_chunks
    partials += chunk * PARTIAL_SIZE
    references = tl.load(partials + REFERENCE, mask=is_chunk, other=LOWEST)
    maximum = tl.max(references, 0)
    scale = tl.exp2((references - maximum) * rate)
    columns = partials[:, None] + pivot[None, :]
    counts = tl.sum(tl.load(columns + COUNTS, mask=is_chunk[:, None], other=0.0), 0)
    masses = tl.load(columns + MASSES, mask=is_chunk[:, None], other=0.0)
    masses = tl.sum(masses * scale[:, None], 0)
    if IS_FIRST:  # the first pivot has all below it that counts
        by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi = bracket
        by_count = tl.where(_at(counts, 0) > target, by_count, 0.0)
        mass = tl.where(top_p < 1, top_p * _at(masses, 0), INF)  # inf: lo is the threshold
        target = tl.where(by_count > 0, target, mass)
        bracket = by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi
    bracket = _narrow(bracket, pivots, counts, masses)
    is_open, bracket = _advance(bracket, top_p, GRAIN)
    return is_open, bracket, maximum


# Whether a pass's partials are aligned depends on the batch size.
@jit(do_not_specialize_on_alignment=["partials", "new_partials", "temperatures", "top_p"])
def _pass_kernel(
    thresholds,  # [B] float32
    records,  # [B, RECORD_SIZE] before the pass ahead; in the first pass, before this one
    new_records,  # [B, RECORD_SIZE] before this pass
    partials,  # [B, num_chunks, PARTIAL_SIZE] of the pass ahead
    new_partials,
    collected,  # [B, num_chunks, CAPACITY] of the logits' dtype
    num_collected,  # [B, num_chunks] int32
    logits,
    temperatures,
    top_p,
    stride_logits,
    num_valid,
    PASS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    CAPACITY: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    GRAIN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Narrow the row's bracket by the pass ahead, and measure or collect; a program for a chunk.

    All programs of a row narrow it alike, the first of them writes it down.
    """
    await_previous(OVERLAP)
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, num_valid)
    logits += row * stride_logits
    rate = LOG2_E / tl.load(temperatures + row)
    record = records + row * RECORD_SIZE
    status = tl.load(record + STATUS)
    pivots = tl.load(record + PIVOTS + tl.arange(0, NUM_PIVOTS))
    maximum = LOWEST
    if PASS > 0:
        new_record = new_records + row * RECORD_SIZE
        if status == MEASURED:
            p = tl.load(top_p + row)
            guess = tl.load(record + GUESS)
            row_partials = partials + row * num_chunks * PARTIAL_SIZE
            is_open, bracket, maximum = _take_in(
                record, row_partials, num_chunks, rate, p, PASS == 1, PADDED_CHUNKS, GRAIN
            )
            by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi = bracket
            if count_lo <= CAPACITY:  # all that top-p may need is collected, too
                hi = INF
                count_hi = 0.0
                mass_hi = 0.0
            if is_open == 0:
                status = 0.0 + DONE
            elif count_lo - count_hi <= CAPACITY:
                status = 0.0 + COLLECTED
            bracket = by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi
            pivots = _choose_pivots(bracket, guess, maximum, False, GRAIN)
            if status == COLLECTED:
                slots = collected + (row * num_chunks + chunk) * CAPACITY
                size = _collect(slots, logits, begin, end, lo, hi, TILE, UNROLL)
                tl.store(num_collected + row * num_chunks + chunk, size)
            if chunk == 0:
                _store_bracket(new_record, bracket)
                tl.store(new_record + MAXIMUM, maximum)
                tl.store(new_record + GUESS, guess)
                tl.store(new_record + PIVOTS + tl.arange(0, NUM_PIVOTS), pivots)
                tl.store(new_record + STATUS, status)
                if status == DONE:
                    tl.store(thresholds + row, lo)
        elif chunk == 0:
            field = tl.arange(0, RECORD_SIZE)
            tl.store(new_record + field, tl.load(record + field))
    if status == MEASURED:
        if PASS == 0:
            column = begin + tl.arange(0, CHUNK)
            whole = tl.load(logits + column, mask=column < num_valid, other=-INF)
            maximum = tl.maximum(tl.max(whole, 0).to(tl.float32), LOWEST)
        counts, masses = _measure(logits, begin, end, pivots, maximum, rate, TILE, UNROLL)
        partial = new_partials + (row * num_chunks + chunk) * PARTIAL_SIZE
        tl.store(partial + COUNTS + tl.arange(0, NUM_PIVOTS), counts)
        tl.store(partial + MASSES + tl.arange(0, NUM_PIVOTS), masses)
        tl.store(partial + REFERENCE, maximum)


@jit
def _load_collected(
    collected,  # [num_chunks, CAPACITY] of a row
    num_collected,  # [num_chunks]
    num_chunks,
    CAPACITY: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
):
    """The values of all chunks one after another, [CAPACITY] float32, then -inf."""
    index = tl.arange(0, CAPACITY)
    own_chunk = tl.zeros([CAPACITY], tl.int32)
    own_begin = tl.zeros([CAPACITY], tl.int32)
    end = 0
    for chunk in tl.static_range(PADDED_CHUNKS):
        end += tl.load(num_collected + chunk, mask=chunk < num_chunks, other=0)
        own_chunk += (index >= end).to(tl.int32)
        own_begin = tl.where(index >= end, end, own_begin)
    pointers = collected + own_chunk * CAPACITY + (index - own_begin)
    return tl.load(pointers, mask=index < end, other=-INF).to(tl.float32)


@jit(do_not_specialize_on_alignment=["partials", "temperatures", "top_p"])
def _finish_kernel(
    thresholds,
    records,  # [B, RECORD_SIZE] before the last pass
    partials,  # of the last pass
    collected,  # [B, num_chunks, CAPACITY] of the logits' dtype
    num_collected,  # [B, num_chunks] int32
    logits,
    temperatures,
    top_p,
    stride_logits,
    num_valid,
    num_chunks,
    IS_FIRST: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    CAPACITY: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    GRAIN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Search what is collected, or if that is not enough the whole row; a program for each row."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    record = records + row * RECORD_SIZE
    status = tl.load(record + STATUS)
    if status != DONE:
        rate = LOG2_E / tl.load(temperatures + row)
        p = tl.load(top_p + row)
        guess = tl.load(record + GUESS)
        logits += row * stride_logits
        values = tl.full([CAPACITY], -INF, tl.float32)
        if status == COLLECTED:
            is_open = True
            bracket = _load_bracket(record)
            maximum = tl.load(record + MAXIMUM)
            values = _load_collected(
                collected + row * num_chunks * CAPACITY,
                num_collected + row * num_chunks,
                num_chunks,
                CAPACITY,
                PADDED_CHUNKS,
            )
            guess = tl.min(tl.where(values == -INF, INF, values), 0)
        else:
            row_partials = partials + row * num_chunks * PARTIAL_SIZE
            is_open, bracket, maximum = _take_in(
                record, row_partials, num_chunks, rate, p, IS_FIRST, PADDED_CHUNKS, GRAIN
            )
        by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi = bracket
        end = tl.where(status == COLLECTED, hi, -INF)  # values are all those in [lo, end)
        count_above = count_hi
        mass_above = mass_hi
        step = 0
        while is_open & (step < MAX_STEPS):
            bracket = by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi
            pivots = _choose_pivots(bracket, guess, maximum, step % 2 == 1, GRAIN)
            if hi <= end:
                above, mass = _compare(values, pivots, maximum, rate)
                counts = count_above + tl.sum(above, 0)
                masses = mass_above + tl.sum(mass, 0)
            else:
                counts, masses = _measure(logits, 0, num_valid, pivots, maximum, rate, TILE, UNROLL)
            bracket = _narrow(bracket, pivots, counts, masses)
            is_open, bracket = _advance(bracket, p, GRAIN)
            by_count, target, lo, hi, count_lo, count_hi, mass_lo, mass_hi = bracket
            step += 1
        tl.store(thresholds + row, lo)


def filter_thresholds(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """logits [B, V] -> thresholds [B] float32; see `Ops.filter_thresholds`."""
    batch_size, width = logits.shape
    num_valid = min(width, vocab_size)
    device = logits.device
    thresholds = torch.empty(batch_size, dtype=torch.float32, device=device)
    if batch_size == 0:
        return thresholds
    assert logits.stride(1) == 1 and 0 < num_valid < 2**24  # counts are exact in float32
    num_chunks = triton.cdiv(num_valid, CHUNK)
    records = torch.empty((NUM_PASSES, batch_size, RECORD_SIZE.value), device=device)
    partials = torch.empty((NUM_PASSES, batch_size, num_chunks, PARTIAL_SIZE.value), device=device)
    collected = logits.new_empty((batch_size, num_chunks, CAPACITY))
    num_collected = torch.empty((batch_size, num_chunks), dtype=torch.int32, device=device)
    row_inputs = logits, temperatures, top_p, logits.stride(0), num_valid
    options = {"GRAIN": GRAIN_BITS[logits.dtype], **overlap_options(device)}
    chunk_options = {
        "CAPACITY": CAPACITY,
        "PADDED_CHUNKS": triton.next_power_of_2(num_chunks),
        **options,
    }
    _start_kernel[(batch_size,)](
        thresholds,
        records[0],
        logits,
        temperatures,
        top_k,
        top_p,
        min_p,
        logits.stride(0),
        num_valid,
        SAMPLE=SAMPLE,
        SAMPLE_BLOCK=SAMPLE_BLOCK,
        SAMPLE_STEPS=SAMPLE_STEPS,
        MAXIMUM_TILE=MAXIMUM_TILE,
        num_warps=SAMPLE_WARPS,
        **options,
    )
    for number in range(NUM_PASSES):
        ahead = max(0, number - 1)
        _pass_kernel[(num_chunks, batch_size)](
            thresholds,
            records[ahead],
            records[number],
            partials[ahead],
            partials[number],
            collected,
            num_collected,
            *row_inputs,
            PASS=min(number, 2),
            CHUNK=CHUNK,
            TILE=TILE,
            UNROLL=UNROLL,
            num_warps=NUM_WARPS,
            **chunk_options,
        )
    _finish_kernel[(batch_size,)](
        thresholds,
        records[-1],
        partials[-1],
        collected,
        num_collected,
        *row_inputs,
        num_chunks,
        IS_FIRST=NUM_PASSES == 1,
        TILE=2 * TILE,
        UNROLL=UNROLL,
        num_warps=FINISH_WARPS,
        **chunk_options,
    )
    return thresholds
