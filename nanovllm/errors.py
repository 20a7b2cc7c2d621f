"""The exceptions that users meet, and how their messages show values and other errors."""

from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 200  # characters of a value in a message
MAX_TYPING_ERRORS = 2  # between what somebody wrote and the name that is suggested


class ArgumentError(ValueError, AssertionError):
    """A wrong argument: the message names the value and the limit.

    Both a ValueError (what vLLM raises) and an AssertionError (what nano-vLLM raises), so that code
    written for either catches it. Raised before any work is queued, and before the GPU is touched
    wherever the arguments alone show the mistake.
    """


class EngineDeadError(RuntimeError):
    """A tensor-parallel worker or the last replica died or failed, so the engine cannot go on.

    The message names the rank or replica and the cause. Build a new `LLM` to continue.
    """


class ReplicaDiedError(RuntimeError):
    """What a request ends with whose replica has died; the message names replica and cause.

    The engine goes on with its other replicas.
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
