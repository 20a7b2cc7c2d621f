"""Errors are raised before anything is queued or started, and leave the engine as good as new."""

import itertools
import os
import random
import shutil

import pytest
from engine_checks import (
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
    token_ids,
    worker_processes,
)
from tiny_models import VOCAB_SIZE, edit_config, reference_greedy

from nanovllm import LLM, ArgumentError, RequestError, SamplingParams

PROMPTS = random_prompts((3, 9, 260, 1, 40, 512), seed=30)
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def reference(shallow_dir):
    return reference_greedy(shallow_dir, PROMPTS, MAX_TOKENS)


@pytest.fixture(scope="module")
def llm(shallow_dir):
    with tiny_engine(shallow_dir, max_model_len=800, num_kvcache_blocks=3) as llm:
        yield llm


def check_usable(llm, reference):
    check_nothing_is_held(llm)
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
    check_nothing_is_held(llm)


def check_next_request(llm, reference):
    check_nothing_is_held(llm)
    assert generate(llm, PROMPTS[:2], greedy(3)) == [tokens[:3] for tokens in reference[:2]]
    check_nothing_is_held(llm)


# ---- wrong prompts and parameters -----------------------------------------------------------


BAD_PROMPTS = [
    ("", "Prompt cannot be empty"),
    ({"prompt_token_ids": []}, "Prompt cannot be empty"),
    ([1, 2, 999999], "999999"),
    ([VOCAB_SIZE], rf"{VOCAB_SIZE} .*vocabulary: 0 to {VOCAB_SIZE - 1}"),
    ([2**70], str(2**70)),
    ([1.5], "1.5"),
    (None, "None"),
    ({"text": "x"}, "prompt_token_ids"),
    ({"prompt": "x", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
    ([7] * 800, "800 .*800"),
    ([7] * 770, "770 .*768"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_wrong_prompt_anywhere_in_the_list(llm, reference, prompt, message):
    for k in (0, 3, len(PROMPTS)):
        prompts = [*PROMPTS[:k], prompt, *PROMPTS[k:]]
        with pytest.raises(ArgumentError, match=message):
            llm.generate(prompts, greedy(4))
        check_nothing_is_held(llm)
    with pytest.raises(ArgumentError, match=message):
        llm.add_request(prompt, greedy(4))
    check_next_request(llm, reference)


@pytest.mark.parametrize("prompt", [5, None, 1.5, object(), {}, ""])
def test_a_wrong_bare_prompt(llm, reference, prompt):
    with pytest.raises(ArgumentError):
        llm.generate(prompt, greedy(4))
    check_next_request(llm, reference)


def test_a_string_that_no_tokenizer_can_encode(llm, reference):
    """A lone surrogate: whatever is raised, nothing is left behind."""
    for call in (
        lambda: llm.generate([*PROMPTS, "\ud800"], greedy(4)),
        lambda: llm.add_request("\ud800", greedy(4)),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
        check_nothing_is_held(llm)
    check_next_request(llm, reference)


def invalidated(**changes):
    params = SamplingParams()
    for name, value in changes.items():
        setattr(params, name, value)
    return params


BAD_PARAMS = [
    ([greedy(4)] * 5, "6.*5"),
    ([greedy(4)] * 7, "6.*7"),
    ([], "6.*0"),
    ((), "6.*0"),
    ("greedy", "greedy"),
    ({"temperature": 1.0}, "temperature"),
    (5, "5"),
    ([*[greedy(4)] * 5, None], "None"),
    ([*[greedy(4)] * 5, {"temperature": 1.0}], "temperature"),
    (invalidated(max_tokens=0), "max_tokens"),
    (invalidated(max_tokens=-3), "max_tokens"),
    (invalidated(max_tokens=2.0), "max_tokens"),
    (invalidated(temperature=-1), "temperature"),
    (invalidated(temperature=float("nan")), "temperature"),
    ([*[greedy(4)] * 5, invalidated(temperature=float("inf"))], "temperature"),
    (invalidated(ignore_eos="yes"), "ignore_eos"),
]


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS)
def test_wrong_params(llm, reference, params, message):
    with pytest.raises(ArgumentError, match=message):
        llm.generate(PROMPTS, params)
    check_nothing_is_held(llm)
    if not isinstance(params, list):
        with pytest.raises(ArgumentError):
            llm.add_request(PROMPTS[0], params)
    check_next_request(llm, reference)


def test_requests_queued_before_a_wrong_call_go_on(shallow_dir, reference):
    with tiny_engine(shallow_dir) as llm:
        for prompt in PROMPTS:
            llm.add_request(prompt, greedy(MAX_TOKENS))
        llm.step()
        with pytest.raises(ArgumentError):
            llm.generate([[1], []], greedy(1))
        with pytest.raises(ArgumentError):
            llm.add_request([999999])
        assert drain(llm)[0] == dict(enumerate(reference))
        # Refused requests took no id.
        assert llm.add_request([1], greedy(1)) == len(PROMPTS)


# ---- wrong engines --------------------------------------------------------------------------


# That each parameter is checked is test_config's affair and test_bounds'; no rank has started then.
BAD_ARGUMENTS = [
    ({"tensor_parallel_size": 3}, ArgumentError, r"tensor_parallel_size \(3\)"),
    ({"tensor_parallel_size": 2, "seed": 1.5}, ArgumentError, "seed"),
    ({"tensor_parallel_size": 2, "block_size": 100}, ArgumentError, "kvcache_block_size"),
    ({"attention_backend": "flash-attn"}, ArgumentError, "flash-attn"),
    ({"num_kvcache_blocks": None, "kv_cache_memory_bytes": 10}, ArgumentError, "kv_cache_memory"),
    ({"worker_timeout": 0.5}, ArgumentError, "worker_timeout must be seconds between 1 and"),
    ({"tensor_parallel_size": 2, "max_model_length": 5}, TypeError, "max_model_len"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_ARGUMENTS)
def test_wrong_constructor_arguments(shallow_dir, arguments, kind, message):
    with pytest.raises(kind, match=message):
        tiny_engine(shallow_dir, **arguments)
    assert not worker_processes()


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "", "~/huggingface/Qwen3-0.6B", None, 5])
def test_the_model_must_be_a_directory(model):
    with pytest.raises(ArgumentError, match="model"):
        LLM(model, tensor_parallel_size=2)
    assert not worker_processes()


@pytest.fixture
def broken_dir(shallow_dir, tmp_path):
    shutil.copytree(shallow_dir, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "missing tensors: lm_head.weight"),
        ({"num_hidden_layers": 3, "layer_types": None}, r"missing tensors: model\.layers\.2\."),
        ({"num_hidden_layers": 1, "layer_types": None}, r"unexpected tensors: model\.layers\.1\."),
        ({"attention_bias": True}, "missing tensors: .*bias"),
        ({"vocab_size": 300}, "embed_tokens.*384, 64.*300, 64"),
        ({"intermediate_size": 128}, "mlp"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),  # contradicts layer_types
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_config_that_does_not_fit(broken_dir, changes, message):
    edit_config(broken_dir, **changes)
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(broken_dir)


def test_a_directory_without_weights(broken_dir):
    os.remove(broken_dir / "model.safetensors")
    with pytest.raises(ArgumentError, match="safetensors"):
        tiny_engine(broken_dir)
    with tiny_engine(broken_dir, load_format="dummy") as llm:
        assert len(generate(llm, [[1]], greedy(3))[0]) == 3


# ---- errors inside a step -------------------------------------------------------------------


class InjectedError(Exception):
    pass


def fail_at(llm, monkeypatch, calls, after=False):
    """Let these calls of the model (counted from 0) fail, before or after their computation."""
    execute, count = llm.model_runner.execute, iter(range(10**9))

    def failing(plan, seqs=()):
        is_bad = next(count) in calls
        if is_bad and not after:
            raise InjectedError
        result = execute(plan, seqs)
        if is_bad:
            raise InjectedError
        return result

    monkeypatch.setattr(llm.model_runner, "execute", failing)


NAMES = ("overlap", "chunked", "num_blocks")
SWITCHES = [
    (True, False, 128),
    (False, False, 128),
    (True, True, 128),
    (True, True, 4),
    (True, False, 4),
]


def stepping_engine(shallow_dir, overlap, chunked, num_blocks):
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 90} if chunked else {}
    return tiny_engine(
        shallow_dir,
        async_scheduling=overlap,
        num_kvcache_blocks=num_blocks,
        watermark=0,
        **chunks,
    )


@pytest.mark.parametrize(
    (*NAMES, "after"),
    [(*switches, False) for switches in SWITCHES[:3]]
    + [(*switches, True) for switches in (*SWITCHES[:2], *SWITCHES[3:])],
)
def test_an_error_in_a_step_that_does_not_come_again(
    shallow_dir, reference, monkeypatch, overlap, chunked, num_blocks, after
):
    """Nobody is to blame: all is computed again, and complete."""
    with stepping_engine(shallow_dir, overlap, chunked, num_blocks) as llm:
        for call in (0, 1, 2, 5, 11):
            with monkeypatch.context() as patch:
                fail_at(llm, patch, {call}, after)
                assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
            check_nothing_is_held(llm)
        check_usable(llm, reference)


@pytest.mark.parametrize(
    (*NAMES, "after"), [(*switches, i % 2 > 0) for i, switches in enumerate(SWITCHES)]
)
def test_a_manual_loop_goes_on_after_errors(
    shallow_dir, reference, monkeypatch, overlap, chunked, num_blocks, after
):
    with stepping_engine(shallow_dir, overlap, chunked, num_blocks) as llm:
        rng = random.Random(num_blocks)
        calls = itertools.accumulate(rng.randrange(25, 40) for _ in range(5))
        fail_at(llm, monkeypatch, {0, *calls}, after)
        for _ in range(5):
            ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]
            assert drain(llm)[0] == dict(zip(ids, reference, strict=True))
            check_nothing_is_held(llm)


def test_sampled_tokens_survive_an_error(shallow_dir, monkeypatch):
    params = SamplingParams(temperature=0.9, max_tokens=MAX_TOKENS, ignore_eos=True)
    with tiny_engine(shallow_dir) as llm:
        expected = generate(llm, PROMPTS, params)
    with tiny_engine(shallow_dir) as llm:
        fail_at(llm, monkeypatch, {1, 30})
        assert generate(llm, PROMPTS, params) == expected


@pytest.mark.parametrize("method", ["__init__", "update", "set_postfix", "close"])
def test_a_progress_bar_that_fails(shallow_dir, reference, method):
    class Bar:
        def __init__(self, **kwargs):
            self.fail("__init__")

        def update(self, n):
            self.fail("update")

        def set_postfix(self, values):
            self.fail("set_postfix")

        def close(self):
            self.fail("close")

        def fail(self, name):
            if name == method:
                raise InjectedError

    with tiny_engine(shallow_dir) as llm:
        llm.add_request(PROMPTS[0], greedy(5))
        with pytest.raises(InjectedError):
            llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=Bar)
        assert drain(llm)[0] == {0: reference[0][:5]}
        check_usable(llm, reference)


def test_a_tokenizer_that_fails_on_the_results(shallow_dir, reference, monkeypatch):
    with tiny_engine(shallow_dir) as llm:
        with monkeypatch.context() as patch:

            def decode(ids, **options):
                raise InjectedError

            patch.setattr(llm.tokenizer, "decode", decode)
            with pytest.raises(RequestError, match="InjectedError") as raised:
                llm.generate(PROMPTS, greedy(2), use_tqdm=False)
            assert token_ids(raised.value.outputs) == [tokens[:2] for tokens in reference]
        check_usable(llm, reference)
