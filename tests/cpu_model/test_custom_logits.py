"""Log probabilities of chosen tokens, repetition, and logits processors, in the engine."""

import pytest
import torch
from engine_checks import check_nothing_is_held, generate, random_prompts, tiny_engine
from tiny_models import VOCAB_SIZE
from transformers import Qwen3ForCausalLM

from nanovllm import ArgumentError, SamplingParams

PROMPTS = random_prompts([5, 300, 40, 1], seed=17)
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def llm(tiny_dir):
    with tiny_engine(tiny_dir, max_model_len=512, num_kvcache_blocks=32) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    yield
    check_nothing_is_held(llm)


@pytest.fixture(scope="module")
def hf_model(tiny_dir):
    return Qwen3ForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


# ---- logprob_token_ids, repetition_detection -------------------------------------------------


def test_logprobs_of_chosen_tokens_are_those_of_transformers(llm, hf_model):
    wanted = [None, [3, 200, 17], None, [9]]
    params = [
        SamplingParams(1.0, MAX_TOKENS, True, seed=i, logprob_token_ids=ids,
                       logprobs={0: 2, 3: 1}.get(i))
        for i, ids in enumerate(wanted)
    ]  # fmt: skip
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    plain = [SamplingParams(1.0, MAX_TOKENS, True, seed=i) for i in range(4)]
    assert [output["token_ids"] for output in outputs] == generate(llm, PROMPTS, plain)
    assert len(outputs[0]["logprobs"][0]) in (2, 3) and outputs[2]["logprobs"] is None
    for output, ids in zip(outputs, wanted, strict=True):
        if ids is None:
            continue
        prompt, completion = output.prompt_token_ids, output["token_ids"]
        with torch.inference_mode():
            logits = hf_model(torch.tensor([prompt + completion])).logits[0]
        truth = logits.log_softmax(-1)[len(prompt) - 1 :]
        for token_id, position, row in zip(completion, output["logprobs"], truth, strict=False):
            assert list(position) == [token_id, *(i for i in ids if i != token_id)]
            for entry_id, entry in position.items():
                assert entry.logprob == pytest.approx(float(row[entry_id]), abs=1e-4)
            assert position.pop(token_id).rank == 1 + int((row > row[token_id] + 1e-5).sum())
            assert {entry.rank for entry in position.values()} <= {None}
        own = sum(float(row[t]) for row, t in zip(truth, completion, strict=False))
        assert output["cumulative_logprob"] == pytest.approx(own, abs=1e-3)


def test_wrong_ids_for_logprobs_are_named(llm):
    for values, message in (
        ({"logprob_token_ids": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE} is out of the vocabulary"),
        ({"logprob_token_ids": list(range(129))}, "must hold at most 128 token ids, got 129"),
        ({"logprob_token_ids": [1, 2], "logprobs": 3}, "logprobs must be None or 2, .* got 3"),
    ):
        with pytest.raises(ArgumentError, match=message):
            llm.generate(PROMPTS[0], SamplingParams(**values), use_tqdm=False)


def test_a_completion_that_repeats_itself_ends(llm):
    """The same tokens as without, up to the first repetition; others of the batch go on."""
    loose = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": True, "seed": 1}
    loose["allowed_token_ids"] = [30, 31, 32]
    free = generate(llm, PROMPTS, SamplingParams(**loose))
    detection = {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 3}
    params = [SamplingParams(**loose, repetition_detection=detection), SamplingParams(**loose)] * 2
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for output, tokens, own in zip(outputs, free, params, strict=True):
        if own.repetition_detection is None:
            assert (output["token_ids"], output["finish_reason"]) == (tokens, "length")
            continue
        text = "".join(map(chr, tokens))
        ends = [n for n in range(61) for k in (2, 3) if text[:n].endswith(text[:n][-k:] * 3)]
        assert output["token_ids"] == tokens[: min(n for n in ends if n >= 6)]
        assert output["finish_reason"] == "repetition"
        assert output.outputs[0].stop_reason == "repetition_detected"
