"""A mixture of experts as Triton kernels: route, sort by expert, two grouped products, sum.

P = T * k pairs, pair = token * k + slot. A program multiplies rows of one expert by a tile of its
weight, so that a weight that any token chose comes through memory once. Shapes follow from T alone:
the blocks of rows are as many as there can be, and programs of those that are empty end at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels.ops import PartialSums, Product
from nanovllm.kernels.triton_launch import await_previous, overlap_options
from nanovllm.kernels.triton_linear import load_summed, parts_of

# Up to here the products of a token's experts stay apart for the next op to add up.
MAX_TOKENS_IN_PARTS = 256
SORT_CHUNK = 4096  # pairs that a program of the sort looks at in one go
BLOCK_COLUMNS = 3  # of the table of blocks: expert, first sorted pair, number of pairs
SUM_COLUMNS = 1024


class Tile(NamedTuple):
    """How a grouped product is cut up: block_m pairs times block_n rows of the weight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """Those of the first and of the second product; block_m is the same."""

    gate_up: Tile
    down: Tile


# Mean pairs per expert, at most -> tiles for half precision; see tests/gpu/bench_moe.py.
# Few pairs: small tiles, so that many programs read the weights of the few experts that are active.
TILES = {
    0.5: Tiles(Tile(16, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4)),
    6: Tiles(Tile(16, 128, 64, 4, 5), Tile(16, 128, 64, 4, 5)),
    20: Tiles(Tile(32, 128, 64, 4, 5), Tile(32, 128, 64, 4, 5)),
    56: Tiles(Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
    float("inf"): Tiles(Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
}
FLOAT32_TILES = Tiles(Tile(16, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3))


def choose_tiles(num_pairs: int, num_experts: int, dtype: torch.dtype) -> Tiles:
    """The tiles for so many pairs of tokens and experts."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    return next(tiles for most, tiles in TILES.items() if num_pairs / num_experts <= most)


# Routing


@triton.jit
def _route_kernel(
    expert_ids,  # [P] int32
    routing_weights,  # [P]
    logits,  # [T, NUM_EXPERTS], in NUM_PARTS parts
    stride_logits,
    stride_part,
    NUM_PARTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token: softmax over its experts, then the most probable ones, the lowest id of equals."""
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
    tl.store(expert_ids + token * TOP_K + slot, ids, mask=slot < TOP_K)
    tl.store(routing_weights + token * TOP_K + slot, chosen.to(dtype), mask=slot < TOP_K)


@triton.jit(do_not_specialize=["num_pairs"])
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


@triton.jit
def first_block(num_pairs_before, num_experts_before, BLOCK_M: tl.constexpr):
    """Where an expert's blocks begin: no later than those ahead of it can end."""
    return num_pairs_before // BLOCK_M + tl.minimum(num_pairs_before, num_experts_before)


def num_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks of so many pairs, empty ones included: `first_block` after all experts."""
    return num_pairs // block_m + min(num_pairs, num_experts)


# Products


@triton.jit(do_not_specialize=["num_tokens"])
def _experts_kernel(
    out,  # GATED: [P, N / 2], sorted; else float32 [TOP_K, T, N], or [P, N] in pairs' order
    x,  # GATED: [T, K]; else [P, K], sorted
    weight,  # [experts * N, K]
    scales,  # of the weight's rows, float32 [experts * N], or None
    routing_weights,  # [P]
    sorted_pairs,
    blocks,
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    IN_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One block of pairs times one tile of its expert's weight.

    GATED: the first product, silu(gate) * up of it; else the second one, times routing weights.
    """
    await_previous(OVERLAP)
    num_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // num_tiles
    first_column = tl.program_id(0) % num_tiles * BLOCK_N
    expert = tl.load(blocks + block * 3)
    first_pair = tl.load(blocks + block * 3 + 1)
    num_pairs = tl.load(blocks + block * 3 + 2)
    if num_pairs == 0:
        return
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.arange(0, BLOCK_M)
    is_pair = row < num_pairs
    place = first_pair + row
    pair = tl.load(sorted_pairs + place, mask=is_pair, other=0)
    column = first_column + tl.arange(0, BLOCK_N)
    # The tile's last rows may lie past the expert's: they are its last one, and are not stored.
    weight_row = tl.minimum(column, N - 1)
    if GATED:  # gate and up in turns, so that a thread has both halves of what it multiplies
        weight_row = weight_row % 2 * (N // 2) + weight_row // 2
    weight_row += (expert * N).to(tl.int64)
    x_row = (pair // TOP_K if GATED else place).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_pointers = x + x_row[:, None] * K + k[None, :]
    weight_pointers = weight + weight_row[:, None] * K + k[None, :]
    # Few pairs: the weight's rows are those of the matrix instruction, which has at least 64.
    SWAPPED: tl.constexpr = BLOCK_M < 64
    product = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x_tile = tl.load(x_pointers, mask=is_pair[:, None], other=0.0)
            weight_tile = tl.load(weight_pointers)
        else:
            in_row = (begin + k < K)[None, :]
            x_tile = tl.load(x_pointers, mask=is_pair[:, None] & in_row, other=0.0)
            weight_tile = tl.load(weight_pointers, mask=in_row, other=0.0)
        if scales is not None:
            weight_tile = weight_tile.to(dtype)
        if SWAPPED:
            product = tl.dot(weight_tile, x_tile.T, product, input_precision="ieee")
        else:
            product = tl.dot(x_tile, weight_tile.T, product, input_precision="ieee")
        x_pointers += BLOCK_K
        weight_pointers += BLOCK_K
    if SWAPPED:
        product = product.T
    if scales is not None:
        product *= tl.load(scales + weight_row)[None, :]
    if GATED:
        gate, up = product.to(dtype).to(tl.float32).reshape(BLOCK_M, BLOCK_N // 2, 2).split()
        y = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        out_column = first_column // 2 + tl.arange(0, BLOCK_N // 2)
        out_row = place
    else:
        routing_weight = tl.load(routing_weights + pair, mask=is_pair, other=0.0).to(tl.float32)
        y = product * routing_weight[:, None]
        out_column = column
        out_row = pair % TOP_K * num_tokens + pair // TOP_K if IN_PARTS else pair
    out_width: tl.constexpr = N // 2 if GATED else N
    pointers = out + out_row[:, None].to(tl.int64) * out_width + out_column[None, :]
    mask = is_pair[:, None] & (out_column < out_width)[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
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
    router_logits: Product, num_experts_per_tok: int, norm_topk_prob: bool, block_m: int
) -> Routing:
    """The pairs of router_logits [T, E], T > 0, in blocks of at most `block_m`."""
    logits, num_parts, stride_part, dtype = parts_of(router_logits)
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1
    num_pairs = num_tokens * num_experts_per_tok
    device, options = logits.device, overlap_options(logits.device)
    expert_ids = torch.empty(num_pairs, dtype=torch.int32, device=device)
    weights = torch.empty(num_pairs, dtype=dtype, device=device)
    _route_kernel[(num_tokens,)](
        expert_ids,
        weights,
        logits,
        logits.stride(0),
        stride_part,
        NUM_PARTS=num_parts,
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        TOP_K=num_experts_per_tok,
        PADDED_TOP_K=triton.next_power_of_2(num_experts_per_tok),
        NORMALIZE=norm_topk_prob,
        num_warps=1,
        **options,
    )
    sorted_pairs = torch.empty_like(expert_ids)
    shape = num_blocks(num_pairs, num_experts, block_m), BLOCK_COLUMNS
    blocks = torch.empty(shape, dtype=torch.int32, device=device)
    _sort_pairs_kernel[(num_experts,)](
        sorted_pairs,
        blocks,
        expert_ids,
        num_pairs,
        NUM_EXPERTS=num_experts,
        BLOCK_M=block_m,
        CHUNK=min(SORT_CHUNK, max(32, triton.next_power_of_2(num_pairs))),
        num_warps=4 if num_pairs <= 1024 else 8,
        **options,
    )
    return Routing(weights, sorted_pairs, blocks)


def _multiply(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    routing: Routing,
    num_experts: int,
    num_experts_per_tok: int,
    tile: Tile,
) -> None:
    """`_experts_kernel` over all blocks; out's width tells which product it is."""
    num_pairs, n = len(routing.sorted_pairs), weight.shape[0] // num_experts
    assert x.is_contiguous() and weight.is_contiguous()
    _experts_kernel[(len(routing.blocks) * triton.cdiv(n, tile.block_n),)](
        out,
        x,
        weight,
        scales,
        routing.weights,
        routing.sorted_pairs,
        routing.blocks,
        num_pairs // num_experts_per_tok,
        N=n,
        K=weight.shape[1],
        TOP_K=num_experts_per_tok,
        GATED=out.shape[-1] < n,
        IN_PARTS=out.dim() == 3,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap_options(x.device),
    )


def experts(
    x: torch.Tensor,
    router_logits: Product,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    gate_up_scales: torch.Tensor | None = None,
    down_scales: torch.Tensor | None = None,
    *,
    tiles: Tiles | None = None,
) -> Product:
    """x [T, H], router_logits [T, E] -> [T, H]; see `Ops.experts`. `tiles`: instead of the best."""
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    num_experts = parts_of(router_logits)[0].shape[1]
    num_pairs = num_tokens * num_experts_per_tok
    tiles = tiles or choose_tiles(num_pairs, num_experts, x.dtype)
    routing = route(router_logits, num_experts_per_tok, norm_topk_prob, tiles.gate_up.block_m)
    rest = routing, num_experts, num_experts_per_tok
    size = gate_up_weight.shape[0] // num_experts // 2
    activations = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    _multiply(activations, x, gate_up_weight, gate_up_scales, *rest, tiles.gate_up)
    if num_tokens <= MAX_TOKENS_IN_PARTS:
        shape = num_experts_per_tok, num_tokens, hidden_size
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
        _multiply(parts, activations, down_weight, down_scales, *rest, tiles.down)
        return PartialSums(parts, x.dtype)
    products = torch.empty(num_pairs, hidden_size, dtype=x.dtype, device=x.device)
    _multiply(products, activations, down_weight, down_scales, *rest, tiles.down)
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
