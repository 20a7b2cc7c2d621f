"""Which JSON schemas are enforced exactly; all others are refused by name before they are compiled.

llguidance ignores keywords that a schema's draft does not know, rounds numbers to a float, and
crashes on some of them. So everything that constrains is looked at here first, without recursion.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from nanovllm.errors import ArgumentError, shown, shown_error
from nanovllm.sampling.finite_patterns import count_matches
from nanovllm.sampling.grammar_text import check_regex, quotable_regex

MAX_DEPTH = 120  # nested lists and objects; llguidance reads 127 at most
MAX_INTEGER = 2**53 - 1  # beyond it a float, which llguidance computes with, skips integers
MAX_COUNT = 2**31 - 1  # of minLength and the like
MAX_PATTERN = 100_000  # characters
ENOUGH_NAMES = 2**15  # a pattern of fewer property names could run out of them
MAX_MULTIPLE = 5_000  # digits of multipleOf as an integer; llguidance has states for each rest

DRAFTS = {
    *(f"http://json-schema.org/draft-0{number}/schema" for number in (4, 6, 7)),
    *(f"https://json-schema.org/draft/{name}/schema" for name in ("2019-09", "2020-12")),
}
# Keywords of any draft that constrain and are not enforced.
UNSUPPORTED = frozenset(
    """uniqueItems not if then else contains minContains maxContains dependentRequired
    dependentSchemas dependencies propertyNames unevaluatedItems unevaluatedProperties $dynamicRef
    $recursiveRef extends disallow divisibleBy""".split()
)
SCHEMA = ("additionalProperties", "additionalItems", "items")
SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")  # lists
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# Keywords that llguidance intersects with those beside them.
APPLICATORS = frozenset(("const", "enum", "allOf", "anyOf", "oneOf", "$ref"))
CONSTRAINTS = APPLICATORS.union(
    SCHEMA,
    SCHEMAS,
    BOUNDS,
    COUNTS,
    ("properties", "patternProperties", "type", "required", "pattern", "format", "multipleOf"),
)
OBJECT_ONLY = frozenset(("patternProperties", "minProperties"))
WHITESPACE = r"[ \n\r\t]*"
GUIDANCE = {  # options of llguidance under which the text stays JSON
    "item_separator": re.compile(rf"{WHITESPACE},{WHITESPACE}"),
    "key_separator": re.compile(rf"{WHITESPACE}:{WHITESPACE}"),
    "whitespace_pattern": re.compile(
        r"(\[( |\\[nrt]|\\x(20|0[9AaDd]))+\]| |\\[nrt])([*+?]|\{\d{1,3}(,\d{0,3})?\})?"
    ),
}
# What a JSON string can only hold as \u...., which is never generated: so that a property's name
# has one spelling. (DEL is left out by llguidance itself.)
UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")


class InexactFloat(float):
    """A number of a JSON text that no float is equal to in its shortest form."""


@dataclass(frozen=True)
class CheckedSchema:
    """A schema that may be compiled.

    Args:
        text: its JSON text for llguidance.
        has_free_names: whether objects may have properties that the schema does not name.
        has_name_patterns: whether patterns say which.
        is_plain: whether it is of the common kind that surely compiles quickly.
    """

    text: str
    has_free_names: bool
    has_name_patterns: bool
    is_plain: bool


def parse_json(text: str) -> Any:
    """The value of a JSON text, floats as written or as `InexactFloat`.

    Raises:
        ArgumentError: not JSON, or an object repeats a key.
    """
    try:
        return json.loads(
            text, parse_float=_exact_float, parse_constant=_refuse_constant,
            object_pairs_hook=_unique_pairs,
        )  # fmt: skip
    except ArgumentError:
        raise
    except (ValueError, RecursionError) as error:
        raise _refuse("", f"no JSON text that can be read: {shown_error(error)}") from None


def check_schema(text: str) -> CheckedSchema:
    """Refuse the schema `text` unless exactly what it says can be enforced.

    Raises:
        ArgumentError: names the keyword and where it stands.
    """
    root = parse_json(text)
    if _depth(root) > MAX_DEPTH:
        raise _refuse("", f"lists and objects may nest {MAX_DEPTH} levels deep at most")
    if isinstance(root, bool):
        root = {} if root else {"enum": []}
    if not isinstance(root, dict):
        raise _refuse("", f"a schema is an object or a boolean, got {shown(root)}")
    _check_root(root)
    walk = _Walk(root)
    walk.run()
    # Without $schema, else llguidance ignores what that draft does not know.
    root.pop("$schema", None)
    text = json.dumps(root)
    return CheckedSchema(
        text,
        has_free_names=walk.has_free_names,
        has_name_patterns=walk.has_name_patterns,
        is_plain=walk.is_plain and len(walk.schemas) <= 300 and len(text) <= 20_000,
    )


class _Walk:
    """Visits every schema of a document once, those that a `$ref` names included."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.pending: list[tuple[Any, str]] = [(root, "")]
        self.seen: set[int] = set()
        self.schemas: list[tuple[dict[str, Any], str]] = []  # each with its place
        self.has_free_names = self.has_name_patterns = False
        self.is_plain = True
        self.intersects = ""  # a place where schemas are intersected
        self.needs_single: list[tuple[str, str]] = []  # what cannot be intersected, and where
        self.multiples: set[Decimal] = set()
        self.bounds: list[dict[str, list[float]]] = []  # of each schema of a number
        self.has_pointers = self.has_ids = False

    def run(self) -> None:
        while self.pending:
            schema, path = self.pending.pop()
            if isinstance(schema, bool):
                self.has_free_names |= schema
                continue
            if not isinstance(schema, dict):
                raise _refuse(path, f"a schema is an object or a boolean, got {shown(schema)}")
            if id(schema) not in self.seen:
                self.seen.add(id(schema))
                self.schemas.append((schema, path))
                self._visit(schema, path)
        if self.intersects and self.needs_single:
            what, path = self.needs_single[0]
            raise _refuse(
                path, f"{what} cannot be enforced in a schema with {self.intersects} in it"
            )
        if self.has_ids and self.has_pointers:
            raise _refuse("", "$ref as a path cannot be followed in a schema with an inner $id")
        self._check_ends()
        self._check_bounds()
        if self.intersects and len(self.multiples) > 1:
            scale = 10 ** max(-int(_exponent(multiple)) for multiple in self.multiples)
            product = 1
            for multiple in self.multiples:
                product *= int(multiple * scale)
                if product > MAX_MULTIPLE:
                    raise _refuse("", f"all multipleOf together must be at most {MAX_MULTIPLE}")

    def _check_bounds(self) -> None:
        """llguidance lets an exclusive bound itself through if it is an integer and the other one
        is less than 1 away."""
        groups = self.bounds
        if self.intersects:  # any may meet any other
            groups = [{key: [v for g in groups for v in g.get(key, ())] for key in BOUNDS}]
        for exclusive, others in (
            ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
            ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
        ):
            for group in groups:
                near = {value for key in others for value in group.get(key, ())}
                by_integer = {integer: value for value in near for integer in _around(value)}
                for bound in group.get(exclusive, ()):
                    if bound in by_integer:
                        raise _refuse(
                            "",
                            f"{exclusive} {bound:g} cannot be enforced with a bound of "
                            f"{by_integer[bound]:g}: give one that is no integer",
                        )

    def _visit(self, schema: dict[str, Any], path: str) -> None:
        if unsupported := [keyword for keyword in schema if keyword in UNSUPPORTED]:
            raise _refuse(path, f"not supported: {', '.join(unsupported)}")
        if path and "$schema" in schema:
            raise _refuse(path, "$schema may stand at the top only")
        self.has_ids |= bool(path) and "$id" in schema
        applicators = schema.keys() & APPLICATORS
        self._note_intersection(schema, applicators)
        self._check_values(schema, path, bool(applicators))
        self._check_object(schema, path)
        self._check_array(schema, path, bool(applicators))
        for key in SCHEMA:
            if key in schema and not (key == "items" and isinstance(schema[key], list)):
                self.pending.append((schema[key], f"{path}/{key}"))
        lists = (*SCHEMAS, "items") if isinstance(schema.get("items"), list) else SCHEMAS
        for key in lists:
            if key in schema:
                items = _of_type(schema[key], list, f"{path}/{key}", "a list")
                self._push(path, key, enumerate(items))
        for key in NAMED_SCHEMAS:
            if key in schema:
                named = _of_type(schema[key], dict, f"{path}/{key}", "an object")
                self._push(path, key, named.items())
        if "$ref" in schema:
            self._follow(_of_type(schema["$ref"], str, f"{path}/$ref", "a string"), path)

    def _push(self, path: str, key: str, schemas: Iterable[tuple[Any, Any]]) -> None:
        self.pending += [(schema, f"{path}/{key}/{name}") for name, schema in schemas]

    def _follow(self, reference: str, path: str) -> None:
        """Visit what a JSON pointer names; other references name what is visited anyway."""
        if not reference.startswith("#/"):
            if "#/" in reference:
                raise _refuse(path, f"$ref {shown(reference)} must begin with #")
            return
        self.has_pointers = True
        self.pending.append((self._target(reference, path), reference))

    def _target(self, reference: str, path: str) -> Any:
        """The part of the schema that a JSON pointer names."""
        target: Any = self.root
        for part in unquote(reference[2:]).split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isascii() and part.isdigit() and len(part) < 8:
                part = int(part)  # type: ignore[assignment]
            try:
                target = target[part]
            except (KeyError, IndexError, TypeError):
                raise _refuse(path, f"$ref {shown(reference)} names nothing") from None
        return target

    def _check_ends(self) -> None:
        """Refuse schemas whose every value holds another of the same: no text of them ends."""
        waiting: dict[int, list[dict[str, Any]]] = {}  # by what may let them end
        ending: set[int] = set()
        pending = [schema for schema, _ in reversed(self.schemas)]
        while pending:
            schema = pending.pop()
            if id(schema) in ending:
                continue
            for alternatives in self._needs(schema):
                if not any(id(other) in ending for other in alternatives):
                    for other in alternatives:
                        waiting.setdefault(id(other), []).append(schema)
                    break
            else:
                ending.add(id(schema))
                pending += waiting.pop(id(schema), [])
        for schema, path in self.schemas:
            if id(schema) not in ending:
                raise _refuse(path, "no text of it ends, as it always holds another of its kind")

    def _needs(self, schema: dict[str, Any]) -> Iterable[list[dict[str, Any]]]:
        """Lists of schemas; a value of `schema` holds values of one of each list, or more."""
        reference = schema.get("$ref", "")
        if reference == "#" or reference.startswith("#/"):
            target = self.root if reference == "#" else self._target(reference, "")
            yield from _needed([target])
        for item in schema.get("allOf", ()):
            yield from _needed([item])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                yield from _needed(schema[key])
        if schema.get("type") == "object":
            properties = schema.get("properties", {})
            others = schema.get("additionalProperties", True)
            for name in schema.get("required", ()):
                yield from _needed([properties.get(name, others)])
            if schema.get("minProperties"):
                patterns = schema.get("patternProperties", {})
                yield from _needed([*properties.values(), *patterns.values(), others])
        elif schema.get("type") == "array":
            first = schema.get("prefixItems", [])
            others = schema.get("items", True)
            if isinstance(others, list):
                first, others = others, schema.get("additionalItems", True)
            for index in range(min(schema.get("minItems", 0), len(first) + 1)):
                yield from _needed([first[index] if index < len(first) else others])

    def _note_intersection(self, schema: dict[str, Any], applicators: set[str]) -> None:
        beside = [key for key in schema if key in CONSTRAINTS]
        items = schema.get("allOf")
        if beside == ["allOf"] and isinstance(items, list) and len(items) == 1:
            return  # a schema that is named so that it may have a default, as of pydantic 1
        if "allOf" in schema:
            self.intersects = "allOf"
            self.is_plain = False
        elif len(beside) > 1 and (
            applicators - {"const", "enum"} or (applicators and OBJECT_ONLY.intersection(schema))
        ):
            self.intersects = " beside ".join(beside[:3])
            self.is_plain = self.is_plain and "$ref" not in schema

    def _check_values(self, schema: dict[str, Any], path: str, has_applicators: bool) -> None:
        if "const" in schema:
            self._check_constant(schema["const"], f"{path}/const")
        if "enum" in schema:
            values = _of_type(schema["enum"], list, f"{path}/enum", "a list")
            self._check_constant(values, f"{path}/enum")
        for key in BOUNDS:
            value = schema.get(key)
            if isinstance(value, bool) and key.startswith("exclusive"):  # of draft 4
                if has_applicators:
                    raise _refuse(path, f"{key} must be a number beside these keywords")
            elif key in schema:
                _check_number(value, f"{path}/{key}")
        if schema.get("type") != "integer":
            self.bounds.append(_numeric_bounds(schema))
        if "multipleOf" in schema:
            self.multiples.add(_check_multiple(schema["multipleOf"], f"{path}/multipleOf"))
        for key in COUNTS:
            if key in schema:
                count = schema[key]
                if type(count) is not int or not 0 <= count <= MAX_COUNT:
                    raise _refuse(
                        f"{path}/{key}",
                        f"must be an integer between 0 and {MAX_COUNT}, got {shown(count)}",
                    )
                if count > 10_000:
                    self.is_plain = False
        if "pattern" in schema or "format" in schema:
            self.is_plain = False
            if schema.get("format") == "unknown":  # llguidance's name for any
                raise _refuse(path, "format unknown is not known")
        if "pattern" in schema:
            pattern = _of_type(schema["pattern"], str, f"{path}/pattern", "a string")
            schema["pattern"] = self._quotable(pattern, f"{path}/pattern")

    def _check_constant(self, constant: Any, path: str) -> None:
        """Its numbers and strings; the text can hold each as it is."""
        pending = [constant]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                self._check_names(value, path)
                pending += value.values()
            elif isinstance(value, list):
                pending += value
            elif isinstance(value, str):
                if match := UNWRITABLE.search(value):
                    raise _refuse(path, f"the character {match[0]!r} cannot be generated")
                if len(value) > 10_000:
                    raise _refuse(path, f"a string of {len(value)} characters; 10000 at most")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                _check_number(value, path)

    @staticmethod
    def _quotable(pattern: str, path: str) -> str:
        if len(pattern) > MAX_PATTERN:
            raise _refuse(path, f"at most {MAX_PATTERN} characters, got {len(pattern)}")
        check_regex(pattern, f"json: {path}", has_sets=False)
        return quotable_regex(pattern, f"json: {path}")

    def _check_names(self, names: Iterable[str], path: str) -> None:
        for name in names:
            if not isinstance(name, str):
                raise _refuse(path, f"a property's name is a string, got {shown(name)}")
            if "\x7f" in name or len(name) > 10_000:
                raise _refuse(path, f"the name {shown(name)} cannot be generated")

    def _check_object(self, schema: dict[str, Any], path: str) -> None:
        required = _of_type(schema.get("required", []), list, f"{path}/required", "a list")
        properties = schema.get("properties", {})
        self._check_names(required, f"{path}/required")
        self._check_names(properties if isinstance(properties, dict) else (), path)
        patterns = schema.get("patternProperties", {})
        is_closed = schema.get("additionalProperties") is False
        if _may_be_object(schema) and (not is_closed or patterns):
            self.has_free_names = True
        if patterns and isinstance(patterns, dict):
            self.is_plain = False
            self.has_name_patterns = True
            self.needs_single.append(("patternProperties", path))
            schema["patternProperties"] = {
                self._quotable(pattern, f"{path}/patternProperties"): value
                for pattern, value in patterns.items()
            }
            for pattern in patterns:
                count = count_matches(pattern, ENOUGH_NAMES)
                if count < ENOUGH_NAMES:
                    raise _refuse(
                        f"{path}/patternProperties",
                        f"{shown(pattern)} matches {count} names, which could run out: "
                        "list them under properties",
                    )
        least = schema.get("minProperties", 0)
        if isinstance(least, int) and least > 1:
            self.needs_single.append(("minProperties", path))
            if is_closed and not patterns and least > len(set(required)):
                raise _refuse(
                    f"{path}/minProperties",
                    f"{least} cannot be enforced where only {len(set(required))} properties are "
                    "required and no others are free",
                )

    def _check_array(self, schema: dict[str, Any], path: str, has_applicators: bool) -> None:
        if "prefixItems" in schema and "2020-12" not in self.root.get("$schema", "2020-12"):
            raise _refuse(path, "prefixItems is no keyword of this $schema")
        is_old = isinstance(schema.get("items"), list) or "additionalItems" in schema
        if is_old and ("prefixItems" in schema or has_applicators):
            raise _refuse(path, "items as a list, and additionalItems, cannot be enforced here")


