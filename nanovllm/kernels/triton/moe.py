"""A mixture of experts as Triton kernels: route, sort by expert, two grouped products, sum.

P = T * k pairs, pair = token * k + slot. A program multiplies rows of one expert by a tile of its
weight, so that a weight that any token chose comes through memory once. Shapes follow from T alone:
the blocks of rows are as many as there can be, and programs of those that are empty end at once.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels.device import INTERPRETER, DeviceLimits, device_limits
from nanovllm.kernels.triton import hopper_experts
from nanovllm.kernels.triton.fp8_linear import quantize_rows
from nanovllm.kernels.triton.launch import await_previous, jit, overlap_options, release_next
from nanovllm.kernels.triton.linear import load_summed, parts_of
from nanovllm.kernels.triton.packed_linear import (
    MAX_BLOCK_COLUMNS,
    added_to,
    as_int16,
    dequantize,
    load_groups,
    multiply_blocks,
    uses_assembly,
    width_of_block,
)
from nanovllm.kernels.triton.tiled_linear import along_tokens, multiply_add
from nanovllm.kernels.types import (
    FP8_BLOCK,
    FP8_DTYPE,
    ClampedSwiGLU,
    LinearOutput,
    PackedWeight,
    PartialSums,
)

# Up to here the products of a token's experts stay apart for the next op to add up.
MAX_TOKENS_IN_PARTS = 256
SORT_CHUNK = 4096  # pairs that a program of the sort looks at in one go
BLOCK_COLUMNS = 3  # of the table of blocks: expert, first sorted pair, number of pairs
SUM_COLUMNS = 1024


class Tile(NamedTuple):
    """How a grouped product is cut up: block_m pairs times block_n columns of the result.

    Each column of the first product takes two rows of the weight, gate's and up's.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """Those of the first and of the second product; block_m is the same."""

    gate_up: Tile
    down: Tile


# Mean pairs per expert, at most -> tiles for half precision; see tests/benchmarks/bench_moe.py.
TILES = {
    1: Tiles(Tile(16, 64, 128, 4, 3), Tile(16, 64, 128, 4, 4)),
    6: Tiles(Tile(16, 64, 64, 4, 5), Tile(16, 128, 64, 4, 5)),
    20: Tiles(Tile(32, 64, 64, 4, 5), Tile(32, 128, 64, 4, 5)),
    80: Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
    float("inf"): Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
}
FP8_TILES = {
    8: Tiles(Tile(16, 64, 128, 4, 3), Tile(16, 64, 128, 4, 4)),
    20: Tiles(Tile(32, 64, 128, 4, 3), Tile(32, 64, 128, 4, 4)),
    80: Tiles(Tile(64, 64, 128, 4, 3), Tile(64, 128, 128, 4, 3)),
    float("inf"): Tiles(Tile(128, 64, 128, 8, 3), Tile(128, 128, 128, 8, 3)),
}
# Of packed weights. block_k is that of groups of 128 columns; of others as many groups, up to 128.
PACKED_TILES = {
    8: Tiles(Tile(16, 64, 256, 4, 3), Tile(16, 64, 256, 4, 3)),
    20: Tiles(Tile(32, 64, 256, 4, 3), Tile(32, 64, 256, 4, 3)),
    80: Tiles(Tile(64, 64, 128, 4, 3), Tile(64, 64, 128, 4, 3)),
    float("inf"): Tiles(Tile(128, 64, 128, 8, 3), Tile(128, 128, 128, 8, 3)),
}
MAX_PAIRS_IN_TENSOR_MEMORY = 80  # packed weights in the larger tiles ask for more than there is
# Packed weights of more pairs per expert, in the mean, and of more tokens are dequantised for the
# product: each of the two as a whole, if it has no more elements than that. Graphs of decode steps
# would hold the buffer once more.
MAX_PACKED_PAIRS = 80
MAX_PACKED_TOKENS = 1024
MAX_DEQUANTIZED = 2**30
FLOAT32_TILES = Tiles(Tile(16, 32, 32, 4, 3), Tile(16, 64, 32, 4, 3))


