"""What counts as a prompt, and what is refused before anything is queued."""

import numpy as np
import pytest
import torch

from nanovllm import ArgumentError, SamplingParams
from nanovllm.engine.prompts import as_params_list, as_prompt_list, check_params, encode_prompt

VOCAB_SIZE = 100


class ByteTokenizer:
    """One id for each byte, as far as they fit the vocabulary."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def encode(prompt):
    return encode_prompt(prompt, ByteTokenizer(), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("Hello", ["Hello"]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ({"prompt_token_ids": [1]}, [{"prompt_token_ids": [1]}]),
        ([], []),
        ((), []),
        (["a", "b"], ["a", "b"]),
        (("a", [1], {"prompt": "b"}), ["a", [1], {"prompt": "b"}]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[]], [[]]),
        ((p for p in ["a", "b"]), ["a", "b"]),
    ],
)
def test_one_prompt_or_several(prompts, expected):
    assert as_prompt_list(prompts) == expected


@pytest.mark.parametrize("prompts", [None, 5, 1.5, object()])
def test_prompts_of_another_type_are_refused(prompts):
    with pytest.raises(ArgumentError, match="prompts must be a list of prompts, got"):
        as_prompt_list(prompts)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("! #", [33, 32, 35]),
        ([5, 6], [5, 6]),
        ((0, 99), [0, 99]),
        (np.array([5, 6], dtype=np.int32), [5, 6]),
        ([np.int64(5), 6], [5, 6]),
        ({"prompt": "!"}, [33]),
        ({"prompt_token_ids": [5]}, [5]),
        ({"prompt_token_ids": [5], "prompt": "!"}, [5]),
        ({"prompt_token_ids": None, "prompt": "!"}, [33]),
    ],
)
def test_prompt_becomes_a_list_of_plain_ints(prompt, expected):
    token_ids = encode(prompt)
    assert token_ids == expected
    assert {type(token) for token in token_ids} == {int}


def test_token_ids_are_copied():
    prompt = [1, 2]
    token_ids = encode(prompt)
    prompt.append(3)
    assert token_ids == [1, 2]


@pytest.mark.parametrize(
    "prompt", ["", [], (), {"prompt": ""}, {"prompt_token_ids": []}, np.array([], dtype=int)]
)
def test_empty_prompt_is_refused(prompt):
    with pytest.raises(ArgumentError, match="Prompt cannot be empty"):
        encode(prompt)


@pytest.mark.parametrize(
    ("prompt", "bad"), [([1, 100], 100), ([-1, 5], -1), ([5, 999999, -3], 999999), (" \x7f", 127)]
)
def test_first_id_outside_the_vocabulary_is_named(prompt, bad):
    with pytest.raises(ArgumentError, match=rf"token id {bad} is out of the vocabulary: 0 to 99"):
        encode(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "a prompt must be a string or a list of token ids, got 5"),
        (None, "a prompt must be a string or a list of token ids, got None"),
        ([1, 2.0], "token ids must be integers, got 2.0"),
        ([1, "2"], "token ids must be integers, got '2'"),
        ([True], "token ids must be integers, got True"),
        ([[1, 2]], r"token ids must be integers, got \[1, 2\]"),
        ({}, "needs 'prompt' or 'prompt_token_ids'"),
        ({"prompt": None}, "needs 'prompt' or 'prompt_token_ids'"),
        ({"text": "a"}, "needs 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "a", "multi_modal_data": {}}, "unsupported keys: multi_modal_data"),
        ({"prompt_token_ids": 5}, "a prompt must be a string or a list of token ids, got 5"),
    ],
)
def test_prompt_of_another_form_is_refused(prompt, message):
    with pytest.raises(ArgumentError, match=message):
        encode(prompt)


def test_one_set_of_params_serves_all_prompts():
    params = SamplingParams(max_tokens=3)
    assert as_params_list(params, 3) == [params] * 3
    assert as_params_list(None, 2) == [SamplingParams()] * 2
    assert as_params_list(params, 0) == []


@pytest.mark.parametrize("kind", [list, tuple])
def test_params_may_come_one_for_each_prompt(kind):
    params = [SamplingParams(max_tokens=n) for n in (1, 2, 3)]
    assert as_params_list(kind(params), 3) == params
    assert as_params_list(kind(), 0) == []


@pytest.mark.parametrize(("num_prompts", "num_params"), [(4, 3), (3, 4), (0, 1), (1, 0)])
def test_lengths_must_agree(num_prompts, num_params):
    message = (
        rf"The lengths of prompts \({num_prompts}\) and params \({num_params}\) must be the same\."
    )
    with pytest.raises(ArgumentError, match=message):
        as_params_list([SamplingParams()] * num_params, num_prompts)


@pytest.mark.parametrize("params", [0.5, "greedy", {"temperature": 0}, {SamplingParams}])
def test_params_of_another_type_are_refused(params):
    with pytest.raises(ArgumentError, match="sampling_params must be a SamplingParams"):
        as_params_list(params, 1)


@pytest.mark.parametrize("params", [None, 0.5, [SamplingParams()]])
def test_element_that_is_no_params_is_refused(params):
    with pytest.raises(ArgumentError, match="sampling_params must be a SamplingParams, got"):
        check_params(params)


def test_params_are_copied_and_checked_again():
    params = SamplingParams(max_tokens=3)
    copy = check_params(params)
    params.max_tokens = 0
    assert copy == SamplingParams(max_tokens=3)
    with pytest.raises(ArgumentError, match="max_tokens must be >= 1, got 0"):
        check_params(params)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ArgumentError, match="not valid Unicode"):
        encode("a lone surrogate \ud800")


def test_arrays_and_tensors_are_lists_of_ids():
    assert as_prompt_list(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert as_prompt_list(torch.tensor([1, 2])) == [[1, 2]]
    assert encode(torch.tensor([1, 2])) == encode(np.array([1, 2])) == [1, 2]
    with pytest.raises(ArgumentError, match="list of prompts"):
        as_prompt_list(torch.tensor(1))
