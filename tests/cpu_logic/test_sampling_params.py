"""Ranges and types of SamplingParams."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from nanovllm import ArgumentError, SamplingParams


def test_defaults():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (1.0, 64, False)


def test_positional_order_is_temperature_max_tokens_ignore_eos():
    assert SamplingParams(0.6, 256, True) == SamplingParams(
        temperature=0.6, max_tokens=256, ignore_eos=True
    )


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (0, 0.0),
        (-0.0, 0.0),
        (1e-10, 0.0),
        (9.9e-6, 0.0),
        (1e-5, 1e-5),
        (0.01, 0.01),
        (2, 2.0),
        (100.0, 100.0),
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        (Fraction(1, 4), 0.25),
    ],
)
def test_temperature_is_a_float_and_greedy_below_the_threshold(temperature, expected):
    params = SamplingParams(temperature=temperature)
    assert params.temperature == expected
    assert type(params.temperature) is float
    assert str(params.temperature) != "-0.0"


@pytest.mark.parametrize(
    "temperature",
    [-1.0, -1e-9, float("nan"), float("inf"), -float("inf"), "1", None, True, [1.0], 1j],
)
def test_wrong_temperature_is_refused_and_named(temperature):
    with pytest.raises(ArgumentError, match="temperature must be") as raised:
        SamplingParams(temperature=temperature)
    assert str(raised.value).endswith(f"got {temperature!r}")


@pytest.mark.parametrize("max_tokens", [1, 10**9, np.int32(7), np.int64(7)])
def test_integers_of_any_kind_are_accepted_as_max_tokens(max_tokens):
    params = SamplingParams(max_tokens=max_tokens)
    assert params.max_tokens == max_tokens
    assert type(params.max_tokens) is int


def test_max_tokens_may_be_left_to_the_model():
    assert SamplingParams(max_tokens=None).max_tokens is None


@pytest.mark.parametrize("max_tokens", [0, -1, 1.0, 2.5, "3", True, np.bool_(True), [1]])
def test_wrong_max_tokens_is_refused_and_named(max_tokens):
    with pytest.raises(ArgumentError, match=r"max_tokens must be .*>= 1, got ") as raised:
        SamplingParams(max_tokens=max_tokens)
    assert str(raised.value).endswith(f"got {max_tokens!r}")


@pytest.mark.parametrize("ignore_eos", [0, 1, None, "yes"])
def test_ignore_eos_must_be_a_bool(ignore_eos):
    with pytest.raises(ArgumentError, match="ignore_eos must be True or False, got"):
        SamplingParams(ignore_eos=ignore_eos)


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


def test_temperature_beyond_float32_is_refused():
    SamplingParams(temperature=3e38)
    with pytest.raises(ValueError, match="temperature must be finite and >= 0, got 1e"):
        SamplingParams(temperature=1e39)
