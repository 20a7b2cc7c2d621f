"""Gumbel-max sampling in Triton, as a race of exponentials: one pass over the logits, two stages.

Groups of DRAW_GROUP neighbouring tokens race, each as one. Stage 1 finds the earliest arrival of
every chunk of a row. Stage 2 computes the earliest chunk once more to find its group, whose tokens
race among themselves. The formulas are those of `torch_ops.sample`, so both backends draw the same
tokens, apart from ties within the logarithms' error (1e-5 of the exponential).
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.launch import await_previous, is_gpu, jit, overlap_options
from nanovllm.kernels.types import DRAW_GROUP

CHUNK = 4096  # logits per program of stage 1
NUM_WARPS = 4


@jit
def _mix(x):
    """The 32-bit integer hash lowbias32 by Chris Wellons; x is uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@jit
def _log2(x, APPROXIMATE: tl.constexpr):
    """Base-2 logarithm of a positive normal float32, by the hardware's unit if APPROXIMATE."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@jit
def _exp2(x, APPROXIMATE: tl.constexpr):
    """2 to the power of x float32, by the hardware's unit if APPROXIMATE."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@jit
def _stream(row, seeds, positions):
    """Start and step of a row's walk over the 32-bit integers; see `torch_ops.exponentials`."""
    position = tl.load(positions + row).to(tl.uint32, bitcast=True)
    seed_lo = tl.load(seeds + 2 * row).to(tl.uint32, bitcast=True)
    seed_hi = tl.load(seeds + 2 * row + 1).to(tl.uint32, bitcast=True)
    start = _mix(seed_lo ^ _mix(position))
    return start, _mix(seed_hi ^ start) | 1


@jit
def _noise(start, step, number, APPROXIMATE: tl.constexpr):
    """log2 of `torch_ops.exponentials`; number is int32."""
    bits = start + (number + 1).to(tl.uint32, bitcast=True) * step
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    v = bits.to(tl.float32) * (2.0**-32 - 2.0**-56) + 2.0**-33
    # -log2(1 - v). For a small v, a winner, 1 - v has lost the digits, but there the series
    # exceeds the logarithm less its error; elsewhere it falls behind for want of terms.
    series = v * (1.4426950 + v * (0.72134752 + v * (0.48089835 + v * 0.36067376)))
    exponential = tl.maximum(series, -9.5e-7 - _log2(1 - v, APPROXIMATE))
    return _log2(exponential, APPROXIMATE)


