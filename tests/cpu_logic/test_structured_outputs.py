"""Texts drawn at random among the allowed tokens are as asked for, and end where they may."""

import json
import random
import re
import sys

import numpy as np
import pytest
import real_tokenizers
import torch

from nanovllm.errors import ArgumentError
from nanovllm.guards.versions import MIN_LLGUIDANCE
from nanovllm.sampling.structured_outputs import Grammar, GrammarCompiler, fill_bitmasks
from nanovllm.sampling_params import StructuredOutputsParams

pytest.importorskip("llguidance", reason="the extra structured-outputs is not installed")

ADDED_IDS = 100  # of the model's vocabulary, beyond the tokenizer's
SEED = 0
MAX_TOKENS = 4000

SCHEMA = {
    "x-guidance": {
        "whitespace_pattern": "[ \\n]{1,4}"
    },  # draws would hardly leave it, were it longer
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 18, "exclusiveMaximum": 100},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
        "kind": {"enum": ["a", "b", None]},
        "scores": {
            "type": "array",
            "items": {"$ref": "#/$defs/score"},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "scores"],
    "additionalProperties": False,
    "$defs": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}
ARITHMETIC_LARK = """
start: term (("+" | "-") term)~0..3
term: NUMBER | "(" NUMBER ")"
NUMBER: /[0-9]{1,3}/
"""
ARITHMETIC_EBNF = """
root ::= term tail? tail?
tail ::= ("+" | "-") term
term ::= number | "(" number ")"
number ::= [0-9] [0-9]? [0-9]?
"""
ARITHMETIC = re.compile(r"(\d{1,3}|\(\d{1,3}\))([+-](\d{1,3}|\(\d{1,3}\))){0,3}")


