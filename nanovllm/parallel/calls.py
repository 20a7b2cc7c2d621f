"""A call of a method on every rank: how it runs on one, and how call and reply travel as bytes.

Plain pickle: callables by their module and name, tensors by value.
"""

import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ArgumentError
from nanovllm.parallel.process import unpickle


class RemoteTraceback(Exception):
    """The cause of an exception that another rank raised: its traceback there, as text."""


def pack_call(
    method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bytes:
    """The bytes of a call; ArgumentError if it cannot be pickled."""
    try:
        return pickle.dumps((method, args, kwargs), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # of many types
        raise ArgumentError(
            f"the call of {method!r} cannot be sent to the other ranks: {error} "
            "(a callable must be defined at the top level of a module, a lambda cannot be sent)"
        ) from error


def reply_to(runner: ModelRunner, packed_call: bytes) -> bytes:
    """Make a packed call on this rank; the packed reply."""

    def call() -> Any:
        method, args, kwargs = unpickle(packed_call)
        return runner.call(method, *args, **kwargs)

    return Reply.of(call).pack(runner.rank)


def sendable(error: BaseException) -> Exception:
    """The error, or a RuntimeError of its text if another process could not read it."""
    with suppress(Exception):
        copy = pickle.loads(pickle.dumps(error))  # many can be pickled, but not unpickled
        if isinstance(error, Exception) and type(copy) is type(error):
            return error
    return RuntimeError(f"{type(error).__qualname__}: {error}")


@dataclass
class Reply:
    """One rank's answer: a result or an error."""

    result: Any = None
    error: Exception | None = None
    remote_traceback: str | None = None  # of an error on another rank

    @classmethod
    def of(cls, call: Callable[[], Any]) -> "Reply":
        """The outcome of `call()`."""
        try:
            return cls(call())
        except Exception as error:
            return cls(error=error)

    def unwrap(self) -> Any:
        """The result; raises the error."""
        if self.error is None:
            return self.result
        if self.remote_traceback is not None:
            raise self.error from RemoteTraceback(self.remote_traceback)
        raise self.error

    def pack(self, rank: int) -> bytes:
        """The reply's bytes, with what cannot be pickled replaced by an error that says so."""
        if self.error is not None:
            text = "".join(traceback.format_exception(self.error))
            return pickle.dumps(Reply(None, sendable(self.error), f"\nOn rank {rank}:\n{text}"))
        try:
            return pickle.dumps(self, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            message = (
                f"the result of rank {rank}, of type {type(self.result).__qualname__}, cannot be "
                f"sent back: {error}"
            )
            return pickle.dumps(Reply(error=ArgumentError(message)))

    @staticmethod
    def unpack(packed: bytes, rank: int) -> "Reply":
        """The reply of these bytes, or an error that says why they make none."""
        try:
            return pickle.loads(packed)
        except Exception as error:
            message = f"the reply of rank {rank} cannot be read here: {error!r}"
            return Reply(error=ArgumentError(message))
