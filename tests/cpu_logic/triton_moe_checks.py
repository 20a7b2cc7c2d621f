"""Run by test_triton_interpreter.py in a process with TRITON_INTERPRET=1: mixtures of experts."""

import itertools

import pytest
import torch

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import moe as triton_moe
from nanovllm.kernels.triton.fp8_linear import quantize_rows
from nanovllm.kernels.triton.hopper_experts import sort_pairs
from nanovllm.kernels.triton.moe import Tile, Tiles, experts, route
from nanovllm.kernels.types import (
    FP8_BLOCK,
    FP8_DTYPE,
    FP8_MAX,
    ClampedSwiGLU,
    LinearOutput,
    PartialSums,
)


def both(*tile: int) -> Tiles:
    return Tiles(Tile(*tile), Tile(*tile))


def summed(product: LinearOutput) -> torch.Tensor:
    return product.parts.sum(0) if isinstance(product, PartialSums) else product


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(1, 6, 3), (20, 5, 5), (9, 20, 1), (7, 18, 5), (17, 9, 1)],
)
def test_sorted_pairs_and_blocks(num_tokens, num_experts, top_k, monkeypatch):
    """Every pair is in one block, of its expert; the blocks have room for any choice of experts."""
    monkeypatch.setattr(triton_moe, "SORT_CHUNK", 32)  # several chunks
    torch.manual_seed(0)
    for spread in (0, 10):
        logits = torch.randn(num_tokens, num_experts) + spread * torch.randn(num_experts)
        routing = route(logits, top_k, True, 16)
        weights, ids = logits.softmax(-1).topk(top_k)
        expected = (weights / weights.sum(-1, keepdim=True)).flatten()
        torch.testing.assert_close(routing.weights, expected, rtol=1e-5, atol=1e-7)
        seen = []
        for expert, first, size in routing.blocks.tolist():
            assert 0 <= size <= 16
            pairs = routing.sorted_pairs[first : first + size].tolist()
            assert all(ids.flatten()[pair] == expert for pair in pairs)
            seen += pairs
        assert sorted(seen) == list(range(num_tokens * top_k))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(20, 5, 3), (9, 20, 1), (40, 4, 2), (2, 64, 8)]
)
def test_pairs_in_blocks_without_gaps(num_tokens, num_experts, top_k):
    """Blocks lie in the order of the experts, and each has pairs."""
    torch.manual_seed(0)
    ids = torch.rand(num_tokens, num_experts).topk(top_k).indices.int().flatten()
    found = sort_pairs(ids, num_experts, 16)
    expected = ids.sort(stable=True)
    assert torch.equal(found.pairs.long(), expected.indices)
    place = 0
    for expert, first, size in found.blocks[: int(found.num_blocks)].tolist():
        assert first == place and 0 < size <= 16
        assert (expected.values[first : first + size] == expert).all()
        place += size
    assert place == len(ids)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_any_logits_give_valid_experts():
    """NaN and infinite logits must not make a program read outside the weights."""
    logits = torch.randn(6, 5)
    logits[0], logits[1], logits[2] = torch.nan, -torch.inf, torch.inf
    logits[3, 2], logits[4, 2] = -torch.nan, torch.inf
    routing = route(logits, 3, False, 16)
    live = routing.blocks[:, 2] > 0
    assert routing.blocks[live, 2].sum() == 18
    assert ((routing.blocks[live, 0] >= 0) & (routing.blocks[live, 0] < 5)).all()
    assert sorted(routing.sorted_pairs.tolist()) == list(range(18))


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize(
    ("hidden_size", "size", "block_m"), [(64, 32, 64), (72, 40, 16), (48, 32, 16)]
)
def test_experts(hidden_size, size, block_m, in_parts, monkeypatch):
    """Blocks of several tiles, which rows and columns do not fill; an expert without tokens."""
    monkeypatch.setattr(triton_moe, "MAX_TOKENS_IN_PARTS", 256 if in_parts else 0)
    torch.manual_seed(0)
    num_tokens, num_experts, top_k = 20, 4, 2
    logits = torch.randn(num_tokens, num_experts)
    logits[:, 2] = -20
    logits[:, 3] += 9  # more pairs than a block of 16 has
    x = torch.randn(num_tokens, hidden_size)
    gate_up = torch.randn(num_experts * 2 * size, hidden_size) / hidden_size**0.5
    down = torch.randn(num_experts * hidden_size, size) / size**0.5
    parts = PartialSums(torch.stack((logits, logits)) / 2, x.dtype)
    product = experts(x, parts, gate_up, down, top_k, False, tiles=both(block_m, 64, 32, 4, 1))
    assert isinstance(product, PartialSums) == in_parts
    expected = torch_ops.experts(x, logits, gate_up, down, top_k, False)
    torch.testing.assert_close(summed(product), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("block_m", "in_parts", "dtype"), [(16, True, torch.float16), (128, False, torch.float32)]
)
def test_biases_and_clamped_swiglu(block_m, in_parts, dtype, monkeypatch):
    """Each alone and both, with numbers on either side of the limit."""
    monkeypatch.setattr(triton_moe, "MAX_TOKENS_IN_PARTS", 256 if in_parts else 0)
    torch.manual_seed(0)
    num_tokens, num_experts, hidden_size, size = 6, 3, 48, 40
    x, logits = torch.randn(num_tokens, hidden_size), torch.randn(num_tokens, num_experts)
    gate_up = torch.randn(num_experts * 2 * size, hidden_size) / hidden_size**0.5
    down = torch.randn(num_experts * hidden_size, size) / size**0.5
    args = [tensor.to(dtype) for tensor in (x, logits, gate_up, down)]
    biases = {
        "gate_up_bias": torch.randn(num_experts * 2 * size).to(dtype),
        "down_bias": torch.randn(num_experts * hidden_size).to(dtype),
    }
    swiglu = {"swiglu": ClampedSwiGLU(1.3, 1.0)}
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    results = [torch_ops.experts(*args, 2, True)]
    for extras in (biases, swiglu, biases | swiglu):
        got = summed(experts(*args, 2, True, **extras, tiles=both(block_m, 32, 32, 4, 1)))
        results.append(torch_ops.experts(*args, 2, True, **extras))
        torch.testing.assert_close(got.to(dtype), results[-1], rtol=tolerance, atol=tolerance)
    assert all((a - b).abs().max() > 0.3 for a, b in itertools.combinations(results, 2))


