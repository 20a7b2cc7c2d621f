"""Ranges and types of SamplingParams."""

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest

from nanovllm import ArgumentError, PoolingParams, SamplingParams, StructuredOutputsParams
from nanovllm.compat import (
    POOLING_NAMES,
    POOLING_OFF,
    SAMPLING_HINTS,
    SAMPLING_NAMES,
    SAMPLING_OFF,
    STRUCTURED_OFF,
)
from nanovllm.errors import nearest, shown
from nanovllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

CHOICE = StructuredOutputsParams(choice=["yes", "no"])
# Every parameter at once.
FULL = {
    "temperature": 0.7,
    "max_tokens": 9,
    "ignore_eos": True,
    "n": 2,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "stop": ["a", "b"],
    "stop_token_ids": [4, 5],
    "include_stop_str_in_output": True,
    "min_tokens": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {3: 1.5},
    "allowed_token_ids": [3, 4],
    "bad_words": ["bad"],
    "logprobs": 2,
    "prompt_logprobs": 0,
    "logprob_token_ids": [7, 8],
    "flat_logprobs": True,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": False,
    "structured_outputs": CHOICE,
    "logits_processors": [max],
    "extra_args": {"own": 1},
    "thinking_token_budget": 5,
    "repetition_detection": RepetitionDetectionParams(2, 1, 3),
    "output_kind": RequestOutputKind.DELTA,
    "skip_reading_prefix_cache": True,
    "truncate_prompt_tokens": 7,
}


def test_positional_order_is_temperature_max_tokens_ignore_eos():
    assert SamplingParams(0.6, 256, True) == SamplingParams(
        temperature=0.6, max_tokens=256, ignore_eos=True
    )


@pytest.mark.parametrize("caught", [ValueError, AssertionError])
def test_errors_are_caught_as_either_kind(caught):
    with pytest.raises(caught):
        SamplingParams(max_tokens=0)


def test_checks_survive_optimised_python():
    code = "from nanovllm import SamplingParams; SamplingParams(max_tokens=0)"
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "ArgumentError: max_tokens must be >= 1, got 0" in result.stderr


def test_importing_sampling_params_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from nanovllm import ArgumentError, EngineDeadError, SamplingParams;"
        "SamplingParams(); print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_package_refuses_unknown_attributes():
    import nanovllm

    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = nanovllm.LMM


def test_defaults_are_those_of_vllm_but_for_max_tokens_and_special_tokens():
    values = {
        name: value for name, value in vars(SamplingParams()).items() if name not in ("n", "seed")
    }
    assert values == {
        "temperature": 1.0,
        "max_tokens": 64,
        "ignore_eos": False,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "stop": [],
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
        "min_tokens": 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "logprobs": None,
        "prompt_logprobs": None,
        "flat_logprobs": False,
        "detokenize": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": True,
        "structured_outputs": None,
        "logprob_token_ids": None,
        "logits_processors": None,
        "extra_args": None,
        "thinking_token_budget": None,
        "repetition_detection": None,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "skip_reading_prefix_cache": None,
        "truncate_prompt_tokens": None,
    }
    assert (SamplingParams().n, SamplingParams().seed) == (1, None)
    assert not SamplingParams().needs_logits


def test_all_parameters_are_kept_and_survive_copies():
    params = SamplingParams(**FULL)
    assert vars(params) == FULL
    for twin in (
        pickle.loads(pickle.dumps(params)),
        copy.deepcopy(params),
        params.clone(),
        replace(params),
    ):
        assert twin == params and repr(twin) == repr(params)
        assert twin != replace(params, top_k=6)
    assert pickle.loads(pickle.dumps(SamplingParams())) == SamplingParams()
    assert replace(SamplingParams()) == SamplingParams()


@pytest.mark.parametrize("how", [SamplingParams.clone, replace, copy.deepcopy])
def test_copies_share_nothing_that_can_change(how):
    params = SamplingParams(**FULL)
    twin = how(params)
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
        getattr(params, name).append(getattr(params, name)[0])
    params.logit_bias[7] = 1.0
    assert vars(twin) == FULL


