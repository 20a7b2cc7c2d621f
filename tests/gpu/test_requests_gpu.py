"""Sampling parameters on CUDA: graphs, overlap, preemption and ranks change no request."""

import pytest
import torch
from test_engine_gpu import check_all_free, random_prompts, small_engine, token_ids
from tiny_models import VOCAB_SIZE, save_model
from transformers import Qwen3ForCausalLM

from nanovllm import SamplingParams, StructuredOutputsParams

MAX_TOKENS = 24
PROMPTS = random_prompts([3, 40, 300, 513, 1, 600, 250, 256, 31, 17], seed=11)
HOT = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
MIXED = [
    {"seed": 1},
    {"seed": 2, "top_k": 5},
    {"seed": 3, "top_p": 0.7, "min_p": 0.01, "logprobs": 2},
    {"seed": 4, "repetition_penalty": 1.5, "presence_penalty": -0.5, "logprobs": 0},
    {"temperature": 0.0, "frequency_penalty": 2.0, "bad_words": ["the"]},
    {"seed": 6, "allowed_token_ids": list(range(100, 140)), "logit_bias": {101: 5.0}},
    {"seed": 7, "min_tokens": 20, "ignore_eos": False},
    {"seed": 8, "n": 3, "top_p": 0.9},
    {"seed": 9, "prompt_logprobs": 2},
    {"temperature": 0.0},
]
PARAMS = [SamplingParams(**(HOT | own)) for own in MIXED]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(model_dir):
    """One by one, without graphs or overlap."""
    with small_engine(model_dir, enforce_eager=True, async_scheduling=False) as llm:
        return [
            llm.generate([prompt], params, use_tqdm=False)[0]
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"async_scheduling": False},
        {"enforce_eager": True},
        {"num_kvcache_blocks": 9, "watermark": 0},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 200},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.two_gpus),
    ],
)
def test_a_batch_of_all_kinds_gives_what_each_gives_alone(model_dir, expected, settings):
    with small_engine(model_dir, **settings) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            agreeing = sum(a == b for a, b in zip(outputs, expected, strict=True))
            # Other shapes sum in another order, which may flip a near tie.
            assert agreeing >= len(PROMPTS) - 1
            assert len(outputs[7].outputs) == 3
            for output, alone in zip(outputs, expected, strict=True):
                if alone["logprobs"] and output == alone:
                    assert output["cumulative_logprob"] == pytest.approx(
                        alone["cumulative_logprob"], abs=1e-2
                    )
            check_all_free(llm)


@torch.inference_mode()
def test_logprobs_are_those_of_transformers(model_dir):
    hf_model = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    params = SamplingParams(**HOT, seed=1, logprobs=3, prompt_logprobs=2)
    with small_engine(model_dir) as llm:
        for output in llm.generate(PROMPTS, params, use_tqdm=False):
            prompt, completion = output.prompt_token_ids, output["token_ids"]
            truth = hf_model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            positions = [*output.prompt_logprobs[1:], *output["logprobs"]]
            for token_id, position, row in zip(
                (prompt + completion)[1:], positions, truth, strict=False
            ):
                assert next(iter(position)) == token_id
                for entry_id, entry in position.items():
                    assert entry.logprob == pytest.approx(float(row[entry_id]), abs=1e-2)


def test_greedy_tokens_do_not_depend_on_who_samples_them(model_dir):
    with small_engine(model_dir) as llm:
        fast = token_ids(llm.generate(PROMPTS, PARAMS[-1], use_tqdm=False))
        params = SamplingParams(**(HOT | {"temperature": 0.0}), logprobs=1)
        assert token_ids(llm.generate(PROMPTS, params, use_tqdm=False)) == fast


def test_structured_outputs_among_others(model_dir):
    pytest.importorskip("llguidance", reason="the extra structured-outputs is not installed")
    choices = ["the quick brown fox", "lazy dog", "a paged cache"]
    choice = SamplingParams(
        max_tokens=40, structured_outputs=StructuredOutputsParams(choice=choices)
    )
    with small_engine(model_dir) as llm:
        expected = token_ids(llm.generate(PROMPTS[:5], PARAMS[0], use_tqdm=False))
        outputs = llm.generate(PROMPTS, [PARAMS[0]] * 5 + [choice] * 5, use_tqdm=False)
        assert token_ids(outputs[:5]) == expected
        for output in outputs[5:]:
            text = llm.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
            assert text in choices
        check_all_free(llm)


def test_a_wide_vocabulary_and_batches_that_change(tmp_path):
    """Padding columns are never drawn, and rows come and go between steps."""
    model_dir = save_model(tmp_path / "m", vocab_size=VOCAB_SIZE + 5, tie_word_embeddings=False)
    prompts = random_prompts([1 + i % 40 for i in range(60)], seed=2)
    params = [
        SamplingParams(
            temperature=50.0, seed=i, max_tokens=1 + i % 23, ignore_eos=True, top_p=0.999
        )
        for i in range(60)
    ]
    with small_engine(model_dir) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [len(output["token_ids"]) for output in outputs] == [p.max_tokens for p in params]
        drawn = {token for output in outputs for token in output["token_ids"]}
        assert max(drawn) < VOCAB_SIZE + 5
        assert len(drawn) > 200
        again = llm.generate(prompts[::-1], params[::-1], use_tqdm=False)
        assert token_ids(again[::-1]) == token_ids(outputs)
