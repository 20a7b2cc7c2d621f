"""Prefill steps filled up with padding, as CUDA graphs have them: the reference's tokens."""

import pytest
import torch
from engine_checks import check_nothing_is_held, generate, greedy, random_prompts, tiny_engine
from quick_reference import quick_reference
from tiny_models import save_family

from nanovllm import SamplingParams
from nanovllm.engine.layer_kinds import FewLayers
from nanovllm.engine.prefill_graphs import PaddedSize, PrefillGraphs, new_padded_inputs, run_padded
from nanovllm.engine.prefill_inputs import PrefillInputs

LENGTHS = (1, 2, 15, 16, 17, 100, 127, 128, 129, 255, 256, 257, 300, 511, 513)
MAX_TOKENS = 4


class PaddedSteps(PrefillGraphs):
    """Steps with padding, one operation after another."""

    def _run_and_capture(self, size: PaddedSize, few: FewLayers) -> None:
        self.used = []  # numbers of tokens: of the padded step, without padding, sampled, copies

    def replay(self, size, step, arrays):
        padded = new_padded_inputs(self.rank, size)
        padded.fill(arrays)
        token_ids, logits = run_padded(size, padded.inputs, self.prefill, self.sample)
        number = len(arrays["rows"])
        self.used.append((size.num_tokens, len(arrays["token_ids"]), number, len(arrays["copies"])))
        if number:
            step.token_ids = token_ids[:number]
            step.positions = padded.inputs.last_positions[:number]
        return logits[:number]


def padded_steps(runner) -> PaddedSteps:
    return PaddedSteps(runner, runner.prefill, runner.sample_last_tokens)


@pytest.fixture(scope="module", params=["qwen3-yarn", "qwen3-moe"])
def model_dir(request, tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("chunked", [False, True])
def test_padded_steps_give_the_reference_tokens(model_dir, chunked):
    prompts = random_prompts(LENGTHS)
    prompts += [[*prompts[-1][:length], 7] for length in (70, 200, 330)]  # units are copied
    expected = quick_reference(model_dir, prompts, MAX_TOKENS)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 256} if chunked else {}
    with tiny_engine(model_dir, max_num_seqs=5, **chunks) as llm:
        llm.model_runner.prefill_graphs = graphs = padded_steps(llm.model_runner)
        for _ in range(2):  # the second time with a warm prefix cache
            assert generate(llm, prompts, greedy(MAX_TOKENS)) == expected
        llm.reset_prefix_cache()
        for prompt, completion in zip(prompts, expected, strict=True):  # each alone
            assert generate(llm, [prompt], greedy(MAX_TOKENS)) == [completion]
        params = [greedy(MAX_TOKENS), SamplingParams(0, MAX_TOKENS, ignore_eos=True, logprobs=2)]
        params = [params[i % 2] for i in range(len(prompts))]
        assert generate(llm, prompts, params) == expected
        check_nothing_is_held(llm)
    sizes, numbers, sampled, copies = map(set, zip(*graphs.used, strict=True))
    assert sizes == ({128, 256} if chunked else {128, 256, 512, 1024, 2048})
    assert 128 in numbers and 1 in numbers  # without padding, and nearly nothing else
    assert chunked == (0 in sampled)
    assert 0 in copies and len(copies) > 3


def test_sizes_suit_the_model_and_the_engine(model_dir):
    with tiny_engine(model_dir, max_model_len=600, max_num_seqs=9) as llm:
        steps = padded_steps(llm.model_runner)
        assert steps.sizes[:2] == [(128, 8, 8 * 31, 600), (256, 9, 9 * 31, 600)]
        assert steps.sizes[-1].num_tokens == 4096
        for size in steps.sizes:
            inputs = new_padded_inputs(llm.model_runner, size).inputs
            token_ids, logits = run_padded(size, inputs, steps.prefill, steps.sample)
            assert len(token_ids) == len(logits) == size.num_seqs
            assert torch.isfinite(logits).all()
        assert isinstance(inputs, PrefillInputs)
        assert not llm.model_runner.row_table.any()  # padding leaves no trace
        assert not llm.model_runner.kv_cache.isnan().any()
