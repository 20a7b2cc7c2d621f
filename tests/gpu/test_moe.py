"""Mixtures of experts on CUDA against float64, any number of tokens, eagerly and in graphs."""

from collections.abc import Callable

import pytest
import torch

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import hopper_experts
from nanovllm.kernels.triton.linear import linear
from nanovllm.kernels.triton.moe import (
    FLOAT32_TILES,
    FP8_TILES,
    TILES,
    choose_tiles,
    experts,
    route,
)
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.types import FP8_BLOCK, ClampedSwiGLU, LinearOutput, PartialSums

HIDDEN_SIZE, SIZE, NUM_EXPERTS, TOP_K = 512, 192, 16, 4


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def distinct_logits(num_tokens: int, num_experts: int = NUM_EXPERTS) -> torch.Tensor:
    """float32 [num_tokens, num_experts], in any row far enough apart for one choice of experts."""
    return torch.rand(num_tokens, num_experts, device="cuda").argsort(1) * 0.2


def weights(
    dtype: torch.dtype = torch.bfloat16,
    hidden_size: int = HIDDEN_SIZE,
    size: int = SIZE,
    num_experts: int = NUM_EXPERTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        randn(num_experts * 2 * size, hidden_size, dtype=dtype) / hidden_size**0.5,
        randn(num_experts * hidden_size, size, dtype=dtype) / size**0.5,
    )


def summed(product: LinearOutput) -> torch.Tensor:
    return product.parts.sum(0) if isinstance(product, PartialSums) else product


def sum_of_experts(
    x: torch.Tensor,
    logits: torch.Tensor,
    top_k: int,
    norm: bool,
    mlp: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """`Ops.experts` in float64 of mlp(rows of x, expert), the choice of experts in float32."""
    probabilities = logits.float().softmax(-1)
    chosen, ids = probabilities.topk(top_k)
    if norm:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(logits.shape[1]):
        tokens, slots = torch.where(ids == expert)
        if len(tokens):
            y = mlp(x[tokens], expert)
            out.index_add_(0, tokens, y * chosen[tokens, slots].double().unsqueeze(1))
    return out


def of_expert(weight: torch.Tensor, num_experts: int, expert: int) -> torch.Tensor:
    return weight.view(num_experts, -1, weight.shape[1])[expert].double()


def exact_experts(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    norm: bool,
) -> torch.Tensor:
    """`Ops.experts` in float64, with the choice of experts of float32."""

    def mlp(rows: torch.Tensor, expert: int) -> torch.Tensor:
        first, second = (of_expert(w, logits.shape[1], expert) for w in (gate_up, down))
        gate, up = (rows.double() @ first.t()).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ second.t()

    return sum_of_experts(x, logits, top_k, norm, mlp)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33, 100, 256, 257, 1000, 4096])
def test_experts_equal_float64(num_tokens, dtype):
    """All tiles that are chosen; an expert without tokens."""
    x = randn(num_tokens, HIDDEN_SIZE, dtype=dtype)
    logits = distinct_logits(num_tokens)
    logits[:, 3] = -20
    gate_up, down = weights(dtype)
    parts = PartialSums(logits.unsqueeze(0), torch.float32)
    for norm in (True, False):
        got = summed(experts(x, parts, gate_up, down, TOP_K, norm))
        exact = exact_experts(x, logits, gate_up, down, TOP_K, norm)
        tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
        assert relative_error(got, exact) < tolerance


@pytest.mark.parametrize("tiles", [*TILES.values(), *FP8_TILES.values(), FLOAT32_TILES])
@pytest.mark.parametrize("num_tokens", [1, 20, 300])
@pytest.mark.parametrize(("hidden_size", "size"), [(512, 192), (200, 72)])
def test_every_tile_for_any_number_of_tokens(hidden_size, size, num_tokens, tiles):
    """Also where all tokens ask for the same experts, and where weights do not fill their tiles."""
    gate_up, down = weights(hidden_size=hidden_size, size=size)
    x = randn(num_tokens, hidden_size)
    for preference in (0, 10):
        logits = distinct_logits(num_tokens)
        logits[:, :TOP_K] += preference
        got = experts(x, logits, gate_up, down, TOP_K, True, tiles=tiles)
        exact = exact_experts(x, logits, gate_up, down, TOP_K, True)
        assert relative_error(summed(got), exact) < 8e-3


