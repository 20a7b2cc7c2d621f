"""When Python's garbage collector runs: not in imports, seldom within a call, else as ever."""

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

FEW_OBJECTS = 100_000  # a fresh process with some libraries
NUM_NEW_OBJECTS = 100_000

_inside: set[object] = set()  # calls
_users: tuple[int, int, int] | None = None  # the user's thresholds, while others are set
_last_set: tuple[int, int, int] | None = None


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Within it Python does not look for dead cycles; what is there then is left alone for ever.

    torch makes half a million objects that live as long as the process: a look at all of them takes
    0.1 s or more. Whoever has imported it before, or has many objects, may have cycles to lose:
    then all objects are looked at later, as ever.
    """
    was_enabled = gc.isenabled()
    is_new = was_enabled and "torch" not in sys.modules and len(gc.get_objects()) < FEW_OBJECTS
    gc.disable()
    try:
        yield
    finally:
        if is_new:
            gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Within it the collector runs after 100,000 new containers, instead of Python's own 700.

    A call of a thousand requests makes some 20,000 that live until its end. The collector would go
    through them many times, and at times through all objects of the process, while the device
    waits. Cycles are found as before, only later.

    Afterwards the collector runs when the user has made as many new objects as ever; those of the
    call count no more. That collection sets the threshold back. Switched off, or with a threshold
    as high, the collector is left as it is. Threads may be inside at the same time.
    """
    global _users
    call = object()
    if not _is_set_here():
        threshold = gc.get_threshold()
        _users = threshold if 0 < threshold[0] < NUM_NEW_OBJECTS else None
    if _users is not None:
        _inside.add(call)
        _set(_users, NUM_NEW_OBJECTS)
    try:
        yield
    finally:
        _inside.discard(call)
        if _users is not None and not _inside and _is_set_here():
            _set(_users, gc.get_count()[0] + _users[0])


def _set(users: tuple[int, int, int], num_new_objects: int) -> None:
    global _last_set
    _last_set = (num_new_objects, *users[1:])
    gc.set_threshold(*_last_set)


def _is_set_here() -> bool:
    """Whether nobody has set thresholds since this module did."""
    return _users is not None and gc.get_threshold() == _last_set


def _on_collection(phase: str, info: Mapping[str, int]) -> None:
    """Set the user's thresholds back."""
    global _users
    if phase == "stop" and _users is not None and not _inside:
        if _is_set_here():
            gc.set_threshold(*_users)
        _users = None


gc.callbacks.append(_on_collection)
