"""The exceptions that users meet, and the checks that raise them."""

import os
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

MAX_INT32 = 2**31 - 1  # integers of steps, block tables and row tables have 32 bits
MAX_SHOWN = 200  # characters of a value in a message
MAX_TYPING_ERRORS = 2  # between what somebody wrote and the name that is suggested


class ArgumentError(ValueError, AssertionError):
    """A wrong argument: the message names the value and the limit.

    Both a ValueError (what vLLM raises) and an AssertionError (what nano-vLLM raises), so that code
    written for either catches it. Raised before any work is queued, and before the GPU is touched
    wherever the arguments alone show the mistake.
    """


class EngineDeadError(RuntimeError):
    """A tensor-parallel worker died or failed, so the engine cannot go on.

    The message names the rank and the cause. Build a new `LLM` to continue.
    """


class EngineUseError(RuntimeError):
    """An engine was used in two threads at once, inside its own step, or in a forked process.

    The call was not made, and the engine goes on where it is.
    """


class RequestError(RuntimeError):
    """A request failed while it ran; all others of the same call have been completed.

    The message names the request and what it raised, which is the error's cause.

    Attributes:
        outputs: those of the whole call in the order of its prompts, the failed ones among them
            (finish reason "abort", `error` says why); [] where a call has no such outputs.
    """

    def __init__(self, message: str, outputs: "list[Any] | None" = None) -> None:
        super().__init__(message)
        self.outputs = outputs or []


def describe(error: BaseException) -> str:
    """The error's type and message in one short line."""
    message = " ".join(_text(error).split())
    name = type(error).__name__
    return f"{name}: {message[:MAX_SHOWN]}" if message else name


def is_fault(error: BaseException) -> bool:
    """Whether `error` is a failure, and no wish to stop.

    Failures in Rust code reach Python as PanicException, which is no `Exception`.
    """
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, EngineUseError))


def _text(error: BaseException) -> str:
    """`str(error)`, "" if that fails, as it may for an exception class of a user's."""
    try:
        return str(error)
    except BaseException as failure:
        if not is_fault(failure):
            raise
        return ""


def shown(value: object) -> str:
    """`repr(value)` for a message: 200 characters at most, whatever `value` is."""
    try:
        text = repr(value[:MAX_SHOWN] if isinstance(value, (str, bytes)) else value)
    except BaseException as error:  # no repr, or an int of more digits than Python writes
        if not is_fault(error):
            raise
        text = f"<{type(value).__name__}>"
    return cut(text)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a slip of: at most two letters are missing, added or wrong.

    Two neighbours that changed places count as one. Of several the closest; None: there is none.
    """
    best = min(known, key=lambda other: (_typing_errors(name, other), other), default=None)
    if best is None or _typing_errors(name, best) > min(MAX_TYPING_ERRORS, len(name) // 2):
        return None
    return best


def _typing_errors(typed: str, meant: str) -> int:
    """The optimal string alignment distance; anything above two where the lengths say so."""
    if abs(len(typed) - len(meant)) > MAX_TYPING_ERRORS:
        return MAX_TYPING_ERRORS + 1
    before: list[int] = []
    row = list(range(len(meant) + 1))
    for i, letter in enumerate(typed, 1):
        before, last, row = row, before, [i]
        for j, other in enumerate(meant, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == meant[j - 2] and typed[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def shown_error(error: BaseException) -> str:
    """A library's error for a message, whose text may quote a value in full."""
    return cut(_text(error)) or type(error).__name__


def cut(text: str) -> str:
    """The first MAX_SHOWN characters of a text that is longer."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


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


def check_int32(name: str, value: Any, minimum: int) -> int:
    """`value` as an int; ArgumentError if it is not an integer >= minimum, or above 32 bits."""
    value = check_integer(name, value, minimum)
    if value > MAX_INT32:
        raise ArgumentError(f"{name} must be <= {MAX_INT32}, got {shown(value)}")
    return value


def clamp_int32(name: str, value: Any, minimum: int) -> int:
    """As `check_int32`, where more than 32 bits hold means "as many as there are"."""
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
