"""Reading a decode batch's inputs from the row table and writing its results back, in Triton.

Static shapes and no host synchronisation, so both run inside a CUDA graph; see `row_state` for the
table's columns.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels import row_state
from nanovllm.kernels.triton.launch import (
    await_previous,
    await_previous_alone,
    jit,
    overlap_options,
)
from nanovllm.kernels.types import DecodeInputs

BLOCK = 256  # block-table entries copied, or rows written back, by one program

LAST_TOKEN = tl.constexpr(row_state.LAST_TOKEN)
LENGTH = tl.constexpr(row_state.LENGTH)
TEMPERATURE = tl.constexpr(row_state.TEMPERATURE)
SEED = tl.constexpr(row_state.SEED)
BLOCK_TABLE = tl.constexpr(row_state.BLOCK_TABLE)


# Per-row inputs may be slices of one packed buffer: no recompilation for their alignment.
@jit(do_not_specialize_on_alignment=["rows"])
def _gather_kernel(
    row_table,  # [R, BLOCK_TABLE + WIDTH] int32
    rows,  # [B] int32
    input_ids,  # outputs, see `DecodeInputs`
    positions,
    slot_mapping,
    context_lens,
    block_tables,
    temperatures,
    seeds,
    stride_table,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous_alone(OVERLAP)  # later kernels read these inputs before they wait
    i = tl.program_id(0)
    state = row_table + tl.load(rows + i).to(tl.int64) * stride_table
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_table = entry < WIDTH
    pages = tl.load(state + BLOCK_TABLE + entry, mask=in_table, other=0)
    tl.store(block_tables + i * WIDTH + entry, pages, mask=in_table)
    if tl.program_id(1) == 0:
        length = tl.load(state + LENGTH)
        live = length > 0
        position = tl.maximum(length - 1, 0)
        page = tl.load(state + BLOCK_TABLE + position // BLOCK_SIZE).to(tl.int64)
        slot = page * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(input_ids + i, tl.where(live, tl.load(state + LAST_TOKEN), 0))
        tl.store(positions + i, position)
        tl.store(slot_mapping + i, tl.where(live, slot, -1))
        tl.store(context_lens + i, length)
        tl.store(temperatures + i, tl.load(state + TEMPERATURE).to(tl.float32, bitcast=True))
        tl.store(seeds + 2 * i, tl.load(state + SEED))
        tl.store(seeds + 2 * i + 1, tl.load(state + SEED + 1))


def gather_decode_inputs(
    row_table: torch.Tensor, rows: torch.Tensor, block_size: int
) -> DecodeInputs:
    """row_table [R, BLOCK_TABLE + W] int32, rows [B] int32 -> the B rows' `DecodeInputs`."""
    assert row_table.stride(1) == 1
    batch_size, width = rows.shape[0], row_table.shape[1] - row_state.BLOCK_TABLE

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=row_table.device)

    inputs = DecodeInputs(
        input_ids=empty(batch_size),
        positions=empty(batch_size),
        slot_mapping=empty(batch_size, dtype=torch.int64),
        context_lens=empty(batch_size),
        block_tables=empty(batch_size, width),
        temperatures=empty(batch_size, dtype=torch.float32),
        seeds=empty(batch_size, 2),
    )
    if batch_size > 0:
        _gather_kernel[(batch_size, triton.cdiv(width, BLOCK))](
            row_table,
            rows,
            *inputs,
            row_table.stride(0),
            WIDTH=width,
            BLOCK_SIZE=block_size,
            BLOCK=BLOCK,
            num_warps=1,
            **overlap_options(row_table.device),
        )
    return inputs


@jit(
    do_not_specialize=["batch_size", "padding_row"],
    do_not_specialize_on_alignment=["rows", "token_ids", "positions", "temperatures"],
)
def _write_back_kernel(
    row_table,
    rows,
    token_ids,
    positions,
    temperatures,
    batch_size,
    padding_row,
    stride_table,
    HAS_TEMPERATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_batch = i < batch_size
    row = tl.load(rows + i, mask=in_batch, other=0)
    live = in_batch & (row != padding_row)
    if HAS_TEMPERATURES:
        live = live & (tl.load(temperatures + i, mask=in_batch, other=0.0) >= 0)
    state = row_table + row.to(tl.int64) * stride_table
    tl.store(state + LAST_TOKEN, tl.load(token_ids + i, mask=live), mask=live)
    tl.store(state + LENGTH, tl.load(positions + i, mask=live) + 2, mask=live)


def write_back(
    row_table: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor | None = None,
) -> None:
    """Makes the sampled tokens [B] the rows' last ones; positions [B] are their inputs'."""
    batch_size = rows.shape[0]
    if batch_size > 0:
        _write_back_kernel[(triton.cdiv(batch_size, BLOCK),)](
            row_table,
            rows,
            token_ids,
            positions,
            temperatures,
            batch_size,
            row_table.shape[0] - 1,
            row_table.stride(0),
            HAS_TEMPERATURES=temperatures is not None,
            BLOCK=BLOCK,
            num_warps=4,
            **overlap_options(row_table.device),
        )
