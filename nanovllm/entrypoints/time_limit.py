"""A limit on how long foreign Python code may run, such as a chat template's."""

import ctypes
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.2


class TimeLimit:
    """Raises TimeoutError in the thread that runs `running` blocks, one after another.

    One watching thread serves all of them, until `close`. It interrupts what runs as Python code. A
    single call into C is not interrupted, but followed by the error.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._thread_id = threading.get_ident()
        self._deadline = math.inf
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @contextmanager
    def running(self) -> Iterator[None]:
        """TimeoutError within the block, or at its end, once `seconds` have passed."""
        self._deadline = time.monotonic() + self.seconds
        try:
            yield
        finally:
            with self._lock:  # the watcher is not about to raise
                self._deadline = math.inf

    def close(self) -> None:
        """End the watching thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with self._lock:
                if time.monotonic() >= self._deadline:
                    self._deadline = math.inf
                    _raise_in_thread(self._thread_id, TimeoutError)


def _raise_in_thread(thread_id: int, error: type[BaseException]) -> None:
    """Let the thread raise `error` before its next instruction of Python."""
    raise_later = ctypes.pythonapi.PyThreadState_SetAsyncExc
    raise_later(ctypes.c_ulong(thread_id), ctypes.py_object(error))
