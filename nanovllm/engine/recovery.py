"""Finds the request that makes a step fail, so that it ends alone and hurts no other.

The requests of a failed step are run in ever smaller groups, each by itself, until one is alone
in a step that fails: that one is ended. A failure that does not come again ends nobody.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nanovllm.engine.request import Request, RequestTable
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.sequence_errors import note_error
from nanovllm.errors import EngineDeadError, describe, is_fault
from nanovllm.guards.interrupts import DeferredInterrupt
from nanovllm.guards.ownership import Owner

if TYPE_CHECKING:
    from nanovllm.engine.executor import Executor

# A sequence that starts again samples the token that failed first or second: with a step in flight,
# the token before was not confirmed yet.
TOKENS_TO_PASS = 2

logger = logging.getLogger("nanovllm")


class Recovery:
    """The groups of requests that are still to be run by themselves; none while all is well.

    Args:
        requests: the engine's.
        scheduler: the engine's.
        executor: the engine's.

    Attributes:
        suspects: the sequences of what is launched or committed just now; None: all.
    """

    def __init__(self, requests: RequestTable, scheduler: Scheduler, executor: "Executor") -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._executor = executor
        self.suspects: list[Sequence] | None = None
        self._groups: list[list[Request]] = []  # the last one is running
        self._goals: list[tuple[Sequence, int]] = []  # tokens with which that group has passed

    @contextmanager
    def stepping(self, owner: Owner) -> Iterator[None]:
        """Around a step: Ctrl-C, and what else wants the engine, waits until its end.

        After a failure all requests are queued anew, with an empty cache. If one of `suspects` may
        have caused it, this is or will be its end. Else the error is raised, or an EngineDeadError
        if nothing can be computed any more.
        """
        with DeferredInterrupt(), owner.stepping():
            try:
                yield
            except BaseException as error:
                cause = self._executor.failure_after(error)
                if cause is None and is_fault(error):
                    everyone = self._requests.sequences()
                    self._isolate(error, everyone if self.suspects is None else self.suspects)
                    return
                self._groups.clear()
                self._run_next_group()
                if is_fault(error):
                    raise EngineDeadError(cause) from error
                raise

    def _isolate(self, error: BaseException, seqs: list[Sequence]) -> None:
        """Look for the request to blame, or end it if it is found.

        The other requests are queued to be computed anew, or held back until the search is over.
        """
        suspects = self._requests.unfinished_of(seqs)
        group = self._groups.pop() if self._groups else []
        own = set(group)
        retried = [request for request in suspects if request in own]
        suspects = retried or suspects  # one that was added since may be only a neighbour
        own.difference_update(suspects)
        self._groups.append([request for request in group if request in own])
        if len(retried) == 1:
            [request] = retried
            logger.warning("request %d is ended: %s", request.request_id, describe(error))
            logger.debug("request %d made a step fail", request.request_id, exc_info=error)
            for seq in request.sequences:
                if not seq.is_finished:  # what has ended by itself stays
                    note_error(seq, error)
        else:
            message = "a step of %d requests failed and is run again in parts: %s"
            logger.warning(message, len(suspects), describe(error))
            half = len(suspects) // 2
            self._groups += [suspects[half:], suspects[:half]]
        self._run_next_group()

    def has_passed(self) -> bool:
        """Whether the group that runs by itself, if one does, has got beyond the failure."""
        return bool(self._groups) and all(
            seq.is_finished or seq.num_tokens >= goal for seq, goal in self._goals
        )

    def go_on(self) -> None:
        """Leave the group that has passed. No step may be in flight."""
        self._groups.pop()
        self._run_next_group()

    def _run_next_group(self) -> None:
        """Queue the last group and hold the others back; queue everything if there is no group."""
        own: set[int] = set()
        while self._groups and not own:
            own = self._requests.unfinished.keys() & {r.request_id for r in self._groups[-1]}
            if not own:
                self._groups.pop()  # they have ended
        everything = self._requests.sequences()
        seqs = [seq for seq in everything if not seq.is_finished]
        chosen = [seq for seq in seqs if not own or seq.request_id in own]
        self._goals = [(seq, seq.num_tokens + TOKENS_TO_PASS) for seq in chosen] if own else []
        restart(self._scheduler, chosen, [seq for seq in seqs if own and seq.request_id not in own])
        self._requests.finish(everything)  # what has ended by now


def restart(scheduler: Scheduler, seqs: list[Sequence], held: Iterable[Sequence] = ()) -> None:
    """Start over with an empty cache and `seqs` waiting, after a step that failed half-way.

    A sequence whose end was committed already is finished instead.

    held: further sequences, which do not run before the next restart.
    """
    untouched = set(scheduler.held)  # most of very many, in a search that restarts often
    scheduler.clear()
    for queue, queued in ((scheduler.add, seqs), (scheduler.held.append, held)):
        for seq in queued:
            if seq not in untouched:
                seq.reset()
                if reason := seq.reason_to_end(scheduler.eos_token_ids):
                    scheduler.finish(seq, reason)
                    continue
            queue(seq)
