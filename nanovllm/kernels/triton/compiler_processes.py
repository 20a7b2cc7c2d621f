"""Forked copies of this process that compile kernels into Triton's cache on disk.

Triton's code generation keeps Python's lock, so threads wait for each other; processes do not. A
copy needs no imports, and nothing of the GPU: it compiles for a target. It is forked only while
this process has one thread of Python's, as no other one can then hold a lock that it needs.
"""

import ctypes
import gc
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

PR_SET_PDEATHSIG = 1
NUM_BYTES = 2  # of a task's number in a pipe
MAX_TASKS = 2048  # so many numbers are in a pipe at once, without a wait
SILENCE_SECONDS = 120.0  # no kernel takes so long


def may_fork() -> bool:
    """Whether a copy of this process can compile."""
    is_main = threading.current_thread() is threading.main_thread()
    return hasattr(os, "fork") and is_main and threading.active_count() == 1


class CompilerProcesses:
    """Copies of this process that do tasks; each takes the first one that is left.

    Where no copy can be made, or all of them die, tasks remain undone. They die with this process.

    Args:
        tasks: what to do, at most `MAX_TASKS`.
        num_processes: at least one.
        prepare: called first in each copy.
    """

    def __init__(
        self,
        tasks: Sequence[Callable[[], bool]],
        num_processes: int,
        prepare: Callable[[], None],
    ) -> None:
        self._num_tasks = len(tasks)
        self._pids: list[int] = []
        numbers, to_copies = os.pipe()
        self._results, results = os.pipe()
        try:
            os.write(to_copies, b"".join(_to_bytes(i) for i in range(len(tasks))))
            os.close(to_copies)  # who finds the pipe empty is at its end
            for _ in range(num_processes):
                self._pids.append(_fork(tasks, prepare, numbers, results))
        except OSError:
            pass  # those that were made do all
        finally:
            os.close(numbers)
            os.close(results)

    def done(self) -> Iterator[tuple[int, bool]]:
        """The tasks' numbers and results as they succeed, until nobody is left to do one."""
        num_left = self._num_tasks
        poll = select.poll()
        poll.register(self._results, select.POLLIN)
        deadline = time.monotonic() + SILENCE_SECONDS
        while num_left and time.monotonic() < deadline:
            if poll.poll(1000.0):
                data = os.read(self._results, (NUM_BYTES + 1) * MAX_TASKS)
                if not data:
                    return
                deadline = time.monotonic() + SILENCE_SECONDS
                for start in range(0, len(data), NUM_BYTES + 1):
                    *number, result = data[start : start + NUM_BYTES + 1]
                    num_left -= 1
                    yield int.from_bytes(number, "little"), bool(result)
            elif not self._any_is_alive():  # somebody else may hold the pipe open
                return

    def _any_is_alive(self) -> bool:
        self._pids = [pid for pid in self._pids if not _has_ended(pid)]
        return bool(self._pids)

    def close(self) -> None:
        """End the copies."""
        # The numbers of those that have ended may be other processes' by now.
        self._pids = [pid for pid in self._pids if not _has_ended(pid)]
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._pids = []
        if self._results >= 0:
            os.close(self._results)
            self._results = -1


def _to_bytes(number: int) -> bytes:
    return number.to_bytes(NUM_BYTES, "little")


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # somebody else has waited for it
        return True


def _fork(
    tasks: Sequence[Callable[[], bool]],
    prepare: Callable[[], None],
    numbers: int,
    results: int,
) -> int:
    parent = os.getpid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    with warnings.catch_warnings():
        # Other libraries' threads, which Python 3.12 counts, have no part in a compilation.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        gc.disable()  # nothing of the parent's is touched or finalized
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prepare()
        while os.getppid() == parent and (number := os.read(numbers, NUM_BYTES)):
            with suppress(Exception):
                result = tasks[int.from_bytes(number, "little")]()
                os.write(results, number + bytes([result]))
    finally:
        os._exit(0)
