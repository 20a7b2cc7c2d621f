"""Run by test_triton_interpreter.py in a process with TRITON_INTERPRET=1: adapters' terms."""

import pytest
import torch

from nanovllm.kernels import torch_lora
from nanovllm.kernels.triton import lora as triton_lora
from nanovllm.kernels.triton.lora import add_adapters, plan_adapters
from nanovllm.kernels.types import LoRAWeights, PartialSums


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that few tokens and rows make several of all."""
    monkeypatch.setattr(triton_lora, "PLAN_BLOCK", 32)
    monkeypatch.setattr(triton_lora, "SHORT_SPAN", 32)
    monkeypatch.setattr(triton_lora, "FEW_TOKENS", 32)


def draw(sizes: tuple[int, ...], num_columns: int, rank: int, num_slots: int, dtype: torch.dtype):
    """Weights of projections with so many rows."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = tuple(zip([0, *ends], ends, strict=False))
    a = torch.randn(num_slots, len(sizes) * rank, num_columns) / num_columns**0.5
    b = torch.randn(num_slots, ends[-1], rank)
    return LoRAWeights(a.to(dtype), b.to(dtype), rows)


def test_the_plan_has_each_token_of_an_adapter_once():
    for num_tokens, num_slots in ((1, 1), (32, 3), (70, 2)):
        slots = torch.randint(0, num_slots + 1, (num_tokens,)).int()
        tiles, owners = plan_adapters(slots, num_slots)
        assert tiles.shape[1] == (16 if num_tokens <= 32 else 64)
        found = []
        for tile, slot in zip(tiles.tolist(), owners.tolist(), strict=True):
            tokens = [token for token in tile if token >= 0] if slot >= 0 else []
            assert all(slots[token] == slot + 1 for token in tokens)
            assert slot < 0 or tokens == tile[: len(tokens)] != []
            found += tokens
        assert sorted(found) == (slots > 0).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize(
    ("num_tokens", "dtype"), [(1, torch.float32), (20, torch.float16), (40, torch.float32)]
)
def test_terms_are_those_of_torch(num_tokens, dtype):
    """In one kernel and in two."""
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for sizes, num_columns, rank in (((40, 56, 8), 300, 16), ((16, 50), 64, 128)):
        weights = draw(sizes, num_columns, rank, 2, dtype)
        slots = torch.randint(0, 3, (num_tokens,)).int()
        x = torch.randn(num_tokens, num_columns).to(dtype)
        before = torch.randn(num_tokens, sum(sizes)).to(dtype)
        expected, found = before.clone(), before.clone()
        torch_lora.add_adapters(expected, x, weights, torch_lora.plan_adapters(slots, 2))
        add_adapters(found, x, weights, plan_adapters(slots, 2))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(found[slots == 0], before[slots == 0])
        assert num_tokens == 1 or not torch.equal(found, before)


def test_one_part_of_a_product_gets_the_terms():
    weights = draw((40, 40), 64, 16, 2, torch.float16)
    slots = torch.tensor([2, 0, 1, 1], dtype=torch.int32)
    x, parts = torch.randn(4, 64).half(), torch.randn(3, 4, 80)
    expected, found = PartialSums(parts.clone(), x.dtype), PartialSums(parts.clone(), x.dtype)
    torch_lora.add_adapters(expected, x, weights, torch_lora.plan_adapters(slots, 2))
    add_adapters(found, x, weights, plan_adapters(slots, 2))
    torch.testing.assert_close(found.parts, expected.parts, rtol=5e-3, atol=5e-3)
    assert torch.equal(found.parts[1:], parts[1:])


def test_a_product_with_a_that_is_there_already():
    weights = draw((40, 8), 64, 16, 2, torch.float32)
    slots = torch.tensor([1, 2, 0], dtype=torch.int32)
    x = torch.randn(3, 64)
    expected, found = torch.zeros(3, 48), torch.zeros(3, 48)
    plan = plan_adapters(slots, 2)
    add_adapters(expected, x, weights, plan)
    inner = torch.zeros(3, 32)
    inner[0], inner[1] = weights.a[0] @ x[0], weights.a[1] @ x[1]
    without_a = LoRAWeights(None, weights.b, weights.rows)
    add_adapters(found, inner, without_a, plan)
    torch.testing.assert_close(found, expected)
