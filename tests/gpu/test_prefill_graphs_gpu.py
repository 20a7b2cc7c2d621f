"""Prefill steps in CUDA graphs: the tokens are those of the reference and of eager steps."""

from contextlib import contextmanager

import pytest
import torch
from tiny_models import VOCAB_SIZE, edit_config, reference_greedy, save_family, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.engine.prefill_graphs import PrefillGraphs

MAX_TOKENS = 8
LENGTHS = (1, 2, 15, 16, 17, 100, 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 700, 1000)


def prompts_of(lengths, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (length,), generator=numbers).tolist() for length in lengths]


def greedy(**kwargs):
    return SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, **kwargs)


def generate(llm, prompts, params=None):
    outputs = llm.generate(prompts, params or greedy(), use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@contextmanager
def replays(monkeypatch):
    """The sizes that are replayed inside, with the steps' own numbers of tokens and of samples."""
    found = []

    def replay(self, size, step, arrays):
        found.append((size.num_tokens, len(arrays["token_ids"]), len(arrays["rows"])))
        return original(self, size, step, arrays)

    original = PrefillGraphs.replay
    monkeypatch.setattr(PrefillGraphs, "replay", replay)
    yield found
    monkeypatch.undo()


@pytest.fixture(scope="module", params=["qwen3", "qwen3-moe"])
def model_dir(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / request.param
    return save_model(path) if request.param == "qwen3" else save_family(path, request.param)


@pytest.mark.parametrize("chunked", [False, True])
def test_prefill_graphs_give_the_reference_tokens(model_dir, chunked, monkeypatch):
    prompts = prompts_of(LENGTHS)
    expected = reference_greedy(model_dir, prompts, MAX_TOKENS)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 256} if chunked else {}
    with (
        LLM(
            str(model_dir), max_model_len=1024, max_num_seqs=8, num_kvcache_blocks=64, **chunks
        ) as llm,
        replays(monkeypatch) as found,
    ):
        assert generate(llm, prompts) == expected
        assert generate(llm, prompts) == expected  # with a warm prefix cache
        llm.reset_prefix_cache()
        for prompt, completion in zip(prompts, expected, strict=True):  # each alone
            assert generate(llm, [prompt]) == [completion]
        some_want_more = [greedy(logprobs=0 if i % 2 else None) for i in range(len(prompts))]
        assert generate(llm, prompts, some_want_more) == expected
        llm.sleep(level=1)
        llm.wake_up()
        assert generate(llm, prompts) == expected
    sizes = {size for size, *_ in found}
    assert sizes >= {128, 256} if chunked else sizes >= {128, 256, 512, 1024, 2048}
    assert any(size == number for size, number, _ in found)
    assert any(size > number for size, number, _ in found)
    assert chunked == any(not num_sampled for *_, num_sampled in found)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_prefill_graphs_agree_with_eager_steps_in_bf16(tmp_path, kv_cache_dtype, monkeypatch):
    """Heads of 128, which Hopper's own kernel takes, and logits that hardly differ."""
    path = save_model(tmp_path / "model", head_dim=128, num_hidden_layers=2)
    edit_config(path, torch_dtype="bfloat16", dtype="bfloat16")
    prompts = prompts_of([*LENGTHS, *range(3, 60)], seed=1)
    settings = {"dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype, "max_model_len": 1024}
    with (
        LLM(str(path), max_num_seqs=64, num_kvcache_blocks=256, **settings) as llm,
        replays(monkeypatch) as found,
    ):
        graphs = llm.model_runner.prefill_graphs
        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
        logprobs = []
        for used in (graphs, None):
            llm.model_runner.prefill_graphs = used
            outputs = [llm.generate(prompts[i : i + 7], sampling, use_tqdm=False)
                       for i in range(0, len(prompts), 7)]  # fmt: skip
            logprobs.append([o.outputs[0].logprobs[0] for group in outputs for o in group])
            llm.reset_prefix_cache()
    assert len(found) >= 9
    for ours, eager in zip(*logprobs, strict=True):
        token = next(iter(eager))
        assert abs(ours[token].logprob - eager[token].logprob) < 0.1


def test_padding_may_be_longer_than_any_sequence(model_dir, monkeypatch):
    prompts = prompts_of(LENGTHS[:5])
    expected = reference_greedy(model_dir, prompts, MAX_TOKENS)
    options = {"max_num_seqs": 20, "max_model_len": 60, "enable_prefix_caching": False}
    with (
        LLM(str(model_dir), num_kvcache_blocks=32, **options) as llm,
        replays(monkeypatch) as found,
    ):
        assert generate(llm, 4 * prompts) == 4 * expected
    assert found == [(512, 4 * sum(LENGTHS[:5]), 20)]
