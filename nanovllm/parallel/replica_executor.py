"""The executor whose ranks are in replicas: engines in processes of their own, driven by messages.

A step of it is what one replica tells of some steps of its own.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from multiprocessing import connection
from typing import Any, NoReturn, cast

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.executor import Executor
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import NONE, StepPlan
from nanovllm.errors import ArgumentError, EngineDeadError
from nanovllm.parallel.calls import pack_call
from nanovllm.parallel.replica_messages import (
    Call,
    Cancel,
    Death,
    Progress,
    ResetPrefixCache,
    Started,
    Submission,
    Submit,
    pack,
)
from nanovllm.parallel.replicas import ReplicaGroup
from nanovllm.parallel.router import Router


class RemoteRunner:
    """Stands in for rank 0's model runner, which is in another process.

    Args:
        device: the type of the ranks' devices.
        has_lm_head: whether the model was loaded with an LM head.
        ask: `collective_rpc` of the executor.
    """

    def __init__(
        self, device: torch.device, has_lm_head: bool, ask: Callable[[Callable[..., Any]], Any]
    ) -> None:
        self.device = device
        self._has_lm_head = has_lm_head
        self._ask = ask

    @property
    def has_lm_head(self) -> bool:
        """Whether tokens can be generated; new weights may bring a head."""
        self._has_lm_head = self._has_lm_head or all(self._ask(_has_lm_head))
        return self._has_lm_head

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"model_runner has no {name!r} here: with data_parallel_size > 1 the models are in "
            "other processes, where collective_rpc and apply_model call functions"
        )


def _has_lm_head(runner: ModelRunner) -> bool:
    return runner.has_lm_head


class ReplicaExecutor(Executor):
    """`config.data_parallel_size` engines on one host, each in a process of its own.

    Args:
        config: the engine's configuration.
        device: of the kind that the ranks have.
        entry_point: see `ReplicaGroup`.

    Raises:
        ArgumentError: a replica's engine cannot be made.
        EngineDeadError: a replica died during start-up.
        RuntimeError: this process is importing the user's script, see `check_script`.
    """

    has_busy_ranks = True

    def __init__(
        self,
        config: Config,
        device: torch.device,
        entry_point: Callable[[Config, connection.Connection], None],
    ) -> None:
        self.cause_of_death: str | None = None
        self._retries = config.replica_death_policy == "retry"
        # What the replicas do not need, and what may not be picklable.
        own = config.replace(
            hf_overrides=None, record=None, disable_log_stats=True, engine_processors=None
        )
        self.group = ReplicaGroup(own, device.type, entry_point)
        started = [cast(Started, answer) for answer in self.group.started.values()]
        self.blocks_of = [answer.num_kvcache_blocks for answer in started]
        has_lm_head = all(answer.has_lm_head for answer in started)
        runner = RemoteRunner(device, has_lm_head, lambda f: self.collective_rpc(f, None, (), {}))
        self.model_runner = cast(ModelRunner, runner)
        self.new_scheduler = self._new_router

    @property
    def num_kvcache_blocks(self) -> int:
        """KV blocks that every replica has: what fits them fits each."""
        return min(self.blocks_of)

    def _new_router(self, config: Config) -> Router:
        self.router = Router(config, self, self.blocks_of)
        return self.router

    # ---- steps --------------------------------------------------------------------------------

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> LaunchedStep:
        """Send the replicas what the router has chosen for them."""
        submissions: dict[int, list[Submission]] = {}
        outgoing, self.router.outgoing = self.router.outgoing, []
        for seq in outgoing:
            place = self.router.places.get(seq)
            if place is not None and place.ticket is not None:
                submissions.setdefault(place.home, []).append(Submission.of(place.ticket, seq))
        for index, own in submissions.items():
            self.group.post(index, pack(Submit(own)))
        return LaunchedStep(_plan(is_prefill, 0), [])

    def wait(self, launched: LaunchedStep) -> list[int | None]:
        """Wait for what a replica tells, which makes the step; EngineDeadError: all have died."""
        index, message = self.group.receive()
        if isinstance(message, Progress):
            launched.plan = _plan(message.is_prefill, message.num_prompt_tokens)
            launched.seqs = self.router.take(index, message.updates, message.snapshot)
        elif isinstance(message, Death):
            launched.seqs = self.router.bury(index, message.cause, self._retries)
        return []

    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int | None]:
        """Not here: the steps are the replicas'."""
        raise ArgumentError("steps cannot be run one by one with data_parallel_size > 1")

    # ---- calls --------------------------------------------------------------------------------

    def cancel(self, index: int, tickets: list[int]) -> None:
        """See `Link.cancel`."""
        self.group.post(index, pack(Cancel(tickets)))

    def reset_prefix_cache(self) -> bool:
        """See `Link.reset_prefix_cache`."""
        return all(self._call(ResetPrefixCache, None).values())

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Any]:
        """See `Executor.collective_rpc`; the ranks of replica 0 come first."""
        packed = pack_call(method, args, kwargs)
        results = self._call(partial(Call, packed_call=packed), timeout)
        return list(chain.from_iterable(cast(list[Any], result) for result in results.values()))

    def _call(self, message: Callable[[int], Any], timeout: float | None) -> dict[int, object]:
        try:
            return self.group.call(message, timeout)
        except (TimeoutError, EngineDeadError) as error:
            self.cause_of_death = f"a call failed: {error!r}"
            raise

    # ---- ends ---------------------------------------------------------------------------------

    def failure_after(self, error: BaseException) -> str | None:
        """See `Executor.failure_after`."""
        self.cause_of_death = str(error) if isinstance(error, EngineDeadError) else None
        return self.cause_of_death

    def close(self) -> None:
        """End the replicas."""
        self.group.close()


def _plan(is_prefill: bool, num_tokens: int) -> StepPlan:
    """A plan that says what kind of a step it was, and how many tokens of prompts it computed."""
    return StepPlan(is_prefill, NONE, NONE, token_ids=np.empty(num_tokens, dtype=np.int32))