def test_what_the_caller_passed_is_copied():
    stop, allowed, bias = ["x"], [1], {1: 2.0}
    params = SamplingParams(stop=stop, allowed_token_ids=allowed, logit_bias=bias)
    for given in (stop, allowed, bias):
        given.clear()
    assert (params.stop, params.allowed_token_ids, params.logit_bias) == (["x"], [1], {1: 2.0})


def test_a_later_wrong_value_is_found_by_the_next_copy():
    params = SamplingParams()
    params.stop_token_ids.append(-3)
    with pytest.raises(ArgumentError, match="stop_token_ids: a token id must be >= 0, got -3"):
        replace(params)


def test_only_the_first_three_are_positional():
    with pytest.raises(TypeError):
        SamplingParams(1.0, 64, False, 2)


@pytest.mark.parametrize("name", ["best_of", "use_beam_search"])
def test_unknown_parameters_are_named(name):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})


@pytest.mark.parametrize("name", sorted(SAMPLING_NAMES))
def test_another_librarys_name_is_translated(name):
    message = f"SamplingParams() got an unexpected keyword argument {name!r}; the nearest known is "
    with pytest.raises(TypeError) as raised:
        SamplingParams(**{name: 1})
    assert str(raised.value) == message + repr(SAMPLING_NAMES[name])
    assert SAMPLING_NAMES[name] in FULL and name not in FULL


@pytest.mark.parametrize("name", sorted(SAMPLING_HINTS))
def test_what_other_libraries_have_and_this_one_does_not_is_said(name):
    with pytest.raises(TypeError) as raised:
        SamplingParams(**{name: 7})
    assert str(raised.value).endswith(f"argument {name!r}: {SAMPLING_HINTS[name]}")
    assert name not in FULL


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("topk", "top_k"),
        ("topK", "top_k"),
        ("topP", "top_p"),
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("top-p", "top_p"),
        ("temperatrue", "temperature"),
        ("Temperature", "temperature"),
        ("stops", "stop"),
    ],
)
def test_a_slip_of_the_pen_is_corrected(typed, meant):
    with pytest.raises(TypeError, match=f"{typed!r}; the nearest known is {meant!r}$"):
        SamplingParams(**{typed: 1})


@pytest.mark.parametrize("name", ["foo", "x", "", "model", "hf_config", "_", "é" * 1000])
def test_nothing_is_guessed_where_nothing_is_near(name):
    with pytest.raises(TypeError, match="; help.nanovllm.SamplingParams. names") as raised:
        SamplingParams(**{name: 1})
    assert len(str(raised.value)) < 400


def test_vllms_other_parameters_are_taken_with_the_values_that_change_nothing():
    for name, values in SAMPLING_OFF.items():
        for value in values:
            assert SamplingParams(0.5, top_k=3, **{name: value}) == SamplingParams(0.5, top_k=3)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=np.array([1, 2]))
    with pytest.raises(TypeError, match="top_j"):
        SamplingParams(best_of=None, top_j=2)


def test_other_values_of_vllms_parameters_are_refused_by_name():
    for name in SAMPLING_OFF:
        with pytest.raises(TypeError, match=rf"unexpected keyword argument {name!r}: "):
            SamplingParams(**{name: 5})
    for name in POOLING_OFF.keys() - POOLING_NAMES.keys():
        with pytest.raises(TypeError, match=f"unexpected keyword argument {name!r}"):
            PoolingParams(**{name: 5})
    for name in STRUCTURED_OFF:
        with pytest.raises(TypeError, match=f"unexpected keyword argument {name!r}: "):
            StructuredOutputsParams(regex="a", **{name: 5})


def test_the_other_classes_take_vllms_values_that_change_nothing():
    for name, values in POOLING_OFF.items():
        assert all(PoolingParams(**{name: value}) == PoolingParams() for value in values)
    for name, values in STRUCTURED_OFF.items():
        for value in values:
            params = StructuredOutputsParams(regex="a", **{name: value})
            assert params == StructuredOutputsParams(regex="a")