@pytest.mark.parametrize("tile", [*hopper_experts.TILES.values(), hopper_experts.TILE_OF_ONE_TOKEN])
@pytest.mark.parametrize("guesses", [True, False])
@pytest.mark.parametrize("num_tokens", [2, 50, 256])
@pytest.mark.parametrize(("hidden_size", "size"), [(512, 192), (576, 64)])
def test_every_hopper_tile(hidden_size, size, num_tokens, guesses, tile):
    """Programs whose first expert is another one than they guessed, and programs without any.

    The same experts for all tokens: each has several blocks, and the others none.
    """
    gate_up, down = weights(hidden_size=hidden_size, size=size)
    x = randn(num_tokens, hidden_size)
    for preference in (0, 10):
        logits = distinct_logits(num_tokens)
        logits[:, 2 : 2 + TOP_K] += preference
        probabilities = logits.softmax(-1).topk(TOP_K)
        shares = probabilities.values / probabilities.values.sum(-1, keepdim=True)
        ids, shares = probabilities.indices.int().flatten(), shares.to(x.dtype).flatten()
        for _ in range(2):
            got = hopper_experts.hopper_experts(
                x, ids, shares, gate_up, down, NUM_EXPERTS, tile=tile, guesses=guesses
            )
            exact = exact_experts(x, logits, gate_up, down, TOP_K, True)
            assert relative_error(summed(got), exact) < 8e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 7, 33, 256, 257, 1000, 4096])
@pytest.mark.parametrize(("hidden_size", "size"), [(512, 192), (360, 90)])
def test_biases_and_clamped_swiglu_equal_float64(hidden_size, size, num_tokens, dtype):
    """As of gpt-oss, whose features do not fill the tiles."""
    x, logits = randn(num_tokens, hidden_size, dtype=dtype), distinct_logits(num_tokens)
    gate_up, down = weights(dtype, hidden_size, size)
    bias, down_bias = randn(len(gate_up), dtype=dtype), randn(len(down), dtype=dtype)
    swiglu = ClampedSwiGLU(1.702, 1.5)

    def mlp(rows: torch.Tensor, expert: int) -> torch.Tensor:
        first, second = (of_expert(w, NUM_EXPERTS, expert) for w in (gate_up, down))
        b1, b2 = (b.view(NUM_EXPERTS, -1)[expert].double() for b in (bias, down_bias))
        return torch_ops.clamped_swiglu(rows.double() @ first.t() + b1, swiglu) @ second.t() + b2

    exact = sum_of_experts(x, logits, TOP_K, True, mlp)
    got = summed(
        experts(
            *(x, PartialSums(logits.unsqueeze(0), torch.float32), gate_up, down, TOP_K, True),
            gate_up_bias=bias,
            down_bias=down_bias,
            swiglu=swiglu,
        )
    )
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert relative_error(got, exact) < tolerance


def fp8_rounded(rows: torch.Tensor, group: int) -> torch.Tensor:
    """bfloat16 rows as fp8 keeps them, each `group` elements with a scale, in float64."""
    return torch.cat(
        [
            torch_ops.dequantize_weight(*torch_ops.quantize(part)).double()
            for part in rows.split(group, 1)
        ],
        1,
    )


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = (size // FP8_BLOCK for size in weight.shape)
    blocks = weight.view(n, FP8_BLOCK, k, FP8_BLOCK).transpose(1, 2).reshape(n * k, -1)
    values, scales = torch_ops.quantize(blocks)
    values = values.view(n, k, FP8_BLOCK, FP8_BLOCK).transpose(1, 2).reshape(weight.shape)
    return values, scales.view(n, k)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 33, 64, 200, 600])
