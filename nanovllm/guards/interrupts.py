"""Ctrl-C held back while the engine's state is half-changed."""

import signal
import threading
from types import FrameType


class DeferredInterrupt:
    """Context in which the first SIGINT waits until the end of the block.

    A second one is delivered at once, so that a step that hangs can still be broken off. Outside
    the main thread, where Python delivers no signals, and where SIGINT is ignored, nothing changes.
    """

    def __enter__(self) -> None:
        self._pending: FrameType | None = None
        self._was_interrupted = False
        self._is_active = threading.current_thread() is threading.main_thread()
        if self._is_active:
            self._previous = signal.getsignal(signal.SIGINT)
            self._is_active = callable(self._previous)
        if self._is_active:
            signal.signal(signal.SIGINT, self._on_interrupt)

    def __exit__(self, *exception: object) -> None:
        if self._is_active:
            signal.signal(signal.SIGINT, self._previous)
            if self._was_interrupted and exception[0] is None:
                self._previous(signal.SIGINT, self._pending)  # type: ignore[operator, misc]

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._was_interrupted:
            self._previous(signum, frame)  # type: ignore[operator, misc]
        self._was_interrupted, self._pending = True, frame
