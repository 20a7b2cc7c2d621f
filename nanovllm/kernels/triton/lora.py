"""The terms of LoRA adapters for tokens of any adapters, in Triton.

Tokens are grouped by their adapters, once for all layers of a step. A tile is some tokens of one
adapter, so each program reads one adapter's weights (as SGMV of Chen et al. 2023, arXiv
2310.18547). Shapes are static and nothing waits for the host: a CUDA graph can hold it all.

No kernel reads weights before the one ahead has ended: a copy may have put them into their slot.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.launch import (
    await_previous,
    await_previous_alone,
    jit,
    num_multiprocessors,
    overlap_options,
    release_next,
)
from nanovllm.kernels.types import LinearOutput, LoRAWeights

FEW_TOKENS = 1024  # up to here a tile has 16 tokens, the fewest that matrix instructions take
MAX_FUSED_RANK = 64  # up to here few tokens take one kernel, which repeats the small product
SPAN = 512  # rows of the weight that a program multiplies, or half of them if programs are few
TILE_BYTES = 16384  # of A or B, that a program holds at a time
NUM_WARPS = 4
PLAN_BLOCK = 1024  # tokens that the plan's program looks at together


class AdapterPlan(NamedTuple):
    """Tokens in the order of their slots, cut into tiles."""

    order: torch.Tensor  # [T] int32, tokens with an adapter first
    tiles: torch.Tensor  # [tiles, 3] int32: slot, first place in the order, tokens (0: no tile)
    block_m: int  # tokens of a full tile


@jit(do_not_specialize=["num_tokens", "num_tiles"], do_not_specialize_on_alignment=["slots"])
def _plan_kernel(
    order,
    tiles,
    slots,  # [T] int32
    num_tokens,
    num_tiles,
    NUM_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous_alone(OVERLAP)  # the layers' kernels read the tiles before they wait
    offset = tl.arange(0, BLOCK)
    first = 0  # place of the slot's first token
    tile = 0  # the slot's first one
    for slot in range(NUM_SLOTS):
        count = 0
        for start in range(0, num_tokens, BLOCK):
            token = start + offset
            word = tl.load(slots + token, mask=token < num_tokens, other=0)
            count += tl.sum((word == slot + 1).to(tl.int32))
        done = 0
        if count > 0:
            for start in range(0, num_tokens, BLOCK):
                token = start + offset
                word = tl.load(slots + token, mask=token < num_tokens, other=0)
                mine = word == slot + 1
                index = done + tl.cumsum(mine.to(tl.int32)) - 1
                tl.store(order + first + index, token, mask=mine)
                entry = tiles + (tile + index // BLOCK_M) * 3
                begins = mine & (index % BLOCK_M == 0)
                tl.store(entry, index * 0 + slot, mask=begins)
                tl.store(entry + 1, first + index, mask=begins)
                tl.store(entry + 2, tl.minimum(count - index, BLOCK_M), mask=begins)
                done += tl.sum(mine.to(tl.int32))
        first += count
        tile += (count + BLOCK_M - 1) // BLOCK_M
    for start in range(0, num_tiles, BLOCK):
        rest = start + offset
        tl.store(tiles + rest * 3 + 2, rest * 0, mask=(rest >= tile) & (rest < num_tiles))


def plan_adapters(slots: torch.Tensor, num_slots: int) -> AdapterPlan:
    """See `Ops.plan_adapters`."""
    num_tokens = len(slots)
    block_m = 16 if num_tokens <= FEW_TOKENS else 32
    num_tiles = num_tokens // block_m + num_slots  # each slot may have a tile that is not full
    order = torch.empty(num_tokens, dtype=torch.int32, device=slots.device)
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=slots.device)
    _plan_kernel[(1,)](
        order,
        tiles,
        slots,
        num_tokens,
        num_tiles,
        NUM_SLOTS=num_slots,
        BLOCK_M=block_m,
        BLOCK=PLAN_BLOCK,
        num_warps=8,
        **overlap_options(slots.device),
    )
    return AdapterPlan(order, tiles, block_m)


@jit
def _tokens(order, tiles, BLOCK_M: tl.constexpr):
    """The slot of this program's tile, its tokens [BLOCK_M], which of them there are, how many."""
    entry = tiles + tl.program_id(0) * 3
    slot = tl.load(entry, cache_modifier=".cg")
    first = tl.load(entry + 1, cache_modifier=".cg")
    count = tl.load(entry + 2, cache_modifier=".cg")
    place = tl.arange(0, BLOCK_M)
    there = place < count
    tokens = tl.load(order + first + place, mask=there, other=0, cache_modifier=".cg")
    return slot.to(tl.int64), tokens.to(tl.int64), there, count


