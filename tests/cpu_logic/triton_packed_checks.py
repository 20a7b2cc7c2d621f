"""Run by test_triton_interpreter.py in a process with TRITON_INTERPRET=1: packed weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import moe as triton_moe
from nanovllm.kernels.triton import packed_linear as triton_packed
from nanovllm.kernels.triton.moe import Tile, Tiles, experts
from nanovllm.kernels.triton.packed_linear import (
    PackedTile,
    dequantize,
    multiply,
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


def check(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """`torch.testing.assert_close`, whose imports take seconds."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs()
    assert (error <= tolerance * (1 + expected.double().abs())).all(), f"off by {error.max()}"


def exact(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    values = torch_ops.dequantize_packed(weight, torch.float64)
    return F.linear(x.double(), values, None if bias is None else bias.double())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("k", "group_size", "has_zeros"),
    # Whole steps, one block more, groups below a block; a block that is cut off.
    [(512, 128, False), (384, 128, True), (64, 64, True), (96, 32, True), (224, 224, False)],
)
def test_products(k: int, group_size: int, has_zeros: bool, bits: int, monkeypatch) -> None:
    """K whole and split; neither tokens nor rows fill their tiles."""
    weight = packed_weight(48, k, bits, group_size, has_zeros, torch.float16)
    x, bias = torch.randn(3, k).half(), torch.randn(48).half()
    expected = exact(x, weight, bias)
    num_programs = 64 if k == 512 else 1
    monkeypatch.setattr(triton_packed, "MIN_COLUMNS_PER_PART", 128)
    monkeypatch.setattr(triton_packed, "num_multiprocessors", lambda _: num_programs)
    product = multiply(x, weight, bias, PackedTile(16, 32, 2, 4, 1, 1))
    assert isinstance(product, PartialSums) == (num_programs > 1)
    check(summed(product), expected, 2e-3)


@pytest.mark.parametrize("has_zeros", [False, True])
def test_numbers_with_something_added(has_zeros: bool, monkeypatch) -> None:
    """As bfloat16 takes them; it comes off again, also where a step has a group past the last."""
    monkeypatch.setattr(triton_packed, "added_to", lambda *_: 128)
    weight = packed_weight(16, 224, 4, 32, has_zeros, torch.float16)
    x = torch.randn(3, 224).half() + 1
    product = summed(multiply(x, weight, None, PackedTile(16, 16, 2, 4, 1, 1)))
    check(product, exact(x, weight), 2e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_choice_and_order(bits: int, monkeypatch) -> None:
    """The kernel, or for more tokens and float32 a dequantised weight, in pieces of 32 rows."""
    monkeypatch.setattr(triton_packed, "MAX_WORKSPACE", 16 * 128)
    weight = packed_weight(48, 128, bits, 64, True, torch.float32)
    weight = replace(weight, order=torch.randperm(128).int())
    for dtype in (torch.float32, torch.float16):
        other = replace(weight, scales=weight.scales.to(dtype))
        values = torch_ops.dequantize_packed(replace(other, order=None), dtype)
        assert torch.equal(dequantize(other, dtype), values)
        for num_tokens, bias in ((0, None), (2, torch.randn(48).to(dtype)), (5000, None)):
            x = torch.randn(num_tokens, 128).to(dtype)
            product = summed(packed_linear(x, other, bias))
            check(product, exact(x, other, bias), 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    ("bits", "block_m", "dtype"), [(4, 16, torch.float16), (8, 128, torch.float32)]
)
def test_experts(bits: int, block_m: int, dtype: torch.dtype) -> None:
    """Tiles that pairs, rows and columns do not fill; zeros, biases."""
    torch.manual_seed(0)
    hidden_size, size, num_experts = 192, 32, 3
    gate_up = packed_weight(num_experts * 2 * size, hidden_size, bits, 64, True, dtype)
    down = packed_weight(num_experts * hidden_size, size, bits, 32, False, dtype)
    x, logits = torch.randn(3, hidden_size).to(dtype), torch.randn(3, num_experts).to(dtype)
    biases = {
        "gate_up_bias": torch.randn(num_experts * 2 * size).to(dtype),
        "down_bias": torch.randn(num_experts * hidden_size).to(dtype),
    }
    tile = Tile(block_m, 128, 128, 4, 1)
    product = experts(x, logits, gate_up, down, 2, True, **biases, tiles=Tiles(tile, tile))
    expected = torch_ops.experts(x, logits, gate_up, down, 2, True, **biases)
    check(summed(product), expected, 1e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_experts_of_many_tokens(dtype: torch.dtype, monkeypatch) -> None:
    """Where each expert has many pairs, they are dequantised first; not for float32."""
    monkeypatch.setattr(triton_moe, "MAX_PACKED_PAIRS", 1)
    monkeypatch.setattr(triton_moe, "MAX_PACKED_TOKENS", 2)
    hidden_size, size, num_experts = 64, 32, 2
    gate_up = packed_weight(num_experts * 2 * size, hidden_size, 4, 64, True, dtype)
    down = packed_weight(num_experts * hidden_size, size, 4, 32, False, dtype)
    x, logits = torch.randn(3, hidden_size).to(dtype), torch.randn(3, num_experts).to(dtype)
    product = summed(experts(x, logits, gate_up, down, 1, True))
    expected = torch_ops.experts(x, logits, gate_up, down, 1, True)
    check(product, expected, 1e-4 if dtype == torch.float32 else 5e-3)
    plain = [torch_ops.dequantize_packed(weight, dtype) for weight in (gate_up, down)]
    as_plain = torch.equal(product, summed(experts(x, logits, *plain, 1, True)))
    assert as_plain == (dtype == torch.float16)
