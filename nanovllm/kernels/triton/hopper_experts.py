"""Experts of few tokens for Hopper, in Gluon: sort the pairs, then two grouped products.

What bounds them is the bandwidth of the experts' weights, so copies of weights never stop. A
program of a product stays on its multiprocessor and takes one tile after another: rows of an
expert's weight times a block of its pairs. One warp copies columns of weights into a ring of shared
memory, by bulk tensor copies, four warps of the first product fetch the tokens of the pairs, and a
warpgroup multiplies both. The weight's rows are those of the matrix instruction. Copies for the
next tile run while a tile is stored.

Launches overlap, too. Programs of the second product come while the last ones of the first still
run, and start their copies. Those of the first product come while the pairs are being sorted. If
there are tokens enough for all experts, they guess their first expert and start with its weights.

Every stage of the ring has two barriers: "full" when its bytes are there, "free" when the
warpgroup is done with them; see kernels/triton/hopper_prefill.py.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import (
    await_previous,
    is_hopper,
    jit,
    next_power_of_2,
    num_multiprocessors,
    overlap_options,
    with_dry_runs,
)
from nanovllm.kernels.triton.weight_tiles import (
    COLUMNS,
    RUN,
    silu_of_runs,
    tile_layout,
    weight_tiles,
)
from nanovllm.kernels.types import PackedWeight, PartialSums

MAX_TOKENS = 256
BLOCK_K = COLUMNS  # of a stage
COPYING_REGISTERS = 24  # of a thread
REGISTERS = 96  # of each thread when a program starts: others have room beside it
GATHERING_REGISTERS = 40
BLOCK_COLUMNS = gl.constexpr(3)  # of the table of blocks: expert, first sorted pair, pairs
MIN_GUESSED = 4  # pairs of an expert in the mean, from which on all experts have some
# Triton 3.9 has another name for it than 3.6.
start_gather = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
GATHERING_THREADS = gl.constexpr(128)


class Tile(NamedTuple):
    """What a program multiplies at a time."""

    pairs: int
    stages: int  # of the ring
    rows: int = 128  # of the weight: those of two matrix instructions


# Mean pairs per expert, at most -> tile.
TILES = {9: Tile(16, 11), float("inf"): Tile(32, 10)}
TILE_OF_ONE_TOKEN = Tile(16, 16, 64)


@jit(do_not_specialize=["num_pairs"])
def _sort_pairs_kernel(
    sorted_pairs,  # [P] int32, by expert
    blocks,  # [>= num_blocks, 3] int32
    num_blocks,  # [1] int32
    expert_ids,  # [P] int32
    num_pairs,
    PADDED_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One expert: its pairs into their places, and its blocks."""
    await_previous(OVERLAP)
    expert = tl.program_id(0)
    pair = tl.arange(0, CHUNK)
    is_pair = pair < num_pairs
    ids = tl.load(expert_ids + pair, mask=is_pair, other=0)
    counts = tl.histogram(ids, PADDED_EXPERTS, mask=is_pair)
    blocks_of = (counts + BLOCK_M - 1) // BLOCK_M
    others = tl.arange(0, PADDED_EXPERTS)
    start = tl.sum(tl.where(others < expert, counts, 0), axis=0)
    count = tl.sum(tl.where(others == expert, counts, 0), axis=0)
    block = tl.sum(tl.where(others < expert, blocks_of, 0), axis=0)
    if expert == 0:
        tl.store(num_blocks, tl.sum(blocks_of, axis=0))
    is_own = (is_pair & (ids == expert)).to(tl.int32)
    place = start + tl.cumsum(is_own, axis=0) - is_own
    tl.store(sorted_pairs + place, pair, mask=is_own == 1)
    for begin in range(0, count, BLOCK_M):
        tl.store(blocks + block * 3, expert)
        tl.store(blocks + block * 3 + 1, start + begin)
        tl.store(blocks + block * 3 + 2, tl.minimum(count - begin, BLOCK_M))
        block += 1