def test_from_optional_takes_none_for_the_default():
    assert SamplingParams.from_optional() == SamplingParams()
    made = SamplingParams.from_optional(temperature=None, top_p=0.5, n=None, max_tokens=None)
    assert made == SamplingParams(top_p=0.5, max_tokens=None)


def test_explaining_errors_changes_neither_the_signature_nor_errors_of_values():
    names = list(inspect.signature(SamplingParams).parameters)
    assert names == [field.name for field in fields(SamplingParams)] == list(FULL)
    with pytest.raises(ArgumentError, match="top_k must be"):
        SamplingParams(top_k="a", best_of=None)
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(1.0, 64, False, 2, best_of=None)


def test_other_parameter_classes_translate_names_too():
    with pytest.raises(TypeError, match="'normalize'; the nearest known is 'use_activation'"):
        PoolingParams(normalize=True)
    with pytest.raises(TypeError, match="'json_schema'; the nearest known is 'json'"):
        StructuredOutputsParams(json_schema={})


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc80b"])
def test_half_a_surrogate_pair_is_refused_wherever_text_is_given(text):
    for make in (
        lambda: SamplingParams(stop=text),
        lambda: SamplingParams(stop=["a", text]),
        lambda: SamplingParams(bad_words=[text]),
        lambda: StructuredOutputsParams(choice=["yes", text]),
        lambda: StructuredOutputsParams(regex=text),
        lambda: StructuredOutputsParams(grammar=text),
        lambda: StructuredOutputsParams(json=f'{{"const": "{text}"}}'),
        lambda: StructuredOutputsParams(json={"const": text}),
    ):
        with pytest.raises(ArgumentError, match="is not valid Unicode"):
            make()


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no repr")


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        b"x" * 10**6,
        list(range(10**5)),
        {"a": "b" * 10**6},
        nested(10**5),
        10**5000,
        -(10**5000),
        Unspeakable(),
        [Unspeakable()],
        "\ud800" * 1000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_messages_quote_200_characters_of_a_value_at_most(value):
    assert len(shown(value)) <= 200
    for field in fields(SamplingParams):
        if isinstance(value, (list, str)) and field.name in ("stop", "bad_words"):
            continue
        clamped = ("max_tokens", "top_k", "min_tokens", "truncate_prompt_tokens")
        if type(value) is int and value > 0 and field.name in clamped:
            continue
        try:
            SamplingParams(**{field.name: value})
        except ArgumentError as error:
            assert len(str(error)) <= 400
        else:
            # The list of integers, and the dict, which may hold anything.
            assert field.name in ("stop_token_ids", "allowed_token_ids", "extra_args")


