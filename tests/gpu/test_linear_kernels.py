"""Products of few tokens against float64, and the kernels that add up their parts."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.activation import gated_linear, silu_and_mul
from nanovllm.kernels.triton.hopper_linear import hopper_linear, takes_gated
from nanovllm.kernels.triton.launch import is_hopper, num_multiprocessors
from nanovllm.kernels.triton.linear import (
    PIECES,
    choose_block_m,
    choose_gated,
    choose_tile,
    choose_wide,
    linear,
    split_linear,
)
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.rope import qk_norm_rope_store
from nanovllm.kernels.triton.tiled_linear import tiled_linear
from nanovllm.kernels.triton.wide_linear import SKEWED_TOKENS, WideTile, wide_linear
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


@pytest.mark.parametrize(
    "num_tokens", [1, 17, 33, 64, 65, 96, 128, 129, 160, 161, 192, 193, 224, 225, 256]
)
@pytest.mark.parametrize(("n", "k", "dtype"), WIDE_SHAPES)
def test_product_of_wide_tiles_equals_float64(n, k, dtype, num_tokens) -> None:
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs Hopper")
    x, weight = randn(num_tokens, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
    pieces = next(pieces for most, pieces in PIECES.items() if num_tokens <= most)
    biased = randn(n, dtype=dtype)
    tiles = (
        (WideTile(pieces), None),
        (WideTile(pieces[:1]), biased),  # programs share the tokens
        (WideTile(pieces, 1, 4), None),
        (WideTile(pieces, 3), biased),
        (WideTile(pieces, 3, 3), biased),
    )
    for tile, bias in tiles:
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        poison = torch.full((4, num_tokens, n), float("nan"), device="cuda")
        del poison  # the allocator hands the same memory out again
        product = wide_linear(x, weight, bias, tile)
        if isinstance(product, PartialSums):
            sums = product.parts.double().sum(0)
            torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(summed(product), exact.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9, 16, 17, 32, 64])
@pytest.mark.parametrize(("n", "k", "dtype"), WIDE_SHAPES)
def test_programs_that_share_a_multiprocessor(n, k, dtype, num_tokens) -> None:
    """Few tokens: the rings are shorter, and the sums are the same."""
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs Hopper")
    x, weight = randn(num_tokens, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
    biased = randn(n, dtype=dtype)
    pieces = next(pieces for most, pieces in PIECES.items() if num_tokens <= most)
    for num_parts in (1, 3):
        alone = summed(wide_linear(x, weight, biased, WideTile(pieces, 1, num_parts)))
        exact = F.linear(x.double(), weight.double(), biased.double())
        torch.testing.assert_close(alone, exact.to(dtype), rtol=1e-2, atol=1e-3)
        for programs_per_sm in (2, 3):
            tile = WideTile(pieces, 1, num_parts, programs_per_sm)
            assert torch.equal(summed(wide_linear(x, weight, biased, tile)), alone)


@pytest.mark.parametrize("num_tokens", [449, 512, 513, 769, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_product_of_tokens_that_programs_share(num_tokens, dtype) -> None:
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs Hopper")
    num_sms = num_multiprocessors(torch.device("cuda", 0))
    size, k = num_sms // 4 * 96, 1024
    assert choose_gated(num_tokens, 2 * size, k, dtype, num_sms) is not None
    x, weight = randn(num_tokens, k, dtype=dtype), randn(2 * size, k, dtype=dtype) / k**0.5
    poison = torch.full((num_tokens, size), float("nan"), device="cuda", dtype=dtype)
    del poison  # the allocator hands the same memory out again
    got = gated_linear(x, weight)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    torch.testing.assert_close(got, (F.silu(gate) * up).to(dtype), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("num_tokens", [32, 33, 64, 65, 128, 129, 176, 192, 193, 256])
@pytest.mark.parametrize(
    ("size", "k", "groups", "dtype"),
    [
        (3072, 1024, 1, torch.bfloat16),
        (2016, 1024, 1, torch.float16),
        (0, 2048, 3, torch.bfloat16),
        (-64, 2048, 3, torch.float16),
    ],
)
def test_gated_product_of_wide_tiles_equals_two_kernels(size, k, groups, num_tokens, dtype) -> None:
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("needs Hopper")
    num_sms = num_multiprocessors(torch.device("cuda", 0))
    if groups == 3:
        size += 96 * num_sms  # a program for each multiprocessor
    x, weight = randn(num_tokens, k, dtype=dtype), randn(2 * size, k, dtype=dtype) / k**0.5
    tile = choose_gated(num_tokens, 2 * size, k, dtype, num_sms)
    assert tile is not None and tile.groups == groups
    poison = torch.full((num_tokens, size), float("nan"), device="cuda", dtype=dtype)
    del poison  # the allocator hands the same memory out again
    got = gated_linear(x, weight)
    assert got.shape == (num_tokens, size)
    if groups == 1 or num_tokens < SKEWED_TOKENS:
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


@pytest.mark.parametrize(
    ("num_tokens", "hidden"),
    [
        *((num_tokens, 1024) for num_tokens in (1, 8, 32, 112, 176, 208, 640)),
        *((num_tokens, 4096) for num_tokens in (1, 8, 16, 32, 48, 144, 256)),
    ],
)
def test_chain_in_a_graph_equals_eager(num_tokens: int, hidden: int) -> None:
    """Layers whose launches overlap, replayed with changing inputs."""
    intermediate = 3 * hidden
    layers = [
        (
            randn(2 * intermediate, hidden) / hidden**0.5,
            randn(hidden, intermediate) / intermediate**0.5,
            randn(hidden),
        )
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
        if num_tokens < SKEWED_TOKENS:
            assert torch.equal(out, in_two_kernels(linear))
    error = (out.float() - in_two_kernels(F.linear).float()).norm() / out.float().norm()
    assert error < 2e-2


def test_choice_of_wide_tiles() -> None:
    """Weights of Qwen3-0.6B, then of larger models, on an H200."""

    def choose(num_tokens: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16):
        return choose_wide(num_tokens, n, k, dtype, 132)

    assert choose(16, 4096, 1024) is None
    assert choose(17, 4096, 1024) == WideTile((32,))
    assert choose(33, 4096, 1024) == WideTile((64,))
    assert choose(128, 6144, 1024) == WideTile((128,))
    assert choose(128, 1024, 2048) == WideTile((128,), 1, 4)
    assert choose(160, 1024, 3072) == WideTile((128, 32), 1, 6)
    assert choose(193, 6144, 1024) == WideTile((128, 64, 32))
    assert choose(193, 4096, 1024) == WideTile((128,))  # two programs share the tokens
    assert choose(257, 4096, 1024) is None
    assert choose(128, 4096, 1024, torch.float32) is None
    assert choose(1, 4096, 4096, torch.float32) is None
    assert choose(1, 6144, 4096) == WideTile((8,), 1, 2, 2)
    assert choose(9, 4096, 12288) == WideTile((16,), 1, 4, 2)
    assert choose(16, 24576, 4096) == WideTile((16,), 1, 1, 3)
    assert choose(1, 28672, 4096) == WideTile((8,), 1, 1, 2)  # more than three for each
    assert choose(1, 1000, 4096) is None and choose(1, 6144, 4000) is None
    assert choose(32, 6144, 4096) == WideTile((32,))
    assert choose(65, 6144, 4096) == WideTile((64, 32))
    assert choose(192, 4096, 12288) == WideTile((128, 64), 1, 2)
    assert choose(225, 4096, 12288) is None
    assert choose(32, 24576, 4096) == WideTile((32,), 3)
    assert choose(256, 24576, 4096) == WideTile((128, 128), 3)
    assert choose(33, 28672, 4096) == WideTile((64,), 1, 1, 2)
    assert choose(65, 28672, 4096) is None  # more than a wave
    # Qwen3-30B-A3B's QKV and O.
    assert choose(16, 5120, 2048) == WideTile((16,), 1, 3, 2)
    assert choose(64, 5120, 2048) == WideTile((64,)) and choose(65, 5120, 2048) is None
    assert choose(16, 2048, 4096) is None  # `hopper_linear`
    assert choose(192, 2048, 4096) == WideTile((128, 64), 1, 3)
    assert choose(193, 2048, 4096) is None


def test_choice_of_gated_tiles() -> None:
    """Weights of Qwen3-0.6B, then of Qwen3-8B, on an H200."""

    def choose(num_tokens: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16):
        return choose_gated(num_tokens, n, k, dtype, 132)

    assert choose(256, 6144, 1024) == choose_wide(256, 6144, 1024, torch.bfloat16, 132)
    assert choose(257, 6144, 1024) is None and choose(448, 6144, 1024) is None
    assert choose(449, 6144, 1024) == WideTile((128,), 3)
    assert choose(640, 6144, 1024) == WideTile((128, 32), 3)
    assert choose(1024, 6144, 1024) == WideTile((128, 128), 3)
    assert choose(1025, 6144, 1024) is None
    assert choose(640, 6144, 1024, torch.float32) is None
    assert choose(1, 24576, 4096) == WideTile((8,), 1, 1, 3)
    assert choose(1, 4096, 4096) is None  # SiLU needs all of K
    assert choose(512, 24576, 4096) is None and choose(512, 6144, 4096) is None
    assert choose(512, 12288, 2048) == WideTile((128, 128), 3)


def test_choice() -> None:
    assert choose_block_m(1, 4096, 1024, torch.bfloat16) == 8
    assert choose_block_m(17, 4096, 1024, torch.bfloat16) == 32
    assert choose_block_m(16384, 4096, 1024, torch.bfloat16) is None
    assert choose_block_m(1, 4096, 1024, torch.float32) is None
    assert choose_block_m(1, 4096, 1000, torch.bfloat16) is None
    assert choose_block_m(1, 24576, 4096, torch.bfloat16) is None
    assert choose_tile(1, 24576, 4096, torch.bfloat16) is not None
    assert choose_tile(1, 24576, 4096, torch.float32) is None
    assert choose_tile(64, 24576, 4096, torch.bfloat16) is None
    assert choose_tile(1, 151936, 4096, torch.bfloat16) is None
    x, weight = randn(300, 1024), randn(128, 1024)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(torch_ops.linear(x, weight), F.linear(x, weight))
