"""Who may use an engine: one thread at a time, in the process that made it."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ctypes import py_object, pythonapi
from functools import wraps
from threading import get_ident
from types import FunctionType
from typing import Any, TypeVar
from weakref import WeakSet

from nanovllm.errors import EngineUseError

C = TypeVar("C", bound=type)

Visit = tuple[int, str]  # the thread, and its call by name

_pid = os.getpid()


class Owner:
    """Lets one thread into an engine, as often as it likes, and refuses the others meanwhile."""

    def __init__(self) -> None:
        self.is_stepping = False  # the engine is half-changed, and takes no call but `exit`
        self._deferred: deque[Callable[[], None]] = deque()
        self._pid = _pid
        self._holder: dict[None, Visit] = {}  # the outermost visit of the thread that is inside

    @property
    def is_foreign(self) -> bool:
        """Whether this process is a fork of the one that made the engine."""
        return self._pid != _pid

    @property
    def is_inside(self) -> bool:
        """Whether this thread is."""
        holder = self._holder.get(None)
        return holder is not None and holder[0] == get_ident()

    def enter(self, visit: Visit) -> None:
        """Let this thread in; `leave` with the same visit, whatever happens.

        Raises:
            EngineUseError: another thread is inside, or a step, or this is another process.
        """
        ident, call = visit
        if self._pid != _pid:
            raise EngineUseError(
                f"{call}() was called in process {_pid}, but the engine belongs to process "
                f'{self._pid}: use it there, or make a new LLM in a process started by "spawn"'
            )
        holder = self._holder.setdefault(None, visit)  # at once: no thread can come between
        if holder[0] != ident:
            raise EngineUseError(
                f"{call}() was called in thread {_thread_name(ident)!r} while {holder[1]}() runs "
                f"in thread {_thread_name(holder[0])!r}: one thread at a time may use an engine "
                "(hold a lock of your own around your calls)"
            )
        if self.is_stepping and call != "exit":
            raise EngineUseError(
                f"{call}() was called from inside a step of the engine, perhaps by a signal "
                "handler: call it between two steps"
            )

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it `is_stepping`; at its end what was deferred is called."""
        self.is_stepping = True
        try:
            yield
        finally:
            self.is_stepping = False
            self.call_deferred()

    def defer(self, call: Callable[[], None]) -> None:
        """Make a call now, or in the next visit if this thread is outside or in mid-step.

        In a forked child it is not made. The garbage collector may come here at any time.
        """
        if not self.is_foreign:
            self._deferred.append(call)
            if self.is_inside and not self.is_stepping:
                self.call_deferred()

    def call_deferred(self) -> None:
        """Make the calls that were deferred; this thread is inside, between two steps."""
        for _ in range(len(self._deferred)):
            self._deferred.popleft()()

    def leave(self, visit: Visit) -> None:
        """Let other threads in again, unless this visit is part of an earlier one."""
        if self._holder.get(None) is visit:
            self._holder.clear()


def one_thread_at_a_time(free: Iterable[str]) -> Callable[[C], C]:
    """Class decorator: `Owner.enter` before each public method of an engine but the `free` ones."""

    def decorate(cls: C) -> C:
        for name, method in list(vars(cls).items()):
            if isinstance(method, FunctionType) and not name.startswith("_") and name not in free:
                setattr(cls, name, _exclusive(method))
        return cls

    return decorate


def _exclusive(method: Callable[..., Any]) -> Callable[..., Any]:
    name = method.__name__

    @wraps(method)
    def exclusive(self: Any, *args: Any, **kwargs: Any) -> Any:
        visit = get_ident(), name
        try:
            self.owner.enter(visit)
            if not self.owner.is_stepping:
                self.owner.call_deferred()
            return method(self, *args, **kwargs)
        finally:
            self.owner.leave(visit)

    return exclusive


def _thread_name(ident: int) -> str:
    names = (thread.name for thread in threading.enumerate() if thread.ident == ident)
    return next(names, str(ident))


# ---- a forked child ---------------------------------------------------------------------------

_bound: WeakSet[Any] = WeakSet()


def keep_for_ever(obj: object) -> None:
    """Never free `obj`."""
    pythonapi.Py_IncRef(py_object(obj))


def bind_to_process(*objects: Any) -> None:
    """Never destroy these objects in a forked child.

    Their destructors would wait for threads, talk to devices or end workers that are the parent's.
    """
    _bound.update(objects)


def _become_foreign() -> None:
    global _pid
    _pid = os.getpid()
    for bound in list(_bound):
        keep_for_ever(bound)


os.register_at_fork(after_in_child=_become_foreign)
