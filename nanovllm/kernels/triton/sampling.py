"""Gumbel-max sampling in Triton, as a race of exponentials: one pass over the logits, two stages.

Stage 1 finds the earliest arrival of every chunk of a row; stage 2 computes the earliest chunk
once more to find its token. The formula is that of `torch_ops.gumbel_scores`, so both backends draw
the same tokens, apart from ties within the logarithm's error (1e-5 of the exponential).
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.launch import await_previous, is_gpu, jit, overlap_options

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
def _arrivals(
    row,
    chunk,
    logits,
    temperatures,
    seeds,
    positions,
    thresholds,
    stride_logits,
    first_token_id,
    num_valid,
    CHUNK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Minus `torch_ops.gumbel_scores` of one chunk of a row, [CHUNK]; +inf for what cannot win."""
    temperature = tl.load(temperatures + row)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    pointers = logits + row * stride_logits + column
    # A block, as the interpreter cannot combine a scalar condition with one.
    is_read = (column < num_valid) & (tl.full([CHUNK], temperature, tl.float32) >= 0)
    logit = tl.load(pointers, mask=is_read, other=float("-inf")).to(tl.float32)
    races = temperature > 0
    if thresholds is not None:
        logit = tl.where(logit >= tl.load(thresholds + row), logit, float("-inf"))
        races = races & (tl.max(logit, 0) > float("-inf"))  # nearly all chunks are spared
    if races:
        position = tl.load(positions + row).to(tl.uint32, bitcast=True)
        seed_lo = tl.load(seeds + 2 * row).to(tl.uint32, bitcast=True)
        seed_hi = tl.load(seeds + 2 * row + 1).to(tl.uint32, bitcast=True)
        start = _mix(seed_lo ^ _mix(position))
        step = _mix(seed_hi ^ start) | 1
        bits = start + (first_token_id + 1 + column).to(tl.uint32, bitcast=True) * step
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        v = bits.to(tl.float32) * (2.0**-32 - 2.0**-56) + 2.0**-33
        # -log2(1 - v). For a small v, a winner, 1 - v has lost the digits, but there the series
        # exceeds the logarithm less its error; elsewhere it falls behind for want of terms.
        series = v * (1.4426950 + v * (0.72134752 + v * (0.48089835 + v * 0.36067376)))
        exponential = tl.maximum(series, -9.5e-7 - _log2(1 - v, APPROXIMATE))
        rate = 1.4426950408889634 / temperature
        arrival = _log2(exponential, APPROXIMATE) - logit * rate
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
    APPROXIMATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    arrival = _arrivals(
        row,
        chunk,
        logits,
        temperatures,
        seeds,
        positions,
        thresholds,
        stride_logits,
        first_token_id,
        num_valid,
        CHUNK,
        APPROXIMATE,
    )
    earliest = tl.min(arrival, 0)  # skips NaN; NaN itself if there is nothing else
    tl.store(chunk_arrivals + row * tl.num_programs(0) + chunk, earliest)


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
    PADDED_CHUNKS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PADDED_CHUNKS)
    pointers = chunk_arrivals + row * num_chunks + index
    earliest = tl.load(pointers, mask=index < num_chunks, other=float("inf"))
    earliest = tl.where(earliest <= float("inf"), earliest, float("inf"))  # a NaN never wins
    chunk = tl.argmin(earliest, 0, tie_break_left=True)
    arrival = _arrivals(
        row,
        chunk,
        logits,
        temperatures,
        seeds,
        positions,
        thresholds,
        stride_logits,
        first_token_id,
        num_valid,
        CHUNK,
        APPROXIMATE,
    )
    arrival = tl.where(arrival <= float("inf"), arrival, float("inf"))
    first, winner = tl.min(arrival, 0, return_indices=True, return_indices_tie_break_left=True)
    token_id = first_token_id + chunk * CHUNK + winner
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
    assert logits.stride(1) == 1 and seeds.is_contiguous()
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
