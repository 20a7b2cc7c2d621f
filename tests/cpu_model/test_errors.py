"""Errors are raised before anything is queued or started, and leave the engine as good as new."""

import itertools
import json
import math
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
from tiny_models import VOCAB_SIZE, edit_config, reference_greedy, save_model

from nanovllm import LLM, ArgumentError, RequestError, SamplingParams

PROMPTS = random_prompts((3, 9, 260, 1, 40, 512), seed=30)
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def reference(tiny_dir):
    return reference_greedy(tiny_dir, PROMPTS, MAX_TOKENS)


@pytest.fixture(scope="module")
def llm(tiny_dir):
    with tiny_engine(tiny_dir, max_model_len=800, num_kvcache_blocks=3) as llm:
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
    ([], "Prompt cannot be empty"),
    ({"prompt": ""}, "Prompt cannot be empty"),
    ({"prompt_token_ids": []}, "Prompt cannot be empty"),
    ([1, 2, 999999], "999999"),
    ([VOCAB_SIZE], rf"{VOCAB_SIZE} .*vocabulary: 0 to {VOCAB_SIZE - 1}"),
    ([1, -1], "-1"),
    ([2**70], str(2**70)),
    ([1.5], "1.5"),
    (["1"], "'1'"),
    ([True], "True"),
    ([None], "None"),
    ([[1, 2]], "integers"),
    (None, "None"),
    (1.5, "1.5"),
    ({}, "prompt_token_ids"),
    ({"text": "x"}, "prompt_token_ids"),
    ({"prompt": "x", "multi_modal_data": {}}, "multi_modal_data"),
    ([7] * 800, "800 .*800"),
    ([7] * 900, "900 .*800"),
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


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"temperature": None},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"ignore_eos": None},
    ],
)
def test_sampling_params_refuse(arguments):
    [name] = arguments
    with pytest.raises(ArgumentError, match=name):
        SamplingParams(**arguments)


def test_the_error_is_a_value_error_and_an_assertion_error(llm):
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind):
            llm.generate([""], greedy(1))
        with pytest.raises(kind):
            SamplingParams(max_tokens=0)


def test_requests_queued_before_a_wrong_call_go_on(tiny_dir, reference):
    with tiny_engine(tiny_dir) as llm:
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


BAD_ARGUMENTS = [
    ({"tensor_parallel_size": 0}, ArgumentError, "tensor_parallel_size"),
    ({"tensor_parallel_size": 9}, ArgumentError, "tensor_parallel_size"),
    ({"tensor_parallel_size": 3}, ArgumentError, r"tensor_parallel_size \(3\)"),
    ({"tensor_parallel_size": "2"}, ArgumentError, "tensor_parallel_size"),
    ({"tensor_parallel_size": True}, ArgumentError, "tensor_parallel_size"),
    ({"kvcache_block_size": 0}, ArgumentError, "kvcache_block_size"),
    ({"kvcache_block_size": -256}, ArgumentError, "kvcache_block_size"),
    ({"kvcache_block_size": 100}, ArgumentError, "100"),
    ({"block_size": 16}, ArgumentError, "kvcache_block_size"),
    ({"kvcache_block_size": 256, "block_size": 512}, TypeError, "block_size"),
    ({"max_num_seqs": 0}, ArgumentError, "max_num_seqs"),
    ({"max_num_batched_tokens": 512}, ArgumentError, r"512.*1024"),
    ({"max_model_len": 0}, ArgumentError, "max_model_len"),
    ({"gpu_memory_utilization": 0}, ArgumentError, "gpu_memory_utilization"),
    ({"gpu_memory_utilization": 1.01}, ArgumentError, "1.01"),
    ({"gpu_memory_utilization": float("nan")}, ArgumentError, "gpu_memory_utilization"),
    ({"num_kvcache_blocks": 0}, ArgumentError, "num_kvcache_blocks"),
    ({"num_kvcache_blocks": None, "kv_cache_memory_bytes": 10}, ArgumentError, "kv_cache_memory"),
    ({"watermark": -1}, ArgumentError, "watermark"),
    ({"enforce_eager": 1}, ArgumentError, "enforce_eager"),
    ({"dtype": "float64"}, ArgumentError, "float64"),
    ({"device": "tpu"}, ArgumentError, "tpu"),
    ({"attention_backend": "flash-attn"}, ArgumentError, "flash-attn"),
    ({"attention_backend": "xformers"}, ArgumentError, "xformers"),
    ({"load_format": "pt"}, ArgumentError, "load_format"),
    ({"seed": 2**63}, ArgumentError, "seed"),
    *[
        ({"worker_timeout": value}, ArgumentError, "worker_timeout must be seconds between 1 and")
        for value in (0, -1, 0.5, 86401, math.inf, math.nan, 10**400, "8", None, True)
    ],
    ({"seed": 1.5}, ArgumentError, "seed"),
    ({"max_model_length": 5}, TypeError, "max_model_length.*max_model_len"),
    ({"hf_config": None}, TypeError, "hf_config"),
    ({"quantization": "awq"}, ValueError, "quantization must be one of fp8, got 'awq'"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_ARGUMENTS)
def test_wrong_constructor_arguments(tiny_dir, arguments, kind, message):
    with pytest.raises(kind, match=message):
        tiny_engine(tiny_dir, **arguments)
    assert not worker_processes()


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "", "~/huggingface/Qwen3-0.6B", None, 5])
def test_the_model_must_be_a_directory(model):
    with pytest.raises(ArgumentError, match="model"):
        LLM(model, tensor_parallel_size=2)
    assert not worker_processes()