def fp8_rounded(x: torch.Tensor, group: int | None) -> torch.Tensor:
    """Rows as fp8 keeps them; the interpreter rounds a little otherwise than `torch_ops`."""
    values, scales = quantize_rows(x, group)
    return values.float() * scales.repeat_interleave(group or x.shape[1], 1)


def check_fp8(hidden_size: int, size: int, group: int | None, quantize, tiles: Tiles) -> None:
    """Two of four experts for each of three tokens, against products of what fp8 keeps."""
    torch.manual_seed(0)
    x, logits = torch.randn(3, hidden_size), torch.randn(3, 4)
    (gate_up, scales), (down, down_scales) = (
        quantize(torch.randn(4 * n, k) / k**0.5)
        for n, k in ((2 * size, hidden_size), (hidden_size, size))
    )
    bias, down_bias = torch.randn(4 * 2 * size), torch.randn(4 * hidden_size)
    product = experts(
        *(x, logits, gate_up, down, 2, True, scales, down_scales),
        gate_up_bias=bias,
        down_bias=down_bias,
        tiles=tiles,
    )
    got = summed(product)
    w1 = torch_ops.dequantize_weight(gate_up, scales).view(4, 2 * size, hidden_size)
    w2 = torch_ops.dequantize_weight(down, down_scales).view(4, hidden_size, size)
    weights, ids = logits.softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    for token in range(3):
        expected = torch.zeros(hidden_size)
        for weight, expert in zip(weights[token], ids[token], strict=True):
            row = fp8_rounded(x[token : token + 1], group)
            y = torch_ops.silu_and_mul(row @ w1[expert].t() + bias.view(4, -1)[expert])
            y = fp8_rounded(y, group) @ w2[expert].t() + down_bias.view(4, -1)[expert]
            expected += y[0] * weight
        # A number at the border of two fp8 ones may be rounded to the other.
        torch.testing.assert_close(got[token], expected, rtol=2e-2, atol=2e-2)


def test_fp8_weights() -> None:
    """Rows of activations are quantised ahead of both products."""
    check_fp8(64, 32, None, torch_ops.quantize, both(16, 64, 32, 4, 1))


@pytest.mark.parametrize("tiles", [both(16, 64, 128, 4, 1), both(128, 128, 128, 8, 1)])
def test_fp8_weights_with_scales_of_blocks(tiles: Tiles) -> None:
    """Each block of a weight, and each FP8_BLOCK elements of a row, has a scale of its own."""

    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, k = weight.shape
        scales = torch.rand(n // FP8_BLOCK, k // FP8_BLOCK) * 0.02 + 1e-3
        spread = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        return (weight / spread).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scales

    check_fp8(256, 128, FP8_BLOCK, quantize, tiles)


def test_half_precision():
    torch.manual_seed(0)
    for hidden_size, size in ((64, 32), (80, 48)):
        x, logits = torch.randn(5, hidden_size).half(), torch.randn(5, 4).half()
        gate_up = torch.randn(4 * 2 * size, hidden_size).half() / 8
        down = torch.randn(4 * hidden_size, size).half() / 6
        args = x, logits, gate_up, down, 2, True
        got = summed(experts(*args, tiles=both(16, 64, 32, 4, 1))).half()
        torch.testing.assert_close(got, torch_ops.experts(*args), rtol=4e-3, atol=4e-3)


def test_no_tokens():
    weights = torch.zeros(2 * 4 * 8, 8), torch.zeros(4 * 8, 8)
    assert experts(torch.zeros(0, 8), torch.zeros(0, 4), *weights, 2, True).shape == (0, 8)
