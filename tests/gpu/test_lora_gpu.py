"""LoRA adapters on CUDA: kernels against float64, tokens against transformers, graphs, ranks."""

import random

import pytest
import torch
from lora_adapters import LINEAR, VOCABULARY, Adapter, reference, save_adapter
from tiny_models import VOCAB_SIZE, save_family, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import torch_lora
from nanovllm.kernels.triton.lora import FEW_TOKENS, add_adapters, plan_adapters
from nanovllm.kernels.types import LoRAWeights, PartialSums
from nanovllm.lora_request import LoRARequest

MAX_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
LENGTHS = (1, 2, 17, 64, 255, 256, 257, 300, 511, 513, 30, 40)


# ---- kernels --------------------------------------------------------------------------------


def draw(sizes: tuple[int, ...], num_columns: int, rank: int, num_slots: int, dtype: torch.dtype):
    """Weights of projections with so many rows."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = tuple(zip([0, *ends], ends, strict=False))
    a = torch.randn(num_slots, len(sizes) * rank, num_columns, device="cuda") / num_columns**0.5
    b = torch.randn(num_slots, ends[-1], rank, device="cuda") / rank**0.5
    return LoRAWeights(a.to(dtype), b.to(dtype), rows)


def as_double(weights: LoRAWeights) -> LoRAWeights:
    return LoRAWeights(weights.a.double(), weights.b.double(), weights.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [16, 64, 256])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 33, 256, FEW_TOKENS, 3000])
def test_terms_equal_float64(num_tokens: int, rank: int, dtype: torch.dtype) -> None:
    for sizes, num_columns in (((2048, 1024, 1024), 1024), ((1000,), 3072), ((24, 8), 72)):
        weights = draw(sizes, num_columns, rank, 8, dtype)
        slots = torch.randint(0, 9, (num_tokens,), device="cuda", dtype=torch.int32)
        x = torch.randn(num_tokens, num_columns, device="cuda").to(dtype)
        found = torch.randn(num_tokens, sum(sizes), device="cuda").to(dtype)
        exact = found.double()
        plan = torch_lora.plan_adapters(slots, 8)
        torch_lora.add_adapters(exact, x.double(), as_double(weights), plan)
        before = found.clone()
        add_adapters(found, x, weights, plan_adapters(slots, 8))
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
        assert torch.equal(found[slots == 0], before[slots == 0])


@pytest.mark.parametrize("num_tokens", [40, 3000])
@pytest.mark.parametrize("rank", [16, 128])
def test_a_token_does_not_depend_on_the_adapters_of_others(num_tokens: int, rank: int) -> None:
    weights = draw((2048, 1024, 1024), 1024, rank, 8, torch.bfloat16)
    x = torch.randn(num_tokens, 1024, device="cuda").bfloat16()
    product = torch.randn(num_tokens, 4096, device="cuda").bfloat16()
    is_own = torch.arange(num_tokens, device="cuda") % 5 == 2
    found = []
    for others in (torch.randint(0, 9, (num_tokens,)), torch.full((num_tokens,), 3)):
        slots = torch.where(is_own, 3, others.cuda()).int()
        out = product.clone()
        add_adapters(out, x, weights, plan_adapters(slots, 8))
        found.append(out)
    assert torch.equal(found[0][is_own], found[1][is_own])
    assert not torch.equal(found[0], found[1])


def test_one_part_of_a_product_gets_the_terms() -> None:
    weights = draw((2048, 1024), 1024, 16, 4, torch.bfloat16)
    slots = torch.tensor([2, 0, 1, 1, 4], dtype=torch.int32, device="cuda")
    x = torch.randn(5, 1024, device="cuda").bfloat16()
    parts = torch.randn(2, 5, 3072, device="cuda")
    exact = parts.double().sum(0)
    plan = torch_lora.plan_adapters(slots, 4)
    torch_lora.add_adapters(exact, x.double(), as_double(weights), plan)
    add_adapters(PartialSums(parts, x.dtype), x, weights, plan_adapters(slots, 4))
    torch.testing.assert_close(parts.double().sum(0), exact, rtol=2e-2, atol=2e-2)


# ---- engines --------------------------------------------------------------------------------


def engine(path, **kwargs) -> LLM:
    settings = {"max_model_len": 1024, "max_num_seqs": 16, "num_kvcache_blocks": 128}
    return LLM(str(path), **(settings | {"enable_lora": True, "max_loras": 2} | kwargs))


def random_prompts(lengths, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def run(llm: LLM, adapters, prompts, params=GREEDY) -> list[list[int]]:
    numbers: dict[str, int] = {}
    requests = [
        adapter
        and LoRARequest("a", numbers.setdefault(str(adapter.path), len(numbers) + 1), adapter.path)
        for adapter in adapters
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory) -> list[Adapter | None]:
    """Those of LENGTHS' prompts: three, and none."""
    folder = tmp_path_factory.mktemp("adapters")
    made = [
        save_adapter(folder / "all", model_dir, seed=1),
        save_adapter(folder / "small", model_dir, seed=2, rank=3, targets=("q_proj", "down_proj")),
        save_adapter(folder / "words", model_dir, seed=3, targets=(*LINEAR, *VOCABULARY)),
    ]
    return [made[i % 4] if i % 4 < 3 else None for i in range(len(LENGTHS))]


