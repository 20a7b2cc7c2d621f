"""Tensor-parallel workers that are threads of the test's process, for tests of what ranks compute.

A worker's process takes seconds to import torch. What starts, watches and ends processes has tests
of its own, with real ones.
"""

import multiprocessing
import os
import pickle
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any


class RankThread(threading.Thread):
    """What `start_process` starts, with the methods of a `subprocess.Popen` that are asked for."""

    pid = os.getpid()  # no child of this process, so never a stopped one

    def __init__(
        self,
        entry_point: Callable[..., None],
        args: tuple[Any, ...],
        pipe: connection.Connection,
        errors: connection.Connection,
    ) -> None:
        super().__init__(daemon=True)
        self.entry_point, self.args, self.pipe, self.errors = entry_point, args, pipe, errors
        self.start()

    def run(self) -> None:
        try:
            self.entry_point(*self.args, self.pipe)
        except (EOFError, BrokenPipeError):
            pass  # rank 0 is gone
        except BaseException:
            self.errors.send((time.monotonic(), traceback.format_exc()))
        finally:
            self.pipe.close()
            self.errors.close()

    def poll(self) -> int | None:
        return None if self.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.is_alive():
            assert timeout is not None
            raise subprocess.TimeoutExpired("a rank", timeout)
        return 0

    def kill(self) -> None:
        """It ends when rank 0 closes its pipe."""


def start_thread(
    name: str, memory: Any, entry_point: Callable[..., None], *args: Any
) -> tuple[RankThread, connection.Connection, connection.Connection]:
    """`nanovllm.parallel.process.start_process` with a thread."""
    pipe, worker_pipe = multiprocessing.Pipe()
    errors, worker_errors = multiprocessing.Pipe(duplex=False)
    # A process would get copies of all that it is sent, and a descriptor of its own.
    sent = pickle.loads(pickle.dumps((entry_point, args)))
    descriptor = os.dup(memory.fileno())
    return RankThread(sent[0], (*sent[1], descriptor), worker_pipe, worker_errors), pipe, errors
