"""Incremental detokenization against the decoding of the whole list, and stop strings.

The oracles are `tokenizer.decode` and a search of the whole text after every token.
"""

import copy
import gc
import random
import weakref
from types import SimpleNamespace

import pytest
import real_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm import SamplingParams
from nanovllm.inputs.detokenizer import (
    BytesDetokenizer,
    CompletionText,
    OutputText,
    WindowDetokenizer,
    decode,
    incremental_detokenizer,
)

TEXTS = [
    "She had never, in all her life, been so agreeably surprised.  \n\n\tIndeed!",
    "URGENCY🌶️ and 👩‍👩‍👧‍👦, 🇩🇪, q\u0301, \ufffd, \u200b",
    "为什么天空是蓝色的 10年前，我比我哥大2岁",
    "မင်္ဂလာပါ ကမ္ဘာလောက",
    "<|im_start|>user\nintroduce yourself<|im_end|>\n<|endoftext|>",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's kind: "▁" for a space, the first one dropped, bytes for what is not a piece."""
    pieces = [*BYTE_TOKENS, *"▁abcdefghijklmnopqrstuvwxyz", "▁a", "▁th", "he", "▁the", "▁▁"]
    merges = [("▁", "a"), ("h", "e"), ("▁", "t"), ("▁t", "h"), ("▁t", "he"), ("▁", "▁")]
    pieces.insert(-4, "▁t")
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    tiny = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny)
    with_added = AutoTokenizer.from_pretrained(tiny)
    with_added.add_tokens(["added token", "字", "\u0100"])  # outside and inside the byte alphabet
    return {
        "tiny": AutoTokenizer.from_pretrained(tiny),
        "added": with_added,
        "austen": real_tokenizers.load("austen"),
        "sentencepiece": sentencepiece_like(),
    }


BYTE_LEVEL = ["tiny", "added", "austen", "qwen3"]


def take(tokenizers, name):
    return real_tokenizers.load(name) if name == "qwen3" else tokenizers[name]


def pieces(detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.append([token]) for token in token_ids), detokenizer.finish()]


def ids_of_bytes(tokenizer) -> list[int]:
    """The tokens that are no valid UTF-8 alone."""
    limit = min(len(tokenizer), 4096)
    return [i for i in range(limit) if "\ufffd" in tokenizer.decode([i])]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_pieces_add_up_to_the_decoded_list(tokenizers, name, skip):
    tokenizer = take(tokenizers, name)
    rng = random.Random(f"{name} {skip}")
    broken, special = ids_of_bytes(tokenizer), tokenizer.all_special_ids
    assert len(broken) > 100 and len(special) >= 2
    sources = [
        lambda: rng.randrange(len(tokenizer) + 50),  # beyond the tokenizer too
        lambda: rng.choice(broken),
        lambda: rng.choice(special),
        lambda: rng.randrange(len(tokenizer) - 10, len(tokenizer)),
    ]
    for case in range(150):
        weights = [(8, 1, 1, 1), (1, 8, 0, 0), (1, 4, 4, 1)][case % 3]
        drawn = rng.choices(sources, weights, k=rng.randrange(60))
        token_ids = [draw() for draw in drawn]
        expected = tokenizer.decode(token_ids, skip_special_tokens=skip)
        detokenizer = incremental_detokenizer(tokenizer, skip)
        assert isinstance(detokenizer, BytesDetokenizer)
        assert "".join(pieces(detokenizer, token_ids)) == expected, token_ids
        at_once = incremental_detokenizer(tokenizer, skip)
        assert at_once.append(token_ids) + at_once.finish() == expected


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*BYTE_LEVEL, "sentencepiece"])
def test_a_character_comes_with_its_last_token(tokenizers, name, text):
    """Never a U+FFFD in between; every piece is there as soon as the ids so far allow it."""
    tokenizer = take(tokenizers, name)
    token_ids = tokenizer.encode(text)
    detokenizer = incremental_detokenizer(tokenizer)
    shown = ""
    for count, token in enumerate(token_ids, 1):
        shown += detokenizer.append([token])
        so_far = tokenizer.decode(token_ids[:count])
        if not so_far.endswith("\ufffd"):
            assert shown == so_far
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


def test_ids_of_incomplete_characters_end_as_replacement_characters(tokenizers):
    tokenizer = tokenizers["tiny"]
    token_ids = tokenizer.encode("🌶")
    assert len(token_ids) == 4
    assert pieces(incremental_detokenizer(tokenizer), token_ids[:3]) == ["", "", "", "\ufffd"]
    assert pieces(incremental_detokenizer(tokenizer), token_ids[1:]) == [*"\ufffd\ufffd\ufffd", ""]
    interrupted = [*token_ids[:2], *tokenizer.encode("a")]
    assert pieces(incremental_detokenizer(tokenizer), interrupted) == ["", "", "\ufffda", ""]
    assert pieces(incremental_detokenizer(tokenizer), [10**7]) == ["", ""]


