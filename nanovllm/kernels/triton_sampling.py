"""The Gumbel race over the vocabulary in Triton: one pass over the logits, two stages.

Stage 1 gives the winner of every chunk of a row, stage 2 the row's. The formula is that of
`torch_ops.race_scores`, so both backends draw the same tokens, apart from ties in the last bit.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton_launch import await_previous, overlap_options

CHUNK = 2048  # logits per program of stage 1
NUM_WARPS = 4


@triton.jit
def _mix(x):
    """The 32-bit integer hash lowbias32 by Chris Wellons; x is uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


# Per-row inputs may be slices of one packed buffer: no recompilation for their alignment.
@triton.jit(
    do_not_specialize=["first_token_id", "num_valid"],
    do_not_specialize_on_alignment=["temperatures", "seeds", "positions"],
)
def _chunk_winner_kernel(
    chunk_scores,  # [B, num_chunks] float32
    chunk_columns,  # [B, num_chunks] int32
    logits,  # [B, V]
    temperatures,
    seeds,  # [B, 2] int32
    positions,
    stride_logits,
    first_token_id,
    num_valid,  # columns from here on are padding and never win
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    valid = column < num_valid
    pointers = logits + row * stride_logits + column
    scores = tl.load(pointers, mask=valid, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        position = tl.load(positions + row).to(tl.uint32, bitcast=True)
        seed_lo = tl.load(seeds + 2 * row).to(tl.uint32, bitcast=True)
        seed_hi = tl.load(seeds + 2 * row + 1).to(tl.uint32, bitcast=True)
        key0 = _mix(seed_lo ^ _mix(position))
        key1 = _mix(seed_hi ^ _mix(position + 0x9E3779B9))
        token_id = (column + first_token_id).to(tl.uint32, bitcast=True)
        bits = _mix(_mix(token_id ^ key0) + key1)
        v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
        v = tl.minimum(v, 0.99999994)  # 1 - 2^-24: log(1 - v) stays finite
        series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5)))))
        exponential = tl.where(v < 0.0625, series, -tl.log(1 - v))
        scores = scores * tl.div_rn(1.0, temperature) - tl.log(exponential)
    scores = tl.where(scores >= float("-inf"), scores, float("-inf"))  # a NaN never wins
    best, winner = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    out = row * tl.num_programs(0) + chunk
    tl.store(chunk_scores + out, best)
    tl.store(chunk_columns + out, chunk * CHUNK + winner)


@triton.jit(do_not_specialize=["first_token_id", "vocab_size", "num_chunks"])
def _row_winner_kernel(
    scores,  # [B] float32
    token_ids,  # [B] int32
    chunk_scores,
    chunk_columns,
    first_token_id,
    vocab_size,
    num_chunks,
    PADDED_CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, PADDED_CHUNKS)
    pointers = chunk_scores + row * num_chunks + chunk
    values = tl.load(pointers, mask=chunk < num_chunks, other=float("-inf"))
    best, winner = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
    column = tl.load(chunk_columns + row * num_chunks + winner)
    tl.store(scores + row, best)
    tl.store(token_ids + row, tl.minimum(first_token_id + column, vocab_size - 1))


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_token_id: int,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] -> (scores [B] float32, token_ids [B] int32); see `Ops.sample`."""
    batch_size, width = logits.shape
    scores = torch.empty(batch_size, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(batch_size, dtype=torch.int32, device=logits.device)
    if batch_size == 0:
        return scores, token_ids
    assert logits.stride(1) == 1 and seeds.is_contiguous()
    num_chunks = triton.cdiv(width, CHUNK)
    shape = (batch_size, num_chunks)
    chunk_scores = torch.empty(shape, dtype=torch.float32, device=logits.device)
    chunk_columns = torch.empty(shape, dtype=torch.int32, device=logits.device)
    _chunk_winner_kernel[(num_chunks, batch_size)](
        chunk_scores,
        chunk_columns,
        logits,
        temperatures,
        seeds,
        positions,
        logits.stride(0),
        first_token_id,
        max(0, min(width, vocab_size - first_token_id)),
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
        **overlap_options(logits.device),
    )
    _row_winner_kernel[(batch_size,)](
        scores,
        token_ids,
        chunk_scores,
        chunk_columns,
        first_token_id,
        vocab_size,
        num_chunks,
        PADDED_CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=1,
        **overlap_options(logits.device),
    )
    return scores, token_ids
