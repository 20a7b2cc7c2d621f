"""Default sampling parameters and end ids from generation_config.json."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovllm import ArgumentError, SamplingParams
from nanovllm.inputs.generation_config import default_sampling_params, eos_token_ids

QWEN3 = Path(__file__).resolve().parents[3] / "shared" / "qwen3-0.6b"


def write(directory: Path, content: object) -> str:
    directory.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "generation_config.json").write_text(text)
    return str(directory)


def test_a_missing_file_leaves_the_defaults(tmp_path):
    assert default_sampling_params(str(tmp_path)) == SamplingParams()


@pytest.mark.skipif(
    not QWEN3.is_dir(), reason="needs the files of Qwen3-0.6B beside the repository"
)
def test_qwen3():
    expected = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert default_sampling_params(str(QWEN3)) == expected
    assert default_sampling_params(str(QWEN3), "vllm") == SamplingParams()
    assert eos_token_ids(str(QWEN3), SimpleNamespace(eos_token_id=151645)) == {151643, 151645}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 5},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 5},
        ),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, {"min_p": 0.1, "repetition_penalty": 1.1}),
        ({"max_new_tokens": 2048}, {"max_tokens": 2048}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"temperature": None, "top_k": None, "do_sample": None}, {}),
        ({"do_sample": True, "temperature": 0.3}, {"temperature": 0.3}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"temperature": 0}),
        ({"max_length": 20, "pad_token_id": 0, "typical_p": 0.5, "eos_token_id": [1]}, {}),
    ],
)
def test_keys_of_the_file(tmp_path, content, expected):
    params = default_sampling_params(write(tmp_path, content))
    assert params == SamplingParams(**expected)


def test_each_call_gives_a_new_object(tmp_path):
    model_dir = write(tmp_path, {"top_k": 5})
    params = default_sampling_params(model_dir)
    params.stop.append("x")
    params.top_k = 6
    assert default_sampling_params(model_dir) == SamplingParams(top_k=5)


def test_another_directory_is_read_instead(tmp_path):
    model_dir = write(tmp_path / "model", {"temperature": 0.5, "eos_token_id": 1})
    other = write(tmp_path / "other", {"top_k": 7, "eos_token_id": 2})
    assert default_sampling_params(model_dir, other) == SamplingParams(top_k=7)
    assert default_sampling_params(model_dir, Path(other)) == SamplingParams(top_k=7)
    assert eos_token_ids(model_dir, None, other) == {2}
    assert eos_token_ids(model_dir, None, "vllm") == {1}


@pytest.mark.parametrize("generation_config", ["nowhere", "", None, 5, "none"])
def test_a_directory_without_the_file_is_refused(tmp_path, generation_config):
    with pytest.raises(
        ArgumentError, match=r'generation_config must be "auto", "vllm" or'
    ) as raised:
        default_sampling_params(write(tmp_path, {}), generation_config)
    assert str(raised.value).endswith(f"got {generation_config!r}")


def test_the_override_wins(tmp_path):
    model_dir = write(tmp_path, {"temperature": 0.6, "top_k": 20})
    override = {"temperature": 0.9, "max_new_tokens": 5, "top_p": None}
    expected = SamplingParams(temperature=0.9, top_k=20, max_tokens=5)
    assert default_sampling_params(model_dir, override=override) == expected
    assert default_sampling_params(model_dir, "vllm", {"top_k": 3}) == SamplingParams(top_k=3)
    greedy = default_sampling_params(model_dir, override={"do_sample": False})
    assert greedy == SamplingParams(temperature=0)
    greedy_dir = write(tmp_path, {"do_sample": False})
    assert default_sampling_params(greedy_dir, override={"temperature": 0.9}).temperature == 0.9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"top_p": 3}, r"top_p must be in \(0, 1\], got 3"),
        ({"temperature": "hot"}, "temperature must be finite and >= 0, got 'hot'"),
        ({"max_new_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"do_sample": "no"}, "do_sample must be True or False, got 'no'"),
    ],
)
def test_wrong_values_are_refused_with_their_source(tmp_path, content, message):
    model_dir = write(tmp_path, content)
    with pytest.raises(ArgumentError, match=rf"generation_config\.json: {message}"):
        default_sampling_params(model_dir)
    with pytest.raises(ArgumentError, match=f"^override_generation_config: {message}"):
        default_sampling_params(model_dir, "vllm", content)
    assert default_sampling_params(model_dir, "vllm") == SamplingParams()


@pytest.mark.parametrize("override", [{"max_tokens": 5}, {"top_p": 0.5, 3: 4}, "x", [], 5])
def test_a_wrong_override_is_refused(tmp_path, override):
    with pytest.raises(ArgumentError, match="override_generation_config must be a dict") as raised:
        default_sampling_params(str(tmp_path), override=override)
    assert str(raised.value).endswith(f"got {override!r}")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "5", "null"])
def test_a_damaged_file_is_named(tmp_path, text):
    model_dir = write(tmp_path, text)
    for read in (default_sampling_params, lambda path: eos_token_ids(path, None)):
        with pytest.raises(ArgumentError, match=r"cannot read .*generation_config\.json: "):
            read(model_dir)


@pytest.mark.parametrize(
    ("listed", "own", "fallback", "expected"),
    [
        ([2, 0], 2, None, {0, 2}),
        (0, 2, 9, {0, 2}),
        (None, 2, 9, {2}),
        (5, None, 9, {5}),
        (None, None, 9, {9}),
        (None, None, [8, 9], {8, 9}),
        (None, None, None, set()),
        ([], None, 0, {0}),
    ],
)
def test_ids_that_end_are_united(tmp_path, listed, own, fallback, expected):
    model_dir = write(tmp_path, {"eos_token_id": listed})
    tokenizer = SimpleNamespace(eos_token_id=own)
    assert eos_token_ids(model_dir, tokenizer, fallback=fallback) == expected
    if own is None:
        assert eos_token_ids(model_dir, None, fallback=fallback) == expected


@pytest.mark.parametrize("listed", ["x", [1, "2"], 1.0, True, {"a": 1}])
def test_ids_that_are_no_integers_are_refused(tmp_path, listed):
    with pytest.raises(ArgumentError, match=r"generation_config\.json: eos_token_id must be integ"):
        eos_token_ids(write(tmp_path, {"eos_token_id": listed}), None)