def test_a_short_value_is_quoted_as_it_is():
    assert (shown("it's"), shown(None), shown(2**64)) == ('"it\'s"', "None", str(2**64))
    assert shown("x" * 198) == repr("x" * 198)
    assert shown("x" * 199) == "'" + "x" * 196 + "..."


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("kitten", "sitten"),
        ("ab", "ba"),
        ("abcd", "abc"),
        ("abcd", "abxcdy"),
        ("", None),
        ("a", None),
        ("abc", None),
        ("abcdefgh", None),
        ("ktitne", "kitten"),
    ],
)
def test_the_nearest_name_is_at_most_two_letters_away(typed, expected):
    known = [] if expected is None else [expected]
    assert nearest(typed, ["entirely", "different", *known]) == expected


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("temperature", 0, 0.0),
        ("temperature", -0.0, 0.0),
        ("temperature", 9.9e-6, 0.0),
        ("temperature", 1e-5, 1e-5),
        ("temperature", 2, 2.0),
        ("temperature", 3e38, 3e38),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.int64(1), 1.0),
        ("temperature", Fraction(1, 4), 0.25),
        ("max_tokens", 10**9, 10**9),
        ("max_tokens", np.int32(7), 7),
        ("max_tokens", None, None),
        ("n", np.int32(3), 3),
        ("n", 16384, 16384),
        ("top_p", 1, 1.0),
        ("top_p", np.float32(0.5), 0.5),
        ("top_p", 1e-3, 1e-3),
        ("top_k", -1, 0),
        ("top_k", 0, 0),
        ("top_k", np.int64(40), 40),
        ("min_p", 1, 1.0),
        ("seed", -1, None),
        ("seed", None, None),
        ("seed", 0, 0),
        ("seed", -(2**63), -(2**63)),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("stop", "\n\n", ["\n\n"]),
        ("stop", ("a", "b"), ["a", "b"]),
        ("stop", [], []),
        ("stop", None, []),
        ("stop_token_ids", (7,), [7]),
        ("stop_token_ids", {7}, [7]),
        ("stop_token_ids", np.array([7, 8]), [7, 8]),
        ("stop_token_ids", [np.int32(7), 8], [7, 8]),
        ("stop_token_ids", None, []),
        ("min_tokens", 64, 64),
        ("presence_penalty", 2, 2.0),
        ("presence_penalty", -2, -2.0),
        ("frequency_penalty", np.float64(0.25), 0.25),
        ("repetition_penalty", 0.01, 0.01),
        ("repetition_penalty", 5, 5.0),
        ("logit_bias", {"42": 1, 7: -1}, {42: 1.0, 7: -1.0}),
        (
            "logit_bias",
            {1: 1000, 2: -1000.5, np.int64(3): np.float32(0.5)},
            {1: 100.0, 2: -100.0, 3: 0.5},
        ),
        ("logit_bias", {}, None),
        ("logit_bias", None, None),
        ("allowed_token_ids", range(2), [0, 1]),
        ("bad_words", ["x y"], ["x y"]),
        ("bad_words", None, []),
        ("logprobs", 0, 0),
        ("logprobs", -1, -1),
        ("logprobs", np.int64(20), 20),
        ("prompt_logprobs", 5, 5),
        ("prompt_logprobs", -1, -1),
        ("skip_reading_prefix_cache", False, False),
        ("truncate_prompt_tokens", np.int64(-1), -1),
        ("truncate_prompt_tokens", 2**40, 2**31 - 1),
    ],
)
def test_values_are_kept_as_plain_python(name, given, kept):
    value = getattr(SamplingParams(**{name: given}), name)
    assert repr(value) == repr(kept)  # so -0.0 is not 0.0, and 1 is not 1.0
    json.dumps(value)  # refuses what is not plain, such as numpy's numbers


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "limit", "wrong"),
    [
        (
            "temperature",
            "finite and >= 0",
            [-1e-9, NAN, INF, -INF, 1e39, "1", None, True, [1.0], 1j],
        ),
        ("max_tokens", ">= 1", [0, -1, 1.0, 2.5, "3", True, np.bool_(True), [1]]),
        ("ignore_eos", "True or False", [0, 1, None, "yes"]),
        ("n", "between 1 and 16384", [0, -1, 16385, 1.0, "2", True, None]),
        ("top_p", "in (0, 1]", [0, -0.1, 1.001, NAN, INF, "0.9", True, None]),
        ("top_k", ">= -1", [-2, 1.5, 20.0, "5", True, None]),
        ("min_p", "in [0, 1]", [-0.01, 1.01, NAN, -INF, "0", False, None]),
        ("seed", f"between {-(2**63)} and {2**64 - 1}", [2**64, -(2**63) - 1, 1.0, "1", True]),
        ("min_tokens", ">= 0", [-1, 1.0, "1", True, None]),
        ("presence_penalty", "in [-2, 2]", [2.01, -2.01, NAN, INF, "1", True, None]),
        ("frequency_penalty", "in [-2, 2]", [2.01, -2.01, NAN, INF, "1", True, None]),
        ("repetition_penalty", "finite and > 0", [0, -1, 1e-50, NAN, INF, 1e39, "1", True, None]),
        ("logprobs", ">= -1", [-2, 1.0, "5", True, False]),
        ("prompt_logprobs", ">= -1", [-2, 1.0, "5", True, False]),
        ("include_stop_str_in_output", "True or False", [0, None, "yes"]),
        ("flat_logprobs", "True or False", [1, None]),
        ("detokenize", "True or False", [1, None]),
        ("skip_special_tokens", "True or False", [1, None]),
        ("spaces_between_special_tokens", "True or False", [1, None]),
        ("skip_reading_prefix_cache", "True or False", [1, "no"]),
        ("truncate_prompt_tokens", ">= 1", [0, -2, 1.0, "5", True]),
        ("structured_outputs", "a StructuredOutputsParams", [{"choice": ["a"]}, "json", False]),
    ],
)
def test_wrong_scalars_are_refused_with_value_and_limit(name, limit, wrong):
    for value in wrong:
        with pytest.raises(ArgumentError) as raised:
            SamplingParams(**{name: value})
        message = str(raised.value)
        assert message.startswith(f"{name} must be ") and f"{limit}, got " in message
        assert message.endswith(repr(value))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("stop", "", "stop must hold strings that are not empty, got ''"),
        ("stop", ["a", ""], "stop must hold strings that are not empty, got ''"),
        ("stop", [1], "stop must hold strings that are not empty, got 1"),
        ("stop", b"a", "stop must be a list of strings, got b'a'"),
        ("stop", 5, "stop must be a list of strings, got 5"),
        ("bad_words", [""], "bad_words must hold strings that are not empty, got ''"),
        ("bad_words", 1.5, "bad_words must be a list of strings, got 1.5"),
        ("stop_token_ids", [3, -1], "stop_token_ids: a token id must be >= 0, got -1"),
        ("stop_token_ids", [1.0], "stop_token_ids: a token id must be an integer >= 0, got 1.0"),
        ("stop_token_ids", [True], "stop_token_ids: a token id must be an integer >= 0, got True"),
        ("stop_token_ids", 5, "stop_token_ids must be a list of token ids, got 5"),
        ("stop_token_ids", "57", "stop_token_ids must be a list of token ids, got '57'"),
        ("stop_token_ids", np.array(5), "stop_token_ids must be a list of token ids, got array(5)"),
        (
            "allowed_token_ids",
            [],
            "allowed_token_ids must hold at least one token id, got none; None allows all",
        ),
        ("allowed_token_ids", [-1], "allowed_token_ids: a token id must be >= 0, got -1"),
        ("logit_bias", [1], "logit_bias must be a dict of token ids and biases, got [1]"),
        ("logit_bias", {-1: 0.5}, "logit_bias: a token id must be >= 0, got -1"),
        ("logit_bias", {"x": 0.5}, "logit_bias: a token id must be an integer >= 0, got 'x'"),
        ("logit_bias", {"²": 0.5}, "logit_bias: a token id must be an integer >= 0, got '²'"),
        ("logit_bias", {3: NAN}, "logit_bias[3] must be finite, got nan"),
        ("logit_bias", {3: -INF}, "logit_bias[3] must be finite, got -inf"),
        ("logit_bias", {3: "1"}, "logit_bias[3] must be finite, got '1'"),
    ],
)
def test_wrong_lists_are_refused_with_the_item(name, wrong, message):
    with pytest.raises(ArgumentError) as raised:
        SamplingParams(**{name: wrong})
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0, "n": 2}, "n must be 1 if greedy (temperature 0), got 2"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens must be <= max_tokens (4), got 5"),
        (
            {"stop": "x", "detokenize": False},
            "stop needs detokenize=True, got stop=['x'] without",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ArgumentError) as raised:
        SamplingParams(**values)
    assert str(raised.value) == message


