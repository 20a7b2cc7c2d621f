"""Sampling parameters in the engine: logprobs against transformers, all kinds in one batch."""

import json
import re
from dataclasses import replace

import pytest
import torch
from engine_checks import check_nothing_is_held, generate, greedy, random_prompts, tiny_engine
from tiny_models import VOCAB_SIZE
from transformers import Qwen3ForCausalLM

from nanovllm import FlatLogprobs, SamplingParams, StructuredOutputsParams

MAX_TOKENS = 12
PROMPTS = random_prompts([3, 40, 300, 513, 1, 600], seed=11)
EOS = 2
HOT = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
MIXED = [
    {"seed": 1},
    {"seed": 2, "top_k": 5},
    {"seed": 3, "top_p": 0.7, "min_p": 0.01, "logprobs": 2},
    {"seed": 4, "repetition_penalty": 1.5, "presence_penalty": -0.5, "logprobs": 0},
    {"temperature": 0.0, "frequency_penalty": 2.0, "bad_words": ["the"]},
    {"seed": 6, "allowed_token_ids": list(range(100, 140)), "logit_bias": {101: 5.0}},
]


@pytest.fixture(scope="module")
def llm(tiny_dir):
    with tiny_engine(tiny_dir, max_logprobs=VOCAB_SIZE) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    yield
    check_nothing_is_held(llm)


@pytest.fixture(scope="module")
def hf_model(tiny_dir):
    return Qwen3ForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


@torch.inference_mode()
def log_softmax(hf_model, token_ids: list[int]) -> torch.Tensor:
    """[T, V]: row i is the distribution of token i + 1."""
    return hf_model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def check_position(position, token_id: int, k: int, truth: torch.Tensor) -> None:
    """One position's dict against the log probabilities `truth` [V]."""
    assert next(iter(position)) == token_id
    assert len(position) in (k, k + 1)
    for entry_id, entry in position.items():
        assert entry.logprob == pytest.approx(float(truth[entry_id]), abs=1e-4)
        assert entry.rank == 1 + int((truth > truth[entry_id] + 1e-5).sum())
    assert {entry.rank for entry in position.values()} >= set(range(1, k + 1))


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("k", [0, 3])
def test_logprobs_are_those_of_transformers(llm, hf_model, temperature, k):
    """Case 49; raw: the temperature does not show in them."""
    params = SamplingParams(
        temperature=temperature, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=k
    )
    for output in llm.generate(PROMPTS[:3], params, use_tqdm=False):
        prompt, completion = output.prompt_token_ids, output["token_ids"]
        truth = log_softmax(hf_model, prompt + completion)[len(prompt) - 1 :]
        assert len(output["logprobs"]) == len(completion)
        for token_id, position, row in zip(completion, output["logprobs"], truth, strict=False):
            check_position(position, token_id, k, row)
        own = [p[t].logprob for p, t in zip(output["logprobs"], completion, strict=True)]
        assert output["cumulative_logprob"] == pytest.approx(sum(own), abs=1e-6)
        assert output.prompt_logprobs is None


@pytest.mark.parametrize("chunked", [False, True])
def test_prompt_logprobs_are_those_of_transformers(tiny_dir, llm, hf_model, chunked):
    """Case 49, and 27: also in chunks, and when the prefix cache is warm."""
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=2)
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 200}
    with tiny_engine(tiny_dir, **(settings if chunked else {})) as engine:
        engine.generate(PROMPTS, greedy(2), use_tqdm=False)
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
        check_nothing_is_held(engine)
    assert [out["token_ids"] for out in outputs] == generate(llm, PROMPTS, greedy(2))
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert output.num_cached_tokens == 0
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        truth = log_softmax(hf_model, prompt)
        for i, position in enumerate(output.prompt_logprobs[1:]):
            check_position(position, prompt[i + 1], 2, truth[i])


