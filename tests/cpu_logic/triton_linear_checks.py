"""Run by test_triton_interpreter.py in a process with TRITON_INTERPRET=1: products in parts."""

import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import tiled_linear as triton_tiled_linear
from nanovllm.kernels.triton.activation import silu_and_mul
from nanovllm.kernels.triton.linear import choose_block_m, choose_tile, split_linear
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.tiled_linear import LinearTile, tiled_linear
from nanovllm.kernels.types import PartialSums


def test_products() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
        for num_tokens, n, k in ((3, 100, 1024), (16, 64, 512), (17, 130, 1536)):
            x = (torch.randn(num_tokens, k) / k**0.5).to(dtype)
            weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
            product = split_linear(x, weight, bias, 16 if num_tokens <= 16 else 32)
            assert isinstance(product, PartialSums) == (k > 512)
            out = product.parts.sum(0) if isinstance(product, PartialSums) else product
            exact = F.linear(x.double(), weight.double(), bias.double())
            torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_products_in_tiles(monkeypatch) -> None:
    """K split and whole; neither tokens nor weights fill their tiles."""
    for num_programs in (1, 64):
        monkeypatch.setattr(triton_tiled_linear, "num_multiprocessors", lambda _, n=num_programs: n)
        for num_tokens, n, k in ((3, 100, 1040), (17, 130, 1536), (130, 72, 96)):
            x = (torch.randn(num_tokens, k) / k**0.5).half()
            weight, bias = torch.randn(n, k).half(), torch.randn(n).half()
            block_m = min(128, max(16, 1 << (num_tokens - 1).bit_length()))
            tile = LinearTile(block_m, 64, 128, 4, 2, 2)
            product = tiled_linear(x, weight, bias, tile, x.dtype, len(x))
            assert isinstance(product, PartialSums) == (k > 512 and num_programs > 1)
            out = product.parts.sum(0) if isinstance(product, PartialSums) else product
            exact = F.linear(x.double(), weight.double(), bias.double())
            torch.testing.assert_close(out.double(), exact, rtol=4e-3, atol=4e-3)


def test_ops_add_up_parts() -> None:
    for num_parts in (2, 5):
        parts = PartialSums(torch.randn(num_parts, 4, 96), torch.float16)
        whole = parts.parts[0].clone()
        for part in parts.parts[1:]:
            whole += part
        whole = whole.half()
        residual, weight = torch.randn(4, 96).half(), torch.randn(96).half()
        normed, total = add_rms_norm(parts, residual.clone(), weight, 1e-6)
        expected, expected_total = torch_ops.add_rms_norm(whole, residual, weight, 1e-6)
        assert torch.equal(total, expected_total)
        torch.testing.assert_close(normed, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(
            silu_and_mul(parts), torch_ops.silu_and_mul(whole), rtol=2e-3, atol=2e-3
        )


def test_who_multiplies() -> None:
    """One tile a program, a loop over tiles, or cuBLAS (None, None)."""

    def chosen(num_tokens: int, n: int, k: int, dtype=torch.bfloat16) -> tuple[int | None, bool]:
        block_m = choose_block_m(num_tokens, n, k, dtype)
        return block_m, choose_tile(num_tokens, n, k, dtype) is not None

    assert chosen(1, 6144, 1024) == (8, True)  # Qwen3-0.6B's gate and up: 192 programs
    assert chosen(32, 6144, 1024) == (32, True)
    assert chosen(64, 4096, 1024) == (64, False)
    assert chosen(64, 6144, 1024) == (None, False)
    assert chosen(1, 6144, 4096) == (None, True)  # Qwen3-8B's QKV: 768 programs
    assert chosen(33, 6144, 4096) == (None, False)
    assert chosen(1, 1152, 896) == (None, True)  # no multiple of 512 columns
    assert chosen(1, 151936, 1024) == (None, False)
    assert chosen(1, 6144, 1024, torch.float32) == (None, False)
    assert chosen(1, 100, 1025) == (None, False)  # rows that bulk copies cannot fetch
    assert choose_tile(1, 4096, 12288, torch.bfloat16).block_k == 256
    assert choose_tile(17, 4096, 12288, torch.bfloat16).block_m == 32
