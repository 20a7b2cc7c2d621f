"""Products of many tokens and what follows them in one kernel, against float32 in PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import activation, rope
from nanovllm.kernels.triton.hopper_fused_linear import MIN_COLUMNS, MIN_TOKENS
from nanovllm.kernels.types import KVCache, Product

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="the kernel is Hopper's",
)
HEAD_DIM, BLOCK_SIZE, EPS = 128, 256, 1e-6
TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 8e-3}


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def counting(monkeypatch, module, name: str) -> list[int]:
    """The list of tokens of each call that is to come of a function."""
    calls, function = [], getattr(module, name)

    def call(x, *args):
        calls.append(len(x[0]) if isinstance(x, Product) else len(x))
        return function(x, *args)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("num_tokens", "k", "size"), [(MIN_TOKENS, MIN_COLUMNS, 128), (9001, 1024, 3072)]
)
def test_silu_of_a_product_equals_float32(monkeypatch, num_tokens, k, size, dtype) -> None:
    calls = counting(monkeypatch, activation, "hopper_silu_linear")
    x, weight = randn(num_tokens, k, dtype=dtype), randn(2 * size, k, dtype=dtype) / k**0.5
    gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
    tolerance = TOLERANCES[dtype]
    out = activation.gated_linear(x, weight)
    torch.testing.assert_close(out.float(), F.silu(gate) * up, rtol=tolerance, atol=tolerance)
    assert calls == [num_tokens]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("num_tokens", "k", "num_q_heads", "num_kv_heads", "has_norms"),
    [
        (MIN_TOKENS, MIN_COLUMNS, 6, 1, True),  # a tile of a key's head and a value's
        (2500, 1024, 4, 2, False),
        (9001, 1024, 16, 8, True),
    ],
)
def test_heads_of_a_product_equal_float32(
    monkeypatch, num_tokens, k, num_q_heads, num_kv_heads, has_norms, dtype
) -> None:
    """Queries, and keys and values in their slots; what has no slot is written nowhere."""
    calls = counting(monkeypatch, rope, "hopper_heads_linear")
    width = (num_q_heads + 2 * num_kv_heads) * HEAD_DIM
    x, weight = randn(num_tokens, k, dtype=dtype), randn(width, k, dtype=dtype) / k**0.5
    norms = [1 + randn(HEAD_DIM, dtype=dtype) / 8 if has_norms else None for _ in range(2)]
    angles = torch.rand(num_tokens, HEAD_DIM // 2, device="cuda") * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randperm(num_tokens, device="cuda").int()
    num_blocks = num_tokens // BLOCK_SIZE + 2
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:num_tokens]
    slots[::5] = -1
    shape = num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM
    cache, expected_cache = (
        KVCache(*(torch.zeros(shape, device="cuda", dtype=kind) for _ in range(2)))
        for kind in (dtype, torch.float32)
    )
    product = F.linear(x.float(), weight.float())
    floats = [norm if norm is None else norm.float() for norm in norms]
    expected = torch_ops.qk_norm_rope_store(
        product, *floats, EPS, cos_sin, positions, expected_cache, slots
    )
    query = rope.heads_linear(Product(x, weight), *norms, EPS, cos_sin, positions, cache, slots)
    assert calls == [num_tokens]
    tolerance = TOLERANCES[dtype]
    for got, wanted in ((query, expected), (cache.key, expected_cache.key)):
        torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache.value.float(), expected_cache.value, rtol=1e-2, atol=1e-3)