def test_fp8_weights(num_tokens, by_blocks):
    """Activations are quantised ahead of both products, as bfloat16 has rounded them.

    The sums of fp8 products are not exact, so a number between two fp8 ones may go to either.
    """
    group = FP8_BLOCK if by_blocks else HIDDEN_SIZE
    gate_up, down = weights(size=2 * FP8_BLOCK)
    # Neighbouring blocks that differ in size.
    gate_up *= torch.rand(gate_up.shape[0] // 64, device="cuda").repeat_interleave(64)[:, None]
    quantize = quantize_blocks if by_blocks else torch_ops.quantize
    (w1, s1), (w2, s2) = (quantize(w) for w in (gate_up, down))
    x, logits = randn(num_tokens, HIDDEN_SIZE), distinct_logits(num_tokens)
    got = summed(experts(x, logits, w1, w2, TOP_K, True, s1, s2))
    gate_up, down = torch_ops.dequantize_weight(w1, s1), torch_ops.dequantize_weight(w2, s2)

    def mlp(rows: torch.Tensor, expert: int) -> torch.Tensor:
        first, second = (of_expert(w, NUM_EXPERTS, expert) for w in (gate_up, down))
        y = torch_ops.silu_and_mul((fp8_rounded(rows, group) @ first.t()).bfloat16())
        return fp8_rounded(y, group) @ second.t()

    exact = sum_of_experts(x, logits, TOP_K, True, mlp)
    unrounded = exact_experts(x, logits, gate_up, down, TOP_K, True)
    error = relative_error(got, exact)
    assert error < 2.5e-2 and error < 0.7 * relative_error(got, unrounded)


@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 8), (8, 8), (300, 8), (16384, 8), (5, 1)])
def test_every_pair_is_in_one_block_of_its_expert(num_tokens, top_k):
    logits = distinct_logits(num_tokens, 128)
    logits[:, 5] += 30  # an expert that all tokens ask for
    for block_m in (16, 128):
        routing = route(logits, top_k, True, block_m)
        ids = logits.softmax(-1).topk(top_k).indices.flatten().cpu()
        pairs, seen = routing.sorted_pairs.cpu(), []
        for expert, first, size in routing.blocks.tolist():
            assert 0 <= size <= block_m
            block = pairs[first : first + size]
            assert (ids[block.long()] == expert).all()
            seen.append(block)
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(num_tokens * top_k).int())


def test_logits_that_are_not_finite_harm_no_other_token():
    gate_up, down = weights()
    x, logits = randn(40, HIDDEN_SIZE), randn(40, NUM_EXPERTS)
    expected = summed(experts(x, logits, gate_up, down, TOP_K, True))
    logits[3], logits[7], logits[9], logits[11, 2] = torch.nan, -torch.inf, torch.inf, -torch.nan
    got = summed(experts(x, logits, gate_up, down, TOP_K, True))
    others = [i for i in range(40) if i not in (3, 7, 9, 11)]
    assert torch.equal(got[others], expected[others])


def test_a_token_gets_the_same_in_any_batch_of_the_same_tiles():
    """And twice the same: no sum depends on the order in which programs run."""
    gate_up, down = weights()
    x, logits = randn(60, HIDDEN_SIZE), randn(60, NUM_EXPERTS)
    assert choose_tiles(60 * TOP_K, NUM_EXPERTS, x.dtype) == choose_tiles(
        48 * TOP_K, NUM_EXPERTS, x.dtype
    )
    whole = summed(experts(x, logits, gate_up, down, TOP_K, True))
    assert torch.equal(whole, summed(experts(x, logits, gate_up, down, TOP_K, True)))
    part = summed(experts(x[12:], logits[12:], gate_up, down, TOP_K, True))
    assert torch.equal(part, whole[12:])


@pytest.mark.parametrize("num_tokens", [1, 8, 64, 150, 300])
def test_layers_in_a_graph_equal_eager_ones(num_tokens):
    """Launches that overlap, replayed with tokens that ask for other experts."""
    layers = [
        (randn(NUM_EXPERTS, HIDDEN_SIZE) / 8, *weights(), randn(HIDDEN_SIZE)) for _ in range(4)
    ]
    x, residual = randn(num_tokens, HIDDEN_SIZE), randn(num_tokens, HIDDEN_SIZE)

    def forward() -> torch.Tensor:
        y, total = x, residual.clone()
        for router, gate_up, down, norm in layers:
            product = experts(y, linear(y, router), gate_up, down, TOP_K, True)
            y, total = add_rms_norm(product, total, norm, 1e-6)
        return y

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for _ in range(20):
        x.copy_(randn(num_tokens, HIDDEN_SIZE))
        residual.copy_(randn(num_tokens, HIDDEN_SIZE))
        graph.replay()
        assert torch.equal(out, forward())