@gluon.jit
def _start_weights(
    weight_tiles, ring, expert, tile, k, stage, WIDTH: gl.constexpr, IS_GATED: gl.constexpr
):
    """The copy of a stage's weights; its barrier expects the bytes of `_copy`'s x as well."""
    weights, xs, full, _free = ring
    ROWS: gl.constexpr = weights.shape[1]
    BLOCK_K: gl.constexpr = weights.shape[2]
    full = full.index(stage)
    x_bytes: gl.constexpr = 0 if IS_GATED else xs.shape[1] * BLOCK_K * 2
    mbarrier.expect(full, weight_tiles.block_type.nbytes + x_bytes)
    if IS_GATED:
        RUN: gl.constexpr = weight_tiles.block_shape[2]
        runs = weights.index(stage).reshape(weight_tiles.block_shape)
        first_run = expert * (2 * WIDTH // RUN) + tile * (ROWS // RUN // 2)
        start_copy(weight_tiles, [first_run, 0, 0, k * BLOCK_K], full, runs)
    else:
        first_row = expert * WIDTH + tile * ROWS
        start_copy(weight_tiles, [first_row, k * BLOCK_K], full, weights.index(stage))


@gluon.jit
def _is_guessed(blocks, num_tiles, TILES: gl.constexpr):
    """Whether a program's first expert is the one that it has if all experts have one block."""
    guess = gl.program_id(0) // TILES
    expert = gl.load(blocks + guess * BLOCK_COLUMNS, cache_modifier=".cg")
    return (gl.program_id(0) < num_tiles) & (expert == guess)


@gluon.jit
def _copy(
    x_tiles,
    weight_tiles,
    ring,
    blocks,
    num_blocks,
    WIDTH: gl.constexpr,
    IS_GATED: gl.constexpr,
    NUM_K: gl.constexpr,
    TILES: gl.constexpr,
    GUESSES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """The copying warp."""
    _weights, xs, full, free = ring
    STAGES: gl.constexpr = xs.shape[0]
    BLOCK_K: gl.constexpr = xs.shape[2]
    first = gl.program_id(0)
    # No kernel writes weights, and the blocks are there when the second product starts. So neither
    # it nor a guess waits for the kernel ahead. A first tile has all stages of the ring.
    is_started = False
    if GUESSES:
        guess = first // TILES
        for early in range(STAGES):
            _start_weights(weight_tiles, ring, guess, first % TILES, early, early, WIDTH, IS_GATED)
        if OVERLAP:
            gdc_wait()
        num_tiles = gl.load(num_blocks, cache_modifier=".cg") * TILES
        is_started = _is_guessed(blocks, num_tiles, TILES)
        if not is_started:  # then what has come is of no use
            for wrong in range(STAGES):
                mbarrier.wait(full.index(wrong), 0)
    else:
        num_tiles = gl.load(num_blocks, cache_modifier=".cg") * TILES
    if (first < num_tiles) & (not is_started):
        expert = gl.load(blocks + first // TILES * BLOCK_COLUMNS, cache_modifier=".cg")
        for early in range(STAGES):
            _start_weights(weight_tiles, ring, expert, first % TILES, early, early, WIDTH, IS_GATED)
    if OVERLAP and not IS_GATED:
        gdc_wait()
    done = 0
    for index in range(first, num_tiles, gl.num_programs(0)):
        block = blocks + index // TILES * BLOCK_COLUMNS
        its_expert = gl.load(block, cache_modifier=".cg")
        first_pair = gl.load(block + 1, cache_modifier=".cg")
        tile = index % TILES
        for k in range(NUM_K):
            stage = done % STAGES
            if done >= STAGES:
                mbarrier.wait(free.index(stage), (done // STAGES + 1) & 1)
                _start_weights(weight_tiles, ring, its_expert, tile, k, stage, WIDTH, IS_GATED)
            if not IS_GATED:
                start_copy(x_tiles, [first_pair, k * BLOCK_K], full.index(stage), xs.index(stage))
            done += 1


@gluon.jit
def _gather(
    x,
    sorted_pairs,
    ring,
    blocks,
    num_blocks,
    NUM_K: gl.constexpr,
    TILES: gl.constexpr,
    TOP_K: gl.constexpr,
    GUESSES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """The gathering warps: x of the pairs of a block."""
    _weights, xs, full, free = ring
    STAGES: gl.constexpr = xs.shape[0]
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    if OVERLAP:
        gdc_wait()
    num_tiles = gl.load(num_blocks, cache_modifier=".cg") * TILES
    if GUESSES and not _is_guessed(blocks, num_tiles, TILES):
        for wrong in range(STAGES):
            mbarrier.arrive(full.index(wrong), count=GATHERING_THREADS)
            mbarrier.wait(full.index(wrong), 0)
    done = 0
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        block = blocks + index // TILES * BLOCK_COLUMNS
        place = gl.load(block + 1, cache_modifier=".cg") + row
        is_pair = row < gl.load(block + 2, cache_modifier=".cg")
        from_row = gl.load(sorted_pairs + place, mask=is_pair, other=0) // TOP_K
        pointers = x + from_row.to(gl.int64)[:, None] * (NUM_K * BLOCK_K) + column[None, :]
        mask = is_pair[:, None] & (column >= 0)[None, :]
        for _k in range(NUM_K):
            stage = done % STAGES
            if done >= STAGES:
                mbarrier.wait(free.index(stage), (done // STAGES + 1) & 1)
            start_gather(xs.index(stage), pointers, mask=mask)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            pointers += BLOCK_K
            done += 1


@gluon.jit
def _compute(
    out,
    routing_weights,
    sorted_pairs,
    ring,
    blocks,
    num_blocks,
    num_tokens,
    WIDTH: gl.constexpr,
    IS_GATED: gl.constexpr,
    RUN: gl.constexpr,
    NUM_K: gl.constexpr,
    TILES: gl.constexpr,
    TOP_K: gl.constexpr,
    GUESSES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """The computing warpgroup."""
    weights, xs, full, free = ring
    STAGES: gl.constexpr = xs.shape[0]
    BLOCK_M: gl.constexpr = xs.shape[1]
    ROWS: gl.constexpr = weights.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dtype: gl.constexpr = out.dtype.element_ty
    if OVERLAP:
        gdc_wait()
        if GUESSES:
            gdc_launch_dependents()
    num_tiles = gl.load(num_blocks, cache_modifier=".cg") * TILES
    done = 0  # stages, and before them those of a wrong guess
    if GUESSES and not _is_guessed(blocks, num_tiles, TILES):
        for wrong in range(STAGES):
            mbarrier.wait(full.index(wrong), 0)
        done += STAGES
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        block = blocks + index // TILES * BLOCK_COLUMNS
        first_pair = gl.load(block + 1, cache_modifier=".cg")
        num_pairs = gl.load(block + 2, cache_modifier=".cg")
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, layout)
        for k in range(NUM_K):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), (done // STAGES) & 1)
            if IS_GATED:
                fence_async_shared()
            x = xs.index(stage).permute((1, 0))
            acc = warpgroup_mma(weights.index(stage), x, acc, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])
            if k > 0:
                mbarrier.arrive(free.index((done - 1) % STAGES))
            done += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((done - 1) % STAGES))
        if IS_GATED:
            act = silu_of_runs(acc, RUN, dtype)
            LANES: gl.constexpr = ROWS // 16
            to: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
            values = gl.convert_layout(act.to(dtype), to)
            row = gl.arange(0, ROWS // 2, layout=gl.SliceLayout(1, to))
            row += index % TILES * (ROWS // 2)
            place = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, to))
            pointers = out + (first_pair + place).to(gl.int64)[None, :] * WIDTH + row[:, None]
            mask = (row < WIDTH)[:, None] & (place < num_pairs)[None, :]
            # They stay in the L2 cache until the second product has read them, and are never
            # written to memory, which costs more of its time than their bytes.
            gl.store(pointers, values, mask=mask, eviction_policy="evict_last")
        else:
            row = index % TILES * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            place = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
            is_pair = place < num_pairs
            pair = gl.load(sorted_pairs + first_pair + place, mask=is_pair, other=0)
            share = gl.load(routing_weights + pair, mask=is_pair, other=0.0).to(gl.float32)
            out_row = (pair % TOP_K * num_tokens + pair // TOP_K).to(gl.int64)
            pointers = out + out_row[None, :] * WIDTH + row[:, None]
            mask = (row < WIDTH)[:, None] & is_pair[None, :]
            gl.store(pointers, (acc * share[None, :]).to(dtype), mask=mask)


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens"])
def _hopper_experts_kernel(
    out,  # IS_GATED: [P, WIDTH], sorted; else [TOP_K, T, WIDTH]
    x,  # IS_GATED: [T, K]; else None
    x_tiles,  # else sorted x [P, K] as tiles of [BLOCK_M, BLOCK_K]; rows past P read as zeros
    weight_tiles,  # see weight_tiles.py
    routing_weights,  # [P]
    sorted_pairs,  # [P] int32
    blocks,  # [>= num_blocks, 3] int32
    num_blocks,  # [1] int32
    num_tokens,
    WIDTH: gl.constexpr,
    NUM_K: gl.constexpr,  # stages of a tile
    TOP_K: gl.constexpr,
    IS_GATED: gl.constexpr,
    GUESSES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    ROWS: gl.constexpr,
    RUN: gl.constexpr,
    STAGES: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
    GATHERING_REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """IS_GATED: the first product, silu(gate) * up; else the second one, times routing weights."""
    if OVERLAP:
        # The second product may start when all programs of the first know that the sort is over.
        if IS_GATED and not GUESSES:
            gdc_wait()
        if not GUESSES:
            gdc_launch_dependents()
    dtype: gl.constexpr = weight_tiles.dtype
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    swizzled: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_K, 16, 2)
    weights = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], swizzled)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1 + GATHERING_THREADS if IS_GATED else 1)
        mbarrier.init(free.index(stage), count=1)
    ring = (weights, xs, full, free)
    TILES: gl.constexpr = (WIDTH * (2 if IS_GATED else 1) + ROWS - 1) // ROWS
    # Triton takes the arguments of roles as tuples written out.
    if IS_GATED:
        gl.warp_specialize(
            [
                (_compute, (
                    out, routing_weights, sorted_pairs, ring, blocks, num_blocks, num_tokens,
                    WIDTH, IS_GATED, RUN, NUM_K, TILES, TOP_K, GUESSES, OVERLAP,
                )),
                (_gather, (
                    x, sorted_pairs, ring, blocks, num_blocks,
                    NUM_K, TILES, TOP_K, GUESSES, OVERLAP,
                )),
                (_copy, (
                    x_tiles, weight_tiles, ring, blocks, num_blocks,
                    WIDTH, IS_GATED, NUM_K, TILES, GUESSES, OVERLAP,
                )),
            ],
            [4, 1],
            [GATHERING_REGISTERS, COPYING_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (
                    out, routing_weights, sorted_pairs, ring, blocks, num_blocks, num_tokens,
                    WIDTH, IS_GATED, RUN, NUM_K, TILES, TOP_K, GUESSES, OVERLAP,
                )),
                (_copy, (
                    x_tiles, weight_tiles, ring, blocks, num_blocks,
                    WIDTH, IS_GATED, NUM_K, TILES, GUESSES, OVERLAP,
                )),
            ],
            [1],
            [COPYING_REGISTERS],
        )  # fmt: skip


class SortedPairs(NamedTuple):
    """Pairs of tokens and experts, token * TOP_K + slot, by their experts and in blocks."""

    pairs: torch.Tensor  # [P] int32
    blocks: torch.Tensor  # [>= num_blocks, 3] int32: expert, first sorted pair, number of pairs
    num_blocks: torch.Tensor  # [1] int32


def empty_pairs(num_pairs: int, most_blocks: int, device: torch.device) -> SortedPairs:
    """Uninitialised."""
    return SortedPairs(
        torch.empty(num_pairs, dtype=torch.int32, device=device),
        torch.empty(most_blocks, BLOCK_COLUMNS.value, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )


def sort_pairs(
    expert_ids: torch.Tensor, num_experts: int, block_m: int, least_blocks: int = 0
) -> SortedPairs:
    """The pairs with expert_ids [P] int32, in blocks of at most `block_m`.

    least_blocks: rows of the table of blocks at least; those past num_blocks have any contents.
    """
    num_pairs, device = len(expert_ids), expert_ids.device
    # No choice of experts needs more.
    most_blocks = max(num_pairs // block_m + min(num_pairs, num_experts), least_blocks)
    result = empty_pairs(num_pairs, most_blocks, device)
    _sort_pairs_kernel[(num_experts,)](
        *result,
        expert_ids,
        num_pairs,
        PADDED_EXPERTS=next_power_of_2(num_experts),
        BLOCK_M=block_m,
        CHUNK=max(32, next_power_of_2(num_pairs)),
        num_warps=4 if num_pairs <= 1024 else 8,
        **overlap_options(device),
    )
    return result


def takes(x: torch.Tensor, *weights: torch.Tensor | PackedWeight) -> bool:
    """Whether `hopper_experts` computes x [T, H] with these weights, which have no biases."""
    return (
        0 < len(x) <= MAX_TOKENS
        and is_hopper(x.device)
        and x.dtype != torch.float32
        and all(isinstance(w, torch.Tensor) and w.dtype == x.dtype for w in weights)
        and all(weight.shape[1] % BLOCK_K == 0 for weight in weights)
    )


def hopper_experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    num_experts: int,
    *,
    pairs: SortedPairs | None = None,
    tile: Tile | None = None,
    guesses: bool | None = None,
) -> PartialSums:
    """x [T, H], and of each pair the expert and its weight [P] -> [T, H], a part for each slot.

    The parts have x's dtype. See `Ops.experts` for the weights of experts. With `pairs`, which need
    no sort, expert_ids are not read. `tile` and `guesses` override the tuned choice.
    """
    (num_tokens, hidden_size), num_pairs = x.shape, len(expert_ids)
    top_k = num_pairs // num_tokens
    size = len(gate_up_weight) // num_experts // 2
    mean_pairs = num_pairs / num_experts
    if tile is None:
        tile = next(tile for most, tile in TILES.items() if mean_pairs <= most)
        tile = TILE_OF_ONE_TOKEN if num_tokens == 1 else tile
    if guesses is None:
        guesses = mean_pairs >= MIN_GUESSED
    num_programs = num_multiprocessors(x.device)
    if pairs is None:
        pairs = sort_pairs(expert_ids, num_experts, tile.pairs, least_blocks=num_programs)
    activations = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    shape = top_k, num_tokens, hidden_size
    products = torch.empty(shape, dtype=x.dtype, device=x.device)
    for out, rows, weight in (
        (activations, x, gate_up_weight),
        (products, activations, down_weight),
    ):
        is_gated, k = out is activations, weight.shape[1]
        x_tiles = None
        if not is_gated:
            block = [tile.pairs, BLOCK_K]
            x_tiles = TensorDescriptor(rows, [num_pairs, k], [k, 1], block, tile_layout(2))
        assert rows.is_contiguous() and weight.is_contiguous() and k % BLOCK_K == 0
        _hopper_experts_kernel[(num_programs,)](
            out,
            rows if is_gated else None,
            x_tiles,
            weight_tiles(weight, tile.rows, is_gated, num_experts),
            routing_weights,
            *pairs,
            num_tokens,
            WIDTH=out.shape[-1],
            NUM_K=k // BLOCK_K,
            TOP_K=top_k,
            IS_GATED=is_gated,
            GUESSES=is_gated and guesses,
            BLOCK_M=tile.pairs,
            BLOCK_K=BLOCK_K,
            ROWS=tile.rows,
            RUN=RUN,
            STAGES=min(tile.stages, k // BLOCK_K),
            COPYING_REGISTERS=COPYING_REGISTERS,
            GATHERING_REGISTERS=GATHERING_REGISTERS,
            num_warps=4,
            maxnreg=REGISTERS,
            **overlap_options(x.device),
        )
    return PartialSums(products, x.dtype)
