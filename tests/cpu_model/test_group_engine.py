"""Engines with sliding windows: no switch changes a token, and what is behind a window is free."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_checks import (
    check_nothing_is_held,
    check_varied,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)
from windowed_models import MODELS, save_windowed, windowed_reference, windows_of

from nanovllm import LLM
from nanovllm.engine.cache_groups import WindowedBlockManager

MAX_TOKENS = 8
MAX_MODEL_LEN = 1200


@dataclass
class Model:
    """One of MODELS, and what it completes the prompts with."""

    name: str
    path: Path
    prompts: list[list[int]]
    reference: list[list[int]]


@contextmanager
def engine_of(model: Model, **kwargs) -> Iterator[LLM]:
    """Three sequences at most, so that pools of windows are small where prompts are chunked."""
    sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 3}
    with windows_of(model.name), tiny_engine(model.path, **(sizes | kwargs)) as llm:
        yield llm


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    shared = random_prompts([800], seed=1)[0]
    prompts = [
        *random_prompts((250, 506, 762)),  # these fill 6 blocks, and grow
        shared,
        shared[:768],  # a full hit
        [*shared[:600], 7],
        [*shared, *shared[:150]],
    ]
    found = {}
    for name in MODELS:
        path = save_windowed(tmp_path_factory.mktemp("models") / "tiny", name)
        with windows_of(name), tiny_engine(path) as llm:
            guesses = generate(llm, prompts, greedy(MAX_TOKENS))
        reference = windowed_reference(path, name, prompts, MAX_TOKENS, guesses)
        check_varied(reference)
        found[name] = Model(name, path, prompts, reference)
    return found


SWITCHES = [  # caching, chunked, overlap, ample
    (True, True, True, True),
    (True, True, False, False),
    (True, False, True, False),
    (False, True, True, False),
]
# Every switch with all kinds of groups, and with the model that has no layer without a window.
CASES = [
    *(("full, 300, 20", *switches) for switches in SWITCHES),
    ("full, 300", *SWITCHES[1]),
    ("full, 300", *SWITCHES[2]),
    ("300", *SWITCHES[0]),
    ("300", *SWITCHES[1]),
    ("300", *SWITCHES[3]),
]


@pytest.mark.parametrize("name, caching, chunked, overlap, ample", CASES)
def test_greedy_tokens_are_those_of_transformers(models, name, caching, chunked, overlap, ample):
    model = models[name]
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 200} if chunked else {}
    pool = {} if ample else {"num_kvcache_blocks": 6, "watermark": 0}
    switches = {"enable_prefix_caching": caching, "async_scheduling": overlap}
    with engine_of(model, **(switches | chunks | pool)) as llm:
        assert isinstance(llm.scheduler.block_manager, WindowedBlockManager)
        for _ in range(1 + caching):  # the second time with a warm prefix cache
            assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference
            check_nothing_is_held(llm)
        stats = llm.scheduler.stats
        assert (stats.num_prefix_cache_hits > 0) == caching
        assert ample or llm.scheduler.num_preemptions > 0


def test_pools_of_windows_are_small_and_taken_from_the_memory(models):
    model = models["full, 300, 20"]
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 256}
    block_bytes = 2 * 256 * 4 * 16 * 4  # of a layer: K and V, tokens, KV heads, head_dim, float32
    memory = {"num_kvcache_blocks": None, "kv_cache_memory_bytes": 100 * block_bytes}
    with engine_of(model, **memory, **chunks) as llm:
        caches = [attention.cache.key for attention in llm.model_runner.attentions]
        # Of 3 sequences two blocks and a window each, and a chunk.
        assert [len(cache) for cache in caches] == [3 * 4 + 1, 100 - 13 - 10, 3 * 3 + 1]
        assert llm.model_runner.kv_cache.nbytes == 100 * block_bytes
        assert llm.config.num_kvcache_blocks == 77
        assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference


def test_sleep_and_reset_forget_all_groups(models):
    model = models["full, 300"]
    with engine_of(model) as llm:
        for forget in (lambda: llm.sleep(1) or llm.wake_up(), llm.reset_prefix_cache):
            assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference
            assert llm.scheduler.block_manager.pools[0].block_ids
            assert forget()
            assert not llm.scheduler.block_manager.pools[0].block_ids
        assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference


def test_a_window_that_no_sequence_exceeds_is_none(models):
    model = models["300"]
    short = [prompt for prompt in model.prompts if len(prompt) + MAX_TOKENS <= 300]
    assert short
    with engine_of(model, max_model_len=300) as llm:
        assert not hasattr(llm.scheduler.block_manager, "pools")
        assert {attention.window for attention in llm.model_runner.attentions} == {None}
        reference = model.reference[: len(short)]
        assert generate(llm, short, greedy(MAX_TOKENS)) == reference


@pytest.mark.usefixtures("ranks_are_threads")
def test_ranks_work_out_the_same_tables(models):
    model = models["full, 300"]
    with engine_of(model, tensor_parallel_size=2, num_kvcache_blocks=7, watermark=0) as llm:
        assert generate(llm, model.prompts, greedy(MAX_TOKENS)) == model.reference
        check_nothing_is_held(llm)
