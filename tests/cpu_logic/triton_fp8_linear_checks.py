"""Run by test_triton_interpreter.py in a process with TRITON_INTERPRET=1: fp8 weights."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import fp8_linear as triton_fp8_linear
from nanovllm.kernels.triton import tiled_linear as triton_tiled_linear
from nanovllm.kernels.types import FP8_BLOCK, FP8_DTYPE, FP8_MAX, LinearOutput, PartialSums


def summed(product: LinearOutput) -> torch.Tensor:
    return product.parts.sum(0) if isinstance(product, PartialSums) else product


def fp8_weight(n: int, k: int, by_blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers, and scales from 1/8 to 8."""
    shape = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)) if by_blocks else (n,)
    scales = torch.randint(-3, 4, shape).float().exp2() / k**0.5
    return torch.randn(n, k).to(FP8_DTYPE), scales


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "num_tokens", "num_programs"),
    [(144, 1088, 1, 64), (144, 144, 17, 1), (144, 1088, 33, 64), (144, 144, 66, 1)],
)
def test_products(monkeypatch, n, k, num_tokens, num_programs, by_blocks) -> None:
    """The exact product of the activations as `quantize_rows` rounds them; K split and whole.

    Weights have more than a tile and a block in each direction, the last ones cut off.
    """
    monkeypatch.setattr(triton_tiled_linear, "num_multiprocessors", lambda _: num_programs)
    weight, scales = fp8_weight(n, k, by_blocks)
    dequantized = torch_ops.dequantize_weight(weight, scales).double()
    bias = torch.randn(n).half()
    group = FP8_BLOCK if by_blocks else k
    x = torch.randn(num_tokens, k).half()
    values, x_scales = triton_fp8_linear.quantize_rows(x, FP8_BLOCK if by_blocks else None)
    rounded = values.double() * x_scales.double().repeat_interleave(group, 1)[:, :k]
    exact = F.linear(rounded, dequantized, bias.double())
    product = triton_fp8_linear.fp8_linear(x, weight, scales, bias)
    assert isinstance(product, PartialSums) == (num_programs > 1)
    out = summed(product).double()
    torch.testing.assert_close(out, exact, rtol=2e-3, atol=2e-3 * exact.std().item())


@pytest.mark.parametrize("group", [None, FP8_BLOCK])
def test_quantize_rows(group: int | None) -> None:
    """As `torch_ops.quantize`, but for what the interpreter rounds down instead of up to 2^n."""
    x = torch.randn(5, 320) * torch.tensor([1e-4, 1.0, 300.0, 0.0, 1e-30])[:, None]
    x[1, 7] = -50.0
    values, scales = triton_fp8_linear.quantize_rows(x, group)
    width = group or x.shape[1]
    for first in range(0, x.shape[1], width):
        part = slice(first, first + width)
        expected, expected_scales = torch_ops.quantize(x[:, part])
        torch.testing.assert_close(scales[:, first // width], expected_scales)
        assert (values[:, part].float() != expected.float()).float().mean() < 0.1
    assert values[1, 7].float() == -FP8_MAX and (values[3].float() == 0).all()
    assert (scales[3] == 1).all()


def test_who_multiplies_many_tokens() -> None:
    """Our tiles, or torch (None), which asks for whole blocks and a multiple of four of them."""

    def block_m(num_tokens: int, n: int, k: int, by_blocks: bool) -> int | None:
        scales = torch.empty((1, 1) if by_blocks else (1,), device="meta")
        weight = torch.empty(n, k, dtype=FP8_DTYPE, device="meta")
        tile = triton_fp8_linear.choose_tile(num_tokens, weight, scales)
        return tile and tile.block_m

    for tokens, expected in ((65, 128), (128, 128), (129, None)):
        assert block_m(tokens, 6144, 4096, by_blocks=False) == expected
    assert block_m(65, 24576, 4096, by_blocks=False) is None
    for by_blocks in (False, True):
        assert block_m(256, 4096, 4096, by_blocks) == 128
        assert block_m(257, 4096, 4096, by_blocks) is None
    for tokens in (65, 5000):
        assert block_m(tokens, 6144, 4096, by_blocks=True) is None
    assert block_m(5000, 6144, 4096 + 128, by_blocks=True) == 128
    assert block_m(5000, 6144 + 64, 4096, by_blocks=True) == 128