def test_values_that_only_seem_to_contradict_each_other():
    SamplingParams(max_tokens=5, min_tokens=5)
    SamplingParams(max_tokens=None, min_tokens=10**6)
    SamplingParams(stop=[], detokenize=False)


@pytest.mark.parametrize("temperature", [0, 9e-6])
def test_greedy_resets_the_filters(temperature):
    params = SamplingParams(temperature, top_p=0.5, top_k=20, min_p=0.5)
    assert params == SamplingParams(temperature=0)
    assert not params.needs_logits


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 0.99},
        {"top_k": 1},
        {"min_p": 0.01},
        {"min_tokens": 1},
        {"presence_penalty": -0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 0.9},
        {"logit_bias": {0: 0.0}},
        {"allowed_token_ids": [0]},
        {"bad_words": ["x"]},
        {"logprobs": 0},
        {"structured_outputs": CHOICE},
    ],
)
def test_what_needs_logits(values):
    assert SamplingParams(**values).needs_logits is True
    if not {"top_p", "top_k", "min_p"} & values.keys():
        assert SamplingParams(temperature=0, **values).needs_logits is True


def test_what_is_not_sampled_apart():
    params = SamplingParams(
        0.6,
        None,
        True,
        n=4,
        top_p=1,
        top_k=-1,
        seed=5,
        stop="x",
        stop_token_ids=[5],
        prompt_logprobs=3,
        logit_bias={},
        skip_special_tokens=True,
        skip_reading_prefix_cache=True,
    )
    assert params.needs_logits is False


