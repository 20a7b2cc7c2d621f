"""Products of few tokens against float64, and the kernels that add up their parts."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.activation import gated_linear, silu_and_mul
from nanovllm.kernels.triton.hopper_linear import hopper_linear, takes_gated
from nanovllm.kernels.triton.launch import is_hopper
from nanovllm.kernels.triton.linear import (
    choose_block_m,
    choose_num_parts,
    choose_tile,
    linear,
    split_linear,
)
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.rope import qk_norm_rope_store
from nanovllm.kernels.triton.tiled_linear import tiled_linear
from nanovllm.kernels.triton.wide_linear import wide_linear
from nanovllm.kernels.types import KVCache, PartialSums, summed

SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (100, 512), (64, 12288))
EPS = 1e-6


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def block_m(num_tokens: int) -> int:
    return max(16, 1 << (num_tokens - 1).bit_length())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 16, 17, 32, 64, 100, 128])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product_equals_float64(n: int, k: int, num_tokens: int, dtype: torch.dtype) -> None:
    x, weight = randn(num_tokens, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
    for bias in (None, randn(n, dtype=dtype)):
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        product = split_linear(x, weight, bias, block_m(num_tokens))
        if isinstance(product, PartialSums):
            # float32 sums: far closer than the dtype's rounding.
            assert product.parts.shape == (k // 512, num_tokens, n)
            torch.testing.assert_close(product.parts.double().sum(0), exact, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(summed(product), exact.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 32])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (5120, 2048), (24576, 4096), (80, 72)])
def test_product_in_tiles_equals_float64(n, k, num_tokens, dtype) -> None:
    x, weight = randn(num_tokens, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
    tile = choose_tile(num_tokens, n, k, dtype)
    for bias in (None, randn(n, dtype=dtype)):
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        product = summed(tiled_linear(x, weight, bias, tile, dtype, num_tokens))
        torch.testing.assert_close(product, exact.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 17, 32, 64])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_hopper_product_equals_split_linear(n, k, num_tokens, dtype) -> None:
    """The same bits: the number of tokens decides which of the two computes a step."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is Hopper's")
    x, weight = randn(num_tokens, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
    for bias in (None, randn(n, dtype=dtype)):
        expected = split_linear(x, weight, bias, block_m(num_tokens))
        rows = max(8, 1 << (num_tokens - 1).bit_length())
        assert torch.equal(summed(hopper_linear(x, weight, bias, rows)), summed(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 17, 31, 32])
@pytest.mark.parametrize(("size", "k"), [(3072, 1024), (8, 1024), (1000, 1024), (4096, 512)])
def test_gated_product_equals_two_kernels(size, k, num_tokens, dtype) -> None:
    """The same bits: which of the two computes a step may depend on its number of tokens."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is Hopper's")
    x, weight = randn(num_tokens, k, dtype=dtype), randn(2 * size, k, dtype=dtype) / k**0.5
    assert choose_block_m(num_tokens, 2 * size, k, dtype) and takes_gated(num_tokens, 2 * size, k)
    poison = torch.full((num_tokens, size), float("nan"), device="cuda", dtype=dtype)
    del poison  # the allocator hands the same memory out again
    got = gated_linear(x, weight)
    assert got.shape == (num_tokens, size) and got.is_contiguous()
    assert torch.equal(got, silu_and_mul(linear(x, weight)))
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    torch.testing.assert_close(got, (F.silu(gate) * up).to(dtype), rtol=2e-2, atol=2e-3)


def test_gated_product_of_other_sizes() -> None:
    """What the kernel does not take is computed by two."""
    for num_tokens, size, k in ((0, 64, 512), (257, 3072, 1024), (3, 100, 512), (2, 64, 2048)):
        assert num_tokens == 0 or not takes_gated(num_tokens, 2 * size, k)
        x, weight = randn(num_tokens, k), randn(2 * size, k) / k**0.5
        assert torch.equal(gated_linear(x, weight), silu_and_mul(linear(x, weight)))


WIDE_SHAPES = ((4096, 1024, torch.bfloat16), (1024, 3072, torch.bfloat16), (1000, 448, torch.half))


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 17, 32, 64, 65, 128, 129, 150, 192, 193, 256])
@pytest.mark.parametrize(("n", "k", "dtype"), WIDE_SHAPES)
def test_product_of_wide_tiles_equals_float64(n, k, dtype, num_tokens) -> None:
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs Hopper")
    x, weight = randn(num_tokens, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
    for num_parts, bias in ((1, None), (4, None), (3, randn(n, dtype=dtype))):
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        product = wide_linear(x, weight, bias, num_parts)
        if isinstance(product, PartialSums):
            sums = product.parts.double().sum(0)
            torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(summed(product), exact.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [33, 64, 65, 128, 129, 176, 192, 193, 256])
@pytest.mark.parametrize(("size", "dtype"), [(3072, torch.bfloat16), (2016, torch.float16)])
def test_gated_product_of_wide_tiles_equals_two_kernels(size, num_tokens, dtype) -> None:
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs Hopper")
    x, weight = randn(num_tokens, 1024, dtype=dtype), randn(2 * size, 1024, dtype=dtype) / 32
    assert choose_num_parts(num_tokens, 2 * size, 1024, dtype) == 1
    poison = torch.full((num_tokens, size), float("nan"), device="cuda", dtype=dtype)
    del poison  # the allocator hands the same memory out again
    got = gated_linear(x, weight)
    assert got.shape == (num_tokens, size)
    assert torch.equal(got, silu_and_mul(linear(x, weight)))
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    torch.testing.assert_close(got, (F.silu(gate) * up).to(dtype), rtol=2e-2, atol=2e-3)


def test_every_element_is_written() -> None:
    """Memory full of NaN before the product: what it leaves out would show."""
    x, weight = randn(33, 1024), randn(1000, 1024)
    poison = torch.full((2, 33, 1000), float("nan"), device="cuda")
    del poison  # the allocator hands the same memory out again
    assert summed(split_linear(x, weight, None, 64)).isfinite().all()


@pytest.mark.parametrize("num_parts", [2, 3, 6])
def test_ops_add_up_parts(num_parts: int) -> None:
    """Reading parts equals reading their rounded sum."""
    num_tokens, hidden = 5, 1024
    parts = PartialSums(randn(num_parts, num_tokens, hidden, dtype=torch.float32), torch.bfloat16)
    whole = parts.parts[0].clone()
    for part in parts.parts[1:]:
        whole += part
    whole = whole.bfloat16()
    residual, weight = randn(num_tokens, hidden), randn(hidden)
    for got, expected in zip(
        add_rms_norm(parts, residual.clone(), weight, EPS),
        add_rms_norm(whole, residual.clone(), weight, EPS),
        strict=True,
    ):
        assert torch.equal(got, expected)
    assert torch.equal(silu_and_mul(parts), silu_and_mul(whole))

    norm_weight, cos_sin = randn(128), torch.randn(16, 128, device="cuda")
    positions = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
    slots = torch.arange(num_tokens, device="cuda")
    caches = [torch.zeros(2, 1, 16, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    queries = [
        qk_norm_rope_store(
            qkv, norm_weight, norm_weight, EPS, cos_sin, positions, KVCache(*cache), slots
        )
        for qkv, cache in zip((parts, whole), caches, strict=True)
    ]
    assert torch.equal(*queries) and torch.equal(*caches)


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 112, 176, 208])
def test_chain_in_a_graph_equals_eager(num_tokens: int) -> None:
    """Layers whose launches overlap, replayed with changing inputs."""
    hidden, intermediate = 1024, 3072
    layers = [
        (randn(2 * intermediate, hidden) / 32, randn(hidden, intermediate) / 55, randn(hidden))
        for _ in range(4)
    ]
    x, residual = randn(num_tokens, hidden), randn(num_tokens, hidden)

    def forward(linear, gated_linear) -> torch.Tensor:
        y, total = x, residual.clone()
        for gate_up, down, norm in layers:
            y, total = add_rms_norm(linear(gated_linear(y, gate_up), down), total, norm, EPS)
        return y

    def in_two_kernels(linear) -> torch.Tensor:
        return forward(linear, lambda y, gate_up: silu_and_mul(linear(y, gate_up)))

    forward(linear, gated_linear)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(linear, gated_linear)
    for _ in range(50):
        x.copy_(randn(num_tokens, hidden))
        residual.copy_(randn(num_tokens, hidden))
        graph.replay()
        assert torch.equal(out, forward(linear, gated_linear))
        assert torch.equal(out, in_two_kernels(linear))
    error = (out.float() - in_two_kernels(F.linear).float()).norm() / out.float().norm()
    assert error < 2e-2


def test_choice() -> None:
    assert choose_block_m(1, 4096, 1024, torch.bfloat16) == 8
    assert choose_block_m(17, 4096, 1024, torch.bfloat16) == 32
    assert choose_block_m(16384, 4096, 1024, torch.bfloat16) is None
    assert choose_block_m(1, 4096, 1024, torch.float32) is None
    assert choose_block_m(1, 4096, 1000, torch.bfloat16) is None
    assert choose_block_m(1, 24576, 4096, torch.bfloat16) is None
    assert choose_num_parts(32, 4096, 1024, torch.bfloat16) is None
    assert choose_num_parts(33, 4096, 1024, torch.bfloat16) == 1
    assert choose_num_parts(65, 4096, 1024, torch.bfloat16) == 1
    assert choose_num_parts(128, 6144, 1024, torch.bfloat16) == 1
    assert choose_num_parts(128, 1024, 2048, torch.bfloat16) == 4
    assert choose_num_parts(128, 1024, 3072, torch.bfloat16) == 6
    assert choose_num_parts(257, 4096, 1024, torch.bfloat16) is None
    assert choose_num_parts(128, 4096, 1024, torch.float32) is None
    assert choose_num_parts(192, 4096, 12288, torch.bfloat16) == 2
    assert choose_num_parts(160, 4096, 12288, torch.bfloat16) is None
    assert choose_num_parts(128, 6144, 4096, torch.bfloat16) is None
    assert choose_tile(1, 24576, 4096, torch.bfloat16) is not None
    assert choose_tile(1, 24576, 4096, torch.float32) is None
    assert choose_tile(64, 24576, 4096, torch.bfloat16) is None
    assert choose_tile(1, 151936, 4096, torch.bfloat16) is None
    x, weight = randn(300, 1024), randn(128, 1024)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(torch_ops.linear(x, weight), F.linear(x, weight))
