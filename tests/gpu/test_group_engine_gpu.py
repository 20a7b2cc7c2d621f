"""Sliding windows on CUDA: with graphs, chunks and little memory the same tokens."""

import itertools
import random

import pytest
from tiny_models import VOCAB_SIZE
from windowed_models import MODELS, save_windowed, windowed_reference, windows_of

from nanovllm import LLM, SamplingParams

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    return {
        name: save_windowed(tmp_path_factory.mktemp("models") / "tiny", name) for name in MODELS
    }


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    lengths = (250, 506, 762, 1, 17, 256, 300, 301, 513, 1000)
    own = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(800)]
    return [*own, shared, shared[:768], [*shared[:600], 7], [*shared, *shared[:150]]]


@pytest.fixture(scope="module")
def references(model_dirs, prompts):
    return {
        name: windowed_reference(path, name, prompts, MAX_TOKENS)
        for name, path in model_dirs.items()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("graphs", "chunked", "ample"), list(itertools.product([True, False], repeat=3))
)
def test_greedy_tokens_are_those_of_transformers(
    model_dirs, prompts, references, name, graphs, chunked, ample
):
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 200} if chunked else {}
    with (
        windows_of(name),
        LLM(
            str(model_dirs[name]),
            max_model_len=1200,
            max_num_seqs=5,
            enforce_eager=not graphs,
            num_kvcache_blocks=64 if ample else 7,
            watermark=0,
            **chunks,
        ) as llm,
    ):
        for _ in range(2):  # the second time with a warm prefix cache
            params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == references[name]
        assert ample or llm.scheduler.num_preemptions > 0
        manager = llm.scheduler.block_manager
        assert manager.num_free_blocks == len(manager.blocks)


def test_the_cache_takes_its_share_of_the_gpu(model_dirs):
    path = model_dirs["full, 300, 20"]
    with windows_of("full, 300, 20"):
        for memory in ({"kv_cache_memory_bytes": 1 << 30}, {"gpu_memory_utilization": 0.5}):
            with LLM(str(path), max_model_len=1200, max_num_seqs=8, **memory) as llm:
                runner = llm.model_runner
                numbers = [len(attention.cache.key) for attention in runner.attentions]
                # 8 sequences of a window and two blocks each, and a step's tokens.
                num_step_blocks = llm.config.max_num_batched_tokens // 256
                assert numbers[0] == 8 * 4 + num_step_blocks
                assert numbers[2] == 8 * 3 + num_step_blocks
                assert numbers[1] == llm.config.num_kvcache_blocks > 1000
