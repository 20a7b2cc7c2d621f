"""How the engine computes: an executor launches steps and calls on every rank.

This one has one rank, in this process. `parallel.executor` has one in each of several processes,
and `parallel.replica_executor` several engines.
"""

from collections.abc import Callable
from time import perf_counter
from typing import ClassVar

import torch

from nanovllm.config import Config
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.startup import start_model_runner
from nanovllm.engine.step_plan import PlanBuilder
from nanovllm.errors import is_fault
from nanovllm.guards.device import device_failure
from nanovllm.guards.ownership import keep_for_ever
from nanovllm.parallel.tensor_parallel import TensorParallel


class Executor:
    """Computes steps on one rank, in this process; `MultiprocExecutor` overrides what differs.

    Args:
        config: the engine's configuration.
        device: rank 0's.

    Attributes:
        model_runner: rank 0's, in this process.
        cause_of_death: why nothing can be computed any more, in words; None: it can.
        has_busy_ranks: whether other ranks wait in a `collective_rpc`, so that what it calls must
            not use the engine.
        new_scheduler: makes what decides on the steps; of a configuration with
            `num_kvcache_blocks`.
    """

    has_busy_ranks: ClassVar[bool] = False
    new_scheduler: Callable[[Config], Scheduler] = Scheduler

    def __init__(self, config: Config, device: torch.device) -> None:
        self.cause_of_death: str | None = None
        self._is_device_lost = False
        self.plan_builder = PlanBuilder(
            config.max_num_seqs, config.row_width, config.kvcache_block_size
        )
        self.model_runner = self._start_model_runner(config, device)
        self.model_runner.run = self.run

    def _start_model_runner(self, config: Config, device: torch.device) -> ModelRunner:
        return start_model_runner(config, device, TensorParallel())

    @property
    def num_kvcache_blocks(self) -> int:
        """KV blocks that every rank has."""
        return self.model_runner.num_kvcache_blocks

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> LaunchedStep:
        """Start one step on every rank; does not wait for the device."""
        start = perf_counter()
        plan = self.plan_builder.build(seqs, is_prefill)
        launched = self.model_runner.execute(plan, seqs)
        launched.seconds = perf_counter() - start
        return launched

    def wait(self, launched: LaunchedStep) -> list[int | None]:
        """`launched.wait()`; EngineDeadError if a rank dies meanwhile."""
        return launched.wait()

    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int | None]:
        """Compute one step and wait for its tokens."""
        return self.wait(self.launch(seqs, is_prefill))

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> list[object]:
        """`ModelRunner.call` on every rank, after all steps launched before; in rank order.

        Args:
            method: the name of a method of `ModelRunner`, or a callable that gets the runner first.
            timeout: seconds for the other ranks to answer; None: for ever.
            args: positional arguments.
            kwargs: keyword arguments.

        Raises:
            Exception: what the lowest failing rank raised. If `cause_of_death` is set then, the
                ranks cannot go on.
        """
        return [self.model_runner.call(method, *args, **kwargs)]

    def failure_after(self, error: BaseException) -> str | None:
        """`cause_of_death`, found out after `error` in a step."""
        self.cause_of_death = self._rank_failure(error)
        if self.cause_of_death is None and is_fault(error):
            self.cause_of_death = device_failure(self.model_runner.device)
            self._is_device_lost = self.cause_of_death is not None
        return self.cause_of_death

    def _rank_failure(self, error: BaseException) -> str | None:
        """Why the ranks cannot go on after `error`; None: they are in step, or there is but one."""
        return None

    def close(self) -> None:
        """End the other ranks and release all memory, but that of a GPU that has failed."""
        if self._is_device_lost:
            keep_for_ever(self)  # torch ends the process when memory of a failed GPU is given back
        else:
            self.model_runner.close()
