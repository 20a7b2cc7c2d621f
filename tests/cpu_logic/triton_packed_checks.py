"""Run by test_triton_interpreter.py in a process with TRITON_INTERPRET=1: packed weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import packed_linear as triton_packed
from nanovllm.kernels.triton.moe import Tile, Tiles, experts
from nanovllm.kernels.triton.packed_linear import (
    PackedTile,
    dequantize,
    multiply,
    multiply_dequantized,
    packed_linear,
)
from nanovllm.kernels.types import PackedWeight, PartialSums, summed


def packed_weight(
    n: int, k: int, bits: int, group_size: int, has_zeros: bool, dtype: torch.dtype
) -> PackedWeight:
    """Random numbers, scales that differ by 4, and zeros."""
    numbers = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    shape = n, k // group_size
    scales = (torch.rand(shape) + 1 / 3) / (2**bits * k**0.5)
    zeros = torch.randint(0, 2**bits, shape, dtype=torch.uint8) if has_zeros else None
    packed = torch_ops.pack_numbers(numbers, bits).contiguous()
    return PackedWeight(packed, scales.to(dtype), zeros, None, bits, group_size)


def exact(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    values = torch_ops.dequantize_packed(weight, torch.float64)
    return F.linear(x.double(), values, None if bias is None else bias.double())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("k", "group_size", "has_zeros"),
    # Whole blocks, one more than a whole step, groups below a block; a block that is cut off.
    [(1024, 128, False), (640, 128, True), (192, 64, True), (96, 32, True), (352, 352, False)],
)
def test_products(k: int, group_size: int, has_zeros: bool, bits: int, monkeypatch) -> None:
    """K split and whole; neither tokens nor rows fill their tiles."""
    weight = packed_weight(80, k, bits, group_size, has_zeros, torch.float16)
    x, bias = torch.randn(3, k).half(), torch.randn(80).half()
    expected = exact(x, weight, bias)
    monkeypatch.setattr(triton_packed, "MIN_COLUMNS_PER_PART", 256)
    for num_programs in (1, 64):
        monkeypatch.setattr(triton_packed, "num_multiprocessors", lambda _, n=num_programs: n)
        product = multiply(x, weight, bias, PackedTile(16, 64, 2, 4, 1, 1))
        assert isinstance(product, PartialSums) == (num_programs > 1 and k >= 512)
        torch.testing.assert_close(summed(product).double(), expected, rtol=2e-3, atol=2e-3)
    product = multiply_dequantized(x, weight, bias)
    torch.testing.assert_close(product.double(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_choice_and_order(bits: int, monkeypatch) -> None:
    """The kernel, or for more tokens and float32 a dequantised weight, in pieces of 32 rows."""
    monkeypatch.setattr(triton_packed, "MAX_WORKSPACE", 32 * 128)
    weight = packed_weight(80, 128, bits, 64, True, torch.float32)
    weight = replace(weight, order=torch.randperm(128).int())
    for dtype in (torch.float32, torch.float16):
        other = replace(weight, scales=weight.scales.to(dtype))
        values = torch_ops.dequantize_packed(replace(other, order=None), dtype)
        assert torch.equal(dequantize(other, dtype), values)
        for num_tokens in (0, 2, 300):
            x = torch.randn(num_tokens, 128).to(dtype)
            for bias in (None, torch.randn(80).to(dtype)):
                product = summed(packed_linear(x, other, bias)).double()
                tolerance = 1e-5 if dtype == torch.float32 else 4e-3
                torch.testing.assert_close(
                    product, exact(x, other, bias), rtol=tolerance, atol=tolerance
                )


@pytest.mark.parametrize(
    ("bits", "block_m", "dtype"), [(4, 16, torch.float16), (8, 128, torch.float32)]
)
def test_experts(bits: int, block_m: int, dtype: torch.dtype) -> None:
    """Tiles that pairs, rows and columns do not fill; zeros, biases."""
    torch.manual_seed(0)
    hidden_size, size, num_experts = 192, 96, 4
    gate_up = packed_weight(num_experts * 2 * size, hidden_size, bits, 64, True, dtype)
    down = packed_weight(num_experts * hidden_size, size, bits, 32, False, dtype)
    x, logits = torch.randn(5, hidden_size).to(dtype), torch.randn(5, num_experts).to(dtype)
    biases = {
        "gate_up_bias": torch.randn(num_experts * 2 * size).to(dtype),
        "down_bias": torch.randn(num_experts * hidden_size).to(dtype),
    }
    tile = Tile(block_m, 64, 128, 4, 1)
    product = experts(x, logits, gate_up, down, 2, True, **biases, tiles=Tiles(tile, tile))
    expected = torch_ops.experts(x, logits, gate_up, down, 2, True, **biases)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(summed(product), expected, rtol=tolerance, atol=tolerance)