@pytest.mark.parametrize("chosen", [{"logprobs": 2}, {"logprob_token_ids": [5, 6, 7]}])
def test_flat_logprobs_are_those_of_the_dicts(llm, chosen):
    params = SamplingParams(1.0, 5, ignore_eos=True, n=2, seed=3, prompt_logprobs=1, **chosen)
    flat = replace(params, flat_logprobs=True)
    expected = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    found = llm.generate(PROMPTS[:2], flat, use_tqdm=False)
    items = llm.generate_stream(PROMPTS[:2], flat)
    found += sorted((i.output for i in items if i.finished), key=lambda o: int(o.request_id))
    for output, plain in zip(found, 2 * expected, strict=True):
        assert isinstance(output.prompt_logprobs, FlatLogprobs)
        assert list(output.prompt_logprobs) == [{}, *plain.prompt_logprobs[1:]]
        num_others = len(output.prompt_token_ids) - 1
        assert output.prompt_logprobs.end_indices == list(range(0, 2 * num_others + 1, 2))
        for completion, dicts in zip(output.outputs, plain.outputs, strict=True):
            assert isinstance(completion.logprobs, FlatLogprobs)
            assert list(completion.logprobs) == dicts.logprobs
            assert completion.cumulative_logprob == dicts.cumulative_logprob
            width = len(chosen.get("logprob_token_ids", "12")) + 1  # the sampled token is kept
            assert completion.logprobs.start_indices == list(range(0, 5 * width, width))
            assert completion.logprobs.token_ids[::width] == completion.token_ids
        assert json.loads(json.dumps(output.to_dict())) == output.to_dict()