def choose_tiles(
    num_pairs: int, num_experts: int, dtype: torch.dtype, limits: DeviceLimits = INTERPRETER
) -> Tiles:
    """The tiles for so many pairs of tokens and experts, with weights of `dtype`."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    mean_pairs = num_pairs / num_experts
    if dtype == torch.uint8 and limits.has_tensor_memory:
        mean_pairs = min(mean_pairs, MAX_PAIRS_IN_TENSOR_MEMORY)
    table = {FP8_DTYPE: FP8_TILES, torch.uint8: PACKED_TILES}.get(dtype, TILES)
    return next(tiles for most, tiles in table.items() if mean_pairs <= most)


def is_dequantized(
    weights: tuple[torch.Tensor | PackedWeight, ...], x: torch.Tensor, mean_pairs: float
) -> bool:
    """Whether all experts' weights are dequantised for their products with x and what follows."""
    has_many = len(x) > MAX_PACKED_TOKENS and mean_pairs > MAX_PACKED_PAIRS
    if not has_many or x.dtype == torch.float32:
        return False
    return all(
        isinstance(weight, PackedWeight) and math.prod(weight.shape) <= MAX_DEQUANTIZED
        for weight in weights
    )


def dtype_of(weight: torch.Tensor | PackedWeight) -> torch.dtype:
    """A weight's dtype; torch.uint8 if it is packed."""
    return weight.numbers.dtype if isinstance(weight, PackedWeight) else weight.dtype


# Routing


@jit
def _route_kernel(
    expert_ids,  # [P] int32
    routing_weights,  # [P]
    sorted_pairs,  # IS_ALONE: [P] int32, else None
    blocks,  # IS_ALONE: [P, 3] int32, else None
    num_blocks,  # [1] int32 or None
    logits,  # [T, NUM_EXPERTS], in NUM_PARTS parts
    stride_logits,
    stride_part,
    NUM_PARTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_ALONE: tl.constexpr,  # whether there is one token only: each pair is a block
    OVERLAP: tl.constexpr,
):
    """One token: softmax over its experts, then the most probable ones, the lowest id of equals."""
    release_next(OVERLAP)
    await_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = routing_weights.dtype.element_ty
    expert = tl.arange(0, PADDED_EXPERTS)
    is_expert = expert < NUM_EXPERTS
    pointers = logits + token * stride_logits + expert
    x = load_summed(pointers, is_expert, stride_part, NUM_PARTS, dtype).to(tl.float32)
    x = tl.where(is_expert, x, -float("inf"))
    exponentials = tl.exp(x - tl.max(x, axis=0))
    probabilities = exponentials / tl.sum(exponentials, axis=0)
    # The bits of numbers >= 0 are ordered as they are. Below them the id: no two keys are equal,
    # and whatever the logits are, a key holds a valid id.
    bits = probabilities.to(tl.int32, bitcast=True).to(tl.int64)
    lowest: tl.constexpr = -(2**63)
    keys = tl.where(is_expert, (bits << 32) | (NUM_EXPERTS - 1 - expert), lowest)
    slot = tl.arange(0, PADDED_TOP_K)
    chosen = tl.zeros([PADDED_TOP_K], tl.float32)
    ids = tl.zeros([PADDED_TOP_K], tl.int32)
    for i in tl.static_range(TOP_K):
        key = tl.max(keys, axis=0)
        chosen = tl.where(slot == i, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), chosen)
        ids = tl.where(slot == i, NUM_EXPERTS - 1 - (key & 0xFFFFFFFF).to(tl.int32), ids)
        keys = tl.where(keys == key, lowest, keys)
    if NORMALIZE:
        chosen /= tl.sum(chosen, axis=0)
    is_slot = slot < TOP_K
    tl.store(routing_weights + token * TOP_K + slot, chosen.to(dtype), mask=is_slot)
    if IS_ALONE:
        tl.store(sorted_pairs + slot, slot, mask=is_slot)
        tl.store(blocks + slot * 3, ids, mask=is_slot)
        tl.store(blocks + slot * 3 + 1, slot, mask=is_slot)
        tl.store(blocks + slot * 3 + 2, 1, mask=is_slot)
        if num_blocks is not None:
            tl.store(num_blocks, TOP_K)
    else:
        tl.store(expert_ids + token * TOP_K + slot, ids, mask=is_slot)