@pytest.mark.parametrize("skip", [False, True])
def test_the_window_keeps_the_context_of_spaces(tokenizers, skip):
    """The first space of a text is dropped, the later ones are not; special tokens lie between."""
    tokenizer = tokenizers["sentencepiece"]
    rng = random.Random(int(skip))
    for _ in range(150):
        token_ids = []
        for _ in range(rng.randrange(1, 5)):
            words = rng.choices(["the", "a", " ", "she", "中", "🌶️", "  x"], k=rng.randrange(1, 5))
            token_ids += tokenizer.encode(" ".join(words))
            token_ids += rng.choice([[], [tokenizer.eos_token_id], [10**7]])
        detokenizer = WindowDetokenizer(tokenizer, skip, True)
        expected = tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert "".join(pieces(detokenizer, token_ids)) == expected, token_ids


def test_both_kinds_agree(tokenizers):
    tokenizer = tokenizers["austen"]
    for text in TEXTS:
        token_ids = tokenizer.encode(text)
        fast = "".join(pieces(incremental_detokenizer(tokenizer, True), token_ids))
        assert "".join(pieces(WindowDetokenizer(tokenizer, True, True), token_ids)) == fast


class Spelling:
    """A tokenizer of another make, whose `decode` has no options: id i is the i-th string."""

    def __init__(self, strings: list[str]) -> None:
        self.strings = strings
        self.longest = 0

    def decode(self, token_ids):
        self.longest = max(self.longest, len(token_ids))
        return "".join(self.strings[i] for i in token_ids)


@pytest.mark.parametrize("strings", [["ab"], ["\ufffd"], ["a", ""], ["a", "\ufffd", "", ""]])
def test_the_window_stays_short(strings):
    tokenizer = Spelling(strings)
    token_ids = [i % len(strings) for i in range(400)]
    text = "".join(pieces(incremental_detokenizer(tokenizer), token_ids))
    assert text == "".join(strings) * (400 // len(strings))
    assert tokenizer.longest <= 8


def test_the_token_table_goes_with_its_tokenizer(tokenizers):
    gc.freeze()  # what all other tests have made is not looked through
    try:
        tokenizer = copy.deepcopy(tokenizers["tiny"])
        detokenizer = incremental_detokenizer(tokenizer)
        detokenizer.append([5])
        alive = weakref.ref(tokenizer)
        del tokenizer
        gc.collect()
        assert alive() is None
    finally:
        gc.unfreeze()


def test_a_token_added_later_has_its_text(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["tiny"])
    token_id = len(tokenizer)
    assert incremental_detokenizer(tokenizer).append([token_id]) == ""
    tokenizer.add_tokens(["brand new"])
    assert incremental_detokenizer(tokenizer).append([token_id]) == "brand new"


def test_decoding_a_whole_completion(tokenizers):
    tokenizer = tokenizers["tiny"]
    token_ids = tokenizer.encode("the fox<|im_end|>")
    assert decode(tokenizer, token_ids, SamplingParams()) == "the fox<|im_end|>"
    assert decode(tokenizer, token_ids, SamplingParams(skip_special_tokens=True)) == "the fox"
    assert decode(tokenizer, token_ids, SamplingParams(detokenize=False)) == ""
    assert decode(None, token_ids, SamplingParams()) == ""


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "window"])
def test_a_text_made_in_parts_is_that_of_the_whole(tokenizers, name):
    tokenizer = take(tokenizers, "tiny" if name == "window" else name)
    rng = random.Random(name)
    token_ids = [rng.randrange(len(tokenizer) + 50) for _ in range(200)]
    if name == "window":  # a tokenizer of no known kind
        token_ids = tokenizer.encode(TEXTS[0] * 3)
        decode_whole = tokenizer.decode
        tokenizer = SimpleNamespace(decode=lambda ids, **options: decode_whole(ids, **options))
    for skip, silent in ((False, frozenset()), (True, frozenset(token_ids[::7]))):
        text = CompletionText(
            tokenizer, SamplingParams(skip_special_tokens=skip), (), ids_without_text=silent
        )
        while text.num_tokens < len(token_ids):
            number = rng.choice((0, 1, 1, 2, 30))
            text.append(token_ids[text.num_tokens : text.num_tokens + number])
        heard = [token_id for token_id in token_ids if token_id not in silent]
        assert text.finish() == tokenizer.decode(heard, skip_special_tokens=skip)


# ---- stop strings --------------------------------------------------------------------------------


def run(tokens: list[str], **params) -> tuple[str, str | None, int, list[str]]:
    """Feed tokens: final text, stop string, the tokens until then, what streaming has shown."""
    strings = sorted(set(tokens))
    output = OutputText(Spelling(strings), SamplingParams(**params))
    shown = []
    for token in tokens:
        output.append(strings.index(token))
        shown.append(output.take_text())
        if output.stop_string is not None:
            break
    count = len(shown)
    text = output.text
    assert text == output.final_text() == output.text
    shown.append(output.take_text())
    assert output.take_text() == ""
    return text, output.stop_string, count, shown


