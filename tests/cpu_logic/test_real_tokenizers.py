"""Texts, stop strings, logprobs, bad words and grammars with the tokenizers of real models.

The oracles are `tokenizer.decode` of transformers, SentencePiece's own decoder, slices of the text
and what the tokenizer itself makes of a text.
"""

import json
import random

import numpy as np
import pytest
import real_tokenizers
from real_tokenizers import BYTE_LEVEL, SENTENCEPIECE
from tokenizers import decoders, pre_tokenizers

from nanovllm import SamplingParams
from nanovllm.batch.records import LineInfo, result_record
from nanovllm.inputs.detokenizer import (
    BytesDetokenizer,
    OutputText,
    WindowDetokenizer,
    decode,
    incremental_detokenizer,
)
from nanovllm.inputs.token_bytes import token_bytes
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling.logprobs import LogprobRow, to_logprobs
from nanovllm.sampling.vocabulary import encode_bad_words

TEXTS = [
    "The capital of France is Paris.",
    "She had never, in all her life,  been so\n\n\tsurprised!  ",
    "URGENCY🌶️ and 👩‍👩‍👧‍👦, 🇩🇪, q\u0301, \u200b",
    "为什么天空是蓝色的 10年前，我比我哥大2岁",
    "မင်္ဂလာပါ ကမ္ဘာလောက กรุงเทพ",
    "שלום עולם مرحبا Ελλάδα",
    "def f(x):\n    return {x: '▁'}\r\n",
    " leading, </s> and <0x41>",
]
NAMES = [*SENTENCEPIECE, *BYTE_LEVEL]
SKIPS = (False, True)


@pytest.fixture
def tokenizers():
    return real_tokenizers.load


def plain(skip=False, **params):
    return SamplingParams(skip_special_tokens=skip, **params)


def pieces(detokenizer, token_ids):
    return "".join(detokenizer.append([token_id]) for token_id in token_ids) + detokenizer.finish()


def both_ways(tokenizer, prompt, completion, skip=False):
    """The text at once, after it was found to be that of the single tokens."""
    whole = decode(tokenizer, completion, plain(skip), prompt)
    assert pieces(incremental_detokenizer(tokenizer, skip, True, prompt), completion) == whole
    return whole