def _check_root(root: dict[str, Any]) -> None:
    draft = root.get("$schema")
    if draft is not None and (not isinstance(draft, str) or draft.rstrip("#") not in DRAFTS):
        raise _refuse(
            "/$schema", f"must name draft 4, 6, 7, 2019-09 or 2020-12, got {shown(draft)}"
        )
    options = root.get("x-guidance", {})
    if not isinstance(options, dict):
        raise _refuse("/x-guidance", f"must be an object, got {shown(options)}")
    for name, value in options.items():
        if name == "whitespace_flexible" and isinstance(value, bool):
            continue
        if name in GUIDANCE and isinstance(value, str) and GUIDANCE[name].fullmatch(value):
            continue
        raise _refuse(
            "/x-guidance",
            "may hold whitespace_flexible, and item_separator, key_separator and "
            f"whitespace_pattern that leave the text JSON, got {shown({name: value})}",
        )


def _needed(schemas: list[Any]) -> Iterable[list[dict[str, Any]]]:
    """None of them are needed if one is a boolean, which holds no other schema."""
    if all(isinstance(schema, dict) for schema in schemas):
        yield schemas


def _may_be_object(schema: dict[str, Any]) -> bool:
    """Whether `schema` alone, without those that it applies, lets objects have names of its own."""
    if "type" not in schema:
        return not schema.keys() & APPLICATORS
    types = schema["type"]
    return types == "object" or (isinstance(types, list) and "object" in types)