@jit
def _shrink(
    x,
    stride_x,
    tokens,
    there,
    a,  # [R, K] of the adapter and the projection
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A x of the tokens, [BLOCK_M, R] float32."""
    total = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    row = tl.arange(0, R)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < K
        x_pointers = x + tokens[:, None] * stride_x + column[None, :]
        x_tile = tl.load(x_pointers, mask=there[:, None] & inside[None, :], other=0.0)
        a_tile = tl.load(a + row[:, None] * K + column[None, :], mask=inside[None, :], other=0.0)
        total += tl.dot(x_tile, a_tile.T, input_precision="ieee")
    return total


@jit
def _expand(
    out,
    stride_out,
    tokens,
    there,
    inner,  # [BLOCK_M, R], of x's dtype
    b,  # [N, R] of the adapter
    first,
    end,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add B inner to the rows from `first` to `end` of the tokens' outputs."""
    column = tl.arange(0, R)
    for start in range(first, end, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        inside = row < end
        b_tile = tl.load(b + row[:, None] * R + column[None, :], mask=inside[:, None], other=0.0)
        term = tl.dot(inner, b_tile.T, input_precision="ieee")
        pointers = out + tokens[:, None] * stride_out + row[None, :]
        mask = there[:, None] & inside[None, :]
        before = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        tl.store(pointers, (before + term).to(out.dtype.element_ty), mask=mask)


@jit
def _shrink_kernel(
    inner,  # [T, P * R], of x's dtype
    x,
    a,  # [S, P * R, K]
    order,
    tiles,
    stride_x,
    P: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    slot, tokens, there, count = _tokens(order, tiles, BLOCK_M)
    await_previous(OVERLAP)
    if count > 0:
        part = tl.program_id(1)
        a_part = a + (slot * P + part) * R * K
        total = _shrink(x, stride_x, tokens, there, a_part, K, R, BLOCK_M, BLOCK_K)
        pointers = inner + tokens[:, None] * (P * R) + part * R + tl.arange(0, R)[None, :]
        tl.store(pointers, total.to(inner.dtype.element_ty), mask=there[:, None])


@jit
def _add_kernel(
    out,  # [T, N]
    x,  # [T, K], or, unless FUSED, `inner` of `_shrink_kernel`
    a,
    b,  # [S, N, R]
    bounds,  # [P, 2] int32, the first row and the end of each projection
    order,
    tiles,
    stride_x,
    stride_out,
    FUSED: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    slot, tokens, there, count = _tokens(order, tiles, BLOCK_M)
    await_previous(OVERLAP)
    if count > 0:
        begin = tl.program_id(1) * SPAN
        for part in range(P):
            first = tl.maximum(begin, tl.load(bounds + 2 * part))
            end = tl.minimum(begin + SPAN, tl.load(bounds + 2 * part + 1))
            if first < end:
                if FUSED:
                    a_part = a + (slot * P + part) * R * K
                    total = _shrink(x, stride_x, tokens, there, a_part, K, R, BLOCK_M, BLOCK_K)
                    inner = total.to(x.dtype.element_ty)
                else:
                    column = part * R + tl.arange(0, R)
                    pointers = x + tokens[:, None] * stride_x + column[None, :]
                    inner = tl.load(pointers, mask=there[:, None], other=0.0)
                own_b = b + slot * N * R
                _expand(out, stride_out, tokens, there, inner, own_b, first, end, R, BLOCK_N)


def add_adapters(out: LinearOutput, x: torch.Tensor, weights: LoRAWeights, plan: object) -> None:
    """See `Ops.add_adapters`."""
    assert isinstance(plan, AdapterPlan)
    target = out if isinstance(out, torch.Tensor) else out.parts[0]
    a, b, rank, num_parts = weights.a, weights.b, weights.rank, len(weights.rows)
    assert x.stride(1) == 1 and target.stride(1) == 1
    num_tiles, block_m, size = len(plan.tiles), plan.block_m, x.element_size()
    num_columns = x.shape[1]
    block_k = max(16, min(TILE_BYTES // (rank * size), TILE_BYTES // (2 * block_m * size)))
    shape = {"P": num_parts, "K": num_columns, "R": rank, "BLOCK_M": block_m}
    shape |= {"BLOCK_K": block_k} | overlap_options(x.device)
    is_fused = a is not None and block_m == 16 and rank <= MAX_FUSED_RANK
    if a is not None and not is_fused:
        inner = torch.empty(len(x), num_parts * rank, dtype=x.dtype, device=x.device)
        _shrink_kernel[(num_tiles, num_parts)](
            inner, x, a, plan.order, plan.tiles, x.stride(0), num_warps=NUM_WARPS, **shape
        )
        x = inner
    num_rows = b.shape[1]
    is_short = 2 * num_tiles * triton.cdiv(num_rows, SPAN) < num_multiprocessors(x.device)
    span = SPAN // 2 if is_short else SPAN
    _add_kernel[(num_tiles, triton.cdiv(num_rows, span))](
        target,
        x,
        a,
        b,
        weights.bounds,
        plan.order,
        plan.tiles,
        x.stride(0),
        target.stride(0),
        FUSED=is_fused,
        N=num_rows,
        SPAN=span,
        BLOCK_N=max(16, min(128, TILE_BYTES // (rank * size))),
        num_warps=NUM_WARPS,
        **shape,
    )
