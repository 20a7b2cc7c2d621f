"""Checks of arguments, whose ArgumentErrors name the value and the limit."""

import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from nanovllm.errors import ArgumentError, shown, shown_error

MAX_INT32 = 2**31 - 1  # integers of steps, block tables and row tables have 32 bits


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int; ArgumentError if it is not an integer in [minimum, maximum]."""
    if type(value) is int and minimum <= value and (maximum is None or value <= maximum):
        return value  # spares the slow look at abstract types
    limit = f">= {minimum}" if maximum is None else f"between {minimum} and {maximum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{name} must be an integer {limit}, got {shown(value)}")
    value = int(value)
    if value < minimum or (maximum is not None and value > maximum):
        raise ArgumentError(f"{name} must be {limit}, got {shown(value)}")
    return value


def check_at_least(name: str, value: Any, minimum: int, maximum: int = MAX_INT32) -> int:
    """As `check_integer`, where the maximum is what a representation holds."""
    value = check_integer(name, value, minimum)
    if value > maximum:
        raise ArgumentError(f"{name} must be <= {maximum}, got {shown(value)}")
    return value


def clamp_int32(name: str, value: Any, minimum: int) -> int:
    """As `check_at_least`, where more than 32 bits hold means "as many as there are"."""
    return min(check_integer(name, value, minimum), MAX_INT32)


def check_number(name: str, value: Any, limit: str, is_allowed: Callable[[float], bool]) -> float:
    """`value` as a float; ArgumentError, naming `limit`, if it is no number or not allowed."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise ArgumentError(f"{name} must be {limit}, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ArgumentError(f"{name} must be {limit}, got one beyond a float") from None
    if not is_allowed(number):
        raise ArgumentError(f"{name} must be {limit}, got {shown(value)}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """`value` if it is True or False, else ArgumentError."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_text(name: str, value: Any) -> str:
    """`value` if it is a string that is not empty, else ArgumentError."""
    if not isinstance(value, str) or not value:
        raise ArgumentError(f"{name} must be a string that is not empty, got {shown(value)}")
    return value


def check_class_name(name: str, value: Any) -> str:
    """ "module.Class" of a class or of that text; ArgumentError if it is neither."""
    if isinstance(value, type):
        value = f"{value.__module__}.{value.__qualname__}"
    parts = value.split(".") if isinstance(value, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ArgumentError(
            f"{name} must be a class at the top level of a module, or its 'module.Class', got "
            f"{shown(value)}"
        )
    return str(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`, else ArgumentError."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    return value


def check_unicode(name: str, text: str) -> str:
    """`text` if it can be written as UTF-8, else ArgumentError: it holds half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name} is not valid Unicode: {error}") from None
    return text


def check_output_path(name: str, path: Any) -> str:
    """`path`, absolute and without links, if a file can be put there, else ArgumentError."""
    problem = "not the path of a file"
    if isinstance(path, (str, os.PathLike)):
        try:
            target = os.path.realpath(path)
            if os.path.isfile(target) or (path and not os.path.lexists(target)):
                with open(f"{target}.tmp", "wb"):
                    pass
                os.unlink(f"{target}.tmp")
                return os.fsdecode(target)
        except (OSError, ValueError) as error:  # ValueError: a null byte, half a surrogate pair
            problem = shown_error(error)
    raise ArgumentError(f"{name} cannot be written, got {shown(path)}: {problem}")