@jit
def _load(
    row,
    column,
    temperature,
    logits,
    thresholds,
    stride_logits,
    num_valid,
    APPROXIMATE: tl.constexpr,
):
    """Logits of a row, float32; -inf for what cannot win, which includes NaN."""
    # A block, as the interpreter cannot combine a scalar condition with one.
    is_read = (column < num_valid) & (tl.full(column.shape, temperature, tl.float32) >= 0)
    pointers = logits + row * stride_logits + column
    logit = tl.load(pointers, mask=is_read, other=float("-inf"))
    if APPROXIMATE and logit.dtype == tl.bfloat16:
        # Two at a time, in half as many instructions as Triton's.
        logit = tl.inline_asm_elementwise(
            """{
            .reg .b32 pair;
            mov.b32 pair, 0xff80ff80;  // -inf
            max.bf16x2 pair, $2, pair;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xffff0000;
            }""",
            "=r,=r,r",
            [logit],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        logit = tl.maximum(logit.to(tl.float32), float("-inf"))
    if thresholds is not None:
        logit = tl.where(logit >= tl.load(thresholds + row), logit, float("-inf"))
    return logit


@jit
def _finite(x):
    """Finite, so that nothing becomes inf - inf."""
    return tl.minimum(tl.maximum(x, -3e38), 3e38)


@jit
def _group_arrivals(
    row,
    chunk,
    temperature,
    start,
    step,
    logits,
    thresholds,
    stride_logits,
    first_token_id,
    num_valid,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Minus `torch_ops.group_scores` of a chunk, [CHUNK / GROUP]; +inf for what cannot win.

    A row of the block is a group, so that one thread reads a group of 16-bit logits at once.
    """
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logit = _load(
        row, column, temperature, logits, thresholds, stride_logits, num_valid, APPROXIMATE
    )
    tl.debug_barrier()  # else the seeds are loaded only where they are used, after the logits
    largest = tl.max(logit, 1)
    if temperature > 0:
        rate = 1.4426950408889634 / temperature
        reference = _finite(largest * rate)
        weight = tl.sum(_exp2(logit * rate - reference[:, None], APPROXIMATE), 1)
        noise = _noise(start, step, first_token_id // GROUP + group, APPROXIMATE)
        arrival = noise - reference - _log2(weight, APPROXIMATE)
    else:
        arrival = -largest
    return arrival


@jit
def _token_arrivals(
    row,
    column,
    temperature,
    start,
    step,
    logits,
    thresholds,
    stride_logits,
    first_token_id,
    num_valid,
    APPROXIMATE: tl.constexpr,
):
    """Minus `torch_ops.token_scores` of a group's columns; +inf for what cannot win."""
    logit = _load(
        row, column, temperature, logits, thresholds, stride_logits, num_valid, APPROXIMATE
    )
    if temperature > 0:
        noise = _noise(_mix(start ^ step), step, first_token_id + column, APPROXIMATE)
        distance = logit - _finite(tl.max(logit, 0))
        arrival = noise - distance * (1.4426950408889634 / temperature)
    else:
        arrival = -logit
    return arrival


# Per-row inputs may be slices of one packed buffer: no recompilation for their alignment.
@jit(
    do_not_specialize=["first_token_id"],
    do_not_specialize_on_alignment=["temperatures", "seeds", "positions", "thresholds"],
)
def _chunk_kernel(
    chunk_arrivals,  # [B, num_chunks] float32
    logits,  # [B, V]
    temperatures,
    seeds,  # [B, 2] int32
    positions,
    thresholds,  # [B] float32 or None
    stride_logits,
    first_token_id,
    num_valid,  # columns from here on are padding and never win
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    start, step = _stream(row, seeds, positions)
    arrival = _group_arrivals(
        row,
        chunk,
        temperature,
        start,
        step,
        logits,
        thresholds,
        stride_logits,
        first_token_id,
        num_valid,
        CHUNK,
        GROUP,
        APPROXIMATE,
    )
    tl.store(chunk_arrivals + row * tl.num_programs(0) + chunk, tl.min(arrival, 0))


@jit(
    do_not_specialize=["first_token_id", "vocab_size", "num_chunks"],
    do_not_specialize_on_alignment=["temperatures", "seeds", "positions", "thresholds"],
)
def _row_kernel(
    scores,  # [B] float32
    token_ids,  # [B] int32
    chunk_arrivals,  # [B, num_chunks]
    vocab_size,
    num_chunks,
    logits,
    temperatures,
    seeds,
    positions,
    thresholds,
    stride_logits,
    first_token_id,
    num_valid,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    start, step = _stream(row, seeds, positions)
    index = tl.arange(0, PADDED_CHUNKS)
    pointers = chunk_arrivals + row * num_chunks + index
    earliest = tl.load(pointers, mask=index < num_chunks, other=float("inf"))
    chunk = tl.argmin(earliest, 0, tie_break_left=True)
    arrival = _group_arrivals(
        row,
        chunk,
        temperature,
        start,
        step,
        logits,
        thresholds,
        stride_logits,
        first_token_id,
        num_valid,
        CHUNK,
        GROUP,
        APPROXIMATE,
    )
    first, group = tl.min(arrival, 0, return_indices=True, return_indices_tie_break_left=True)
    column = chunk * CHUNK + group * GROUP + tl.arange(0, GROUP)
    arrival = _token_arrivals(
        row,
        column,
        temperature,
        start,
        step,
        logits,
        thresholds,
        stride_logits,
        first_token_id,
        num_valid,
        APPROXIMATE,
    )
    winner = tl.argmin(arrival, 0, tie_break_left=True)
    token_id = first_token_id + chunk * CHUNK + group * GROUP + winner
    tl.store(scores + row, -first)
    tl.store(token_ids + row, tl.minimum(token_id, vocab_size - 1))


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_token_id: int,
    vocab_size: int,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] -> (scores [B] float32, token_ids [B] int32); see `Ops.sample`."""
    batch_size, width = logits.shape
    scores = torch.empty(batch_size, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(batch_size, dtype=torch.int32, device=logits.device)
    if batch_size == 0:
        return scores, token_ids
    assert logits.stride(1) == 1 and seeds.is_contiguous() and first_token_id % DRAW_GROUP == 0
    num_chunks = triton.cdiv(width, CHUNK)
    chunk_arrivals = torch.empty((batch_size, num_chunks), device=logits.device)
    num_valid = max(0, min(width, vocab_size - first_token_id))
    inputs = (
        logits,
        temperatures,
        seeds,
        positions,
        thresholds,
        logits.stride(0),
        first_token_id,
        num_valid,
    )
    options = {
        "CHUNK": CHUNK,
        "GROUP": DRAW_GROUP,
        "APPROXIMATE": is_gpu(logits.device),
        "num_warps": NUM_WARPS,
        **overlap_options(logits.device),
    }
    _chunk_kernel[(num_chunks, batch_size)](chunk_arrivals, *inputs, **options)
    _row_kernel[(batch_size,)](
        scores,
        token_ids,
        chunk_arrivals,
        vocab_size,
        num_chunks,
        *inputs,
        PADDED_CHUNKS=triton.next_power_of_2(num_chunks),
        **options,
    )
    return scores, token_ids