@pytest.fixture(scope="module")
def expected(model_dir, adapters):
    return reference(model_dir, adapters, random_prompts(LENGTHS), MAX_TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 100, "enable_chunked_prefill": True},
        {"num_kvcache_blocks": 6, "watermark": 0},
        {"async_scheduling": False, "max_loras": 3},
        {"max_lora_rank": 256},
    ],
    ids=str,
)
def test_float32_gives_the_tokens_of_merged_weights(model_dir, adapters, expected, settings):
    prompts = random_prompts(LENGTHS)
    with engine(model_dir, **settings) as llm:
        for _ in range(2):  # the second time with a warm prefix cache
            assert run(llm, adapters, prompts) == expected


def test_steps_without_adapters_have_graphs_of_their_own(model_dir, adapters):
    prompts = random_prompts(LENGTHS)
    with engine(model_dir, enable_lora=False) as llm:
        without = run(llm, [None] * len(prompts), prompts)
    with engine(model_dir) as llm:
        assert run(llm, [None] * len(prompts), prompts) == without
        plain = llm.model_runner.graphs
        run(llm, adapters[:1], prompts[:1])
        assert llm.model_runner.graphs is not plain
        assert run(llm, [None] * len(prompts), prompts) == without
        assert llm.model_runner.graphs is not None


def test_adapters_survive_a_sleep(model_dir, adapters, expected):
    prompts = random_prompts(LENGTHS)
    with engine(model_dir) as llm:
        assert run(llm, adapters, prompts) == expected
        llm.sleep(level=1)
        llm.wake_up()
        assert run(llm, adapters, prompts) == expected


@pytest.mark.parametrize("name", ["llama2", "gemma2", "phi4-mini"])
def test_families_in_float32(tmp_path, name):
    path = save_family(tmp_path / "m", name)
    fused = ("qkv_proj", "gate_up_proj")
    chosen = [save_adapter(tmp_path / "a", path, targets=(*LINEAR, *fused, "lm_head")), None]
    prompts = random_prompts((20, 300))
    with engine(path) as llm:
        assert run(llm, chosen, prompts) == reference(path, chosen, prompts, MAX_TOKENS)


def test_bfloat16_stays_close(model_dir, adapters):
    """A first token depends on one prefill only, so rounding seldom changes it."""
    prompts = random_prompts(LENGTHS)
    exact = reference(model_dir, adapters, prompts, 1)
    with engine(model_dir, dtype="bfloat16") as llm:
        found = run(llm, adapters, prompts, SamplingParams(temperature=0, max_tokens=1))
    assert sum(a == b for a, b in zip(found, exact, strict=True)) >= len(prompts) * 2 / 3


@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_a_quantised_base_gives_the_tokens_of_the_cpu(tmp_path, quantization):
    path = save_model(tmp_path / "m", hidden_size=128, intermediate_size=128)
    chosen = [save_adapter(tmp_path / "a", path), None] * 2
    prompts = random_prompts((20, 300, 5, 40))
    found = []
    for device in ("cuda", "cpu"):
        with engine(path, quantization=quantization, device=device) as llm:
            found.append(run(llm, chosen, prompts))
    assert found[0] == found[1]


@pytest.mark.two_gpus
def test_two_ranks(model_dir, adapters, expected):
    with engine(model_dir, tensor_parallel_size=2) as llm:
        assert run(llm, adapters, random_prompts(LENGTHS)) == expected
