"""Products with weights of 4 and 8 bits against float64, and experts with them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.device import device_limits
from nanovllm.kernels.triton import hopper_packed
from nanovllm.kernels.triton.hopper_packed import FewTile, ManyTile
from nanovllm.kernels.triton.launch import is_hopper
from nanovllm.kernels.triton.moe import experts
from nanovllm.kernels.triton.packed_linear import (
    TILES,
    choose_tile,
    dequantize,
    multiply,
    multiply_dequantized,
    packed_linear,
)
from nanovllm.kernels.types import PackedWeight, PartialSums, summed

DTYPES = [torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def packed_weight(
    n: int, k: int, bits: int, group_size: int, has_zeros: bool, dtype: torch.dtype
) -> PackedWeight:
    """Random numbers, scales that differ by 4, and zeros; its product with normal x is near 1."""
    shape = n, k // group_size
    scales = (torch.rand(shape, device="cuda") + 1 / 3) * 4 / (2**bits * k**0.5)
    zeros = torch.randint(0, 2**bits, shape, device="cuda", dtype=torch.uint8)
    return PackedWeight(
        torch.randint(0, 256, (n, k * bits // 8), device="cuda", dtype=torch.uint8),
        scales.to(dtype),
        zeros if has_zeros else None,
        None,
        bits,
        group_size,
    )


def exact(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    values = torch_ops.dequantize_packed(weight, torch.float64)
    return F.linear(x.double(), values, None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [
        *((6144, 4096, 128), (4096, 12288, 128), (1040, 2560, 64), (1040, 1056, 32)),
        *((112, 11008, 11008), (4096, 1152, 128), (48, 96, 96), (16, 32, 32)),
    ],
)
def test_product_equals_float64(n, k, group_size, has_zeros, bits, dtype) -> None:
    """In every tile and dequantised, whatever wins."""
    weight = packed_weight(n, k, bits, group_size, has_zeros, dtype)
    values = torch_ops.dequantize_packed(weight, dtype)
    assert torch.equal(dequantize(weight, dtype), values)
    for num_tokens in (1, 3, 8, 16, 17, 33, 64, 100, 300):
        x, bias = randn(num_tokens, k, dtype=dtype), randn(n, dtype=dtype)
        expected = exact(x, weight, bias)
        for most, tile in TILES.items():
            if num_tokens > most and num_tokens <= 64:
                continue
            product = multiply(x, weight, bias, tile)
            if isinstance(product, PartialSums):
                # float32 sums of exact products: far closer than the dtype's rounding.
                torch.testing.assert_close(
                    product.parts.double().sum(0), expected, rtol=1e-4, atol=1e-3
                )
            torch.testing.assert_close(summed(product), expected.to(dtype), rtol=1e-2, atol=2e-3)
        product = multiply_dequantized(x, weight, bias)
        torch.testing.assert_close(product, expected.to(dtype), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("n", "k", "group_size", "has_zeros", "dtype"),
    [
        (6144, 4096, 128, False, torch.bfloat16),
        (4096, 12288, 128, False, torch.bfloat16),
        (1040, 2560, 256, True, torch.bfloat16),
        (1040, 2560, 128, False, torch.float16),
        (112, 1152, 128, False, torch.bfloat16),
        (112, 11008, 11008, True, torch.float16),
        (16, 256, 128, True, torch.bfloat16),
    ],
)
def test_hopper_product_equals_float64(n, k, group_size, has_zeros, dtype) -> None:
    """In every tile that holds so many tokens, which rows and tokens do not fill."""
    if not is_hopper(torch.device("cuda")):
        pytest.skip("kernels for Hopper")
    weight = packed_weight(n, k, 4, group_size, has_zeros, dtype)
    values = torch_ops.dequantize_packed(weight, dtype).double()
    bias = randn(n, dtype=dtype)
    for num_tokens in (1, 3, 8, 16, 33, 100, 300):
        x = randn(num_tokens, k, dtype=dtype)
        expected = exact(x, weight, bias)
        rounded = F.linear(x.double(), values, bias.double())
        products = [
            (
                hopper_packed.hopper_packed_linear(x, weight, bias, tile),
                expected if isinstance(tile, FewTile) else rounded,
            )
            for tile in (FewTile(16, 1, 4, 8), FewTile(8, 2, 2, 8), *hopper_packed.TILES.values())
            if tile and (num_tokens <= tile.tokens or isinstance(tile, ManyTile))
        ]
        for product, right in products:
            if isinstance(product, PartialSums):
                sums = product.parts.double().sum(0)
                torch.testing.assert_close(sums, right, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(summed(product), right.to(dtype), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_choice_and_order(dtype: torch.dtype, monkeypatch) -> None:
    weight = packed_weight(1024, 512, 4, 128, True, dtype)
    weight = replace(weight, order=torch.randperm(512, device="cuda").int())
    monkeypatch.setattr("nanovllm.kernels.triton.packed_linear.MAX_WORKSPACE", 512 * 300)
    for num_tokens in (0, 1, 16, 65, 257, 1100):
        x = randn(num_tokens, 512, dtype=dtype)
        for bias in (None, randn(1024, dtype=dtype)):
            product = summed(packed_linear(x, weight, bias))
            expected = exact(x, weight, bias).to(dtype)
            torch.testing.assert_close(product, expected, rtol=1e-2, atol=2e-2)
    limits = device_limits(x.device)
    assert choose_tile(1, torch.bfloat16, limits) is not None
    assert choose_tile(1, torch.float32, limits) is None
    assert choose_tile(100_000, torch.bfloat16, limits) is None


def test_every_element_is_written() -> None:
    """Memory full of NaN before the product: what it leaves out would show."""
    weight = packed_weight(1008, 1024, 4, 128, False, torch.bfloat16)
    x = randn(33, 1024)
    for tile in TILES.values():
        poison = torch.full((4, 33, 1008), float("nan"), device="cuda")
        del poison  # the allocator hands the same memory out again
        assert summed(multiply(x, weight, None, tile)).isfinite().all()
    for num_tokens in (3, 33, 100):  # as it is chosen
        poison = torch.full((4, num_tokens, 1008), float("nan"), device="cuda")
        del poison
        assert summed(packed_linear(randn(num_tokens, 1024), weight)).isfinite().all()


def test_offsets_beyond_int32() -> None:
    """Rows whose numbers lie more than 2^31 int16 from the first ones."""
    n, k = 2**17 + 64, 65536
    weight = packed_weight(n, k, 4, 128, False, torch.bfloat16)
    x = randn(2, k)
    product = summed(packed_linear(x, weight))
    last = weight.rows(slice(n - 64, n))
    torch.testing.assert_close(
        product[:, -64:], exact(x, last, None).bfloat16(), rtol=1e-2, atol=2e-3
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_graph_equals_eager(bits: int) -> None:
    """Products whose launches overlap, replayed with changing inputs; the same every time."""
    first, second = (packed_weight(2048, 2048, bits, 128, True, torch.bfloat16) for _ in range(2))
    for num_tokens in (1, 16, 40, 300, 1100):
        x = randn(num_tokens, 2048)

        def forward(x=x) -> torch.Tensor:
            return summed(packed_linear(summed(packed_linear(x, first)), second))

        forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward()
        for _ in range(20):
            x.copy_(randn(num_tokens, 2048))
            graph.replay()
            assert torch.equal(out, forward())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "has_zeros"), [(4, 128, False), (8, 64, True)])
@pytest.mark.parametrize("num_tokens", [1, 7, 40, 300, 2000])
def test_experts(num_tokens, bits, group_size, has_zeros, dtype) -> None:
    num_experts, top_k, hidden, size = 16, 4, 1024, 384
    x, logits = randn(num_tokens, hidden, dtype=dtype), randn(num_tokens, num_experts, dtype=dtype)
    gate_up = packed_weight(num_experts * 2 * size, hidden, bits, group_size, has_zeros, dtype)
    down = packed_weight(num_experts * hidden, size, bits, group_size, has_zeros, dtype)
    got = summed(experts(x, logits, gate_up, down, top_k, True))
    expected = torch_ops.experts(x, logits, gate_up, down, top_k, True)
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)
