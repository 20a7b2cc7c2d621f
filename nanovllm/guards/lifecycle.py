"""An engine for those who hold it: used by one thread, in one process, and ended once."""

import weakref
from threading import get_ident
from typing import NoReturn, Protocol, TypeVar

from nanovllm.errors import EngineDeadError
from nanovllm.guards.ownership import Owner, bind_to_process

Engine = TypeVar("Engine", bound="Lifecycle")
ENDED = "the engine was ended by exit()"


class Resource(Protocol):
    """What an engine computes with, and releases at its end."""

    cause_of_death: str | None

    def close(self) -> None:
        """Release everything."""


class Lifecycle:
    """The base of an engine.

    Args:
        resource: released by `exit`, or when nothing refers to the engine any more.

    Attributes:
        owner: says who may use the engine now.
        asleep: what is switched off, so that no step can run.
    """

    def __init__(self, resource: Resource) -> None:
        self.owner = Owner()
        self.asleep: frozenset[str] = frozenset()
        self._resource = resource
        # Not bound to self, so that dropping the engine releases everything.
        self._finalizer = weakref.finalize(self, _release, self.owner, resource)
        bind_to_process(resource)

    def check_ready(self) -> None:
        """EngineDeadError if the engine has ended."""
        if not self._finalizer.alive:
            raise EngineDeadError(self._resource.cause_of_death or ENDED)

    def check_awake(self) -> None:
        """RuntimeError while the engine sleeps, EngineDeadError if it has ended."""
        self.check_ready()
        if self.asleep:
            off = ", ".join(sorted(self.asleep))
            raise RuntimeError(f"the engine sleeps ({off}): call wake_up() first")

    def exit(self) -> None:
        """End the workers and release all memory. May be called again.

        In a forked child it does nothing.
        """
        if self.owner.is_foreign:
            return
        visit = get_ident(), "exit"
        try:
            self.owner.enter(visit)
            self._finalizer()
            self._end()
        finally:
            self.owner.leave(visit)

    def _end(self) -> None:
        """What else an engine does at its end."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied, as it holds a model and perhaps "
            "processes: make a new one where it is needed, or pass prompts and outputs"
        )

    def __enter__(self: Engine) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()


def _release(owner: Owner, resource: Resource) -> None:
    if not owner.is_foreign:  # a forked child ends: everything is its parent's
        resource.close()
