"""The exceptions that users meet, and the checks that raise them."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


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
    try:
        message = " ".join(str(error).split())
    except Exception:  # an exception class of a user's
        message = ""
    name = type(error).__name__
    return f"{name}: {message[:200]}" if message else name


def is_fault(error: BaseException) -> bool:
    """Whether `error` is a failure, and no wish to stop.

    Failures in Rust code reach Python as PanicException, which is no `Exception`.
    """
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int; ArgumentError if it is not an integer in [minimum, maximum]."""
    if type(value) is int and minimum <= value and (maximum is None or value <= maximum):
        return value  # spares the slow look at abstract types
    limit = f">= {minimum}" if maximum is None else f"between {minimum} and {maximum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{name} must be an integer {limit}, got {value!r}")
    value = int(value)
    if value < minimum or (maximum is not None and value > maximum):
        raise ArgumentError(f"{name} must be {limit}, got {value}")
    return value


def check_number(name: str, value: Any, limit: str, is_allowed: Callable[[float], bool]) -> float:
    """`value` as a float; ArgumentError, naming `limit`, if it is no number or not allowed."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise ArgumentError(f"{name} must be {limit}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ArgumentError(f"{name} must be {limit}, got one beyond a float") from None
    if not is_allowed(number):
        raise ArgumentError(f"{name} must be {limit}, got {value}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """`value` if it is True or False, else ArgumentError."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`, else ArgumentError."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
