"""Products and norms that wait for what reads them: every family gives the tokens that it gave."""

import pytest
from engine_checks import generate, greedy, random_prompts, tiny_engine
from tiny_models import save_family

from nanovllm.kernels import select
from nanovllm.kernels.cpu_ops import CpuOps
from nanovllm.kernels.types import Normed, Product

MAX_TOKENS = 8  # that are left: prompts are longer, decode steps shorter
# Whether any of a family's layers leaves a product.
EXPECTED = {
    "qwen2": True,  # with biases: QKV's norm is computed ahead of it
    "llama3": True,
    "gemma": True,  # norm weights in float32
    "qwen3-yarn": True,
    "qwen3-window": True,
    "qwen3-moe": True,  # the layers with a plain MLP
    "mixtral": False,
    "granite": False,
    "glm4": False,
    "gemma2": False,
    "cohere": False,
    "nemotron": False,
    "gpt-oss": False,
    "qwen3.5": False,
}


class LateOps(CpuOps):
    """Takes products and norms late, and sums in the residual's memory as a GPU's kernels do."""

    num_added = 0

    def __init__(self) -> None:
        super().__init__()
        self.add_rms_norm = self.add_late

    def leaves_product(self, x, weight):
        return len(x) <= MAX_TOKENS

    def add_late(self, x, residual, weight, eps):
        if isinstance(x, Product):
            LateOps.num_added += 1
            residual += CpuOps.linear(*x)
            return Normed(residual, weight, eps), residual
        return CpuOps().add_rms_norm(x, residual, weight, eps)

    def linear(self, x, weight, bias=None):
        return CpuOps.linear(self.rms_norm(*x) if isinstance(x, Normed) else x, weight, bias)


@pytest.fixture
def prompts():
    return random_prompts([3, 20, 1, 9])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_gives_the_same_tokens(name, tmp_path, prompts, monkeypatch):
    path = save_family(tmp_path / name, name)
    expected = generate(tiny_engine(path), prompts, greedy(12))
    monkeypatch.setattr(select, "CpuOps", LateOps)
    monkeypatch.setattr(LateOps, "num_added", 0)
    assert generate(tiny_engine(path), prompts, greedy(12)) == expected
    assert (LateOps.num_added > 0) == EXPECTED[name]


@pytest.mark.parametrize("options", [{"quantization": "int4"}, {"enable_lora": True}])
def test_options_give_the_same_tokens(options, tmp_path, prompts, monkeypatch):
    path = save_family(tmp_path, "qwen3-yarn")
    expected = generate(tiny_engine(path, **options), prompts, greedy(12))
    monkeypatch.setattr(select, "CpuOps", LateOps)
    assert generate(tiny_engine(path, **options), prompts, greedy(12)) == expected
