"""What counts as a prompt, and what is refused before anything is queued."""

from enum import IntEnum
from numbers import Integral

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE as VOCAB_SIZE_OF_MODEL
from tiny_models import save_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from nanovllm import ArgumentError, SamplingParams
from nanovllm.inputs.prompts import (
    EncodedPrompt,
    as_params_list,
    as_prompt_list,
    check_params,
    check_unsupported,
    encode_prompts,
)

VOCAB_SIZE = 100


class ByteTokenizer:
    """One id for each byte, as far as they fit the vocabulary."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def encode(prompt):
    [encoded] = encode_prompts([prompt], ByteTokenizer(), VOCAB_SIZE)
    return encoded.token_ids


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
    ("prompt", "bad"),
    [
        ([1, 100], 100),
        ([-1, 5], -1),
        ([5, 2**64], 2**64),
        ([5, 999999, -3], 999999),
        (" \x7f", 127),
    ],
)
def test_first_id_outside_the_vocabulary_is_named(prompt, bad):
    with pytest.raises(ArgumentError, match=rf"token id {bad} is out of vocabulary: 0 to 99"):
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
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "unsupported keys: multi_modal_data"),
        ({"prompt": "a", "cache_salt": "s"}, "unsupported keys: cache_salt"),
        (
            {"prompt_embeds": torch.zeros(2, 3)},
            "unsupported keys: prompt_embeds; .* needs 'prompt'",
        ),
        (
            {"encoder_prompt": "a", "decoder_prompt": "b"},
            "unsupported keys: encoder_prompt, decoder_prompt",
        ),
        ({"prompt_token_ids": 5}, "a prompt must be a string or a list of token ids, got 5"),
        ({"prompt_token_ids": "ab"}, "token ids must be integers, got 'a'"),
        ({"prompt": [1, 2]}, r"'prompt' of a prompt dict must be a string, got \[1, 2\]"),
        ({"prompt": "a \ud800", "prompt_token_ids": [1]}, "not valid Unicode"),
        ("a lone surrogate \ud800", "not valid Unicode"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "a prompt must be a string or a list"),
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


def test_arrays_and_tensors_are_lists_of_ids():
    assert as_prompt_list(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert as_prompt_list(torch.tensor([1, 2])) == [[1, 2]]
    assert encode(torch.tensor([1, 2])) == encode(np.array([1, 2])) == [1, 2]
    with pytest.raises(ArgumentError, match="list of prompts"):
        as_prompt_list(torch.tensor(1))


# Several prompts, text and ids


def test_text_is_kept_where_there_is_one():
    prompts = ["!", [5], {"prompt": "#"}, {"prompt_token_ids": [6]}]
    both = {"prompt": "any text", "prompt_token_ids": [7, 8], "cache_salt": None}
    assert encode_prompts([*prompts, both], ByteTokenizer(), VOCAB_SIZE) == [
        EncodedPrompt("!", [33]),
        EncodedPrompt(None, [5]),
        EncodedPrompt("#", [35]),
        EncodedPrompt(None, [6]),
        EncodedPrompt("any text", [7, 8]),
    ]
    assert encode_prompts([], ByteTokenizer(), VOCAB_SIZE) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["!", 5], r"^prompts\[1\]: a prompt must be a string"),
        (["!", "", "#"], r"^prompts\[1\]: Prompt cannot be empty"),
        ([[1], "!", [3, 100]], r"^prompts\[2\]: token id 100 is out"),
        (
            [{"prompt": "!"}, {"prompt": "#", "x": 1}],
            r"^prompts\[1\]: prompt has unsupported keys: x",
        ),
        ([""], "^Prompt cannot be empty"),
    ],
)
def test_the_wrong_one_of_several_prompts_is_named(prompts, message):
    with pytest.raises(ArgumentError, match=message):
        encode_prompts(prompts, ByteTokenizer(), VOCAB_SIZE)


class Id(IntEnum):
    SEVEN = 7


@pytest.mark.parametrize(
    "odd",
    [
        *(True, False, 1.0, None, b"i", (), [], [5], -1, 100, 2**31, -(2**31), 2**32, 2**63),
        *(np.bool_(True), np.float32(5), np.int8(-1), np.uint64(2**63), object(), 5j),
        # As the way that looks at many prompts together sees it, this one holds an id itself.
        *("i\x01\x00\x00\x00", "[\x01\x00\x00\x00i\x01\x00\x00\x00", "i" * 5, "N"),
        *(np.int8(7), np.int64(99), np.uint8(0), Id.SEVEN, 0, 99),
    ],
)
@pytest.mark.parametrize("place", [(0, 0), (0, 3), (299, 0), (299, 3)])
def test_one_odd_id_among_many(odd, place):
    prompts = [[index % VOCAB_SIZE, 2, 3, 4] for index in range(300)]
    prompts[place[0]][place[1]] = odd
    is_id = isinstance(odd, Integral) and not isinstance(odd, bool) and 0 <= odd < VOCAB_SIZE
    if not is_id:
        what = "token id .* is out of" if isinstance(odd, Integral) else "ids must be integers"
        if isinstance(odd, bool):
            what = "ids must be integers"
        with pytest.raises(ArgumentError, match=rf"^prompts\[{place[0]}\]: .*{what}"):
            encode_prompts(prompts, None, VOCAB_SIZE)
        return
    encoded = encode_prompts(prompts, None, VOCAB_SIZE)
    assert [prompt.token_ids for prompt in encoded] == prompts
    assert {type(token) for prompt in encoded for token in prompt.token_ids} == {int}


def test_prompts_of_ids_are_cut_at_their_own_limits():
    prompts = [[1, 2, 3], [4, 5], [6]]
    encoded = encode_prompts(prompts, None, VOCAB_SIZE, None, [2, None, 5])
    assert encoded == [(None, [2, 3]), (None, [4, 5]), (None, [6])]
    prompts[1].append(7)
    assert encoded[1].token_ids == [4, 5]


def test_a_text_beyond_any_context_is_refused_before_it_is_tokenized():
    class Refusing:
        def encode(self, text):
            raise AssertionError("it was given to the tokenizer")

    with pytest.raises(ArgumentError, match=r"prompts\[1\]: a prompt may have 8388608 characters"):
        encode_prompts(["a", "b" * (2**23 + 1)], Refusing(), VOCAB_SIZE)


def test_entries_of_vllms_prompts_that_say_nothing_are_taken():
    prompt = {"type": "token", "prompt_token_ids": [5], "multi_modal_data": {}, "cache_salt": None}
    assert encode_prompts([prompt], None, VOCAB_SIZE) == [EncodedPrompt(None, [5])]
    with pytest.raises(ArgumentError, match="unsupported keys: type"):
        encode_prompts([prompt | {"type": "embeds"}], None, VOCAB_SIZE)


def test_strings_without_a_tokenizer_are_refused():
    assert encode_prompts([[5]], None, VOCAB_SIZE) == [EncodedPrompt(None, [5])]
    with pytest.raises(ArgumentError, match="skip_tokenizer_init=True"):
        encode_prompts([[5], "!"], None, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["lora_request", "mm_processor_kwargs"])
def test_arguments_without_anything_behind_them_take_only_none(name):
    for nothing in (None, {}, [], [None, None]):
        check_unsupported(**{name: nothing})
    with pytest.raises(ArgumentError, match=f"{name} is not supported, got 5"):
        check_unsupported(**{"output_type": None, name: 5})


# tokenization_kwargs, on a tokenizer of transformers that adds a special token in front


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


TEXTS = ["the quick fox", "", "<|im_end|> is special", "10年前 🌶️", "x" * 60, " the quick fox"]
KWARGS = [
    None,
    {},
    {"add_special_tokens": False},
    {"add_special_tokens": True, "split_special_tokens": True},
    {"max_length": 3},
    {"truncation": True, "max_length": 2},
    {"truncation": "only_first", "max_length": 4},
    {"truncation": False, "max_length": 4},
    {"truncation": None, "max_length": None},
]


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_batch_is_tokenized_as_each_string_alone(bos_tokenizer, kwargs):
    texts = [
        text for text in TEXTS if text or (kwargs or {}).get("add_special_tokens") is not False
    ]
    encoded = encode_prompts(texts, bos_tokenizer, VOCAB_SIZE_OF_MODEL, kwargs)
    expected = [bos_tokenizer.encode(text, **(kwargs or {})) for text in texts]
    assert [prompt.token_ids for prompt in encoded] == expected
    assert [prompt.text for prompt in encoded] == texts
    for text, token_ids in encoded:
        [alone] = encode_prompts([text], bos_tokenizer, VOCAB_SIZE_OF_MODEL, kwargs)
        assert alone == (text, token_ids)


def test_tokenization_kwargs_of_one_call_are_gone_in_the_next(bos_tokenizer):
    text = "the quick fox"
    expected = bos_tokenizer.encode(text)
    for kwargs in ({"max_length": 2}, {"split_special_tokens": True}):
        encode_prompts([text] * 2, bos_tokenizer, VOCAB_SIZE_OF_MODEL, kwargs)
        [encoded] = encode_prompts([text], bos_tokenizer, VOCAB_SIZE_OF_MODEL)
        assert encoded.token_ids == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (5, "tokenization_kwargs must be a dict, got 5"),
        ({"max_len": 3}, "'max_len' is not supported; supported: add_special_tokens"),
        ({"padding": True}, "'padding' is not supported"),
        ({"return_tensors": "pt"}, "'return_tensors' is not supported"),
        ({"max_length": 0}, "tokenization_kwargs: max_length must be >= 1, got 0"),
        ({"max_length": "3"}, "max_length must be an integer >= 1, got '3'"),
        ({"truncation": "only_second"}, "truncation must be one of longest_first"),
        ({"add_special_tokens": 1}, "add_special_tokens must be True or False, got 1"),
    ],
)
def test_wrong_tokenization_kwargs_are_refused_by_name(bos_tokenizer, kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        encode_prompts(["a"], bos_tokenizer, VOCAB_SIZE_OF_MODEL, kwargs)
    with pytest.raises(ArgumentError, match=message):  # though no string is there to tokenize
        encode_prompts([[1]], bos_tokenizer, VOCAB_SIZE_OF_MODEL, kwargs)


def test_what_the_tokenizer_itself_refuses_is_an_argument_error():
    class Refusing(ByteTokenizer):
        def encode(self, text):
            raise RuntimeError("not mine")

    with pytest.raises(ArgumentError, match="the tokenizer refuses the prompt: not mine"):
        encode_prompts(["a"], Refusing(), VOCAB_SIZE)


@pytest.mark.parametrize("returned", [None, "ab", ["a"], [1.5], [[1]], 5, [True]])
def test_what_a_tokenizer_returns_must_be_ids(returned):
    class Odd(ByteTokenizer):
        def encode(self, text):
            return returned

    with pytest.raises(ArgumentError, match="token ids"):
        encode_prompts(["a"], Odd(), VOCAB_SIZE)


# truncate_prompt_tokens


@pytest.mark.parametrize("kwargs", [{}, {"add_special_tokens": False}])
def test_a_prompts_end_is_kept_as_transformers_truncates_on_the_left(bos_tokenizer, kwargs):
    text = "a paged cache keeps the keys and values of every sequence"
    whole = bos_tokenizer.encode(text, **kwargs)
    ids = list(range(3, 9))
    prompts = [text, ids, {"prompt": text, "prompt_token_ids": ids}, text]
    side = bos_tokenizer.truncation_side
    for limit in (2, 3, 5, 1000):
        bos_tokenizer.truncation_side = "left"
        expected = bos_tokenizer.encode(text, truncation=True, max_length=limit, **kwargs)
        bos_tokenizer.truncation_side = side
        assert (expected[0] == 0) is (not kwargs)  # the special token stays
        encoded = encode_prompts(
            prompts, bos_tokenizer, VOCAB_SIZE_OF_MODEL, kwargs, [limit, limit, limit, None]
        )
        expected_ids = [expected, ids[-limit:], ids[-limit:], whole]
        assert [prompt.token_ids for prompt in encoded] == expected_ids
        assert bos_tokenizer.truncation_side == side


def test_a_prompt_is_cut_in_one_way(bos_tokenizer):
    with pytest.raises(ArgumentError, match="two ways to cut a prompt: give one"):
        encode_prompts(["x"], bos_tokenizer, 1000, {"truncation": True, "max_length": 2}, [1])
