"""Worker entry points and calls that say so and then hang, and hold Python's lock if asked to.

They are looked up by name in the worker process, so they live in a module of their own.
"""

import ctypes
import os
import time

FOR_EVER = 10**6


def hang() -> None:
    """As a loader of shared libraries may: no other Python thread runs meanwhile."""
    print("hangs", os.getpid(), flush=True)
    ctypes.PyDLL(None).sleep(FOR_EVER)


def hang_in_start(rank: int, *args) -> None:
    hang()


def hang_in_load(rank: int, *args) -> None:
    from nanovllm.models import families
    from nanovllm.parallel import workers

    families.load_model = lambda *arguments: hang()
    workers._worker_main(rank, *args)


def sleep_in_the_next_step(worker, rank: int) -> None:
    """Return now, and let this rank's next step hang."""

    def execute(plan, seqs=()):
        print("hangs", flush=True)
        time.sleep(FOR_EVER)

    if worker.rank == rank:
        worker.execute = execute
