"""How the engine computes: executors launch steps and calls on every rank.

`UniProcExecutor` has one rank, in this process; `parallel.executor` has one in each of several.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from ctypes import py_object, pythonapi
from time import perf_counter
from typing import Any, ClassVar

import torch

from nanovllm.config import Config
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.startup import start_model_runner
from nanovllm.engine.step_plan import PlanBuilder
from nanovllm.errors import describe, is_fault
from nanovllm.parallel.tensor_parallel import TensorParallel


class Executor(ABC):
    """Computes steps on every rank.

    Args:
        config: the engine's configuration.
        model_runner: rank 0's, in this process.

    Attributes:
        cause_of_death: why nothing can be computed any more, in words; None: it can.
        has_busy_ranks: whether other ranks wait in a `collective_rpc`, so that what it calls must
            not use the engine.
    """

    has_busy_ranks: ClassVar[bool] = False

    def __init__(self, config: Config, model_runner: ModelRunner) -> None:
        self.model_runner = model_runner
        self.plan_builder = PlanBuilder(config.max_num_seqs, config.row_width)
        self.cause_of_death: str | None = None
        self._is_device_lost = False
        model_runner.run = self.run

    @property
    def num_kvcache_blocks(self) -> int:
        """KV blocks that every rank has."""
        return self.model_runner.num_kvcache_blocks

    @abstractmethod
    def launch(self, seqs: list[Sequence], is_prefill: bool) -> LaunchedStep:
        """Start one step on every rank; does not wait for the device."""

    def wait(self, launched: LaunchedStep) -> list[int | None]:
        """`launched.wait()`; EngineDeadError if a rank dies meanwhile."""
        return launched.wait()

    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int | None]:
        """Compute one step and wait for its tokens."""
        return self.wait(self.launch(seqs, is_prefill))

    @abstractmethod
    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Any]:
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

    def failure_after(self, error: BaseException) -> str | None:
        """`cause_of_death`, found out after `error` in a step."""
        self.cause_of_death = self._rank_failure(error)
        if self.cause_of_death is None and is_fault(error):
            self.cause_of_death = self._device_failure()
        return self.cause_of_death

    def _rank_failure(self, error: BaseException) -> str | None:
        """Why the ranks cannot go on after `error`; None: they are in step, or there is but one."""
        return None

    def _device_failure(self) -> str | None:
        """How a kernel has failed, after which nothing runs on this GPU; None: it works."""
        if self.model_runner.is_cuda:
            try:
                torch.cuda.synchronize(self.model_runner.device)
            except Exception as error:
                self._is_device_lost = True
                return f"the GPU failed: {describe(error)}"
        return None

    def close(self) -> None:
        """End the other ranks and release all memory, but that of a GPU that has failed."""
        if self._is_device_lost:
            # torch ends the process when memory of a GPU that failed is given back: it never is.
            pythonapi.Py_IncRef(py_object(self))
        else:
            self.model_runner.close()


class UniProcExecutor(Executor):
    """One rank, in this process."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, start_model_runner(config, device, TensorParallel()))

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> LaunchedStep:
        """See `Executor.launch`."""
        start = perf_counter()
        plan = self.plan_builder.build(seqs, is_prefill)
        launched = self.model_runner.execute(plan, seqs)
        launched.seconds = perf_counter() - start
        return launched

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Any]:
        """See `Executor.collective_rpc`; the call in this process is not broken off."""
        return [self.model_runner.call(method, *args, **kwargs)]
