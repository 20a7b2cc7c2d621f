"""Limits on the time and memory that foreign Python code may take, such as a chat template's."""

import ctypes
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.2
_memory_limit = threading.Lock()  # the limit is the process's


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


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """MemoryError within the block for so much more memory than the process has now.

    It is a limit of the address space, for all threads, so the block must be short. Where the
    system has none, nothing is limited.
    """
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            num_pages = int(file.read().split()[0])
    except (ImportError, OSError):
        yield
        return
    with _memory_limit:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limits = [num_pages * resource.getpagesize() + num_bytes, soft, hard]
        lowest = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
