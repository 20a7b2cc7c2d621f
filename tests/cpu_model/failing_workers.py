"""Worker entry points that fail, for tests to put in place of the real one.

They are looked up by name in the spawned process, so they live in a module of their own.
"""

import os

from nanovllm.engine import model_runner
from nanovllm.models import families
from nanovllm.parallel import workers

CALLS_BEFORE_FAILURE = 5


def raise_in_start_up(rank: int, *args) -> None:
    def load_model(*arguments):
        raise ValueError(f"injected in the start of rank {rank}")

    families.load_model = load_model
    workers._worker_main(rank, *args)


def exit_in_start_up(rank: int, *args) -> None:
    os._exit(7)


def raise_in_step(rank: int, *args) -> None:
    execute = model_runner.ModelRunner.execute
    plans = []

    def failing(self, plan, seqs=()):
        plans.append(plan)
        if len(plans) > CALLS_BEFORE_FAILURE:
            raise ValueError(f"injected in a step of rank {rank}")
        return execute(self, plan, seqs)

    model_runner.ModelRunner.execute = failing
    workers._worker_main(rank, *args)


def exit_in_step(rank: int, *args) -> None:
    execute = model_runner.ModelRunner.execute
    plans = []

    def exiting(self, plan, seqs=()):
        plans.append(plan)
        if len(plans) > CALLS_BEFORE_FAILURE:
            os._exit(7)
        return execute(self, plan, seqs)

    model_runner.ModelRunner.execute = exiting
    workers._worker_main(rank, *args)
