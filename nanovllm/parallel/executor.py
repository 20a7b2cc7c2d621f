"""The executor whose ranks are processes: rank 0 is this one, the others are workers."""

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.executor import Executor
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.startup import start_model_runner
from nanovllm.errors import ArgumentError, EngineDeadError, is_fault
from nanovllm.parallel.packed_plans import pack
from nanovllm.parallel.workers import WorkerGroup


class MultiprocExecutor(Executor):
    """`config.tensor_parallel_size` ranks on one host, each in a process of its own.

    Raises:
        EngineDeadError: a worker died during start-up.
        RuntimeError: this process is importing the user's script, see `check_script`.
    """

    has_busy_ranks = True

    def __init__(self, config: Config, device: torch.device) -> None:
        # Only rank 0 needs these, and they may not be picklable.
        for_workers = config.replace(
            tokenizer=None, hf_overrides=None, logits_processors=None, engine_processors=None
        )
        self.workers = WorkerGroup(for_workers, device.type)
        self._is_mid_step = False  # after a failed launch: the ranks are out of step
        super().__init__(config, device)

    def _start_model_runner(self, config: Config, device: torch.device) -> ModelRunner:
        workers = self.workers
        try:
            assert workers.tp is not None
            runner = start_model_runner(config, device, workers.tp, workers.agree)
            workers.finish_start()
            return runner
        except BaseException as error:
            # A rank that fails takes the collectives of the others with it: name the first.
            is_own = isinstance(error, ArgumentError) or not isinstance(error, Exception)
            cause = None if is_own else workers.wait_for_death(1.0)
            workers.is_broken = True  # they may be anywhere
            workers.close()
            if cause:
                raise EngineDeadError(cause) from error
            raise

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> LaunchedStep:
        """See `Executor.launch`."""
        start = perf_counter()
        self._is_mid_step = False
        plan = self.plan_builder.build(seqs, is_prefill)
        packed = pack(plan)
        self._is_mid_step = True
        self.workers.send(packed)
        launched = self.model_runner.execute(plan, seqs)
        self._is_mid_step = False
        launched.seconds = perf_counter() - start
        return launched

    def wait(self, launched: LaunchedStep) -> list[int | None]:
        """See `Executor.wait`."""
        while not launched.is_done():
            self.workers.check()
        return launched.wait()

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Any]:
        """See `Executor.collective_rpc`, and `WorkerGroup.call` for more errors."""
        try:
            return self.workers.call(self.model_runner, method, args, kwargs, timeout)
        except BaseException as error:
            if self.workers.is_broken:
                is_death = isinstance(error, EngineDeadError)
                self.cause_of_death = str(error) if is_death else f"a call failed: {error!r}"
            raise

    def failure_after(self, error: BaseException) -> str | None:
        """See `Executor.failure_after`."""
        cause = super().failure_after(error)
        self.workers.is_broken |= cause is not None
        return cause

    def _rank_failure(self, error: BaseException) -> str | None:
        if not is_fault(error):
            return f"a tensor-parallel step was broken off: {error!r}"
        cause = self.workers.wait_for_death(1.0) if self._is_mid_step else None
        if isinstance(error, EngineDeadError):
            return cause or str(error)
        return cause or (f"a tensor-parallel step failed: {error!r}" if self._is_mid_step else None)

    def close(self) -> None:
        """See `Executor.close`."""
        if self._is_device_lost:
            super().close()
            with suppress(Exception):
                self.workers.close()
            return
        if self.workers.is_broken:
            # What is in flight may wait for a rank that does not come, and dropping graphs for it.
            self.workers.break_off()
        self.model_runner.drop_graphs()
        self.workers.close()
        super().close()


def start_executor(config: Config, device: torch.device) -> Executor:
    """The executor of one engine, over as many ranks as the configuration says.

    Raises:
        ArgumentError: `data_parallel_size` asks for several engines.
    """
    if config.data_parallel_size > 1:
        raise ArgumentError(
            f"data_parallel_size ({config.data_parallel_size}) must be 1 here: nanovllm.LLM starts "
            "several replicas"
        )
    form = MultiprocExecutor if config.tensor_parallel_size > 1 else Executor
    return form(config, device)
