"""Logits processors, budgets of reasoning, repetition and chosen logprobs on CUDA.

Requests with and without them run in one batch, with graphs, overlap, preemptions and ranks.
"""

from itertools import pairwise

import pytest
import torch
from nanovllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor
from nanovllm.v1.sample.logits_processor.builtin import process_dict_updates
from test_engine_gpu import check_all_free, random_prompts, small_engine, token_ids
from tiny_models import save_model
from transformers import NoRepeatNGramLogitsProcessor

from nanovllm import RequestError, SamplingParams

MAX_TOKENS = 24
PROMPTS = random_prompts([3, 40, 300, 513, 1, 600, 250, 256, 31, 17], seed=12)
REASONING = {"reasoning_start_str": "lazy", "reasoning_end_str": "dog"}


def alternate(token_ids, logits):
    if token_ids:
        logits[token_ids[-1] % 2 :: 2] = -torch.inf
    return logits


def no_prompt_tokens(prompt_token_ids, token_ids, logits):
    return logits.index_fill(0, torch.tensor(prompt_token_ids, device=logits.device), -torch.inf)


def fail(token_ids, logits):
    if len(token_ids) == 5:
        raise ValueError("no more")
    return logits


OWN = [
    {"seed": 1, "logits_processors": [alternate]},
    {"seed": 2, "top_k": 5},
    {"seed": 3, "logits_processors": [no_prompt_tokens, alternate], "top_p": 0.9, "logprobs": 1},
    {"temperature": 0.0},
    {"temperature": 0.0, "logits_processors": [NoRepeatNGramLogitsProcessor(1)]},
    {"seed": 6, "thinking_token_budget": 3, "n": 2},
    {"temperature": 0.0, "thinking_token_budget": 0},
    {"seed": 8, "repetition_detection": {"max_pattern_size": 3, "min_count": 2}},
    {"seed": 9, "logprob_token_ids": [5, 300]},
    {"temperature": 0.0, "extra_args": {"ban": 1}, "repetition_penalty": 1.3},
]
PARAMS = [
    SamplingParams(**({"temperature": 1.0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | own))
    for own in OWN
]


class BanGenerated(LogitsProcessor):
    """A batch processor: requests with extra_args["ban"] generate no token twice."""

    def __init__(self, vllm_config, device, is_pin_memory):
        assert device.type == "cuda" and is_pin_memory
        self.outputs = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(
            self.outputs,
            batch_update,
            lambda params, _, output: output if params.extra_args else None,
        )

    def apply(self, logits):
        for index, output in self.outputs.items():
            logits[index, output] = -torch.inf
        return logits


class BanForRequests(AdapterLogitsProcessor):
    """The same as functions of requests."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        return self.ban if params.extra_args else None

    def ban(self, token_ids, logits):
        logits[token_ids] = -torch.inf
        return logits


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts(model_dir):
    with small_engine(model_dir) as llm:
        start = llm.get_tokenizer().encode("lazy", add_special_tokens=False)
    prompts = [list(prompt) for prompt in PROMPTS]
    for index in (5, 6):
        prompts[index] += start
    return prompts


@pytest.fixture(scope="module")
def expected(model_dir, prompts):
    """One by one, without graphs or overlap."""
    settings = {"logits_processors": [BanForRequests], "reasoning_config": REASONING}
    with small_engine(model_dir, enforce_eager=True, async_scheduling=False, **settings) as llm:
        return [
            llm.generate([prompt], params, use_tqdm=False)[0]
            for prompt, params in zip(prompts, PARAMS, strict=True)
        ]


@pytest.mark.parametrize("processor", [BanGenerated, BanForRequests])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enforce_eager": True},
        {"num_kvcache_blocks": 9, "watermark": 0},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 200},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.two_gpus),
    ],
)
def test_a_mixed_batch_gives_what_each_gives_alone(
    model_dir, prompts, expected, settings, processor
):
    settings = {"logits_processors": [processor], "reasoning_config": REASONING} | settings
    with small_engine(model_dir, **settings) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
            agreeing = sum(
                [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
                for a, b in zip(outputs, expected, strict=True)
            )
            assert agreeing >= len(PROMPTS) - 1  # other shapes may flip a near tie
            parities = [token_id % 2 for token_id in outputs[0]["token_ids"]]
            assert all(a != b for a, b in pairwise(parities))
            banned = outputs[9]["token_ids"]
            assert len(set(banned)) == len(banned)
            assert all({5, 300} <= position.keys() for position in outputs[8]["logprobs"])
            check_all_free(llm)


def test_plain_requests_keep_their_tokens_and_a_failing_one_ends_alone(model_dir):
    greedy = SamplingParams(0, MAX_TOKENS, True)
    with small_engine(model_dir) as llm:
        plain = token_ids(llm.generate(PROMPTS, greedy, use_tqdm=False))
        params = [greedy, SamplingParams(0, MAX_TOKENS, True, logits_processors=[fail])] * 5
        with pytest.raises(RequestError, match=r"prompts\[1\] failed, and 4 more: ValueError"):
            llm.generate(PROMPTS, params, use_tqdm=False)
        params[1::2] = [SamplingParams(0, MAX_TOKENS, True, logits_processors=[alternate])] * 5
        outputs = token_ids(llm.generate(PROMPTS, params, use_tqdm=False))
        agreeing = sum(a == b for a, b in zip(outputs[::2], plain[::2], strict=True))
        assert agreeing >= 4
        check_all_free(llm)