def _check_number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(path, f"must be a number, got {shown(value)}")
    if isinstance(value, InexactFloat):
        raise _refuse(path, "a number with more digits than a float has cannot be enforced")
    if not abs(value) <= MAX_INTEGER:
        raise _refuse(path, f"a number must be within +-{MAX_INTEGER}, got {shown(value)}")
    if value and abs(value) < 1e-15:
        raise _refuse(path, f"a number other than 0 must be at least 1e-15, got {shown(value)}")


def _around(value: float) -> Iterable[float]:
    """The integers less than 1 away from `value` and other than it."""
    return () if value == int(value) else (math.floor(value), math.ceil(value))


def _numeric_bounds(schema: dict[str, Any]) -> dict[str, list[float]]:
    """The bounds that `schema` has, with draft 4's exclusive booleans as numbers."""
    bounds = {key: schema[key] for key in BOUNDS if key in schema}
    for exclusive, inclusive in (
        ("exclusiveMinimum", "minimum"),
        ("exclusiveMaximum", "maximum"),
    ):
        is_exclusive = bounds.get(exclusive)
        if isinstance(is_exclusive, bool):
            del bounds[exclusive]
            if is_exclusive and inclusive in bounds:
                bounds[exclusive] = bounds[inclusive]
    return {key: [value] for key, value in bounds.items()}