def test_logprobs_of_the_whole_vocabulary(llm, hf_model):
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1)
    [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    for position in (*output["logprobs"], *output.prompt_logprobs[1:]):
        assert len(position) == VOCAB_SIZE
        assert sum(torch.tensor([e.logprob for e in position.values()]).exp()) == pytest.approx(1)


def test_parameters_do_not_reach_the_neighbours(llm):
    """Each request of a mixed batch gives what it gives alone."""
    params = [SamplingParams(**(HOT | own)) for own in MIXED]
    together = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, own, expected in zip(PROMPTS, params, together, strict=True):
        [alone] = llm.generate([prompt], own, use_tqdm=False)
        assert alone == expected
        if own.logprobs is not None:
            a, b = alone["logprobs"], expected["logprobs"]
            assert [list(position) for position in a] == [list(position) for position in b]
    assert len({tuple(output["token_ids"]) for output in together}) == len(PROMPTS)
    assert set(together[5]["token_ids"]) <= set(range(100, 140))


MANY = random_prompts([240 + i for i in range(10)], seed=12)  # each grows into a second block
PENALTIES = [
    SamplingParams(**(HOT | {"max_tokens": 30, "temperature": 0.0} | own))
    for own in (
        {},
        {"presence_penalty": -1.0},
        {"bad_words": list("aeinorst")},
        {"seed": 5, "temperature": 1.0},
    )
]


@pytest.fixture(scope="module")
def unpreempted(shallow_dir):
    with tiny_engine(shallow_dir) as llm:
        results = [generate(llm, MANY, params) for params in PENALTIES]
        assert not llm.scheduler.num_preemptions
    assert len({str(result) for result in results}) == len(PENALTIES)
    return results


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_preemption_changes_no_token(shallow_dir, unpreempted, async_scheduling):
    """Case 25: with penalties and bad words too, and the parameter sets differ."""
    settings = {"num_kvcache_blocks": 6, "watermark": 0, "async_scheduling": async_scheduling}
    with tiny_engine(shallow_dir, **settings) as small:
        for params, expected in zip(PENALTIES, unpreempted, strict=True):
            before = small.scheduler.num_preemptions
            assert generate(small, MANY, params) == expected
            assert small.scheduler.num_preemptions > before
        check_nothing_is_held(small)


def test_min_tokens(llm):
    """Case 47."""
    bias = {EOS: 100.0}  # ends at once, if it may
    early = SamplingParams(max_tokens=8, logit_bias=bias)
    exact = SamplingParams(max_tokens=8, min_tokens=8, logit_bias=bias)
    [short, long] = llm.generate([PROMPTS[0]] * 2, [early, exact], use_tqdm=False)
    assert short["token_ids"] == [EOS]
    assert (short["finish_reason"], short["stop_reason"]) == ("stop", None)
    assert len(long["token_ids"]) == 8
    assert EOS not in long["token_ids"]
    assert long["finish_reason"] == "length"


def test_stop_strings_wait_for_min_tokens(llm):
    vowels = list("aeiou")
    params = SamplingParams(
        temperature=1.0, seed=0, max_tokens=60, min_tokens=50, ignore_eos=True, stop=vowels
    )
    for output in llm.generate(PROMPTS[:3], params, use_tqdm=False):
        assert len(output["token_ids"]) > 50
        assert output["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("repetition_penalty", [1e-30, 1e30])
def test_no_repetition_penalty_lets_a_forbidden_token_through(llm, repetition_penalty):
    """min_tokens forbids the only token that is allowed, which is taken all the same."""
    params = SamplingParams(
        temperature=0,
        max_tokens=5,
        min_tokens=5,
        allowed_token_ids=[2],
        repetition_penalty=repetition_penalty,
    )
    assert llm.generate([[2, 3]], params, use_tqdm=False)[0]["token_ids"] == [2] * 5
    free = params.clone()
    free.allowed_token_ids = None
    assert 2 not in llm.generate([[2, 3]], free, use_tqdm=False)[0]["token_ids"]


def test_one_allowed_token(llm):
    """Case 50."""
    [output] = llm.generate(
        [PROMPTS[0]], SamplingParams(**(HOT | {"allowed_token_ids": [10]})), use_tqdm=False
    )
    assert output["token_ids"] == [10] * MAX_TOKENS


def test_structured_output_among_others(llm):
    pytest.importorskip("llguidance", reason="the extra structured-outputs is not installed")
    choices = ["the quick brown fox", "lazy dog", "a paged cache"]
    choice = SamplingParams(
        temperature=1.0,
        seed=1,
        max_tokens=40,
        structured_outputs=StructuredOutputsParams(choice=choices),
    )
    plain = SamplingParams(**HOT, seed=9)
    expected = generate(llm, PROMPTS[:3], plain)
    outputs = llm.generate(PROMPTS, [plain] * 3 + [choice] * 3, use_tqdm=False)
    assert [output["token_ids"] for output in outputs[:3]] == expected
    for output in outputs[3:]:
        assert output["text"] in choices
        assert output["finish_reason"] == "stop"
        [alone] = llm.generate([output.prompt_token_ids], choice, use_tqdm=False)
        assert alone == output


def test_an_eos_token_is_no_part_of_a_structured_text(llm):
    """The grammar could go on where the model ends it."""
    pytest.importorskip("llguidance", reason="the extra structured-outputs is not installed")
    digits = SamplingParams(
        max_tokens=5,
        temperature=0,
        logit_bias={EOS: 100.0},
        structured_outputs=StructuredOutputsParams(regex="[0-9]{1,9}"),
    )
    marked = replace(digits, include_stop_str_in_output=True)
    eos = llm.tokenizer.decode([EOS])
    assert eos
    for stop in (None, ["never there"]):
        for params, end in ((replace(digits, stop=stop), ""), (replace(marked, stop=stop), eos)):
            [output] = llm.generate([PROMPTS[1]], params, use_tqdm=False)
            *token_ids, last = output["token_ids"]
            assert last == EOS and output["finish_reason"] == "stop"
            assert output["text"] == llm.tokenizer.decode(token_ids) + end
            assert output["text"].removesuffix(eos).isdigit()
            pieces = [item.text for item in llm.generate_stream([PROMPTS[1]], params)]
            assert "".join(pieces) == output["text"]


def test_json_without_whitespace(tiny_dir, llm):
    pytest.importorskip("llguidance", reason="the extra structured-outputs is not installed")
    schema = {
        "type": "object",
        "properties": {
            "few": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
            "one": {"enum": ["two words"]},
        },
        "required": ["few", "one"],
        "additionalProperties": False,
    }

    def texts(engine, **options) -> list[str]:
        params = SamplingParams(
            seed=1, max_tokens=300, structured_outputs=StructuredOutputsParams(**options)
        )
        return [output["text"] for output in engine.generate(PROMPTS[:2], params, use_tqdm=False)]

    def compact(text: str) -> str:
        return json.dumps(json.loads(text), separators=(",", ":"))

    found = texts(llm, json=schema)  # they need not end
    assert any(re.search(r"[\[{,:]\s", text) for text in found)  # else it would prove nothing
    found = texts(llm, json=schema, disable_any_whitespace=True)
    config = {"backend": "xgrammar", "disable_any_whitespace": True}
    with tiny_engine(tiny_dir, structured_outputs_config=config) as other:
        found += texts(other, json=schema)
    assert found == [compact(text) for text in found]