def added(tokenizer, prompt, completion, skip=False):
    """What transformers has for prompt and completion without what it has for the prompt."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *completion], skip_special_tokens=skip)
    assert whole.startswith(before)
    return whole[len(before) :]


# ---- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_text_read_as_one_text(tokenizers, name):
    tokenizer = tokenizers(name)
    for text in TEXTS:
        token_ids = tokenizer.encode(text)
        for cut in range(1, len(token_ids)):
            prompt, completion = token_ids[:cut], token_ids[cut:]
            if "\ufffd" in tokenizer.decode(prompt):
                continue  # within a character
            # By turns; what has a special token within is read in both ways.
            for skip in SKIPS if text == TEXTS[-1] else SKIPS[cut % 2 :][:1]:
                expected = added(tokenizer, prompt, completion, skip)
                assert both_ways(tokenizer, prompt, completion, skip) == expected
                window = WindowDetokenizer(tokenizer, skip, True, prompt)
                assert pieces(window, completion) == expected
                assert window.finish() == ""


@pytest.mark.parametrize("name", SENTENCEPIECE[:3])
def test_the_example_keeps_its_space(tokenizers, name):
    tokenizer = tokenizers(name)
    prompt = "The capital of France is"
    whole = tokenizer.encode(prompt + " Paris.")
    completion = whole[len(tokenizer.encode(prompt)) :]
    assert both_ways(tokenizer, tokenizer.encode(prompt), completion) == " Paris."
    assert tokenizer.decode(completion) == "Paris."  # by itself it is a text of its own
    for before in ([], [tokenizer.bos_token_id]):  # the completion begins the text
        assert both_ways(tokenizer, before, completion, skip=True) == "Paris."
    # Behind a special token that is shown transformers shows the space.
    assert both_ways(tokenizer, [tokenizer.bos_token_id], completion) == " Paris."
    space = tokenizer.convert_tokens_to_ids("▁")
    assert both_ways(tokenizer, [space], completion) == " Paris."  # that space was the first


@pytest.mark.parametrize("name", NAMES)
def test_any_ids_have_the_text_that_transformers_adds(tokenizers, name):
    tokenizer = tokenizers(name)
    rng = random.Random(name)
    table = token_bytes(tokenizer)
    limit = len(tokenizer)
    spaces = [i for i in range(limit) if table[i] and not table[i].strip(b" ")]
    special = tokenizer.all_special_ids
    sources = [range(limit + 20), spaces, special]  # beyond the tokenizer too
    num_compared = 0
    for case in range(300):
        weights = [(8, 1, 1), (2, 4, 4), (0, 1, 1)][case % 3]
        drawn = rng.choices(sources, weights, k=rng.randrange(1, 25))
        token_ids = [rng.choice(source) for source in drawn]
        cut = rng.randrange(len(token_ids))
        prompt, completion = token_ids[:cut], token_ids[cut:]
        for skip in SKIPS:
            text = both_ways(tokenizer, prompt, completion, skip)
            if "\ufffd" not in tokenizer.decode(token_ids, skip_special_tokens=skip):
                assert text == added(tokenizer, prompt, completion, skip), token_ids
                num_compared += 1
    assert num_compared > 100


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_no_utf8(tokenizers, name):
    """Byte-level: as transformers. SentencePiece: as its library, which keeps whole characters."""
    tokenizer = tokenizers(name)
    table = token_bytes(tokenizer)
    if name in BYTE_LEVEL:
        reference = tokenizer.decode
    else:
        sentencepiece = pytest.importorskip("sentencepiece")
        model = str(real_tokenizers.file_of("mistral-v3" if name == "mistral-v3" else "mistral-v1"))
        reference = sentencepiece.SentencePieceProcessor(model_file=model).decode
    rng = random.Random(name)
    parts = [i for i in range(len(tokenizer)) if len(table[i]) == 1 and table[i][0] >= 0x80]
    words = tokenizer.encode("is 中é a", add_special_tokens=False)
    for _ in range(300):
        token_ids = [rng.choice(rng.choice([parts, parts, words])) for _ in range(12)]
        begin = words[:1]
        expected = reference([*begin, *token_ids])[len(reference(begin)) :]
        assert both_ways(tokenizer, begin, token_ids) == expected
    character = table.byte_pieces("🌶".encode())
    for length in range(1, 4):  # the end of a completion within a character
        text = both_ways(tokenizer, words[:1], character[:length])
        assert text == "\ufffd" * (1 if name in BYTE_LEVEL else length)
        assert text == added(tokenizer, words[:1], character[:length])


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_ends_within_a_character(tokenizers, name):
    """The character belongs to the completion; what the prompt shows for its part is not said
    again."""
    tokenizer = tokenizers(name)
    words = tokenizer.encode("is", add_special_tokens=False)
    character = token_bytes(tokenizer).byte_pieces("🌶".encode())
    after = tokenizer.encode(" a", add_special_tokens=False)[-1:]
    for cut in range(1, 4):
        prompt = [*words, *character[:cut]]
        assert both_ways(tokenizer, prompt, [*character[cut:], *after]) == "🌶 a"
        assert both_ways(tokenizer, prompt, after) == added(tokenizer, prompt, after) == " a"
        assert both_ways(tokenizer, prompt, character[cut:3]) in ("", "\ufffd" * (3 - cut))
        window = WindowDetokenizer(tokenizer, False, True, prompt)
        assert pieces(window, [*character[cut:], *after]) == "🌶 a"
        assert pieces(WindowDetokenizer(tokenizer, False, True, prompt), after) == " a"
    prompt = tokenizer.encode("is \ufffd")  # not a part of a character
    for detokenizer in (
        incremental_detokenizer(tokenizer, False, True, prompt),
        WindowDetokenizer(tokenizer, False, True, prompt),
    ):
        assert pieces(detokenizer, after) == " a"


class Ids:
    """An object of another make: SentencePiece itself, whose `decode` has no options."""

    def __init__(self, model_file):
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_file=str(model_file))

    def encode(self, text):
        return self.processor.encode(text)

    def decode(self, token_ids):
        return self.processor.decode(token_ids)


def other_kinds(tokenizers):
    """Tokenizers whose decoders are not known."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    pytest.importorskip("sentencepiece")
    model = str(real_tokenizers.file_of("mistral-v1"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    yield SentencePieceBackend(vocab_file=model, **special)  # in Python
    yield Ids(model)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_metaspace_decoder(scheme):
    tokenizer = real_tokenizers.read("llama-form")
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    check_window(tokenizer, tokenizer.decode)


def test_tokenizers_of_other_kinds(tokenizers):
    for tokenizer in other_kinds(tokenizers):
        check_window(tokenizer, tokenizer.decode)


def check_window(tokenizer, reference):
    for text in (TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[5]):
        token_ids = list(tokenizer.encode(text))
        for cut in range(1, len(token_ids)):
            prompt, completion = token_ids[:cut], token_ids[cut:]
            detokenizer = incremental_detokenizer(tokenizer, False, True, prompt)
            assert isinstance(detokenizer, WindowDetokenizer)
            before, whole = reference(prompt), reference(token_ids)
            if not before.endswith("\ufffd"):
                assert both_ways(tokenizer, prompt, completion) == whole[len(before) :]


def test_a_long_prompt_without_text_of_its_own(tokenizers):
    """The window reaches back until there is a text before it, and is not the whole prompt."""
    tokenizer = tokenizers("mistral-v1")
    bos = tokenizer.bos_token_id
    prompt = [*tokenizer.encode("The capital of France is"), *[bos] * 100]
    completion = tokenizer.convert_tokens_to_ids(["▁Paris"])
    window = WindowDetokenizer(tokenizer, True, True, prompt)
    assert pieces(window, completion) == both_ways(tokenizer, prompt, completion, True) == " Paris"
    lengths = []

    class Counted:
        def decode(self, token_ids, **options):
            lengths.append(len(token_ids))
            return tokenizer.decode(token_ids, **options)

    window = WindowDetokenizer(Counted(), False, True, prompt * 50)
    assert pieces(window, completion * 50) == " Paris" * 50
    assert max(lengths) <= 10


@pytest.mark.parametrize("name", ["mistral-v1", "qwen3"])
def test_whoever_replaces_decode_has_it_called(tokenizers, name, monkeypatch):
    tokenizer = tokenizers(name)

    def decode_loudly(token_ids, **options):
        if 400 in token_ids:
            raise KeyError(400)
        return type(tokenizer).decode(tokenizer, token_ids, **options).upper()

    monkeypatch.setattr(tokenizer, "decode", decode_loudly)
    token_ids = tokenizer.encode("The capital", add_special_tokens=False)
    assert both_ways(tokenizer, token_ids[:1], token_ids[1:]) == " CAPITAL"
    with pytest.raises(KeyError, match="400"):
        decode(tokenizer, [400], plain())
    with pytest.raises(KeyError, match="400"):
        OutputText(tokenizer, plain(stop="x")).append(400)


def test_a_prompt_that_cannot_be_decoded_is_no_context():
    class Letters:
        def decode(self, token_ids):
            return "".join("abc"[token_id] for token_id in token_ids)

    assert both_ways(Letters(), [7, 9], [0, 2, 1]) == "acb"
    with pytest.raises(IndexError):
        decode(Letters(), [3], plain(), [0])


# ---- stop strings ----------------------------------------------------------------------------


def ends(tokenizer, prompt, text, **params):
    """The text, stop string and number of tokens until then."""
    prompt_ids = tokenizer.encode(prompt)
    token_ids = tokenizer.encode(prompt + text)
    assert token_ids[: len(prompt_ids)] == prompt_ids
    completion = token_ids[len(prompt_ids) :]
    output = OutputText(tokenizer, plain(**params), prompt_ids)
    shown, count = "", 0
    for token_id in completion:
        output.append(token_id)
        shown += output.take_text()
        count += 1
        if output.stop_string is not None:
            break
    final = output.final_text()
    assert shown + output.take_text() == final
    return final, output.stop_string, count


@pytest.mark.parametrize("name", NAMES)
def test_stop_strings(tokenizers, name):
    tokenizer = tokenizers(name)
    prompt = "The capital of France is"
    assert ends(tokenizer, prompt, " Paris, or so", stop=" Paris")[:2] == ("", " Paris")
    included = {"include_stop_str_in_output": True}
    assert ends(tokenizer, prompt, " Paris, or", stop=" Paris", **included)[0] == " Paris"
    assert ends(tokenizer, prompt, " Paris, or so", stop="is, o")[:2] == (" Par", "is, o")
    assert ends(tokenizer, prompt, " big\nor so", stop="\n")[:2] == (" big", "\n")
    assert ends(tokenizer, prompt, " hot 🌶️ or so", stop=" 🌶️")[:2] == (" hot", " 🌶️")
    assert ends(tokenizer, prompt, " hot 中文 or", stop="中文 ")[:2] == (" hot ", "中文 ")
    assert ends(tokenizer, prompt, " Paris", stop="France")[:2] == (" Paris", None)
    first = ends(tokenizer, prompt, " a b a b", stop=" a")
    assert first == ("", " a", 1)
    assert ends(tokenizer, prompt, " a b a b", stop=" a", min_tokens=1) == (" a b", " a", 3)


@pytest.mark.parametrize("name", SENTENCEPIECE[:3])
def test_a_stop_string_within_the_text_of_a_special_token(tokenizers, name):
    tokenizer = tokenizers(name)
    prompt = tokenizer.encode("The")
    word, eos = tokenizer.encode("The cat")[-1], tokenizer.eos_token_id
    for skip, expected in ((False, (" cat<", "/s")), (True, (" cat", None))):
        output = OutputText(tokenizer, plain(skip, stop=["/s"]), prompt)
        for token_id in (word, eos):
            output.append(token_id)
        assert (output.final_text(), output.stop_string) == expected


# ---- logprobs and their forms in batch files ---------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_decoded_tokens_are_what_they_add_to_a_text(tokenizers, name):
    tokenizer = tokenizers(name)
    for text in TEXTS[:2]:
        token_ids = tokenizer.encode("x " + text, add_special_tokens=False)
        rows = [LogprobRow(np.array([i, 5]), np.array([-1.0, -2.0]), 1) for i in token_ids]
        own = [next(iter(entries.values())) for entries in to_logprobs(rows, tokenizer)]
        joined = "".join(entry.decoded_token for entry in own)
        assert joined.removeprefix(" ") == "x " + text
    [part, *_] = token_bytes(tokenizer).byte_pieces("🌶".encode())
    rows = [LogprobRow(np.array([part]), np.array([-1.0]), 1)]
    assert to_logprobs(rows, tokenizer)[0][part].decoded_token == "\ufffd"


def test_decoded_tokens_of_other_kinds(tokenizers):
    for tokenizer in other_kinds(tokenizers):
        token_ids = tokenizer.encode("The capital of")[-3:]
        rows = [LogprobRow(np.array([i]), np.array([-1.0]), 1) for i in token_ids]
        texts = [next(iter(e.values())).decoded_token for e in to_logprobs(rows, tokenizer)]
        assert texts == [" The", " capital", " of"]


def record_of(tokenizer, prompt, completion, is_chat=False, others=(), text=None, **params):
    """The logprobs of a batch file's line, and its text."""
    params = SamplingParams(logprobs=len(others), **params)
    rows = [
        LogprobRow(
            np.array([token_id, *others]),
            np.array([-1.0, *[-2.0 - i for i in range(len(others))]]),
            1,
        )
        for token_id in completion
    ]
    if text is None:
        text = decode(tokenizer, completion, params, prompt)
    output = CompletionOutput(0, text, completion, -1.0, to_logprobs(rows, tokenizer), "stop")
    request = RequestOutput("0", None, prompt, None, [output], True)
    info = LineInfo("batch_req_0_1", 1, "a", params, is_chat)
    record = result_record(info, request, "tiny", tokenizer)
    json.dumps(record)
    return record["response"]["body"]["choices"][0]["logprobs"], text


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", NAMES)
def test_offsets_are_places_in_the_text(tokenizers, name, skip):
    tokenizer = tokenizers(name)
    table = token_bytes(tokenizer)
    prompt = tokenizer.encode("Say")
    special = [tokenizer.all_special_ids[0]]
    pepper = table.byte_pieces("🌶".encode())
    for text in ("Hi 😀 there 中", "👩‍👩‍👧‍👦 é\n", "plain words"):
        middle = tokenizer.encode("Say " + text)[len(prompt) :]
        completion = [*middle, *special, *pepper[:2], *middle, *pepper[:3]]
        logprobs, whole = record_of(tokenizer, prompt, completion, skip_special_tokens=skip)
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets) and offsets[0] == 0
        num_whole = 0
        for token_id, name_of_it, offset in zip(
            completion, logprobs["tokens"], offsets, strict=True
        ):
            if skip and token_id in special:
                continue
            if not name_of_it.startswith("bytes:"):
                assert whole[offset : offset + len(name_of_it)] == name_of_it
                num_whole += 1
                continue
            first = table[token_id].decode("utf-8", "ignore")[:1]
            character = whole[offset : offset + 1]
            assert table[token_id][:1] in character.encode() or character in ("\ufffd", first)
        assert num_whole >= 4


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_character_have_names_and_bytes_of_their_own(tokenizers, name):
    tokenizer = tokenizers(name)
    parts = token_bytes(tokenizer).byte_pieces("🌶".encode())
    assert len(set(parts)) == 4
    prompt = tokenizer.encode("Say")
    logprobs, text = record_of(tokenizer, prompt, parts, others=parts)
    names = [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x8c", r"bytes:\xb6"]
    assert text == "🌶" and logprobs["tokens"] == names
    assert logprobs["text_offset"] == [0] * 4
    for top in logprobs["top_logprobs"]:
        assert sorted(top) == sorted(names)
    logprobs, _ = record_of(tokenizer, prompt, parts, is_chat=True, others=parts)
    for byte, entry in zip("🌶".encode(), logprobs["content"], strict=True):
        assert (entry["token"], entry["bytes"]) == ("\ufffd", [byte])
        assert {tuple(top["bytes"]) for top in entry["top_logprobs"]} <= {
            (other,) for other in "🌶".encode()
        }


def test_offsets_where_the_completion_begins_the_text(tokenizers):
    """Behind a special token alone: the first space is left out, characters may be broken."""
    tokenizer = tokenizers("llama-form")
    parts = token_bytes(tokenizer).byte_pieces("🌶".encode())
    words = tokenizer.convert_tokens_to_ids(["▁Paris", "is"])
    for completion, text, offsets in (
        (words, "Parisis", [0, 5]),
        ([*parts[:2], words[1], *parts], "\ufffd\ufffdis🌶", [0, 0, 2, 4, 4, 4, 4]),
    ):
        prompt = [tokenizer.bos_token_id]
        logprobs, whole = record_of(tokenizer, prompt, completion, skip_special_tokens=True)
        assert (whole, logprobs["text_offset"]) == (text, offsets)


def test_a_cut_text_ends_the_offsets(tokenizers):
    tokenizer = tokenizers("mistral-v1")
    prompt = tokenizer.encode("Say")
    completion = tokenizer.encode("Say Hi there you")[len(prompt) :]
    logprobs, _ = record_of(tokenizer, prompt, completion, text=" Hi th", stop="ere")
    assert logprobs["tokens"] == [" Hi", " there", " you"]
    assert logprobs["text_offset"] == [0, 3, 6]


def test_of_tokens_with_one_text_the_more_probable_is_in_the_form(tokenizers):
    tokenizer = tokenizers("mistral-v1")
    letter, byte = tokenizer.convert_tokens_to_ids(["A", "<0x41>"])
    assert letter != byte
    logprobs, _ = record_of(tokenizer, tokenizer.encode("Say"), [letter], others=[byte])
    assert logprobs["top_logprobs"] == [{"A": -1.0}]


# ---- bad words -------------------------------------------------------------------------------

WORDS = [
    "\n",
    "\t",
    "  ",
    "中",
    "中国",
    "。",
    "Paris",
    " yes",
    "...",
    "(",
    "'s",
    "🌶️",
    "é",
    "the quick",
]
WORDS += ["2024", "_x", "กรุง", "-", "Москва", "C++", "\n-"]
BEFORE = [
    "",
    "a",
    "Hello",
    "x9",
    "9",
    "\n",
    "\n\n",
    ".",
    "(",
    '"',
    "中",
    "é",
    "🌶",
    " ",
    "the ",
    "\t",
]


@pytest.mark.parametrize("name", NAMES)
def test_bad_words_are_forbidden_wherever_the_tokenizer_spells_them(tokenizers, name):
    tokenizer = tokenizers(name)
    table = token_bytes(tokenizer)
    num_checked = 0
    for word in WORDS:
        bare = word.lstrip() or word
        spellings = encode_bad_words([word], tokenizer, len(tokenizer))
        for token_ids in spellings:
            data = b"".join(table[token_id] for token_id in token_ids)
            assert data.removeprefix(b" ") == bare.encode() or data == bare.encode()
        for before in BEFORE:
            for form in (bare, " " + bare):
                if bare.isspace() and form != bare:
                    continue
                token_ids = tokenizer.encode(before + form, add_special_tokens=False)
                if any(is_word(table, token_ids[start:], bare) for start in range(len(token_ids))):
                    num_checked += 1
                    is_forbidden = any(token_ids[-len(bad) :] == bad for bad in spellings)
                    assert is_forbidden, (word, before, token_ids)
    assert num_checked > 300


def is_word(table, token_ids, bare):
    data = b"".join(table[token_id] for token_id in token_ids)
    return (data if bare.isspace() else data.lstrip(b" ")) == bare.encode()


@pytest.mark.parametrize("name", NAMES)
def test_every_single_token_that_is_the_word_is_forbidden(tokenizers, name):
    tokenizer = tokenizers(name)
    table = token_bytes(tokenizer)
    words = ("\n", ".", "a", "Paris", "中", ")", "A")
    ids_of = {word.encode(): [] for word in words}
    for token_id in range(len(tokenizer)):
        data = table[token_id]
        word = data if data.isspace() else data.lstrip(b" ")
        if word in ids_of:
            ids_of[word].append(token_id)
    for word in words:
        forbidden = encode_bad_words([word], tokenizer, len(tokenizer))
        for token_id in ids_of[word.encode()]:
            assert [token_id] in forbidden, (word, table[token_id])
    assert sum(map(len, ids_of.values())) >= len(words)


@pytest.mark.parametrize("name", SENTENCEPIECE[:3])
def test_bad_words_that_are_spelled_in_bytes(tokenizers, name):
    tokenizer = tokenizers(name)
    table = token_bytes(tokenizer)
    [newline] = table.byte_pieces(b"\n")
    assert encode_bad_words(["\n"], tokenizer, len(tokenizer)) == [[newline]]
    for word in ("中国", "Paris"):
        pieces_of_word = table.byte_pieces(word.encode())
        assert pieces_of_word in encode_bad_words([word], tokenizer, len(tokenizer))


# ---- grammars --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral-v1", "llama-form"])
def test_grammars_say_what_the_text_is(tokenizers, name):
    """Random walks through the tokens that are allowed, where one or several texts are."""
    pytest.importorskip("llguidance")
    from nanovllm.sampling.structured_outputs import GrammarCompiler
    from nanovllm.sampling_params import StructuredOutputsParams

    tokenizer = tokenizers(name)
    before = tokenizer.backend_tokenizer.to_str()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    assert tokenizer.backend_tokenizer.to_str() == before
    prompt = tokenizer.encode("The capital of France is")
    rng = random.Random(name)
    texts = [" yes", " no", "maybe", "\n", " 🌶️ hot", "中文", "  two", "\n\n x"]
    schema = {"enum": [" a", "b c", "é中"]}
    seen = set()
    for case in range(60):
        choices = rng.sample(texts, rng.randrange(1, 4))
        sources = [
            ({"choice": choices}, choices.__contains__),
            ({"regex": r" (is|was) it,? \n?(é|中|🌶)+ end"}, lambda text: text.endswith(" end")),
            ({"json": schema}, lambda text: json.loads(text) in schema["enum"]),
            ({"grammar": 'root ::= " a" ("b" | " c") "\\n"'}, [" ab\n", " a c\n"].__contains__),
        ]
        params, is_right = sources[case % 4]
        grammar = compiler.compile(StructuredOutputsParams(**params))
        completion = walk(grammar, tokenizer, rng)
        text = both_ways(tokenizer, prompt, completion)
        assert grammar.error is None and is_right(text), (params, text)
        seen.add(text)
    assert len(seen) > 15


def test_grammars_with_a_byte_level_tokenizer_that_adds_a_space():
    pytest.importorskip("llguidance")
    from nanovllm.sampling.structured_outputs import GrammarCompiler
    from nanovllm.sampling_params import StructuredOutputsParams

    tokenizer = real_tokenizers.read("austen")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer.decode(tokenizer.encode("yes")) == " yes"
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    rng = random.Random(0)
    for choices in (["yes"], [" yes"], ["she had", "he"], [" the day", " a day"]):
        grammar = compiler.compile(StructuredOutputsParams(choice=choices))
        assert decode(tokenizer, walk(grammar, tokenizer, rng), plain(), [5]) in choices
        assert grammar.error is None


def walk(grammar, tokenizer, rng):
    """Ids that a grammar allows, up to an end token or the end of the grammar."""
    import torch

    size = len(tokenizer)
    completion = []
    while not grammar.is_terminated:
        bitmask = torch.zeros(1, -(-size // 32), dtype=torch.int32)
        grammar.fill_bitmask(bitmask, 0)
        bits = np.unpackbits(bitmask.numpy().view(np.uint8)[0], bitorder="little")[:size]
        token_id = int(rng.choice(bits.nonzero()[0].tolist()))
        if token_id == tokenizer.eos_token_id:
            break
        grammar.accept(token_id)
        completion.append(token_id)
    return completion


def test_a_known_kind_takes_the_fast_way(tokenizers):
    for name in NAMES:
        try:
            tokenizer = tokenizers(name)
        except pytest.skip.Exception:
            continue
        assert isinstance(incremental_detokenizer(tokenizer), BytesDetokenizer)
