"""Every model family, with all that its config can switch on, against transformers in float32."""

import inspect
import itertools
from dataclasses import dataclass
from functools import cache
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
from tiny_models import (
    FAMILIES,
    VOCAB_SIZE,
    completion_logits,
    greedy_tokens,
    save_family,
    save_model,
)
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from nanovllm.models.registry import ARCHITECTURES

MAX_TOKENS = 10
FEW = slice(1, 5)  # prompts from shorter than a convolution to longer than windows and a block
NAMES = ("caching", "chunked", "overlap", "eager")
LIKE_QWEN3_5 = ("qwen3.5-moe", "qwen3-next")  # whose switches are tested with that one
SWITCHES = list(itertools.product([True, False], repeat=4))
# One of each way to divide a layer; processes that start take seconds.
WITH_RANKS = """qwen2-yarn llama2 smollm2 phi4-mini glm4 qwen3-moe qwen3-moe-steps gemma2 gemma3
    gpt-oss granite olmo2 cohere nemotron starcoder2 qwen3.5 qwen3-next""".split()
WITH_THEIR_OWN_ROUNDING = ("gemma", "gemma2", "granite", "nemotron", "olmo2")
# Of these two half of all switches each, in which any three come in every combination.
WITH_MORE_SWITCHES = ("gemma2", "qwen3-moe")


def switches_of(name: str) -> list[tuple[bool, ...]]:
    """Chunked prefills at least; over the families, the other switches in all combinations.

    A family's code sees none of them: it sees the step plans that follow.
    """
    if name in WITH_MORE_SWITCHES:
        parity = WITH_MORE_SWITCHES.index(name)
        return [switches for switches in SWITCHES if sum(switches) % 2 == parity]
    chunked = [switches for switches in SWITCHES if switches[NAMES.index("chunked")]]
    return [chunked[list(FAMILIES).index(name) % len(chunked)]]


@dataclass
class Model:
    """A family's model: what transformers makes of the prompts, and a plain engine.

    The engine's completions are from an empty prefix cache, and then from a warm one.
    """

    path: Path
    prompts: list[list[int]]
    module: PreTrainedModel
    reference: list[list[int]]
    logits: torch.Tensor  # after each prompt: [prompts, VOCAB_SIZE]
    completions: list[list[list[int]]]
    logits_of_engine: torch.Tensor


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes a family's model once, with prompts that reach far into the scaled positions."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str) -> Model:
        path = save_family(folder / name, name)
        [shared] = random_prompts([520], seed=1)
        prompts = [*random_prompts((1, 3, 60, 200, 257), seed=2), shared[:300], shared, shared]
        with tiny_engine(path) as llm:
            captured = capture_logits(llm)
            completions = []
            for _ in range(2):
                completions.append(generate(llm, prompts, greedy(MAX_TOKENS)))
                check_nothing_is_held(llm)
        module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        given = {tuple(p): c for p, c in zip(prompts, completions[0], strict=True)}
        rows = {p: completion_logits(module, [*p], c) for p, c in given.items()}
        reference = [rows[tuple(p)].argmax(-1).tolist() for p in prompts]
        if reference != completions[0]:  # then these are no greedy tokens
            reference = greedy_tokens(module, prompts, MAX_TOKENS)
        check_varied(reference)
        logits = torch.stack([rows[tuple(p)][0] for p in prompts])
        of_engine = torch.cat(captured)[: len(prompts), :VOCAB_SIZE]
        return Model(path, prompts, module, reference, logits, completions, of_engine)

    return make


@torch.inference_mode()
def logits_after(module: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """Of transformers, after each prompt: [prompts, VOCAB_SIZE]."""
    return torch.stack([module(torch.tensor([p]), use_cache=False).logits[0, -1] for p in prompts])


def capture_logits(llm) -> list[torch.Tensor]:
    """A list to which the engine adds what it samples from, of each step from now on."""
    captured: list[torch.Tensor] = []
    llm.model_runner.model.lm_head.register_forward_hook(
        lambda module, args, out: captured.append(out.clone())  # the engine reuses it
    )
    return captured


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
    torch.testing.assert_close(model.logits_of_engine, model.logits, atol=2e-4, rtol=2e-4)
    assert model.completions == [model.reference] * 2


@pytest.mark.parametrize("name", WITH_THEIR_OWN_ROUNDING)
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(models, name):
    model = models(name)
    with tiny_engine(model.path, dtype="bfloat16") as llm:
        captured = capture_logits(llm)
        generate(llm, model.prompts, greedy(1))
    logits = torch.cat(captured)[:, :VOCAB_SIZE]
    module = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16)
    rounded = logits_after(module, model.prompts)
    error, of_transformers = (x.float() - model.logits for x in (logits, rounded))
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
        assert generate(llm, model.prompts[FEW], greedy(MAX_TOKENS)) == model.reference[FEW]
        check_nothing_is_held(llm)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_fp8_cache_gives_the_logits_of_transformers_over_quantised_keys_and_values(models, name):
    """Rounding may tip an element to the next fp8 number, hence the tolerance."""
    model = models(name)
    with tiny_engine(model.path, kv_cache_dtype="fp8") as llm:
        captured = capture_logits(llm)
        generate(llm, model.prompts, greedy(1))
    logits = torch.cat(captured)[:, :VOCAB_SIZE]
    AttentionInterface.register("over_fp8", attention_over_fp8)
    previous = model.module.config._attn_implementation
    model.module.set_attn_implementation("over_fp8")
    try:
        expected = logits_after(model.module, model.prompts)
    finally:
        model.module.set_attn_implementation(previous)
    error = (logits - expected).square().mean().sqrt()
    of_quantisation = (logits - model.logits).square().mean().sqrt()
    assert error < 0.1 * of_quantisation
