"""The terms of LoRA adapters for tokens of any adapters, in Triton.

Tokens are grouped by their adapters, once for all layers of a step. A tile is some tokens of one
adapter, so each program reads one adapter's weights (as SGMV of Chen et al. 2023, arXiv
2310.18547). Shapes are static and nothing waits for the host: a CUDA graph can hold it all.

Copies into slots come before a step's plan, whose kernel waits for them and lets no other begin
before it has ended. So kernels read weights before they wait, past their multiprocessor's cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels.device import device_limits
from nanovllm.kernels.triton.launch import (
    await_previous,
    await_previous_alone,
    jit,
    overlap_options,
    release_next,
)
from nanovllm.kernels.types import LinearOutput, LoRAWeights

FEW_TOKENS = 1024  # up to here a tile has 16 tokens, the fewest that matrix instructions take
FEW_BLOCK_M, MANY_BLOCK_M = 16, 64
MAX_FUSED_RANK = 64  # up to here few tokens may take one kernel: its programs repeat A x
MAX_FUSED_COLUMNS = 16384  # columns of A that are multiplied for a token then, repetitions included
# Rows of the weight that a program multiplies, measured on an H200.
SPAN = 1024
SHORT_SPAN = 256  # of weights with few rows
SPAN_OF_MANY_TOKENS = 128
LARGE_SHARED_MEMORY = 160 << 10  # with less a tile is half as large
NUM_WARPS = 8  # each multiplies columns of its own
PLAN_BLOCK = 1024  # tokens that a program of the plan looks at together


class AdapterPlan(NamedTuple):
    """Tiles of tokens that have one adapter."""

    tokens: torch.Tensor  # [tiles, tokens of a full tile] int32; -1: none
    slots: torch.Tensor  # [tiles] int32; -1: no tile


@jit(do_not_specialize=["num_tokens", "num_tiles"], do_not_specialize_on_alignment=["slots"])
def _plan_kernel(
    tile_tokens,
    tile_slots,
    slots,  # [T] int32
    num_tokens,
    num_tiles,
    NUM_WORDS: tl.constexpr,  # a power of two above all `slots`
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The tiles of one slot; of the last slot's program, also those that are no tiles."""
    await_previous_alone(OVERLAP)  # the layers' kernels read tiles and weights before they wait
    slot = tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    word = tl.arange(0, NUM_WORDS)
    counts = tl.zeros((NUM_WORDS,), dtype=tl.int32)
    for start in range(0, num_tokens, BLOCK):
        token = start + offset
        counts += tl.histogram(tl.load(slots + token, mask=token < num_tokens, other=0), NUM_WORDS)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where((word > 0) & (word <= slot), tiles, 0))
    count = tl.sum(tl.where(word == slot + 1, counts, 0))
    end = first + (count + BLOCK_M - 1) // BLOCK_M
    own_tokens = tile_tokens + first * BLOCK_M
    done = 0
    for start in range(0, num_tokens, BLOCK):
        token = start + offset
        mine = tl.load(slots + token, mask=token < num_tokens, other=0) == slot + 1
        index = done + tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(own_tokens + index, token, mask=mine)
        done += tl.sum(mine.to(tl.int32))
    rest = count + tl.arange(0, BLOCK_M)
    tl.store(own_tokens + rest, rest * 0 - 1, mask=rest < (end - first) * BLOCK_M)
    for start in range(first, end, BLOCK):
        tile = start + offset
        tl.store(tile_slots + tile, tile * 0 + slot, mask=tile < end)
    if slot == tl.num_programs(0) - 1:
        for start in range(end, num_tiles, BLOCK):
            tile = start + offset
            tl.store(tile_slots + tile, tile * 0 - 1, mask=tile < num_tiles)


def plan_adapters(slots: torch.Tensor, num_slots: int) -> AdapterPlan:
    """See `Ops.plan_adapters`."""
    num_tokens = len(slots)
    block_m = FEW_BLOCK_M if num_tokens <= FEW_TOKENS else MANY_BLOCK_M
    num_tiles = num_tokens // block_m + num_slots  # each slot may have a tile that is not full
    tokens = torch.empty(num_tiles, block_m, dtype=torch.int32, device=slots.device)
    plan = AdapterPlan(tokens, tokens.new_empty(num_tiles))
    _plan_kernel[(num_slots,)](
        *plan,
        slots,
        num_tokens,
        num_tiles,
        NUM_WORDS=max(32, triton.next_power_of_2(num_slots + 1)),
        BLOCK_M=block_m,
        BLOCK=PLAN_BLOCK,
        num_warps=8,
        **overlap_options(slots.device),
    )
    return plan


