"""Every model family, with all that its config can switch on, against transformers in float32."""

import inspect
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from engine_checks import (
    check_nothing_is_held,
    check_varied,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)
from test_fp8_engine import attention_over_fp8
from tiny_models import FAMILIES, VOCAB_SIZE, reference_greedy, save_family, save_model
from transformers import AttentionInterface, AutoModelForCausalLM

from nanovllm.models.registry import ARCHITECTURES

MAX_TOKENS = 10
NAMES = ("caching", "chunked", "overlap", "eager")
LIKE_QWEN3_5 = ("qwen3.5-moe", "qwen3-next")  # whose switches are tested with that one
SWITCHES = list(itertools.product([True, False], repeat=4))
# One of each way to divide a layer; processes that start take seconds.
WITH_RANKS = """qwen2-yarn llama2 smollm2 phi4-mini glm4 qwen3-moe qwen3-moe-steps gemma2 gemma3
    gpt-oss granite olmo2 cohere nemotron starcoder2 qwen3.5 qwen3-next""".split()
WITH_THEIR_OWN_ROUNDING = ("gemma", "gemma2", "granite", "nemotron", "olmo2")
WITH_ALL_SWITCHES = ("gemma2", "qwen3-moe")


def switches_of(name: str) -> list[tuple[bool, ...]]:
    """Each switch on and off; over the families, all switches in all combinations.

    A family's code sees none of them: it sees the step plans that follow.
    """
    if name in WITH_ALL_SWITCHES:
        return SWITCHES
    number = list(FAMILIES).index(name) % (len(SWITCHES) // 2)
    return [SWITCHES[number], SWITCHES[-1 - number]]  # of which one is the other's opposite


@dataclass
class Model:
    path: Path
    prompts: list[list[int]]
    reference: list[list[int]]

    @cached_property
    def logits(self) -> torch.Tensor:
        """Of transformers in float32, which several tests compare with."""
        return logits_of_transformers(self)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes a family's model once, with prompts that reach far into the scaled positions."""
    made = {}
    folder = tmp_path_factory.mktemp("families")

    def make(name: str) -> Model:
        if name not in made:
            path = save_family(folder / name, name)
            [shared] = random_prompts([520], seed=1)
            prompts = [*random_prompts((1, 3, 60, 200, 257), seed=2), shared[:300], shared, shared]
            reference = reference_greedy(path, prompts[:-1], MAX_TOKENS)
            reference.append(reference[-1])  # of the equal prompt
            check_varied(reference)
            made[name] = Model(path, prompts, reference)
        return made[name]

    return make


def logits_of_transformers(
    model: Model, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """After each prompt: [prompts, VOCAB_SIZE]."""
    reference = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=dtype, attn_implementation=attention
    )
    with torch.inference_mode():
        return torch.stack(
            [reference(torch.tensor([p]), use_cache=False).logits[0, -1] for p in model.prompts]
        )


def captured_logits(llm, model: Model) -> torch.Tensor:
    """What the engine samples the first tokens from: [prompts, VOCAB_SIZE]."""
    captured = []
    hook = llm.model_runner.model.lm_head.register_forward_hook(
        lambda module, args, out: captured.append(out.clone())  # the engine reuses it
    )
    generate(llm, model.prompts, greedy(1))
    hook.remove()
    return torch.cat(captured)[:, :VOCAB_SIZE]


def caches_prefixes(name: str) -> bool:
    return "linear_num_key_heads" not in FAMILIES[name]


def engine_with(model: Model, caching, chunked, overlap, eager, **kwargs):
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 90} if chunked else {}
    return tiny_engine(
        model.path,
        enable_prefix_caching=caching and caches_prefixes(model.path.name),
        async_scheduling=overlap,
        enforce_eager=eager,
        num_kvcache_blocks=8,  # too few for all at once
        **(chunks | kwargs),
    )


def test_every_family_is_here():
    default = inspect.signature(save_model).parameters["architecture"].default
    assert {f.get("architecture", default) for f in FAMILIES.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(models, name):
    model = models(name)
    with tiny_engine(model.path) as llm:
        logits = captured_logits(llm, model)
        torch.testing.assert_close(logits, model.logits, atol=2e-4, rtol=2e-4)
        for _ in range(2):  # the second time with a warm prefix cache
            assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference
            check_nothing_is_held(llm)


@pytest.mark.parametrize("name", WITH_THEIR_OWN_ROUNDING)
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(models, name):
    model = models(name)
    with tiny_engine(model.path, dtype="bfloat16") as llm:
        logits = captured_logits(llm, model)
    exact = model.logits
    rounded = logits_of_transformers(model, dtype=torch.bfloat16)
    error, of_transformers = (x.float() - exact for x in (logits, rounded))
    assert error.square().mean() < 1.15 * of_transformers.square().mean()


@pytest.mark.parametrize(
    ("name", *NAMES),
    [
        (name, *switches)
        for name in FAMILIES
        if name not in LIKE_QWEN3_5
        for switches in switches_of(name)
    ],
)
def test_no_switch_changes_a_token(models, name, caching, chunked, overlap, eager):
    model = models(name)
    with engine_with(model, caching, chunked, overlap, eager) as llm:
        assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference
        check_nothing_is_held(llm)


@pytest.mark.usefixtures("ranks_are_threads")
@pytest.mark.parametrize(
    ("name", *NAMES),
    [(name, *switches) for name, switches in zip(WITH_RANKS, itertools.cycle(SWITCHES))],
)
def test_ranks_split_biases_and_experts_too(models, name, caching, chunked, overlap, eager):
    """Two ranks, or three where the number of heads is odd."""
    model = models(name)
    ranks = 3 if FAMILIES[name].get("num_attention_heads", 8) % 2 else 2
    with engine_with(model, caching, chunked, overlap, eager, tensor_parallel_size=ranks) as llm:
        assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference
        check_nothing_is_held(llm)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_fp8_cache_gives_the_logits_of_transformers_over_quantised_keys_and_values(models, name):
    """Rounding may tip an element to the next fp8 number, hence the tolerance."""
    model = models(name)
    AttentionInterface.register("over_fp8", attention_over_fp8)
    with tiny_engine(model.path, kv_cache_dtype="fp8") as llm:
        logits = captured_logits(llm, model)
    error = (logits - logits_of_transformers(model, "over_fp8")).square().mean().sqrt()
    of_quantisation = (logits - model.logits).square().mean().sqrt()
    assert error < 0.1 * of_quantisation