def _check_multiple(value: Any, path: str) -> Decimal:
    """`value` as llguidance reads it, if that is the same."""
    _check_number(value, path)
    if value <= 0:
        raise _refuse(path, f"must be a number > 0, got {shown(value)}")
    number, exponent = float(value), 0
    while number != int(number) and exponent < 20:
        number, exponent = number * 10, exponent + 1
    exact = Decimal(repr(value))
    if number > MAX_MULTIPLE or Decimal(int(number)).scaleb(-exponent) != exact:
        raise _refuse(
            path, f"the digits of multipleOf must be at most {MAX_MULTIPLE}, got {shown(value)}"
        )
    return exact


def _exponent(number: Decimal) -> int:
    exponent = number.normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return min(exponent, 0)


def _exact_float(text: str) -> float:
    number = float(text)
    is_exact = math.isfinite(number) and Decimal(text) == Decimal(repr(number))
    return number if is_exact else InexactFloat(number)


def _refuse_constant(name: str) -> Any:
    raise _refuse("", f"{name} is no number of JSON")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name, count in Counter(names).items() if count > 1)
        raise _refuse("", f"an object repeats the key {shown(repeated)}")
    return result


def _depth(value: Any) -> int:
    """How deep lists and objects nest."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _of_type(value: Any, kind: type, path: str, what: str) -> Any:
    if not isinstance(value, kind):
        raise _refuse(path, f"must be {what}, got {shown(value)}")
    return value


def _refuse(path: str, message: str) -> ArgumentError:
    place = path if len(path) <= 100 else f"...{path[-97:]}"
    return ArgumentError(f"structured outputs, json: {place + ': ' if place else ''}{message}")
