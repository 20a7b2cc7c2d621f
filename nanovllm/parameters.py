"""Parameters declared once: each is a dataclass's field with its default, check and help.

Docstrings, the options of command lines and docs/parameters.md come from the declarations.
"""

import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field, fields
from enum import Enum
from fractions import Fraction
from typing import Any, NamedTuple

from nanovllm.compat import ALIASES
from nanovllm.validation import (
    MAX_INT32,
    check_at_least,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    check_text,
    clamp_int32,
)


class Check(NamedTuple):
    """The check of a parameter's values.

    Attributes:
        limits: which values are allowed, in words; "" where the help says it.
        run: `run(name, value)` gives the value to keep; ArgumentError for one that is not allowed.
    """

    limits: str
    run: Callable[[str, Any], Any]


class Parameter(NamedTuple):
    """A declared parameter; the default of one that must be given is `MISSING`."""

    name: str
    default: Any
    type: Any
    check: Check
    help: str

    @property
    def limits(self) -> str:
        """The check's, with a default of None that is never checked."""
        limits = self.check.limits
        return f"{limits} or None" if limits and self.default is None else limits

    @property
    def shown_default(self) -> str:
        """The default as Python writes it."""
        if isinstance(self.default, Enum):
            return str(self.default)
        return json.dumps(self.default) if isinstance(self.default, str) else repr(self.default)

    @property
    def aliases(self) -> list[str]:
        """Its other names."""
        return [alias for alias, name in ALIASES.items() if name == self.name]


def parameter(default: Any, check: Check, help: str) -> Any:
    """The field of a dataclass that declares a parameter; `help` is whole sentences.

    Only values other than the default are checked.
    """
    return field(default=default, metadata={"check": check, "help": help})


def parameters(cls: type) -> list[Parameter]:
    """The parameters that a dataclass declares."""
    return [
        Parameter(f.name, f.default, f.type, f.metadata["check"], f.metadata["help"])
        for f in fields(cls)
        if f.metadata
    ]


def check_values(values: dict[str, Any], declared: Iterable[Parameter]) -> None:
    """Replace each value that is not the default, in an object's dict, by what its check keeps."""
    for name, default, _, check, _ in declared:
        if values[name] is not default:
            values[name] = check.run(name, values[name])


def document(cls: type, declared: type) -> None:
    """Put the parameters that `declared` declares in place of "{parameters}" in a docstring."""
    entries = []
    for p in parameters(declared):
        name = f"{p.name} ({', '.join(p.aliases)})" if p.aliases else p.name
        default = "" if p.default is MISSING else f"default {p.shown_default}"
        last = ", ".join(filter(None, (p.limits, default)))
        text = f"{name}: {p.help} {last[:1].upper()}{last[1:]}{'.' if last else ''}"
        entries.append(textwrap.fill(text.rstrip(), 92, subsequent_indent="    "))
    arguments = "Args:\n" + textwrap.indent("\n".join(entries), "    ")
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "").replace("{parameters}", arguments)


# ---- checks -----------------------------------------------------------------------------------

boolean = Check("True or False", check_bool)
text = Check("text", check_text)


def unchecked(limits: str = "") -> Check:
    """What is checked where it is used."""
    return Check(limits, lambda name, value: value)


def integer(minimum: int, maximum: int, words: str = "") -> Check:
    """An integer between two limits; `words` for documentation if they are long."""
    limits = f"integer {words or f'from {minimum} to {maximum}'}"
    return Check(limits, lambda name, value: check_integer(name, value, minimum, maximum))


def at_least(minimum: int, maximum: int = MAX_INT32) -> Check:
    """An integer with a lower limit; the upper one is what the representation holds."""
    return Check(
        f"integer >= {minimum}", lambda name, value: check_at_least(name, value, minimum, maximum)
    )


def clamped(minimum: int) -> Check:
    """An integer with a lower limit; more than 32 bits hold is "as many as there are"."""
    return Check(f"integer >= {minimum}", lambda name, value: clamp_int32(name, value, minimum))


UNITS = {letter: 1000 ** (n + 1) for n, letter in enumerate("kmgt")} | {
    letter: 1024 ** (n + 1) for n, letter in enumerate("KMGT")
}


def readable(check: Check) -> Check:
    """What passes `check`, and text such as "32k" (32,000), "25.6k" and "32K" (32,768)."""

    def run(name: str, value: Any) -> Any:
        match = isinstance(value, str) and re.fullmatch(
            r"(\d{1,12}(?:\.\d{1,12})?)([a-zA-Z])", value
        )
        if match and match[2] in UNITS:
            value = int(Fraction(match[1]) * UNITS[match[2]])
        return check.run(name, value)

    return Check(check.limits, run)


def number(limits: str, is_allowed: Callable[[float], bool]) -> Check:
    """A number for which `is_allowed` holds; `limits` says the same for messages."""
    return Check(limits, lambda name, value: check_number(name, value, limits, is_allowed))


def finite(minimum: float) -> Check:
    """A finite number with a lower limit."""
    return number(f"finite and >= {minimum}", lambda value: minimum <= value < math.inf)


finite_number = number("finite", math.isfinite)


def choice(*choices: str, aliases: Mapping[str, str] | None = None) -> Check:
    """One of several strings; another name of one is replaced."""

    def run(name: str, value: Any) -> str:
        if aliases and isinstance(value, str):
            value = aliases.get(value, value)
        return check_choice(name, value, choices)

    *others, last = map(json.dumps, choices)
    return Check(f"{', '.join(others)} or {last}" if others else last, run)


def optional(check: Check) -> Check:
    """None, or what passes another check."""
    return Check(
        f"{check.limits} or None",
        lambda name, value: None if value is None else check.run(name, value),
    )
