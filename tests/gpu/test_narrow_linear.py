"""Products of few tokens without parts against float64, with what stands around them."""

import pytest
import torch

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.narrow_linear import Way, add_linear, normed_linear

EPS = 1e-6
WAYS = [
    *(Way(False, 8), Way(False, 4), Way(True, 8), Way(True, 16, 3)),
    Way(True, 8, 1, 96, fills_device=True),
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernels are Hopper's")


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Norms by other sums are, now and then, rounded to another neighbour."""
    assert found.isfinite().all()
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < (2e-3 if found.dtype == torch.bfloat16 else 3e-4), float(error)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("is_gated", [False, True])
def test_normed_products(is_gated, num_tokens, dtype, way) -> None:
    n = 6144 if is_gated else 4096
    residual, norm_weight = randn(num_tokens, 1024, dtype=dtype), randn(1024, dtype=dtype)
    weight = randn(n, 1024, dtype=dtype) / 32
    x = torch_ops.rms_norm(residual, norm_weight, EPS)
    product = (x.double() @ weight.double().T).to(dtype)
    expected = torch_ops.silu_and_mul(product) if is_gated else product
    close(normed_linear(residual, norm_weight, EPS, weight, is_gated, way), expected)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("k", [2048, 3072])
def test_sums_with_the_residual(k, num_tokens, dtype, way) -> None:
    x, weight = randn(num_tokens, k, dtype=dtype), randn(1024, k, dtype=dtype) / k**0.5
    rows = randn(num_tokens + 1, 1024, dtype=dtype)
    before, residual = rows.clone(), rows[:num_tokens]
    add_linear(x, weight, residual, way)
    close(residual, (x.double() @ weight.double().T).to(dtype) + before[:num_tokens])
    assert torch.equal(rows[num_tokens], before[num_tokens])