@pytest.fixture
def broken_dir(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "linear"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"use_sliding_window": True}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"tie_word_embeddings": False}, "missing tensors: lm_head.weight"),
        ({"num_hidden_layers": 4, "layer_types": None}, r"missing tensors: model\.layers\.3\."),
        ({"num_hidden_layers": 2, "layer_types": None}, r"unexpected tensors: model\.layers\.2\."),
        ({"attention_bias": True}, "missing tensors: .*bias"),
        ({"vocab_size": 300}, "embed_tokens.*384, 64.*300, 64"),
        ({"intermediate_size": 128}, "mlp"),
    ],
)
def test_a_config_that_does_not_fit(broken_dir, changes, message):
    edit_config(broken_dir, **changes)
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(broken_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers"),  # contradicts layer_types
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_config_that_transformers_refuses(broken_dir, changes, message):
    edit_config(broken_dir, **changes)
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(broken_dir)


def test_a_directory_without_weights(broken_dir):
    os.remove(broken_dir / "model.safetensors")
    with pytest.raises(ArgumentError, match="safetensors"):
        tiny_engine(broken_dir)
    with tiny_engine(broken_dir, load_format="dummy") as llm:
        assert len(generate(llm, [[1]], greedy(3))[0]) == 3


def test_a_damaged_weight_file(broken_dir):
    path = broken_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        tiny_engine(broken_dir)


def test_an_index_that_names_a_missing_file(tmp_path):
    model_dir = save_model(tmp_path / "m", max_shard_size="100KB")
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    missing = sorted(set(index["weight_map"].values()))[1]
    os.remove(model_dir / missing)
    with pytest.raises(ArgumentError, match=missing):
        tiny_engine(model_dir)


def test_a_directory_without_config(broken_dir):
    os.remove(broken_dir / "config.json")
    with pytest.raises(ArgumentError, match=r"config\.json"):
        tiny_engine(broken_dir)


def test_a_config_that_is_no_json(broken_dir):
    (broken_dir / "config.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"config\.json"):
        tiny_engine(broken_dir)


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


STEP_SWITCHES = pytest.mark.parametrize(
    ("overlap", "chunked", "num_blocks"),
    [(True, False, 128), (False, False, 128), (True, True, 128), (True, True, 4), (True, False, 4)],
)


def stepping_engine(tiny_dir, overlap, chunked, num_blocks):
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 90} if chunked else {}
    return tiny_engine(
        tiny_dir,
        async_scheduling=overlap,
        num_kvcache_blocks=num_blocks,
        watermark=0,
        **chunks,
    )


@STEP_SWITCHES
@pytest.mark.parametrize("after", [False, True])
def test_an_error_in_a_step_that_does_not_come_again(
    tiny_dir, reference, monkeypatch, overlap, chunked, num_blocks, after
):
    """Nobody is to blame: all is computed again, and complete."""
    with stepping_engine(tiny_dir, overlap, chunked, num_blocks) as llm:
        for call in (0, 1, 2, 5, 11):
            with monkeypatch.context() as patch:
                fail_at(llm, patch, {call}, after)
                assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
            check_usable(llm, reference)


@STEP_SWITCHES
@pytest.mark.parametrize("after", [False, True])
def test_a_manual_loop_goes_on_after_errors(
    tiny_dir, reference, monkeypatch, overlap, chunked, num_blocks, after
):
    with stepping_engine(tiny_dir, overlap, chunked, num_blocks) as llm:
        rng = random.Random(num_blocks)
        calls = itertools.accumulate(rng.randrange(25, 40) for _ in range(8))
        fail_at(llm, monkeypatch, {0, *calls}, after)
        for _ in range(8):
            ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]
            assert drain(llm)[0] == dict(zip(ids, reference, strict=True))
            check_nothing_is_held(llm)


def test_sampled_tokens_survive_an_error(tiny_dir, monkeypatch):
    params = SamplingParams(temperature=0.9, max_tokens=MAX_TOKENS, ignore_eos=True)
    with tiny_engine(tiny_dir) as llm:
        expected = generate(llm, PROMPTS, params)
    with tiny_engine(tiny_dir) as llm:
        fail_at(llm, monkeypatch, {1, 30})
        assert generate(llm, PROMPTS, params) == expected


@pytest.mark.parametrize("method", ["__init__", "update", "set_postfix", "close"])
def test_a_progress_bar_that_fails(tiny_dir, reference, method):
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

    with tiny_engine(tiny_dir) as llm:
        llm.add_request(PROMPTS[0], greedy(5))
        with pytest.raises(InjectedError):
            llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=Bar)
        assert drain(llm)[0] == {0: reference[0][:5]}
        check_usable(llm, reference)


def test_a_tokenizer_that_fails_on_the_results(tiny_dir, reference, monkeypatch):
    with tiny_engine(tiny_dir) as llm:
        with monkeypatch.context() as patch:

            def decode(ids, **options):
                raise InjectedError

            patch.setattr(llm.tokenizer, "decode", decode)
            with pytest.raises(RequestError, match="InjectedError") as raised:
                llm.generate(PROMPTS, greedy(2), use_tqdm=False)
            assert token_ids(raised.value.outputs) == [tokens[:2] for tokens in reference]
        check_usable(llm, reference)
