"""Whatever is asked for as a structured output is enforced exactly or refused, and ends nothing."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_python import ForkedPython
from transformers import AutoTokenizer

import nanovllm
from nanovllm.errors import ArgumentError
from nanovllm.sampling.finite_patterns import count_matches
from nanovllm.sampling.structured_outputs import Grammar, GrammarCompiler, fill_bitmasks
from nanovllm.sampling_params import StructuredOutputsParams

pytest.importorskip("llguidance", reason="the extra structured-outputs is not installed")

AUSTEN = Path(nanovllm.__file__).parent / "assets" / "austen-7m"
ROOT = Path(nanovllm.__file__).resolve().parents[1]
END = 0
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
COMPACT = {"x-guidance": {"whitespace_flexible": False}}


class Vocabulary:
    """austen-7m's tokenizer and a compiler over it."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(AUSTEN)
        self.size = len(self.tokenizer)
        self.compiler = GrammarCompiler(self.tokenizer, self.size, {0, 2}, timeout=120)
        self.texts = [self.compiler._tokenizer.decode_bytes([i]) for i in range(self.size)]

    def compile(self, **params) -> Grammar:
        return self.compiler.compile(StructuredOutputsParams(**params))

    def allowed(self, grammar: Grammar) -> list[int]:
        bitmask = torch.empty(1, -(-self.size // 32), dtype=torch.int32)
        grammar.fill_bitmask(bitmask, 0)
        bits = np.unpackbits(bitmask.numpy().view(np.uint8), bitorder="little")
        return np.flatnonzero(bits).tolist()

    def draw(self, grammar: Grammar, generator: random.Random, most: int = 120) -> str | None:
        """A text of allowed tokens, short ones preferred; None if it has not ended by then."""
        token_ids: list[int] = []
        while not grammar.is_terminated and len(token_ids) < most:
            allowed = self.allowed(grammar)
            if END in allowed and generator.random() < 0.4:
                break
            weights = [1 / (1 + len(self.texts[i])) ** 2 for i in allowed]
            token_ids += generator.choices(allowed, weights)
            grammar.accept(token_ids[-1])
            assert grammar.error is None
        if not grammar.is_terminated and END not in self.allowed(grammar):
            return None
        return b"".join(self.texts[i] for i in token_ids if i not in (0, 2)).decode()

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Whether `text` may be generated and be all of the completion."""
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            if token_id not in self.allowed(grammar):
                return False
            grammar.accept(token_id)
        return END in self.allowed(grammar)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary()


def without_repeated_keys(pairs):
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


# What a schema says, as Python. Whether a completion is right is judged by these alone.
OBJECT = {"type": "object"}
NAMED_BY_PATTERN = {
    **OBJECT,
    "patternProperties": {"^[ab]{16}$": DIGIT},
    "additionalProperties": False,
    "maxProperties": 2,
}
RULES = [
    ({"type": "number", "exclusiveMinimum": 5, "maximum": 9}, lambda x: 5 < x <= 9),
    ({"type": "number", "exclusiveMinimum": 4.5, "maximum": 5.5}, lambda x: 4.5 < x <= 5.5),
    ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, None),
    ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0.25}, lambda x: -0.5 <= x < 0.25),
    ({"type": "integer", "minimum": -(2**53 - 1)}, lambda x: x >= -(2**53 - 1)),
    ({"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 99}, lambda x: x % 7 == 0),
    ({"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 9}, lambda x: x % 0.25 == 0),
    ({"enum": [1.0, 2.5, -0.0, 1e-7]}, lambda x: x in (1, 2.5, 0, 1e-7)),
    ({"type": "integer", "enum": [2.0, 2.5, "2"]}, lambda x: x == 2),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 3}, lambda x: x == 3),
    (
        {"$schema": "http://json-schema.org/draft-04/schema#", **DIGIT, "exclusiveMinimum": True},
        lambda x: 0 < x <= 9,
    ),
    (
        {
            **OBJECT,
            "patternProperties": {"^[ab]+$": DIGIT},
            "additionalProperties": False,
            "minProperties": 2,
            "maxProperties": 3,
        },
        lambda x: 2 <= len(x) <= 3,
    ),
    (
        {**OBJECT, "patternProperties": {"^[a-c]{4,}$": DIGIT}, "additionalProperties": False},
        lambda x: all(re.fullmatch("[a-c]{4,}", key) for key in x),
    ),
    (
        {**OBJECT, "properties": {"a": DIGIT}, "additionalProperties": DIGIT, "required": ["b"]},
        lambda x: "b" in x and set(map(type, x.values())) == {int},
    ),
    (
        {"type": "array", "prefixItems": [DIGIT, False], "items": DIGIT},
        lambda x: len(x) <= 1,
    ),
    ({"type": "string", "pattern": '^[^"\\\\]{1,3}$'}, lambda x: not set('"\\') & set(x)),
    ({"type": "string", "pattern": "^[^]-]{1,3}$"}, lambda x: not set("]-") & set(x)),
    ({"type": "string", "pattern": "^[\\x00-\\x1f]$"}, lambda x: x < " "),
    ({"type": "string", "pattern": "^[\\\\x00]$"}, lambda x: x in "\\x0"),
    ({"type": "string", "pattern": "^a|b$", "maxLength": 4}, lambda x: x[0] == "a" or x[-1] == "b"),
    (
        {
            "$defs": {"named": NAMED_BY_PATTERN},
            **OBJECT,
            "properties": {"x": {"allOf": [{"$ref": "#/$defs/named"}], "default": {}}},
            "additionalProperties": False,
        },
        lambda x: all(len(k) == 16 and y in range(10) for k, y in x.get("x", {}).items()),
    ),
    ({"allOf": [{"pattern": "^a"}, {"type": "string", "maxLength": 3}]}, lambda x: x[0] == "a"),
]


@pytest.mark.parametrize(
    ("schema", "holds"), RULES, ids=[json.dumps(schema)[:60] for schema, _ in RULES]
)
def test_a_completion_is_what_the_schema_says_or_the_schema_is_refused(vocabulary, schema, holds):
    if holds is None:
        with pytest.raises(ArgumentError, match="cannot be enforced"):
            vocabulary.compile(json=schema)
        return
    grammar = vocabulary.compile(json={**schema, **COMPACT})
    generator = random.Random(1)
    texts = [vocabulary.draw(grammar.fork(), generator) for _ in range(12)]
    values = [json.loads(t, object_pairs_hook=without_repeated_keys) for t in texts if t]
    assert values and all(map(holds, values))


def test_a_schema_that_may_hold_itself_is_taken(vocabulary):
    tree = {
        **OBJECT,
        "properties": {"n": DIGIT, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["n", "next"],
        "additionalProperties": False,
    }
    for schema in (
        tree,
        {"type": "array", "items": {"$ref": "#"}},
        {**OBJECT, "additionalProperties": {"$ref": "#"}},
        {"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "items": {"$ref": "#"}, "prefixItems": [True], "minItems": 1},
    ):
        vocabulary.compile(json=schema)
    assert vocabulary.takes(vocabulary.compile(json=tree), '{"n":1,"next":{"n":2,"next":null}}')


@pytest.mark.parametrize("number", ["9007199254740991", "-9007199254740991", "0.1", "1e15", "-1.5"])
def test_a_number_that_a_float_holds_is_exact(vocabulary, number):
    for schema in (f'{{"const": {number}}}', f'{{"enum": [{number}, "x"]}}'):
        grammar = vocabulary.compile(json=schema)
        texts = [vocabulary.draw(grammar.fork(), random.Random(seed)) for seed in range(8)]
        assert {json.loads(t) for t in texts if t != '"x"'} == {json.loads(number)}


@pytest.mark.parametrize(
    "number",
    """9007199254740992 -9007199254740992 1234567890123456789 -9223372036854775808
    18446744073709551616 1e22 1e400 1e-400 0.10000000000000000001 5e-324 1.7976931348623157e308
    123456789012345678901234567890 NaN Infinity""".split(),
)
@pytest.mark.parametrize(
    "keyword",
    ["const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
)
def test_a_number_that_a_float_does_not_hold_is_refused(vocabulary, keyword, number):
    value = f"[1, [{number}]]" if keyword == "enum" else number
    schema = f'{{"type": "object", "properties": {{"a": {{"{keyword}": {value}}}}}}}'
    with pytest.raises(ArgumentError, match="^structured outputs, json: "):
        vocabulary.compile(json=schema)


REFUSED = [
    # Keywords, also those that the schema's draft does not know.
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"not": {"type": "string"}}}, "not"),
    ({"json": {"type": "array", "contains": {}}}, "contains"),
    ({"json": {"if": {}, "then": {}}}, "if"),
    ({"json": {"dependentRequired": {"a": ["b"]}}}, "dependentRequired"),
    ({"json": {"propertyNames": {"pattern": "a"}}}, "propertyNames"),
    ({"json": {"unevaluatedProperties": False}}, "unevaluatedProperties"),
    ({"json": {"type": "string", "format": "color"}}, "color"),
    ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
    ({"json": {"$ref": "https://example.com/schema"}}, "example.com"),
    ({"json": {"type": "text"}}, "text"),
    ({"json": {"enum": []}}, "json: "),
    ({"json": {"$ref": "#"}}, "no text"),
    ({"json": {"const": float("nan")}}, "json: "),
    (
        {"json": {"$schema": "http://json-schema.org/draft-07/schema#", "dependentRequired": {}}},
        "d",
    ),
    ({"json": {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": []}}, "prefix"),
    ({"json": {"$schema": "http://json-schema.org/draft-03/schema#"}}, "draft"),
    ({"json": {"items": [{"$dynamicRef": "#x"}]}}, "dynamicRef"),
    ({"json": {"properties": {"a": {"$schema": "x"}}}}, "schema"),
    ({"json": {"type": "string", "format": "unknown"}}, "unknown"),
    ({"json": {"x-guidance": {"lenient": True}}}, "lenient"),
    ({"json": {"x-guidance": {"coerce_one_of": True}}}, "coerce_one_of"),
    ({"json": {"x-guidance": {"item_separator": ";"}}}, "item_separator"),
    ({"json": {"x-guidance": {"json_allowed_escapes": "u"}}}, "json_allowed_escapes"),
    # Objects whose names run out.
    ({"json": {**OBJECT, "patternProperties": {"^a$": {}}, "minProperties": 2}}, "matches 1 "),
    ({"json": {**OBJECT, "patternProperties": {"^(a|b)c?$": {}}}}, "matches 4 "),
    (
        {
            "json": {
                "properties": {"a": {}},
                "patternProperties": {"^a$": {}},
                "additionalProperties": False,
            }
        },
        "matches 1 ",
    ),
    (
        {"json": {"properties": {"a": {}}, "additionalProperties": False, "minProperties": 2}},
        "minProperties",
    ),
    ({"json": {**OBJECT, "additionalProperties": False, "required": ["a"]}}, "'a'"),
    (
        {"json": {"allOf": [{"patternProperties": {"^a": {}}}, {"additionalProperties": False}]}},
        "allOf",
    ),
    ({"json": {"minProperties": 3, "anyOf": [{"properties": {"a": {}}}]}}, "minProperties"),
    # Numbers.
    ({"json": {"multipleOf": 4294967295}}, "multipleOf"),
    ({"json": {"multipleOf": 0}}, "multipleOf"),
    ({"json": {"allOf": [{"multipleOf": 4999}, {"multipleOf": 4993}]}}, "multipleOf"),
    ({"json": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-7}}, "exclusiveMinimum"),
    (
        {"json": {"allOf": [{"exclusiveMaximum": 3}, {"type": "number", "minimum": 2.5}]}},
        "exclusiveMaximum",
    ),
    ({"json": {"type": "string", "minLength": 10**12}}, "minLength"),
    ({"json": {"type": "string", "maxLength": 1.5}}, "maxLength"),
    # The text of the schema.
    ({"json": '{"type": "string", "type": "integer"}'}, "repeats the key 'type'"),
    ({"json": '{"properties": {"a": {}, "b": {}, "a": {"const": 1}}}'}, "repeats the key 'a'"),
    ({"json": '{"default": 1e400}'}, "column"),
    ({"json": {"const": "a\x01"}}, "x01"),
    ({"json": {"const": "\x7f"}}, "x7f"),
    ({"json": '{"const": "\\ud800"}'}, "escape"),
    ({"json": {"$ref": "#/$defs/a"}}, "names nothing"),
    ({"json": {"$ref": "#/a/0", "a": [{"const": -(2**63)}]}}, "const"),
    ({"json": {"$ref": "file:///etc/hosts"}}, "hosts"),
    # What no text can end.
    ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no text"),
    (
        {
            "json": {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
            }
        },
        "no text",
    ),
    ({"json": {**OBJECT, "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}, "no text"),
    ({"json": {**OBJECT, "additionalProperties": {"$ref": "#"}, "minProperties": 1}}, "no text"),
    ({"json": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}, "no text"),
    ({"json": {**OBJECT, "properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}]}}}}, "no text"),
    ({"json": '{"const": ' + "[" * 121 + "]" * 121 + "}"}, "120 levels"),
    # Patterns that dialects read in two ways.
    ({"json": {"type": "string", "pattern": "[a&&b]"}}, "&&"),
    ({"json": {"type": "string", "pattern": "[[:alpha:]]"}}, "inside of"),
    ({"json": {"type": "string", "pattern": "a++"}}, "possessive"),
    ({"json": {"type": "string", "pattern": "\\x00"}}, "NUL"),
    ({"json": {"type": "string", "pattern": "\\P{L}"}}, "control"),
    ({"regex": "(ab)*+c"}, "possessive"),
    # Other regexes.
    ({"regex": "[a"}, "unclosed"),
    ({"regex": "a(?=b)"}, "look-ahead"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": "[a&&b]"}, "no text"),
    # Grammars.
    ({"grammar": "start: missing"}, "missing"),
    ({"grammar": 'start: start "a"'}, "no text"),
    ({"grammar": 'root ::= "a" missing'}, "missing"),
    ({"grammar": "nothing of the sort"}, "grammar: "),
    ({"grammar": 'start: %json {"const": 1}'}, "%json"),
    ({"grammar": 'start: <a#b> %json {"const": 1}'}, "%json"),
    ({"grammar": 'start: r\nr[stop="b"]: /[ab]*/'}, "stop="),
    ({"grammar": "start: r\nr[temperature=0.5]: /a/"}, "temperature="),
    ({"grammar": "start: @other"}, "@"),
    ({"grammar": 'root ::= "a"\nroot ::= "b"'}, "2 times"),
    ({"grammar": 'root ::= "\\q"'}, "escape"),
    ({"grammar": 'root ::= "a'}, "does not end"),
    ({"grammar": "root ::= []"}, "empty"),
    ({"grammar": "root ::= [b-a]"}, "range"),
    ({"grammar": 'a ::= "x"'}, "root"),
    ({"grammar": 'root ::= "a"{3,2}'}, "range"),
    # Sizes.
    ({"regex": "a" * 2_000_001}, "2000000"),
    ({"choice": ["a", "b" * 10_001]}, "10000"),
    ({"json": {"patternProperties": {"a" * 100_001: {}}}}, "100000"),
]


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_is_not_enforced_exactly_is_refused_by_name(vocabulary, params, message):
    with pytest.raises(ArgumentError, match=re.escape(message)) as caught:
        vocabulary.compile(**params)
    text = str(caught.value)
    assert text.startswith(f"structured outputs, {next(iter(params))}: ") and len(text) < 500


@pytest.mark.parametrize("kind", ["json", "regex", "choice", "grammar"])
def test_a_lone_surrogate_and_values_without_a_short_repr_are_named(kind):
    bad = {"json": {"const": "\ud800"}, "choice": ["\ud800"]}.get(kind, "\ud800")
    with pytest.raises(ArgumentError, match="surrogate"):
        StructuredOutputsParams(**{kind: bad})
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for value in (deep, {"a": 10**5000}, [deep], [10**5000]):
        with pytest.raises(ArgumentError) as caught:
            StructuredOutputsParams(**{kind: value})
        assert len(str(caught.value)) < 600
    while deep:  # else freeing it is recursive
        deep = deep.pop("a")


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= "\\u0041\\x42\\n\\"\\\\" [\\u00e9x]', r'AB\n"\\[éx]'),
        ("root ::= [a&&~~c]+", "[a&~c]+"),
        ("root ::= [a-c-]+ [^a]", r"[a-c\-]+[^a]"),
        ('root ::= [\\]\\[/] # "x"\n', r"[\]\[/]"),
        ("root ::= .", "(?s:.)"),
        ('root ::= (\n"a" |\n"b" # c\n){2,3} "c"?', "[ab]{2,3}c?"),
        ('root ::= root "a" | "b"', "ba*"),
        ('  root ::= "a" # x\n\n  # y\n  | "b"\r\n\t| c\n  c ::= "|\\n|"', "a|b|\\|\n\\|"),
        (r'root ::= [^"\\\x7F\x00-\x1F]+ "\x00"', r'[^"\\\x7F\x00-\x1F]+\x00'),
        ('start: "//" /[\\/]a/ // "c"\n | "stop=" # "d"', "///a|stop="),
        ('start: "a"~2..3 "%json"', "aa+%json"),
    ],
)
def test_a_grammar_is_read_as_it_is_written(vocabulary, grammar, pattern):
    start = vocabulary.compile(grammar=grammar)
    generator = random.Random(2)
    texts = [vocabulary.draw(start.fork(), generator) for _ in range(12)]
    assert any(texts) and all(re.fullmatch(pattern, text) for text in texts if text is not None)


@pytest.mark.parametrize(
    "params",
    [
        {"json": {"type": "string", "pattern": "[" * 99_000}},
        {"json": {"type": "string", "pattern": "[" + "\\\\" * 49_000}},
        {"json": {"type": "string", "pattern": "(a" * 49_000}},
        {"regex": "[" * 300_000},
        {"grammar": 'start: "' + '\\"' * 300_000},
        {"grammar": "start: /" + "\\/" * 300_000},
        {"grammar": "start: missing" + "\n" * 300_000},
        {"grammar": "root ::= " + "[" * 300_000},
        {"grammar": "root ::= x" + "\n" * 300_000},
        {"grammar": "root ::= x" + "\n#|" * 300_000},
    ],
)
def test_a_malformed_text_is_read_in_linear_time(vocabulary, params):
    start = time.monotonic()
    with pytest.raises(ArgumentError):
        vocabulary.compile(**params)
    assert time.monotonic() - start < 60  # a quadratic way takes minutes


def test_a_count_that_texts_cannot_reach_is_refused(vocabulary):
    for pattern in ("a{1000000000}", "((a{1000}){1000}){1000}"):
        with pytest.raises(ArgumentError, match="regex: not even short texts"):
            vocabulary.compile(regex=pattern)


def test_many_choices_and_special_characters(vocabulary):
    choices = [chr(code) for code in range(300)] + ["a|b", "a.b", "(", "\r\n", "ab", "a"]
    grammar = vocabulary.compile(choice=choices)
    for choice in ("\x00", "\n", "\\", "^", "#", " ", "-", "é", *choices[-6:]):
        assert vocabulary.takes(grammar.fork(), choice), choice
    assert not vocabulary.takes(grammar.fork(), "a.c") and not vocabulary.takes(grammar.fork(), "")
    many = vocabulary.compile(choice=[f"number {i}" for i in range(20_000)])
    assert vocabulary.takes(many.fork(), "number 19999")
    assert not vocabulary.takes(many.fork(), "number 20000")


@pytest.mark.parametrize(
    ("text", "repeating"),
    [
        ('{"a":1,"a', ['"']),
        ('{"a":1,"', ['a"']),
        ('{"a":{"a":1},"b":[{"a":1},{"a":2}],"b', ['"']),
        ('{"a\\"b":1,"a\\"b', ['"']),
        ('{"":1,"', ['"']),
        ('{"a":1},'[:-2] + ',"x":{"a', []),
        ('{"a":"a', []),
    ],
)
def test_a_key_is_not_repeated(vocabulary, text, repeating):
    """Exactly the tokens that complete such a key are forbidden beside those of the grammar."""
    grammar = vocabulary.compile(json_object=True)
    for token_id in vocabulary.tokenizer.encode(text, add_special_tokens=False):
        grammar.accept(token_id)
    free = Grammar(grammar._matcher.deep_copy(), grammar._end_row)
    forbidden = set(vocabulary.allowed(free)) - set(vocabulary.allowed(grammar))
    expected = {
        token_id
        for token_id, piece in enumerate(vocabulary.texts)
        if any(piece.startswith(end.encode()) for end in repeating)
    }
    assert forbidden == expected & set(vocabulary.allowed(free))
    assert not repeating or repeating == ['a"'] or forbidden
    fork = grammar.fork()
    assert vocabulary.allowed(fork) == vocabulary.allowed(grammar)


def test_a_key_has_one_spelling(vocabulary):
    grammar = vocabulary.compile(json={"properties": {"a": DIGIT}})
    assert vocabulary.takes(grammar.fork(), '{"a":1,"b":"\\n"}')
    assert not vocabulary.takes(grammar.fork(), '{"a":1,"\\u0061":"x"}')


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("^a$", 1),
        ("^(a|bc)?$", 3),
        ("^[ab]{2}$", 4),
        ("^[a-z]{2}$", 676),
        (r"^\d$", 10),
        ("^a$|^b$", 2),
        ("^(?:ab){3}$", 1),
        ("^$", 1),
        ("^(a{0,3}){0,2}$", 21),  # ways to match, some of which give the same text
        ("a$", 1000),
        ("^a", 1000),
        ("^a+$", 1000),
        ("^a$|b", 1000),
        ("^[a-z]{1,40}$", 1000),
        ("^(a", 1000),
    ],
)
def test_names_that_a_pattern_matches_are_counted(pattern, count):
    assert count_matches(pattern, 1000) == count


CRASHES = """
    import json
    from nanovllm.config import Config
    from nanovllm.errors import ArgumentError
    from nanovllm.inputs.tokenizer import load_tokenizer
    from nanovllm.sampling.structured_outputs import GrammarCompiler
    from nanovllm.sampling_params import StructuredOutputsParams

    def chain(count, link):
        defs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
        return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{count}": {"type": "integer"}}}

    def nested(count):
        return {"anyOf": [nested(count - 1)]} if count else {}

    rules = "".join(f"r{i}: r{i + 1}\\n" for i in range(8_000))
    terminals = "".join(f"R{i}: R{i + 1}\\n" for i in range(12_000))
    cases = [
        {"json": chain(8_000, lambda ref: ref)},
        {"json": chain(4_000, lambda ref: {"properties": {"a": ref}})},
        {"json": chain(8_000, lambda ref: {"anyOf": [ref, {"type": "null"}]})},
        {"json": nested(300)},
        {"json": '{"const":' + "[" * 50_000 + "]" * 50_000 + "}"},
        {"json": {"const": -(2**63)}},
        {"json": {"anyOf": [{"enum": [{"a": [-(2**63)]}]}]}},
        {"regex": "(" * 200_000 + "a" + ")" * 200_000},
        {"grammar": f"start: r0\\n{rules}r8000: 'x'"},
        {"grammar": f'start: r0\\n{rules}r8000: "x"'},
        {"grammar": f'start: R0\\n{terminals}R12000: "x"'},
        {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
        {"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000},
        {"grammar": 'start: %json {"const": -9223372036854775808}'},
    ]
    compiler = GrammarCompiler(load_tokenizer(Config(AUSTEN)), 4096, {0, 2}, 60)
    for number, case in enumerate(cases):
        try:
            compiler.compile(StructuredOutputsParams(**case))
        except ArgumentError as error:
            assert len(str(error)) < 600
            print(number, "refused", flush=True)
    compiler.compile(StructuredOutputsParams(grammar='start: "a"'))
    print("goes on")
"""


def test_nothing_ends_the_process():
    script = f"AUSTEN = {str(AUSTEN)!r}\n" + textwrap.dedent(CRASHES)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ForkedPython([sys.executable, "-c", script], text=True, **pipes) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    expected = [f"{number} refused" for number in range(14)] + ["goes on"]
    assert out.splitlines() == expected


HANGS = [
    {"regex": "a?" * 100_000},
    {"grammar": "start: T\nT: " + " & ".join(f"/(?s:.*)a{i}(?s:.*)/" for i in range(60))},
    {"json": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(60)]}},
]


@pytest.mark.parametrize("params", HANGS, ids=["regex", "grammar", "json"])
def test_a_time_limit_ends_what_would_take_for_ever(params):
    tokenizer = AutoTokenizer.from_pretrained(AUSTEN)
    compiler = GrammarCompiler(tokenizer, 4096, {0, 2}, timeout=120)
    compiler.compile(StructuredOutputsParams(regex="a" * 301))  # starts the process
    trial = compiler._trials._process
    compiler._seconds = 0.5  # of these alone: the others are to be done on any machine
    start = time.monotonic()
    for _ in range(2):  # the second time it is known
        with pytest.raises(ArgumentError, match=r"structured_outputs_timeout \(0\.5 s\)"):
            compiler.compile(StructuredOutputsParams(**params))
    assert time.monotonic() - start < 30  # seconds of slack for a loaded machine
    assert trial.poll() is not None and compiler._trials._process is None
    compiler._seconds = 120
    assert compiler.compile(StructuredOutputsParams(regex="b" * 301)).error is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grammar_is_tried_again_when_the_other_process_was_killed(number):
    compiler = GrammarCompiler(AutoTokenizer.from_pretrained(AUSTEN), 4096, {0, 2}, timeout=120)
    compiler.compile(StructuredOutputsParams(regex="a" * 301))  # starts the process
    trial = compiler._trials._process
    os.kill(trial.pid, signal.SIGSTOP)  # so that it is there when the next grammar comes
    threading.Timer(0.3, trial.send_signal, [number]).start()
    threading.Timer(0.4, trial.send_signal, [signal.SIGCONT]).start()
    assert compiler.compile(StructuredOutputsParams(regex="b" * 301)).error is None
    assert compiler._trials._process is not trial
    compiler.close()


def test_the_other_process_ends_with_the_engine(tmp_path):
    """However that ends, and though the other one is busy."""
    script = f"""
        from nanovllm.sampling.grammar_process import TrialProcess

        setup = dict(vocab_size=4096, end_token_ids=[0, 2])
        setup["tokenizer"] = open({str(AUSTEN / "tokenizer.json")!r}).read()
        trials = TrialProcess(lambda: setup)
        job = dict(kind="lark", limits={{}})
        trials.try_grammar({{**job, "source": 'start: "a"'}}, 600, "grammar")
        print(trials._process.pid, flush=True)
        trials.try_grammar({{**job, "source": {HANGS[1]["grammar"]!r}}}, 600, "grammar")
    """
    engine = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert engine.stdout is not None
    trial_pid = int(engine.stdout.readline())
    os.kill(trial_pid, 0)  # it is there
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    engine.stdout.close()
    deadline = time.monotonic() + 30
    while is_alive(trial_pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_does_not_start_is_named(monkeypatch):
    compiler = GrammarCompiler(AutoTokenizer.from_pretrained(AUSTEN), 4096, {0, 2})
    for executable in ("/no/such/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(RuntimeError, match="the process that tries grammars did not start"):
            compiler.compile(StructuredOutputsParams(regex="a" * 301))
    monkeypatch.undo()
    assert compiler.compile(StructuredOutputsParams(regex="a" * 301)).error is None


def test_the_other_process_ends_with_its_compiler():
    tokenizer = AutoTokenizer.from_pretrained(AUSTEN)
    for end in (GrammarCompiler.close, None):
        compiler = GrammarCompiler(tokenizer, 4096, {0, 2})
        compiler.compile(StructuredOutputsParams(regex="a" * 301))
        trial = compiler._trials._process
        assert trial.poll() is None
        if end:
            end(compiler)
        else:
            del compiler  # nothing else holds it, so nothing waits for a garbage collection
        assert trial.poll() is not None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class PanicException(BaseException):
    """Named and derived as pyo3 does."""


class Panicking:
    """A matcher that panics."""

    def __getattr__(self, name):
        def panic(*args):
            raise PanicException("index out of bounds")

        return panic


@pytest.mark.parametrize("method", ["fill_bitmask", "accept"])
def test_a_panic_of_the_library_ends_one_grammar(vocabulary, method):
    good = vocabulary.compile(choice=["a"])
    bad = Grammar(Panicking(), good._end_row)
    bitmask = torch.zeros(1, -(-vocabulary.size // 32), dtype=torch.int32)
    if method == "accept":
        bad.accept(1)
    else:
        bad.fill_bitmask(bitmask, 0)
    assert bad.is_terminated and bad.error == "llguidance failed: 'index out of bounds'"
    assert vocabulary.allowed(bad) == [0, 2]
    bad.accept(0)
    assert bad.error


def test_a_panic_among_many_rows_spoils_no_other(vocabulary):
    good = vocabulary.compile(choice=["ab", "cd"])
    grammars = [good.fork(), Grammar(Panicking(), good._end_row), good.fork()]
    bitmask = torch.zeros(3, -(-vocabulary.size // 32), dtype=torch.int32)
    for _ in range(2):  # once it panics, once it is known to
        fill_bitmasks(grammars, bitmask)
        assert torch.equal(bitmask[0], bitmask[2]) and bitmask[0].any()
        assert bitmask[1].numpy().tolist() == good._end_row.tolist()
        assert [grammar.error is None for grammar in grammars] == [True, False, True]


def test_ctrl_c_is_no_failure_of_a_grammar(vocabulary):
    class Interrupted:
        def consume_token(self, token_id):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Grammar(Interrupted(), np.zeros(1, dtype=np.int32)).accept(1)


def test_a_limit_that_the_shortest_texts_exceed_is_an_error_of_the_grammar(vocabulary):
    alternatives = "|".join(f'"v{i}"' for i in range(3000))
    with pytest.raises(ArgumentError, match="grammar: not even short texts: .*2000"):
        vocabulary.compile(grammar=f"start: {alternatives}")


@pytest.mark.parametrize("letter", [b"a", b"c", b"0"])
@pytest.mark.parametrize(
    ("pattern", "is_closed"),
    [
        ("^[ab]{16}$", True),
        ("^(ab|c+)$", True),
        (r"^\d{4}-\d{2}-\d{2}$", True),
        ("^(a{60}|c{1,30}|[0-9]{9})x?$", True),
        ("^([ab]{2}|[0-9]{1,20})$", False),
    ],
)
def test_a_key_that_is_begun_can_be_ended_as_another(vocabulary, pattern, is_closed, letter):
    """Always the token that goes on with the same letter, so that keys come again."""
    schema = {**COMPACT, **OBJECT, "patternProperties": {pattern: DIGIT}, "minProperties": 4}
    schema |= {"maxProperties": 4, "additionalProperties": DIGIT if not is_closed else False}
    grammar = vocabulary.compile(json=schema)
    text = b""
    while not grammar.is_terminated:
        token_id = max(
            vocabulary.allowed(grammar),
            key=lambda i: (vocabulary.texts[i] == b'"', vocabulary.texts[i].count(letter)),
        )
        grammar.accept(token_id)
        text += vocabulary.texts[token_id]
    assert grammar.error is None, text
    value = json.loads(text, object_pairs_hook=without_repeated_keys)
    assert len(value) == 4
    assert not is_closed or all(re.search(pattern, key) for key in value)