class Vocabulary:
    """A tokenizer, its compiler, and one row of a bitmask."""

    def __init__(self, name: str, end_token_ids: set[int]) -> None:
        self.tokenizer = real_tokenizers.load(name)
        self.end_token_ids = end_token_ids
        self.size = len(self.tokenizer) + ADDED_IDS
        self.compiler = GrammarCompiler(self.tokenizer, self.size, end_token_ids)
        self.bitmask = torch.empty(1, -(-self.size // 32), dtype=torch.int32)

    def compile(self, **params) -> Grammar:
        return self.compiler.compile(StructuredOutputsParams(**params))

    def allowed(self, grammar: Grammar) -> list[int]:
        self.bitmask.fill_(0x55555555)  # every word is to be overwritten
        grammar.fill_bitmask(self.bitmask, 0)
        bits = np.unpackbits(self.bitmask.numpy().view(np.uint8), bitorder="little")
        return np.flatnonzero(bits).tolist()

    def draw(self, grammar: Grammar, generator: random.Random, check_end=None) -> str:
        """Uniform among the allowed tokens to the end; `check_end(text so far, end is allowed)`."""
        token_ids: list[int] = []
        while not grammar.is_terminated:
            assert len(token_ids) < MAX_TOKENS
            allowed = self.allowed(grammar)
            may_end = self.end_token_ids.issubset(allowed)
            assert may_end or self.end_token_ids.isdisjoint(allowed)  # all of them or none
            assert allowed[-1] < len(self.tokenizer)
            if check_end:
                check_end(self.tokenizer.decode(token_ids), may_end)
            token_id = generator.choice(allowed)
            grammar.accept(token_id)
            assert grammar.error is None
            if token_id in self.end_token_ids:
                assert grammar.is_terminated
                break
            token_ids.append(token_id)
        assert set(self.allowed(grammar)) == self.end_token_ids
        return self.tokenizer.decode(token_ids)


@pytest.fixture(scope="module", params=["austen", "qwen3"])
def vocabulary(request) -> Vocabulary:
    return Vocabulary(request.param, {151643, 151645} if request.param == "qwen3" else {0, 2})


def check_person(text: str) -> None:
    person = json.loads(text)
    assert set(person) <= set(SCHEMA["properties"]) and {"name", "age", "scores"} <= set(person)
    assert isinstance(person["name"], str) and 1 <= len(person["name"]) <= 8
    assert type(person["age"]) is int and 18 <= person["age"] < 100
    assert re.fullmatch("[A-Z]{2}[0-9]{3}", person.get("code", "AB123"))
    assert person.get("kind") in ("a", "b", None)
    assert 1 <= len(person["scores"]) <= 3
    assert all(0 <= score <= 1 for score in person["scores"])


@pytest.mark.parametrize("form", ["dict", "text"])
def test_json_schema(vocabulary, form):
    grammar = vocabulary.compile(json=SCHEMA if form == "dict" else json.dumps(SCHEMA))
    generator = random.Random(SEED)
    texts = {vocabulary.draw(grammar.fork(), generator) for _ in range(8)}
    assert len(texts) == 8
    for text in texts:
        check_person(text)


def test_json_schema_of_a_pydantic_model(vocabulary):
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")
    model = pydantic.create_model("Car", wheels=(int, pydantic.Field(ge=3, le=4)), red=(bool, ...))
    text = vocabulary.draw(vocabulary.compile(json=model), random.Random(SEED))
    car = model.model_validate_json(text)
    assert car.wheels in (3, 4)


def test_json_object(vocabulary):
    """Draws at random would nest for ever, so a text is followed and its next tokens are judged."""
    grammar = vocabulary.compile(json_object=True)
    for part in ('{"a', '": [1, {"b": null', '}], "c": "d\\n', '"'):
        for token_id in vocabulary.tokenizer.encode(part, add_special_tokens=False):
            assert token_id in vocabulary.allowed(grammar)
            grammar.accept(token_id)
        assert vocabulary.end_token_ids.isdisjoint(vocabulary.allowed(grammar))
    grammar.accept(*vocabulary.tokenizer.encode("}", add_special_tokens=False))
    assert grammar.is_terminated and grammar.error is None


@pytest.mark.parametrize(
    "pattern",
    ["a|ab|abc", r"[a-z]{2,5}(\.[a-z]{1,3})?", r"[0-9]{3}-[0-9]{2}", "(ha){1,4}!?", "(é|😀|\\n)+x"],
)
def test_regex_may_end_exactly_at_a_match(vocabulary, pattern):
    grammar = vocabulary.compile(regex=pattern)
    generator = random.Random(SEED)

    def check_end(text: str, may_end: bool) -> None:
        assert may_end == (re.fullmatch(pattern, text) is not None)

    for _ in range(10):
        text = vocabulary.draw(grammar.fork(), generator, check_end)
        assert re.fullmatch(pattern, text)


def test_choice(vocabulary):
    choices = ["yes", "no", "not sure", 'a "quoted" \\ (x|y)* one', "é😀\n"]
    grammar = vocabulary.compile(choice=choices)
    generator = random.Random(SEED)
    assert {vocabulary.draw(grammar.fork(), generator) for _ in range(60)} == set(choices)


@pytest.mark.parametrize("grammar", [ARITHMETIC_LARK, ARITHMETIC_EBNF], ids=["lark", "ebnf"])
def test_grammar(vocabulary, grammar):
    start = vocabulary.compile(grammar=grammar)
    generator = random.Random(SEED)
    texts = {vocabulary.draw(start.fork(), generator) for _ in range(20)}
    assert len(texts) > 10 and any("(" in text for text in texts)
    assert all(ARITHMETIC.fullmatch(text) for text in texts)


def test_special_tokens_are_never_text(vocabulary):
    allowed = vocabulary.allowed(vocabulary.compile(regex="(?s:.*)"))
    special = set(vocabulary.tokenizer.all_special_ids)
    assert special & set(allowed) == vocabulary.end_token_ids & special


def test_fork_and_cache_share_no_state(vocabulary):
    first = vocabulary.compile(regex="[ab]{2}")
    (a,) = vocabulary.tokenizer.encode("a", add_special_tokens=False)
    before = vocabulary.allowed(first)
    first.accept(a)
    fork = first.fork()
    fork.accept(a)
    assert fork.is_terminated and not first.is_terminated
    again = vocabulary.compile(regex="[ab]{2}")  # from the cache
    assert vocabulary.allowed(again) == before != vocabulary.allowed(first)


def test_many_rows_equal_one_by_one(vocabulary):
    start = vocabulary.compile(json=SCHEMA)
    generator = random.Random(SEED)
    grammars = [start.fork() for _ in range(9)]
    for steps, grammar in enumerate(grammars):
        for _ in range(steps):
            grammar.accept(generator.choice(vocabulary.allowed(grammar)))
    expected = torch.zeros(len(grammars) + 1, vocabulary.bitmask.shape[1], dtype=torch.int32)
    for index, grammar in enumerate(grammars):
        grammar.fill_bitmask(expected, index)
    for count in (1, len(grammars)):
        bitmask = torch.zeros_like(expected)
        fill_bitmasks(grammars[:count], bitmask)
        assert torch.equal(bitmask[:count], expected[:count]) and not bitmask[count:].any()


def test_after_the_end_only_end_tokens(vocabulary):
    grammar = vocabulary.compile(choice=["a"])
    (a,) = vocabulary.tokenizer.encode("a", add_special_tokens=False)
    grammar.accept(a)
    for end_token_id in sorted(vocabulary.end_token_ids):
        assert grammar.is_terminated
        assert set(vocabulary.allowed(grammar)) == vocabulary.end_token_ids
        grammar.accept(end_token_id)
    assert grammar.error is None


def test_a_token_that_is_not_allowed_ends_the_grammar(vocabulary):
    for choice, wrong in ((["aa"], "b"), (["a"], "a")):
        grammar = vocabulary.compile(choice=choice)
        (a,) = vocabulary.tokenizer.encode("a", add_special_tokens=False)
        (wrong_id,) = vocabulary.tokenizer.encode(wrong, add_special_tokens=False)
        if a in vocabulary.allowed(grammar):
            grammar.accept(a)
        grammar.accept(wrong_id)
        assert grammar.is_terminated and grammar.error
        assert set(vocabulary.allowed(grammar)) == vocabulary.end_token_ids
        grammar.accept(wrong_id)  # harmless
        assert grammar.is_terminated and grammar.error


def test_dead_ends(tmp_path):
    """A vocabulary without "z": nothing to begin with is refused, a dead end on the way ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE(vocab={"<|im_end|>": 0, "a": 1, "b": 2}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")
    compiler = GrammarCompiler(tokenizer, vocab_size=40, end_token_ids=[0])
    with pytest.raises(ArgumentError, match="no text of this vocabulary"):
        compiler.compile(StructuredOutputsParams(regex="z"))
    grammar = compiler.compile(StructuredOutputsParams(regex="az|bz"))
    bitmask = torch.full((2, 2), -1, dtype=torch.int32)
    for allowed, token_id in ([0b110, 1], [0b001, 0]):
        grammar.fill_bitmask(bitmask, 1)
        assert bitmask.tolist() == [[-1, -1], [allowed, 0]]
        grammar.accept(token_id)
    assert grammar.is_terminated and grammar.error == "no token can follow"


def test_unusable_tokenizers_are_named():
    tokenizer = real_tokenizers.load("austen")
    for *args, message in (
        (tokenizer, 10, {2}, "vocab size too small"),
        (tokenizer, 4096, set(), "eos_token"),
        (tokenizer, 4096, {9999}, "9999"),
        (object(), 4096, {2}, "fast tokenizers"),
    ):
        with pytest.raises(ArgumentError, match=f"structured outputs, tokenizer: .*{message}"):
            GrammarCompiler(*args)


@pytest.mark.parametrize("installed", ["1.8.9", "0.7.30"])
def test_an_older_library_is_refused_by_name(monkeypatch, installed):
    """1.6.1 fails with a TypeError in the middle of a call."""
    monkeypatch.setattr("nanovllm.guards.versions.version", lambda name: installed)
    needed = rf"llguidance {MIN_LLGUIDANCE} or newer, {installed} is installed: pip install"
    with pytest.raises(ArgumentError, match=needed):
        GrammarCompiler(real_tokenizers.load("austen"), 4096, {2})


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(ArgumentError, match=r"pip install 'nanovllm\[structured-outputs\]'"):
        GrammarCompiler(None, 384, {2})