ORGANIZE = [
    "We",
    " are",
    " a",
    " group",
    " of",
    " peo",
    "ple",
    " who",
    " volunteer",
    " organizers.",
]


@pytest.mark.parametrize(
    ("stop", "excluded", "included", "num_tokens"),
    [
        (".", "We are a group of people who volunteer organizers", None, 10),
        ("group of peo", "We are a ", "We are a group of peo", 6),  # over three tokens
        ("gani", "We are a group of people who volunteer or", None, 10),  # inside one
        (["no such text", " who"], "We are a group of people", None, 8),
        ("We", "", "We", 1),
    ],
)
def test_where_the_text_is_cut(stop, excluded, included, num_tokens):
    string = stop if isinstance(stop, str) else stop[-1]
    assert run(ORGANIZE, stop=stop)[:3] == (excluded, string, num_tokens)
    with_string = run(ORGANIZE, stop=stop, include_stop_str_in_output=True)
    assert with_string[:3] == (included or excluded + string, string, num_tokens)


def test_no_stop_string_is_there():
    whole = "".join(ORGANIZE)
    assert run(ORGANIZE, stop="organizers.x")[:3] == (whole, None, 10)
    assert run(ORGANIZE)[:3] == (whole, None, 10)


@pytest.mark.parametrize("stop", [["c", "bcd", "ab"], ["ab", "c", "bcd"], ["bcd", "ab", "c"]])
def test_the_string_that_ends_first_counts_then_the_longest(stop):
    assert run(["xabcde"], stop=stop)[:2] == ("x", "ab")
    assert run(["xa", "bcd", "e"], stop=stop)[:2] == ("x", "ab")
    assert run(["xbcde"], stop=stop)[:2] == ("xb", "c")
    assert run(["xbcde"], stop=[s.replace("c", "cd") for s in stop if s != "bcd"] + ["bcd"])[
        :2
    ] == ("x", "bcd")


def test_stop_strings_do_not_count_in_the_first_min_tokens():
    vowels = [*"aeiou"]
    assert run([*"abacde"], stop=vowels, min_tokens=3)[:3] == ("abacd", "e", 6)
    assert run([*"abacde"], stop=vowels, min_tokens=2)[:3] == ("ab", "a", 3)
    assert run([*"aaaa"], stop=vowels, min_tokens=4)[:3] == ("aaaa", None, 4)
    # A match may begin before and end after; one that ended before is not found again.
    assert run(["xa", "b"], stop="ab", min_tokens=1)[:2] == ("x", "ab")
    assert run(["xaby", "z"], stop=["ab", "xabyzw"], min_tokens=1)[:2] == ("xabyz", None)


def test_an_incomplete_character_ends_the_text_but_not_before_a_stop_string(tokenizers):
    tokenizer = tokenizers["tiny"]
    token_ids = tokenizer.encode("the 🌶")
    for stop, expected in ((None, "the \ufffd"), ("he", "t")):
        output = OutputText(tokenizer, SamplingParams(stop=stop))
        for token in token_ids[:-1]:
            output.append(token)
        assert output.text == expected.rstrip("\ufffd")
        assert output.final_text() == expected
    output = OutputText(tokenizer, SamplingParams(stop="🌶"))
    for token in token_ids:
        output.append(token)
    assert (output.stop_string, output.final_text()) == ("🌶", "the ")


def search_everything(tokens: list[str], stop: list[str], included: bool, min_tokens: int):
    """The text, stop string and number of tokens, by looking at every end of every match."""
    text = ""
    for count, token in enumerate(tokens, 1):
        for end in range(len(text) + 1, len(text + token) + 1):
            hits = [s for s in stop if (text + token)[:end].endswith(s)]
            if hits and count > min_tokens:
                longest = max(hits, key=len)
                cut = end if included else end - len(longest)
                return (text + token)[:cut], longest, count
        text += token
    return text, None, len(tokens)


WORDS = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(WORDS, max_size=12),
    st.lists(WORDS.map("aab".__add__) | WORDS, max_size=3),
    st.booleans(),
    st.integers(0, 6),
)
def test_stop_strings_equal_a_search_of_the_whole_text(tokens, stop, included, min_tokens):
    params = {"stop": stop, "include_stop_str_in_output": included, "min_tokens": min_tokens}
    text, string, count, shown = run(tokens, **params)
    assert (text, string, count) == search_everything(tokens, stop, included, min_tokens)
    assert "".join(shown) == text
    # What is not shown yet could still become a stop string: nothing more is held back.
    so_far = "".join(tokens[:count])
    for i in range(count - (string is not None)):
        held = "".join(tokens[: i + 1])[len("".join(shown[: i + 1])) :]
        assert not held or any(s.startswith(held) and s != held for s in stop)
    assert so_far.startswith("".join(shown))