@jit(do_not_specialize=["num_pairs"])
def _sort_pairs_kernel(
    sorted_pairs,  # [P] int32, by expert
    blocks,  # [number of blocks, 3] int32
    expert_ids,  # [P] int32
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One expert: its pairs into their places, and its blocks of at most BLOCK_M pairs.

    `first_block` of the pairs ahead leaves each expert room for its blocks. What an expert does not
    need of the room up to the next one's, it marks as empty.
    """
    await_previous(OVERLAP)
    expert = tl.program_id(0)
    index = tl.arange(0, CHUNK)
    are_before = tl.zeros([CHUNK], tl.int32)
    are_own = tl.zeros([CHUNK], tl.int32)
    for begin in range(0, num_pairs, CHUNK):
        ids = tl.load(expert_ids + begin + index, mask=begin + index < num_pairs, other=NUM_EXPERTS)
        are_before += (ids < expert).to(tl.int32)
        are_own += (ids == expert).to(tl.int32)
    start = tl.sum(are_before, axis=0)
    end = start + tl.sum(are_own, axis=0)

    position = start
    for begin in range(0, num_pairs, CHUNK):
        pair = begin + index
        ids = tl.load(expert_ids + pair, mask=pair < num_pairs, other=NUM_EXPERTS)
        is_own = (ids == expert).to(tl.int32)
        place = position + tl.cumsum(is_own, axis=0) - is_own
        tl.store(sorted_pairs + place, pair, mask=is_own == 1)
        position += tl.sum(is_own, axis=0)

    block = first_block(start, expert, BLOCK_M)
    next_block = first_block(end, expert + 1, BLOCK_M)
    while block < next_block:
        tl.store(blocks + block * 3, expert)
        tl.store(blocks + block * 3 + 1, start)
        tl.store(blocks + block * 3 + 2, tl.maximum(tl.minimum(end - start, BLOCK_M), 0))
        start += BLOCK_M
        block += 1


@jit
def first_block(num_pairs_before, num_experts_before, BLOCK_M: tl.constexpr):
    """Where an expert's blocks begin: no later than those ahead of it can end."""
    return num_pairs_before // BLOCK_M + tl.minimum(num_pairs_before, num_experts_before)


def num_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks of so many pairs, empty ones included: `first_block` after all experts."""
    return num_pairs // block_m + min(num_pairs, num_experts)


# Products


@jit(do_not_specialize=["num_tokens", "stride_x_scales"])
def _experts_kernel(
    out,  # GATED: [P, WIDTH], sorted; else float32 [TOP_K, T, WIDTH], or [P, WIDTH] by pair
    x,  # GATED: [T, K]; else [P, K], sorted
    x_scales,  # of x in fp8: float32 [T] or [P], or [K / FP8_BLOCK, T or P], else None
    weight,  # [experts * N, K], or int16 [experts * N, K * BITS / 16]
    scales,  # of fp8 weights: float32 [experts * N], or of blocks, else None
    group_scales,  # of packed weights: [experts * N, K / GROUP], else None
    zeros,  # the same, uint8, or None
    bias,  # [experts * N], or None
    routing_weights,  # [P]
    sorted_pairs,
    blocks,
    num_tokens,
    stride_x_scales,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    IN_PARTS: tl.constexpr,
    BY_BLOCKS: tl.constexpr,  # whether the scales are those of blocks; BLOCK_K is then FP8_BLOCK
    FP8_BLOCK: tl.constexpr,
    BITS: tl.constexpr,  # of packed weights, else None
    GROUP: tl.constexpr,
    PACKED_WIDTH: tl.constexpr,  # int16 of a row of a block
    PACKED_BLOCKS: tl.constexpr,  # that are fetched at a time
    ADDED: tl.constexpr,  # to packed numbers as they meet x
    ASSEMBLY: tl.constexpr,
    SWIGLU_ALPHA: tl.constexpr,  # of `ClampedSwiGLU`, as the limit; None: silu(gate) * up
    SWIGLU_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One block of pairs times the weights of BLOCK_N columns of the result.

    GATED: the first product, silu(gate) * up, N = 2 * WIDTH; else the second one, N = WIDTH, times
    routing weights.
    """
    await_previous(OVERLAP)
    num_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // num_tiles
    first_column = tl.program_id(0) % num_tiles * BLOCK_N
    expert = tl.load(blocks + block * 3)
    first_pair = tl.load(blocks + block * 3 + 1)
    num_pairs = tl.load(blocks + block * 3 + 2)
    if num_pairs == 0:
        return
    row = tl.arange(0, BLOCK_M)
    is_pair = row < num_pairs
    place = first_pair + row
    pair = tl.load(sorted_pairs + place, mask=is_pair, other=0)
    x_row = (pair // TOP_K if GATED else place).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_pointers = x + x_row[:, None] * K + k[None, :]
    column = first_column + tl.arange(0, BLOCK_N)
    first_weight_row = expert * (2 * WIDTH if GATED else WIDTH)
    # Columns past the result's are not stored, whatever weights they meet.
    weight_row = first_weight_row + tl.minimum(column, WIDTH - 1)
    weight_pointers = weight + weight_row[:, None].to(tl.int64) * K + k[None, :]
    # Few pairs: the weight's rows are those of the matrix instruction, which has at least 64.
    # Packed ones come from registers, as only those rows can.
    SWAPPED: tl.constexpr = BLOCK_M < 128 or BITS is not None
    product = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros_like(product)
    if BY_BLOCKS:
        # Whole blocks are an expert's own, and whole tiles lie in one.
        blocks_of_row: tl.constexpr = (K + FP8_BLOCK - 1) // FP8_BLOCK
        x_scale_pointers = x_scales + x_row
        scale_pointer = scales + (first_weight_row + first_column) // FP8_BLOCK * blocks_of_row
    if BITS is not None:
        NUM_INT16: tl.constexpr = K * BITS // 16
        NUM_GROUPS: tl.constexpr = K // GROUP
        safe_row = weight_row.to(tl.int64)
        numbers = weight + safe_row[:, None] * NUM_INT16
        row_scales = group_scales + safe_row * NUM_GROUPS
        row_zeros = None if zeros is None else zeros + safe_row * NUM_GROUPS
        row_x = x + x_row[:, None] * K
        groups = load_groups(row_scales, row_zeros, 0, K, GROUP, BITS, PACKED_WIDTH, PACKED_BLOCKS)
        if GATED:
            up_numbers = numbers + WIDTH * NUM_INT16
            up_scales = row_scales + WIDTH * NUM_GROUPS
            up_zeros = None if zeros is None else row_zeros + WIDTH * NUM_GROUPS
            up_groups = load_groups(
                up_scales, up_zeros, 0, K, GROUP, BITS, PACKED_WIDTH, PACKED_BLOCKS
            )
        for first in range(0, (NUM_INT16 + PACKED_WIDTH - 1) // PACKED_WIDTH, PACKED_BLOCKS):
            next_groups = load_groups(
                row_scales,
                row_zeros,
                first + PACKED_BLOCKS,
                K,
                GROUP,
                BITS,
                PACKED_WIDTH,
                PACKED_BLOCKS,
            )
            product = multiply_blocks(
                product,
                row_x,
                is_pair[:, None],
                numbers,
                groups,
                zeros is not None,
                first,
                K,
                GROUP,
                BITS,
                PACKED_WIDTH,
                PACKED_BLOCKS,
                ADDED,
                ASSEMBLY,
            )
            groups = next_groups
            if GATED:
                next_groups = load_groups(
                    up_scales,
                    up_zeros,
                    first + PACKED_BLOCKS,
                    K,
                    GROUP,
                    BITS,
                    PACKED_WIDTH,
                    PACKED_BLOCKS,
                )
                up = multiply_blocks(
                    up,
                    row_x,
                    is_pair[:, None],
                    up_numbers,
                    up_groups,
                    zeros is not None,
                    first,
                    K,
                    GROUP,
                    BITS,
                    PACKED_WIDTH,
                    PACKED_BLOCKS,
                    ADDED,
                    ASSEMBLY,
                )
                up_groups = next_groups
    else:
        for begin in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x_tile = tl.load(x_pointers, mask=is_pair[:, None], other=0.0)
                weight_tile = tl.load(weight_pointers)
                if GATED:
                    up_tile = tl.load(weight_pointers + WIDTH * K)
            else:
                in_row = (begin + k < K)[None, :]
                x_tile = tl.load(x_pointers, mask=is_pair[:, None] & in_row, other=0.0)
                weight_tile = tl.load(weight_pointers, mask=in_row, other=0.0)
                if GATED:
                    up_tile = tl.load(weight_pointers + WIDTH * K, mask=in_row, other=0.0)
            if BY_BLOCKS:
                x_scale = along_tokens(tl.load(x_scale_pointers, mask=is_pair, other=0.0), SWAPPED)
                nothing = tl.zeros_like(product)
                of_block = multiply_add(x_tile, weight_tile, nothing, SWAPPED)
                product += of_block * (x_scale * tl.load(scale_pointer))
                if GATED:
                    of_block = multiply_add(x_tile, up_tile, nothing, SWAPPED)
                    up_scale = tl.load(scale_pointer + WIDTH // FP8_BLOCK * blocks_of_row)
                    up += of_block * (x_scale * up_scale)
                x_scale_pointers += stride_x_scales
                scale_pointer += 1
            else:
                product = multiply_add(x_tile, weight_tile, product, SWAPPED)
                if GATED:
                    up = multiply_add(x_tile, up_tile, up, SWAPPED)
            x_pointers += BLOCK_K
            weight_pointers += BLOCK_K
    if SWAPPED:
        product, up = product.T, up.T
    if scales is not None and not BY_BLOCKS:
        x_scale = tl.load(x_scales + x_row, mask=is_pair, other=0.0)[:, None]
        product *= x_scale * tl.load(scales + weight_row)[None, :]
    if bias is not None:
        product += tl.load(bias + weight_row).to(tl.float32)[None, :]
    if GATED:
        if scales is not None and not BY_BLOCKS:
            up *= x_scale * tl.load(scales + weight_row + WIDTH)[None, :]
        if bias is not None:
            up += tl.load(bias + weight_row + WIDTH).to(tl.float32)[None, :]
        dtype: tl.constexpr = out.dtype.element_ty
        gate = product.to(dtype).to(tl.float32)
        if SWIGLU_ALPHA is None:
            y = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        else:
            gate = tl.minimum(gate, SWIGLU_LIMIT)
            up = tl.minimum(tl.maximum(up.to(dtype).to(tl.float32), -SWIGLU_LIMIT), SWIGLU_LIMIT)
            y = (gate / (1 + tl.exp(-SWIGLU_ALPHA * gate))).to(dtype).to(tl.float32) * (up + 1)
        out_row = place
    else:
        routing_weight = tl.load(routing_weights + pair, mask=is_pair, other=0.0).to(tl.float32)
        y = product * routing_weight[:, None]
        out_row = pair % TOP_K * num_tokens + pair // TOP_K if IN_PARTS else pair
    pointers = out + out_row[:, None].to(tl.int64) * WIDTH + column[None, :]
    mask = is_pair[:, None] & (column < WIDTH)[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=mask)


@jit
def _sum_experts_kernel(
    out,  # [T, N]
    products,  # [T, TOP_K, N]
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    y = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        pointers = products + (token * TOP_K + slot) * N + column
        y += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * N + column, y.to(out.dtype.element_ty), mask=mask)


# The whole of it


class Routing(NamedTuple):
    """Which pairs each program of the products works on, and how much each pair counts."""

    weights: torch.Tensor  # [P]
    sorted_pairs: torch.Tensor  # [P] int32
    blocks: torch.Tensor  # [number of blocks, BLOCK_COLUMNS] int32


def route(
    router_logits: LinearOutput, num_experts_per_tok: int, norm_topk_prob: bool, block_m: int
) -> Routing:
    """The pairs of router_logits [T, E], T > 0, in blocks of at most `block_m`."""
    logits = parts_of(router_logits)[0]
    (num_tokens, num_experts), device = logits.shape, logits.device
    num_pairs = num_tokens * num_experts_per_tok
    is_alone = num_tokens == 1
    shape = num_pairs if is_alone else num_blocks(num_pairs, num_experts, block_m), BLOCK_COLUMNS
    sorted_pairs = torch.empty(num_pairs, dtype=torch.int32, device=device)
    blocks = torch.empty(shape, dtype=torch.int32, device=device)
    alone = (sorted_pairs, blocks, None) if is_alone else None
    expert_ids, weights = _choose(router_logits, num_experts_per_tok, norm_topk_prob, alone)
    if not is_alone:
        _sort_pairs_kernel[(num_experts,)](
            sorted_pairs,
            blocks,
            expert_ids,
            num_pairs,
            NUM_EXPERTS=num_experts,
            BLOCK_M=block_m,
            CHUNK=min(SORT_CHUNK, max(32, triton.next_power_of_2(num_pairs))),
            num_warps=4 if num_pairs <= 1024 else 8,
            **overlap_options(device),
        )
    return Routing(weights, sorted_pairs, blocks)


def _choose(
    router_logits: LinearOutput,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    alone: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts that router_logits [T, E] choose, [P] int32, and their weights [P].

    alone: of the only token, pairs, blocks and their number: they are written instead of experts.
    """
    logits, num_parts, stride_part, dtype = parts_of(router_logits)
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1
    num_pairs, device = num_tokens * num_experts_per_tok, logits.device
    weights = torch.empty(num_pairs, dtype=dtype, device=device)
    expert_ids = torch.empty(num_pairs, dtype=torch.int32, device=device)
    _route_kernel[(num_tokens,)](
        expert_ids,
        weights,
        *(alone or (None, None, None)),
        logits,
        logits.stride(0),
        stride_part,
        NUM_PARTS=num_parts,
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        TOP_K=num_experts_per_tok,
        PADDED_TOP_K=triton.next_power_of_2(num_experts_per_tok),
        NORMALIZE=norm_topk_prob,
        IS_ALONE=alone is not None,
        num_warps=1,
        **overlap_options(device),
    )
    return expert_ids, weights


def _multiply(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    routing: Routing,
    num_experts: int,
    num_experts_per_tok: int,
    tile: Tile,
    dequantizes: bool,
    swiglu: ClampedSwiGLU | None = None,
) -> None:
    """`_experts_kernel` over all blocks; out's width tells which product it is.

    dequantizes: whether the kernel gets a dequantised copy of the packed weight.
    """
    if dequantizes:
        assert isinstance(weight, PackedWeight)
        weight = dequantize(weight, x.dtype)
    width = out.shape[-1]
    x_scales = None
    by_blocks = scales is not None and scales.dim() == 2
    if scales is not None:
        x, x_scales = quantize_rows(x, FP8_BLOCK if by_blocks else None)
        assert not by_blocks or (tile.block_k == FP8_BLOCK and FP8_BLOCK % tile.block_n == 0)
    packed = weight if isinstance(weight, PackedWeight) else None
    values = weight if isinstance(weight, torch.Tensor) else as_int16(weight)
    assert x.is_contiguous() and values.is_contiguous()
    _experts_kernel[(len(routing.blocks) * triton.cdiv(width, tile.block_n),)](
        out,
        x,
        x_scales,
        values,
        scales,
        packed and packed.scales,
        packed and packed.zeros,
        bias,
        routing.weights,
        routing.sorted_pairs,
        routing.blocks,
        len(routing.sorted_pairs) // num_experts_per_tok,
        0 if x_scales is None else x_scales.stride(1),
        WIDTH=width,
        K=weight.shape[1],
        TOP_K=num_experts_per_tok,
        GATED=width < weight.shape[0] // num_experts,
        IN_PARTS=out.dim() == 3,
        BY_BLOCKS=by_blocks,
        FP8_BLOCK=FP8_BLOCK,
        BITS=packed and packed.bits,
        GROUP=packed and packed.group_size,
        PACKED_WIDTH=packed and width_of_block(packed),
        PACKED_BLOCKS=max(1, tile.block_k // MAX_BLOCK_COLUMNS),
        ADDED=packed and added_to(packed, x, tile.block_m, tile.num_warps),
        ASSEMBLY=uses_assembly(x),
        SWIGLU_ALPHA=None if swiglu is None else swiglu.alpha,
        SWIGLU_LIMIT=None if swiglu is None else swiglu.limit,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap_options(x.device),
    )


def experts(
    x: torch.Tensor,
    router_logits: LinearOutput,
    gate_up_weight: torch.Tensor | PackedWeight,
    down_weight: torch.Tensor | PackedWeight,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    gate_up_scales: torch.Tensor | None = None,
    down_scales: torch.Tensor | None = None,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    swiglu: ClampedSwiGLU | None = None,
    tiles: Tiles | None = None,
) -> LinearOutput:
    """x [T, H], router_logits [T, E] -> [T, H]; see `Ops.experts`. `tiles`: instead of the best."""
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    num_experts = parts_of(router_logits)[0].shape[1]
    num_pairs = num_tokens * num_experts_per_tok
    if tiles is None and x.dtype == torch.float32:
        tiles = FLOAT32_TILES
    weights = gate_up_weight, down_weight
    is_plain = tiles is None and gate_up_bias is None and swiglu is None
    if is_plain and hopper_experts.takes(x, *weights):
        assert isinstance(gate_up_weight, torch.Tensor) and isinstance(down_weight, torch.Tensor)
        alone = None
        if num_tokens == 1:  # each pair is a block
            alone = hopper_experts.empty_pairs(num_pairs, num_pairs, x.device)
        chosen = _choose(router_logits, num_experts_per_tok, norm_topk_prob, alone)
        return hopper_experts.hopper_experts(
            x, *chosen, gate_up_weight, down_weight, num_experts, pairs=alone
        )
    dequantizes = tiles is None and is_dequantized(weights, x, num_pairs / num_experts)
    if tiles is None:
        dtype = x.dtype if dequantizes else dtype_of(gate_up_weight)
        tiles = choose_tiles(num_pairs, num_experts, dtype, device_limits(x.device))
    routing = route(router_logits, num_experts_per_tok, norm_topk_prob, tiles.gate_up.block_m)
    rest = routing, num_experts, num_experts_per_tok
    size = gate_up_weight.shape[0] // num_experts // 2
    activations = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    gate_up = gate_up_weight, gate_up_scales, gate_up_bias
    _multiply(activations, x, *gate_up, *rest, tiles.gate_up, dequantizes, swiglu)
    in_parts = num_tokens <= MAX_TOKENS_IN_PARTS
    if in_parts:
        shape = num_experts_per_tok, num_tokens, hidden_size
        products = torch.empty(shape, dtype=torch.float32, device=x.device)
    else:
        products = torch.empty(num_pairs, hidden_size, dtype=x.dtype, device=x.device)
    down = down_weight, down_scales, down_bias
    _multiply(products, activations, *down, *rest, tiles.down, dequantizes)
    if in_parts:
        return PartialSums(products, x.dtype)
    out = torch.empty_like(x)
    _sum_experts_kernel[(num_tokens, triton.cdiv(hidden_size, SUM_COLUMNS))](
        out,
        products,
        N=hidden_size,
        TOP_K=num_experts_per_tok,
        BLOCK=SUM_COLUMNS,
        num_warps=4,
        **overlap_options(x.device),
    )
    return out