@jit
def _tile(tile_tokens, tile_slots, BLOCK_M: tl.constexpr):
    """The slot of this program's tile, its tokens [BLOCK_M]; -1: none."""
    tile = tl.program_id(0)
    slot = tl.load(tile_slots + tile, cache_modifier=".cg")
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = tl.load(tile_tokens + place, cache_modifier=".cg")
    return slot.to(tl.int64), tokens.to(tl.int64)


@jit
def _span(ROWS: tl.constexpr, NUM_PARTS: tl.constexpr, SPAN: tl.constexpr):
    """This program's projection, the first of its SPAN rows at most, and the end of all rows."""
    span = tl.program_id(1)
    part, first, end, before = 0, 0, 0, 0
    for p in tl.static_range(NUM_PARTS):
        after = before + (ROWS[2 * p + 1] - ROWS[2 * p] + SPAN - 1) // SPAN
        is_own = (span >= before) & (span < after)
        part = tl.where(is_own, p, part)
        first = tl.where(is_own, ROWS[2 * p] + (span - before) * SPAN, first)
        end = tl.where(is_own, ROWS[2 * p + 1], end)
        before = after
    return part, first, end


@jit
def _shrink(
    x,
    stride_x,
    tokens,
    a,  # its first row
    num_rows,  # of a
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A x of the tokens, [BLOCK_M, BLOCK_R] float32.

    With SPLITS > 1 as many warps multiply columns of their own, so that none has a long sum.
    """
    BLOCK_M: tl.constexpr = tokens.shape[0]
    row = tl.arange(0, BLOCK_R)
    if SPLITS == 1:
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        x_rows = x + tokens[:, None] * stride_x
        a_rows = a + row[:, None] * K
        column = tl.arange(0, BLOCK_K)[None, :]
        has_token, has_row = (tokens >= 0)[:, None], (row < num_rows)[:, None]
    else:
        total = tl.zeros((SPLITS, BLOCK_M, BLOCK_R), dtype=tl.float32)
        x_rows = x + tokens[None, :, None] * stride_x
        a_rows = a + row[None, :, None] * K
        split = tl.arange(0, SPLITS)[:, None, None]
        column = split * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        has_token, has_row = (tokens >= 0)[None, :, None], (row < num_rows)[None, :, None]
    for start in tl.range(0, K, SPLITS * BLOCK_K, num_stages=STAGES):
        k = start + column
        x_tile = tl.load(x_rows + k, mask=has_token & (k < K), other=0.0)
        a_tile = tl.load(a_rows + k, mask=has_row & (k < K), other=0.0, cache_modifier=".cg")
        a_tile = a_tile.T if SPLITS == 1 else tl.permute(a_tile, (0, 2, 1))
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
    return total if SPLITS == 1 else tl.sum(total, axis=0)


@jit
def _shrink_kernel(
    inner,  # [T, PR], of x's dtype
    x,
    a,  # [S, PR, K]
    tile_tokens,
    tile_slots,
    stride_x,
    PR: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    slot, tokens = _tile(tile_tokens, tile_slots, BLOCK_M)
    await_previous(OVERLAP)
    if slot >= 0:
        first = tl.program_id(1) * BLOCK_R
        own_a = a + (slot * PR + first) * K
        total = _shrink(x, stride_x, tokens, own_a, PR - first, K, BLOCK_R, BLOCK_K, SPLITS, STAGES)
        row = first + tl.arange(0, BLOCK_R)[None, :]
        pointers = inner + tokens[:, None] * PR + row
        tl.store(
            pointers, total.to(inner.dtype.element_ty), mask=(tokens >= 0)[:, None] & (row < PR)
        )


@jit
def _add_kernel(
    out,  # [T, N]
    x,  # [T, K], or, unless FUSED, `inner` of `_shrink_kernel`
    a,  # [S, P * R, K]
    b,  # [S, N, R]
    tile_tokens,
    tile_slots,
    stride_x,
    stride_out,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,  # P times the first row and the end of a projection
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    slot, tokens = _tile(tile_tokens, tile_slots, BLOCK_M)
    part, first, end = _span(ROWS, P, SPAN)
    if slot < 0:
        await_previous(OVERLAP)
        return
    column = tl.arange(0, R)
    row = first + tl.arange(0, SPAN)
    b_pointers = b + (slot * N + row)[:, None] * R + column[None, :]
    b_tile = tl.load(b_pointers, mask=(row < end)[:, None], other=0.0, cache_modifier=".cg")
    await_previous(OVERLAP)
    pointers = out + tokens[:, None] * stride_out + row[None, :]
    mask = (tokens >= 0)[:, None] & (row < end)[None, :]
    before = tl.load(pointers, mask=mask, other=0.0)
    if FUSED:
        own_a = a + (slot * P + part) * R * K
        inner = _shrink(x, stride_x, tokens, own_a, R, K, R, BLOCK_K, SPLITS, STAGES)
        inner = inner.to(x.dtype.element_ty)
    else:
        inner_pointers = x + tokens[:, None] * stride_x + part * R + column[None, :]
        inner = tl.load(inner_pointers, mask=(tokens >= 0)[:, None], other=0.0)
    term = tl.dot(inner, b_tile.T, input_precision="ieee")
    tl.store(pointers, (before.to(tl.float32) + term).to(out.dtype.element_ty), mask=mask)


def add_adapters(out: LinearOutput, x: torch.Tensor, weights: LoRAWeights, plan: object) -> None:
    """See `Ops.add_adapters`."""
    assert isinstance(plan, AdapterPlan)
    target = out if isinstance(out, torch.Tensor) else out.parts[0]
    a, b, rank = weights.a, weights.b, weights.rank
    assert x.stride(1) == 1 and target.stride(1) == 1
    num_tiles, block_m = plan.tokens.shape
    is_few = block_m == FEW_BLOCK_M
    span = _span_size(weights, x.dtype, is_few)
    num_spans = sum(triton.cdiv(end - first, span) for first, end in weights.rows)
    is_fused = is_few and rank <= MAX_FUSED_RANK and num_spans * x.shape[1] <= MAX_FUSED_COLUMNS
    if a is not None and not is_fused:
        x = _shrink_all(x, a, plan)
    _add_kernel[(num_tiles, num_spans)](
        target,
        x,
        a,
        b,
        *plan,
        x.stride(0),
        target.stride(0),
        FUSED=a is not None and is_fused,
        ROWS=tuple(row for rows in weights.rows for row in rows),
        P=len(weights.rows),
        K=x.shape[1],
        N=b.shape[1],
        R=rank,
        SPAN=span,
        BLOCK_M=block_m,
        num_warps=NUM_WARPS,
        **_loop(x, rank, block_m),
        **overlap_options(x.device),
    )


def _span_size(weights: LoRAWeights, dtype: torch.dtype, is_few: bool) -> int:
    """Rows of B for a program."""
    most = max(16, _tile_size(dtype) // weights.rank)
    if not is_few:
        return min(SPAN_OF_MANY_TOKENS, most)
    return min(SPAN if weights.b.shape[1] >= 2 * SPAN else SHORT_SPAN, most)


def _tile_size(dtype: torch.dtype) -> int:
    """Elements of A or B that a program holds at a time."""
    return 2048 if dtype == torch.float32 else 16384


def _shrink_all(x: torch.Tensor, a: torch.Tensor, plan: AdapterPlan) -> torch.Tensor:
    """A x of all projections, [T, P * R]."""
    num_rows, num_columns = a.shape[1:]
    num_tiles, block_m = plan.tokens.shape
    inner = torch.empty(len(x), num_rows, dtype=x.dtype, device=x.device)
    block_r = min(16 if x.dtype == torch.float32 else 64, triton.next_power_of_2(num_rows))
    _shrink_kernel[(num_tiles, triton.cdiv(num_rows, block_r))](
        inner,
        x,
        a,
        *plan,
        x.stride(0),
        PR=num_rows,
        K=num_columns,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        **_loop(x, block_r, block_m),
        **overlap_options(x.device),
    )
    return inner


def _loop(x: torch.Tensor, block_r: int, block_m: int) -> dict[str, int]:
    """How `_shrink` passes over the columns."""
    size = _tile_size(x.dtype)
    if device_limits(x.device).shared_memory < LARGE_SHARED_MEMORY:
        size //= 2
    columns = size // max(block_r, block_m)
    splits = NUM_WARPS if block_m == FEW_BLOCK_M else 1
    return {"BLOCK_K": max(16, columns // splits), "SPLITS": splits, "STAGES": 3}
