"""Every parameter at the ends of every kind of number: refused by name when made, or harmless.

A table says for each field which of the values it takes and what it keeps of them. All that is
taken then runs beside ordinary requests, whose tokens must stay the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import pytest
import torch
from engine_checks import generate, greedy, random_prompts, tiny_engine
from tiny_models import VOCAB_SIZE

from nanovllm import LLM, ArgumentError, PoolingParams, SamplingParams
from nanovllm.config import Config
from nanovllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

INT32 = 2**31 - 1
POWERS = (2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, 10**5000)
VALUES = [
    *(sign * power for power in POWERS for sign in (1, -1)),
    *(0, 1, -1, True, False, None),
    *(0.0, -0.0, 1.0, 0.5, math.inf, -math.inf, math.nan, 1e308, -1e308, 3.5e38, 3.4e38),
    *(5e-324, 1e-310, 1e-40, 1.2e-38, -5e-324, 1e-5, 9e-6),
    *(np.int64(3), np.int64(2**62), np.uint64(2**64 - 1), np.float32(0.5), np.float16("inf")),
    *(np.bool_(True), torch.tensor(3), torch.tensor(0.5), torch.tensor(True)),
    *(Decimal("0.5"), Decimal("NaN"), Fraction(1, 2), Fraction(10**400), Fraction(1, 10**400)),
    *("1", "", "\ud800", b"1", 1j, object(), int, [], [1], (), {}, {1: 1.0}, np.array([1, 2])),
]


def show(value: Any) -> str:
    try:
        return "an object" if type(value) is object else repr(value)[:40]
    except ValueError:
        return "int of 5001 digits"


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass
class Row:
    """Which values a field takes, and what it keeps of one."""

    takes: Callable[[Any], bool]
    keeps: Callable[[Any], Any] = lambda value: value


def integer(low: int, high: float = math.inf, keeps: Callable[[Any], Any] = int) -> Row:
    return Row(lambda value: is_integer(value) and low <= value <= high, keeps)


def number(is_in: Callable[[float], bool], keeps: Callable[[float], Any] = float) -> Row:
    return Row(lambda v: is_number(v) and is_in(as_float(v)), lambda v: keeps(as_float(v)))


def or_none(row: Row, none: Any = None) -> Row:
    return Row(
        lambda value: value is None or row.takes(value),
        lambda value: none if value is None else row.keeps(value),
    )


def clamped(value: Any) -> int:
    return min(int(value), INT32)


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def as_ints(value: Any) -> list[int]:
    return [int(item) for item in value]


boolean = Row(lambda value: isinstance(value, bool))
penalty = number(lambda p: -2 <= p <= 2)
token_ids = Row(is_list, as_ints)
strings = Row(
    lambda value: value == "1" if isinstance(value, str) else is_list(value) and len(value) == 0,
    lambda value: [value] if isinstance(value, str) else [],
)
SAMPLING = {
    "temperature": number(lambda t: 0 <= t < 3.41e38, lambda t: 0.0 if t < 1e-5 else t),
    "max_tokens": or_none(integer(1, keeps=clamped)),
    "ignore_eos": boolean,
    "n": integer(1, 16384),
    "top_p": number(lambda p: 0 < p <= 1, lambda p: max(p, 2.0**-126)),
    "top_k": integer(-1, keeps=lambda k: max(clamped(k), 0)),
    "min_p": number(lambda p: 0 <= p <= 1),
    "seed": or_none(integer(-(2**63), 2**64 - 1, lambda s: None if s == -1 else int(s))),
    "stop": or_none(strings, []),
    "stop_token_ids": or_none(token_ids, []),
    "include_stop_str_in_output": boolean,
    "min_tokens": integer(0, 64),  # the default of max_tokens
    "presence_penalty": penalty,
    "frequency_penalty": penalty,
    "repetition_penalty": number(lambda p: 2.0**-126 <= p < 3.41e38),
    "logit_bias": or_none(Row(lambda value: isinstance(value, dict), lambda value: value or None)),
    "allowed_token_ids": or_none(Row(lambda v: is_list(v) and len(v) > 0, as_ints)),
    "bad_words": or_none(strings, []),
    "logprobs": or_none(integer(-1, INT32)),
    "prompt_logprobs": or_none(integer(-1, INT32)),
    "logprob_token_ids": or_none(Row(is_list, lambda v: as_ints(v) or None)),
    "flat_logprobs": boolean,
    "detokenize": boolean,
    "skip_special_tokens": boolean,
    "spaces_between_special_tokens": boolean,
    "structured_outputs": Row(lambda value: value is None),
    "logits_processors": or_none(Row(lambda v: is_list(v) and len(v) == 0, lambda _: None)),
    "extra_args": or_none(Row(lambda value: isinstance(value, dict))),
    "thinking_token_budget": or_none(
        integer(-1, INT32, lambda n: None if n == -1 else int(n)),
    ),
    "repetition_detection": or_none(
        Row(lambda v: isinstance(v, dict) and not v, lambda _: RepetitionDetectionParams())
    ),
    "output_kind": Row(lambda value: isinstance(value, RequestOutputKind)),
    "truncate_prompt_tokens": or_none(
        Row(lambda n: is_integer(n) and (n == -1 or n >= 1), clamped)
    ),
    "skip_reading_prefix_cache": Row(lambda value: value is None or isinstance(value, bool)),
}
POOLING = {
    "dimensions": or_none(integer(1, INT32)),
    "use_activation": Row(lambda value: value is None or isinstance(value, bool)),
    "task": Row(lambda value: value is None),
    "step_tag_id": or_none(integer(0, INT32)),
    "returned_token_ids": or_none(Row(lambda v: isinstance(v, list) and len(v) > 0)),
    "skip_reading_prefix_cache": Row(lambda value: value is None or isinstance(value, bool)),
}
nothing = Row(lambda value: False)
anything = Row(lambda value: True)
CONFIG = {
    "max_num_batched_tokens": or_none(
        integer(1024, keeps=lambda n: min(int(n), 1024 * 1024)), 16384
    ),
    "max_num_seqs": integer(1, (INT32 - 6) // 10 - 1),
    "max_model_len": or_none(
        Row(
            lambda n: is_integer(n) and (n == -1 or n >= 2),
            lambda n: 2048 if n == -1 else min(int(n), 2048),
        ),
        2048,
    ),
    "gpu_memory_utilization": number(lambda share: 0 < share <= 1),
    "cpu_offload_gb": number(lambda gib: 0 <= gib < math.inf),
    "tensor_parallel_size": integer(1, 1),
    "data_parallel_size": integer(1, 64),
    "replica_death_policy": nothing,
    "enable_lora": boolean,
    "max_loras": integer(1, 1024),
    "max_lora_rank": integer(1, 256),
    "max_cpu_loras": or_none(integer(1, INT32)),
    "lora_dtype": nothing,
    "fully_sharded_loras": boolean,
    "disable_custom_all_reduce": boolean,
    "worker_timeout": number(lambda seconds: 1 <= seconds <= 86400),
    "disable_any_whitespace": boolean,
    "structured_outputs_timeout": number(lambda seconds: 0 < seconds <= 86400),
    "enforce_eager": boolean,
    "kvcache_block_size": nothing,
    "num_kvcache_blocks": or_none(
        Row(
            lambda n: is_integer(n) and n != 0 and -1 <= n <= INT32,
            lambda n: None if n == -1 else int(n),
        )
    ),
    "kv_cache_memory_bytes": or_none(integer(1, 2**63 - 1)),
    "kv_cache_dtype": nothing,
    "watermark": number(lambda w: 0 <= w < math.inf, lambda w: min(w, float(INT32))),
    "enable_prefix_caching": or_none(boolean, True),
    "enable_chunked_prefill": or_none(boolean, False),
    "async_scheduling": boolean,
    "attention_backend": nothing,
    "dtype": nothing,
    "quantization": Row(lambda value: value is None),
    "device": nothing,
    "seed": integer(-(2**63), 2**63 - 1),
    "load_format": nothing,
    "model_impl": nothing,
    "skip_tokenizer_init": boolean,
    "trust_remote_code": boolean,
    "tokenizer_mode": nothing,
    "max_logprobs": integer(-1, keeps=clamped),
    "scheduling_policy": nothing,
    "runner": nothing,
    "enable_sleep_mode": boolean,
    "disable_log_stats": boolean,
    "download": or_none(boolean),
}
# Not numbers: read with the model's folder, and tested with it.
NO_NUMBERS = {"model", "hf_overrides", "tokenizer", "chat_template", "generation_config"}
NO_NUMBERS |= {"override_generation_config", "source", "model_config", "eos_token_ids"}
NO_NUMBERS |= {"record", "profiler_config"}  # with the report, and with vLLM's parameters
NO_NUMBERS |= {"pooler_config"}  # with heads
NO_NUMBERS |= {"logits_processors", "engine_processors", "reasoning_config"}  # with them
NO_NUMBERS |= {"revision", "tokenizer_revision", "hf_token", "download_dir"}  # with names
NO_NUMBERS |= {"replica"}  # with replicas
NO_NUMBERS |= {"worker_extension_cls", "weight_transfer_config"}  # with weight transfer


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right


def check_row(name: str, row: Row, make: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """What `make` makes of the values that the row takes; all others are refused by name."""
    made = []
    for value in VALUES:
        if not row.takes(value):
            with pytest.raises(ArgumentError) as raised:
                make(value)
            message = str(raised.value)
            assert message.startswith((f"{name} ", f"{name}:", f"{name}[")), message
            assert len(message) < 500
            continue
        params = make(value)
        kept = getattr(params, name)
        assert same(kept, row.keeps(value)), (name, show(value), kept)
        made.append((value, params))
    return made


def make_sampling(name: str) -> Callable[[Any], SamplingParams]:
    # Greedy refuses several completions, and resets what only sampling uses.
    needs_sampling = name in ("n", "top_p", "top_k", "min_p", "seed")
    settings = {"temperature": 1.0 if needs_sampling else 0.0}
    return lambda value: SamplingParams(**(settings | {name: value}))


def test_every_field_has_a_row():
    assert {field.name for field in fields(SamplingParams)} == SAMPLING.keys()
    assert {field.name for field in fields(PoolingParams)} == POOLING.keys()
    assert {field.name for field in fields(Config)} == CONFIG.keys() | NO_NUMBERS


@pytest.fixture(scope="module")
def llm(shallow_dir) -> LLM:
    reasoning = {"reasoning_start_str": "lazy", "reasoning_end_str": "dog"}
    settings = {"max_num_seqs": 64, "max_logprobs": -1, "reasoning_config": reasoning}
    return tiny_engine(shallow_dir, max_model_len=96, **settings)


NEIGHBOURS = [greedy(12), SamplingParams(0.9, 12, True, seed=11)]
PROMPTS = random_prompts((9, 5), seed=3)


@pytest.fixture(scope="module")
def alone(llm) -> list[list[int]]:
    return generate(llm, PROMPTS, NEIGHBOURS)


def run_beside(llm: LLM, alone: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """The tokens of each; the neighbours among them get what they get alone."""
    prompts, batch = [], []
    for index, own in enumerate(params):
        prompts += [PROMPTS[index % 2], *([] if index % 8 else PROMPTS)]
        batch += [own, *([] if index % 8 else NEIGHBOURS)]
    outputs = llm.generate(prompts, batch, use_tqdm=False)
    results = iter(outputs)
    own_results = []
    for index in range(len(params)):
        own_results.append(next(results))
        if index % 8 == 0:
            assert [next(results)["token_ids"] for _ in NEIGHBOURS] == alone
    for output in own_results:
        assert all(0 <= i < VOCAB_SIZE for c in output.outputs for i in c.token_ids)
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length")
            for entries in completion.logprobs or []:
                assert all(math.isfinite(e.logprob) for e in entries.values())
    return [output["token_ids"] for output in own_results]


def test_sampling_parameters_at_the_ends_of_numbers_are_refused_or_hurt_nobody(llm, alone):
    batch = [
        params
        for name, row in SAMPLING.items()
        for value, params in check_row(name, row, make_sampling(name))
        if name != "n" or value == 1 or is_integer(value)
    ]
    assert len(batch) > 200
    for params in batch:
        params.max_tokens = min(params.max_tokens or 96, 96 if params.max_tokens != 64 else 3)
    run_beside(llm, alone, batch)


def make_pooling(name: str, value: Any) -> PoolingParams:
    return PoolingParams(**{name: value})


def test_pooling_parameters_at_the_ends_of_numbers_are_refused_or_hurt_nobody(llm, alone):
    for name, row in POOLING.items():
        for value, params in check_row(name, row, partial(make_pooling, name)):
            if name == "dimensions" and value is not None and value > 64:
                with pytest.raises(ArgumentError, match=r"dimensions must be between 1 and \d+"):
                    llm.embed(PROMPTS, pooling_params=params, use_tqdm=False)
            elif name in ("step_tag_id", "returned_token_ids") and value is not None:
                with pytest.raises(ArgumentError, match=f"{name} is for pooling type 'STEP'"):
                    llm.embed(PROMPTS, pooling_params=params, use_tqdm=False)
            else:
                [output, _] = llm.embed(PROMPTS, pooling_params=params, use_tqdm=False)
                assert all(map(math.isfinite, output.outputs.embedding))
    assert generate(llm, PROMPTS, NEIGHBOURS) == alone


HUGE = (INT32, 2**31, 3_000_000_000, 2**53, 2**63, 2**64, 10**30)


def test_more_than_there_are_means_all(llm, alone):
    sampled = SamplingParams(1.0, 20, True, seed=5)
    [expected] = generate(llm, PROMPTS[:1], sampled)
    every = [SamplingParams(1.0, 20, True, seed=5, top_k=k) for k in (VOCAB_SIZE, *HUGE)]
    every += [SamplingParams(1.0, 20, True, seed=5, min_p=p) for p in (5e-324, 1e-310, 1e-40)]
    for params in every:
        assert generate(llm, PROMPTS[:1], params) == [expected]
    results = run_beside(llm, alone, [greedy(n) for n in HUGE for _ in range(2)])
    assert {len(tokens) for tokens in results[::2]} == {96 - len(PROMPTS[0])}
    # Its only end token is not sampled before as many as never come.
    [end] = generate(llm, PROMPTS[:1], greedy(1))[0]
    wanting = [
        SamplingParams(0, None, min_tokens=n, stop_token_ids=[end], logprobs=0) for n in HUGE
    ]
    for tokens in run_beside(llm, alone, [p for p in wanting for _ in range(2)])[::2]:
        assert len(tokens) == 96 - len(PROMPTS[0]) and end not in tokens


def test_the_smallest_share_is_the_single_best_token(llm, alone):
    [best] = generate(llm, PROMPTS[:1], greedy(12))
    for params in (
        *(SamplingParams(1.0, 12, True, top_p=p) for p in (5e-324, 1e-310, 1e-40, 1.2e-38, 1e-30)),
        *(SamplingParams(t, 12, True, top_k=1) for t in (1e-5, 1.0, 1e30, 3.4e38)),
        SamplingParams(1e-5, 12, True),
        SamplingParams(1.0, 12, True, min_p=1),
        SamplingParams(3.4e38, 12, True, top_p=1e-310),
    ):
        assert generate(llm, PROMPTS[:1], params) == [best], params


def test_extreme_temperatures_and_penalties_leave_valid_tokens(llm, alone):
    hot = [SamplingParams(t, 40, True, seed=1) for t in (1e10, 1e37, 3.4e38)]
    for tokens in run_beside(llm, alone, hot):
        assert len(set(tokens)) > 20  # nearly uniform over the vocabulary
    mixed = [
        SamplingParams(t, 12, True, repetition_penalty=r, presence_penalty=p, frequency_penalty=-p)
        for t in (0, 1e-5, 3.4e38)
        for r in (1.2e-38, 1e-10, 1e10, 3.4e38)
        for p in (-2, 5e-324, 2)
    ]
    mixed += [
        SamplingParams(t, 12, True, logit_bias={3: bias, 4: -bias}, top_p=p, min_p=m)
        for t in (0, 1.0, 3.4e38)
        for bias in (1e308, -1e308, 5e-324)
        for p, m in ((1e-310, 1e-310), (1.0, 1.0))
    ]
    run_beside(llm, alone, mixed)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": list(range(10**6))}, "stop_token_ids: token id 999999 is out of"),
        ({"allowed_token_ids": list(range(10**6))}, "allowed_token_ids: token id 999999 is out"),
        ({"logit_bias": dict.fromkeys(range(10**5), 1.0)}, "logit_bias: token id 99999 is out"),
        ({"logit_bias": {INT32: 1.0}}, f"logit_bias: token id {INT32} is out of vocabulary"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_long_lists_are_compared_with_the_vocabulary(llm, alone, params, message):
    with pytest.raises(ArgumentError, match=message):
        llm.generate(PROMPTS, SamplingParams(**params), use_tqdm=False)
    assert generate(llm, PROMPTS, NEIGHBOURS) == alone


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bad_words": ["a"] * 10**6}, "bad_words must hold at most 10000 strings, got 1000000"),
        ({"stop": ["a"] * 10001}, "stop must hold at most 10000 strings, got 10001"),
        ({"bad_words": ["fox"] * 3000 + ["the fox jumps over " * 300]}, r"bad_words must take at"),
        (
            {
                "bad_words": ["the fox jumps over " * 300],
                "min_tokens": 1,
                "stop_token_ids": list(range(VOCAB_SIZE)) * 12,
            },
            r"bad_words must take at most \d+ tokens if all .*, got \d+ \* \d+",
        ),
    ],
    ids=["bad_words", "stop", "a long word", "end tokens"],
)
def test_words_that_would_take_the_memory_and_time_of_others_are_refused(
    llm, alone, params, message
):
    with pytest.raises(ArgumentError, match=message):
        llm.generate(PROMPTS, SamplingParams(**params), use_tqdm=False)
    assert generate(llm, PROMPTS, NEIGHBOURS) == alone


def test_long_lists_of_known_ids_and_empty_ones_run(llm, alone):
    many = list(range(VOCAB_SIZE)) * 2604  # a million
    params = [
        SamplingParams(0, 3, True, allowed_token_ids=many),
        SamplingParams(0, 3, True, stop_token_ids=many, min_tokens=2),
        SamplingParams(0, 3, True, stop=[], stop_token_ids=[], bad_words=[], logit_bias={}),
        SamplingParams(0, 3, True, logit_bias=dict.fromkeys(range(VOCAB_SIZE), 5e-324)),
    ]
    first, second, third, fourth = run_beside(llm, alone, params)
    assert [first, third] == [alone[0][:3], alone[0][:3]]
    assert len(second) == 2  # there was nothing else to take
    assert [fourth] == generate(llm, PROMPTS[1:], greedy(3))


@pytest.mark.parametrize(
    "token_id", [VOCAB_SIZE, *HUGE, 10**5000, -1, -(2**31), -(10**5000)], ids=show
)
def test_token_ids_of_any_size_are_refused_wherever_they_are_given(llm, token_id):
    for give in (
        lambda: llm.generate([[1, token_id]], greedy(1), use_tqdm=False),
        lambda: llm.generate([{"prompt_token_ids": [token_id]}], greedy(1), use_tqdm=False),
        lambda: llm.add_request([token_id]),
        lambda: llm.embed([[token_id]], use_tqdm=False),
        lambda: llm.add_request([1], SamplingParams(stop_token_ids=[1, token_id])),
        lambda: llm.add_request([1], SamplingParams(allowed_token_ids=[1, token_id])),
        lambda: llm.add_request([1], SamplingParams(logit_bias={token_id: 0})),
    ):
        with pytest.raises(ArgumentError, match="token id"):
            give()
    if token_id >= 0 and token_id < 10**4000:
        with pytest.raises(ArgumentError, match="token id"):
            llm.add_request([1], SamplingParams(logit_bias={str(token_id): 0}))
    assert llm.is_finished()


@pytest.mark.parametrize("value", VALUES, ids=show)
def test_numbers_beside_the_parameters_are_bounded_too(llm, value):
    """Priorities, lengths, time limits, levels, ids: taken or refused by name, and nothing else."""
    calls = {
        "priority": lambda: llm.generate(PROMPTS[:1], greedy(1), False, priority=[value]),
        "max_length": lambda: llm.generate(
            ["the fox"], greedy(1), False, tokenization_kwargs={"max_length": value}
        ),
        "max_length with truncation": lambda: llm.generate(
            ["the fox"],
            greedy(1),
            False,
            tokenization_kwargs={"max_length": value, "truncation": True},
        ),
        "truncate_prompt_tokens": lambda: llm.embed(
            ["the fox"], truncate_prompt_tokens=value, use_tqdm=False
        ),
        "timeout": lambda: llm.collective_rpc(str, timeout=value),
        "level": lambda: (llm.sleep(level=value), llm.wake_up()),
        "get_output": lambda: llm.get_output(value),
        "abort_request": lambda: llm.abort_request(value),
        "wake_up": lambda: llm.wake_up(value),
        "apply_model": lambda: llm.apply_model(value),
        "method": lambda: llm.collective_rpc(value),
        "embed": lambda: llm.embed(["the fox"], pooling_params=value, use_tqdm=False),
        "keys of prompts": lambda: llm.generate({f"{show(value)}": 1}, use_tqdm=False),
        "prompt": lambda: llm.generate(value, greedy(1), use_tqdm=False),
        "prompts": lambda: llm.generate([[5], value], greedy(1), use_tqdm=False),
        "sampling_params": lambda: llm.generate(PROMPTS[:1], value, use_tqdm=False),
    }
    for name, call in calls.items():
        if name in ("apply_model", "method") and callable(value):
            continue  # it is called
        try:
            call()
        except ArgumentError as error:
            assert len(str(error)) < 600
        assert llm.is_finished()


def make_config(shallow_dir, name: str) -> Callable[[Any], Config]:
    settings = {} if name == "max_model_len" else {"max_model_len": 1024}
    return lambda value: Config(str(shallow_dir), **(settings | {name: value}))


def test_constructor_parameters_at_the_ends_of_numbers_are_refused_or_kept(shallow_dir):
    for name, row in CONFIG.items():
        if name == "tensor_parallel_size":
            row = integer(1, 8, lambda n: int(n))
            row.takes = lambda value: is_integer(value) and value == 1  # 3 does not fit the model
        check_row(name, row, make_config(shallow_dir, name))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_num_seqs", (INT32, 2**31, 2**24, 10**30)),
        ("kvcache_block_size", (2**30, 2**40, 2**63)),
        ("num_kvcache_blocks", (2**24, INT32, 2**62)),
        ("kv_cache_memory_bytes", (1, 2**50, 2**63 - 1, 2**70)),
    ],
)
def test_what_no_memory_holds_is_refused_before_anything_is_allocated(shallow_dir, name, values):
    for value in values:
        with pytest.raises(ArgumentError, match=name if value > 1 else "no room for the KV cache"):
            LLM(str(shallow_dir), device="cpu", **{"max_model_len": 1024, name: value})


def test_engines_with_constructor_parameters_at_the_ends_of_numbers_run(shallow_dir, alone):
    for settings in (
        {"max_num_seqs": 1, "watermark": 1e308},
        {"max_num_seqs": 2, "watermark": 1e308, "max_num_batched_tokens": 2**62},
        {"max_num_seqs": 4096, "max_num_batched_tokens": 2**31, "seed": -(2**63)},
        {"max_model_len": 2**64, "watermark": 5e-324, "seed": 2**63 - 1},
        {"gpu_memory_utilization": 5e-324, "max_logprobs": 10**30},
        {"max_num_batched_tokens": 1, "enable_chunked_prefill": True, "watermark": 2**53},
    ):
        llm = tiny_engine(shallow_dir, **settings)
        assert generate(llm, PROMPTS * 2, NEIGHBOURS * 2) == alone * 2, settings
        logprobs = SamplingParams(0, 2, logprobs=settings.get("max_logprobs", 1) % 384)
        assert len(generate(llm, PROMPTS, logprobs)) == 2
        llm.exit()