class Schema:
    @classmethod
    def model_json_schema(cls) -> dict:
        return {"type": "object"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"json": {"type": "object", "title": "é"}}, '{"type": "object", "title": "é"}'),
        ({"json": '{"type":"integer"}'}, '{"type":"integer"}'),
        ({"json": Schema}, '{"type": "object"}'),
        ({"regex": "[ab]+"}, "[ab]+"),
        ({"choice": ["yes", "no"]}, ("yes", "no")),
        ({"grammar": 'root ::= "a"'}, 'root ::= "a"'),
        ({"json_object": True}, True),
        ({"json_object": False, "regex": "a"}, "a"),
        (
            {"json_object": True, "disable_any_whitespace": True},
            '{"type": "object", "x-guidance": {"whitespace_flexible": false}}',
        ),
        (
            {"json": {"x-guidance": {}, "title": "é"}, "disable_any_whitespace": True},
            '{"x-guidance": {}, "title": "é"}',
        ),
        ({"regex": "a +", "disable_any_whitespace": True}, "a +"),
    ],
)
def test_structured_outputs_are_kept_immutable(given, kept):
    params = StructuredOutputsParams(**given)
    assert kept in vars(params).values()
    twin = pickle.loads(pickle.dumps(params))
    assert twin == params and hash(twin) == hash(params)
    assert copy.deepcopy(params) == replace(params) == params
    with pytest.raises(AttributeError):
        params.regex = "x"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "need exactly one of json, .*, got none"),
        ({"json_object": False}, "got none"),
        ({"regex": "a", "json_object": True}, "got regex and json_object"),
        ({"json": {}, "choice": ["a"]}, "got json and choice"),
        ({"structural_tag": "{}"}, "structural_tag is an option of vLLM that nanovllm does not"),
        ({"json": "{"}, "json is not a valid JSON schema: .*, got '{'"),
        ({"json": {"a": object}}, "json is not a valid JSON schema"),
        ({"json": "[1]"}, r"json must hold a JSON object or a boolean, got '\[1\]'"),
        ({"json": 5}, "json must be a JSON schema: .*, got 5"),
        ({"json": int}, "json must be a JSON schema: .*, got <class 'int'>"),
        ({"regex": ""}, "regex must be a string that is not empty, got ''"),
        ({"grammar": 1}, "grammar must be a string that is not empty, got 1"),
        ({"choice": []}, "choice must hold at least one string, got none"),
        ({"choice": ["a", ""]}, "choice must hold strings that are not empty, got ''"),
        ({"choice": [1]}, "choice must hold strings that are not empty, got 1"),
        (
            {"regex": "a", "disable_any_whitespace": 1},
            "disable_any_whitespace must be True or False, got 1",
        ),
        ({"json_object": 1}, "json_object must be True or False, got 1"),
    ],
)
def test_wrong_structured_outputs_are_refused(given, message):
    with pytest.raises(ArgumentError, match=message):
        StructuredOutputsParams(**given)
