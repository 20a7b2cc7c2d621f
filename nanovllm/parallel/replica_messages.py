"""What an engine and its replicas tell each other: sequences out, tokens and calls back.

This is the one place where a request and what it has got are pickled.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_stats import SchedulerStats
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ArgumentError
from nanovllm.parallel.calls import sendable
from nanovllm.parallel.process import unpickle
from nanovllm.sampling.state import LogprobRow
from nanovllm.sampling_params import SamplingParams

# ---- to a replica -----------------------------------------------------------------------------


class Submission(NamedTuple):
    """A sequence that a replica is to complete.

    Attributes:
        ticket: names it in all further messages.
        token_ids: the prompt's.
        completion: tokens that it has got by now, on a replica before.
        logprobs: theirs, if wanted.
        params: with n of 1.
        max_length, priority, seed: the sequence's.
        pooler, pooling_type: as of `FeatureState`.
    """

    ticket: int
    token_ids: list[int]
    completion: list[int]
    logprobs: list[LogprobRow]
    params: SamplingParams
    max_length: int
    priority: int
    seed: int
    pooler: Callable[[np.ndarray], Any] | None
    pooling_type: str

    @classmethod
    def of(cls, ticket: int, seq: Sequence) -> "Submission":
        """That of a sequence as it is now."""
        params, features = seq.sampling_params, seq.features
        # Log probabilities of the prompt are the first completion's, and are computed once.
        has_all = len(features.prompt_logprobs) == features.num_prompt_logprobs > 0
        if params.n > 1 or has_all:
            prompt_logprobs = None if seq.index or has_all else params.prompt_logprobs
            params = replace(params, n=1, prompt_logprobs=prompt_logprobs)
        return cls(
            ticket,
            seq.prompt_token_ids,
            seq.completion_token_ids,
            features.logprobs,
            params,
            seq.max_length,
            seq.priority,
            seq.seed,
            features.pooler,
            features.pooling_type,
        )


class Submit(NamedTuple):
    """Queue these sequences."""

    submissions: list[Submission]


class Cancel(NamedTuple):
    """Forget these sequences; tickets of those that have ended mean nothing."""

    tickets: list[int]


class Call(NamedTuple):
    """Make a call on every rank of the replica, and answer with a `CallReply`."""

    number: int
    packed_call: bytes  # of `calls.pack_call`


class ResetPrefixCache(NamedTuple):
    """Forget all cached K/V, and answer with a `CallReply`. No sequence may be left."""

    number: int


class Exit(NamedTuple):
    """End the process."""


# ---- from a replica ---------------------------------------------------------------------------


class Started(NamedTuple):
    """The engine of the replica is ready, or `packed_reply` has the error that it raised."""

    num_kvcache_blocks: int
    has_lm_head: bool


class Ending(NamedTuple):
    """How a sequence has ended; as of `Sequence` and `FeatureState`."""

    finish_reason: str
    stop_reason: int | str | None
    error: BaseException | None
    pooled: Any


class Further(NamedTuple):
    """What a sequence has got beside tokens; as of `Sequence` and `FeatureState`."""

    logprobs: list[LogprobRow]
    prompt_logprobs: list[LogprobRow]  # all, once
    num_cached_tokens: int
    num_cached_prompt_tokens: int
    ending: Ending | None

    def apply(self, seq: Sequence) -> None:
        """Give a sequence what has come, its end aside."""
        features = seq.features
        features.logprobs += self.logprobs
        if self.prompt_logprobs:
            features.prompt_logprobs[:] = self.prompt_logprobs
        if not seq.was_admitted:
            seq.num_cached_prompt_tokens = self.num_cached_prompt_tokens
        seq.was_admitted = True
        seq.num_cached_tokens = self.num_cached_tokens
        if self.ending is not None:
            features.pooled = self.ending.pooled


class Update(NamedTuple):
    """What a sequence has got since the last update."""

    ticket: int
    token_ids: list[int]
    further: Further | None  # always in the first update of a sequence and in the last


@dataclass
class Snapshot:
    """The counters of a replica's scheduler."""

    stats: SchedulerStats
    num_preemptions: int
    num_free_blocks: int

    @classmethod
    def of(cls, scheduler: Scheduler) -> "Snapshot":
        """Those of now."""
        num_free_blocks = scheduler.block_manager.num_free_blocks
        return cls(scheduler.stats, scheduler.num_preemptions, num_free_blocks)


class Progress(NamedTuple):
    """What some steps of one kind have brought."""

    is_prefill: bool
    num_prompt_tokens: int  # that were computed
    updates: list[Update]
    snapshot: Snapshot


class CallReply(NamedTuple):
    """The answer to the call of this number."""

    number: int
    packed_reply: bytes  # of `calls.Reply`; a result is a list with one for each rank


class Death(NamedTuple):
    """A replica has died; written by the process that watches it."""

    cause: str


Message = Submit | Cancel | Call | ResetPrefixCache | Exit | Started | Progress | CallReply | Death


def update_of(ticket: int, seq: Sequence, start: int, stop: int, is_first: bool) -> Update:
    """An update of a replica's sequence.

    Args:
        ticket: its name.
        seq: the sequence.
        start, stop: which of its completion tokens are told; the last one tells its end too.
        is_first: whether nothing was told of it before.
    """
    token_ids = seq.token_ids[seq.num_prompt_tokens + start : seq.num_prompt_tokens + stop]
    is_last = seq.is_finished and stop == seq.num_completion_tokens
    features = seq.features
    if not (is_first or is_last or features.logprobs):
        return Update(ticket, token_ids, None)
    ending = None
    if is_last:
        assert seq.finish_reason is not None
        error = None if seq.error is None else sendable(seq.error)
        ending = Ending(seq.finish_reason, seq.stop_reason, error, features.pooled)
    has_all = len(features.prompt_logprobs) == features.num_prompt_logprobs
    further = Further(
        features.logprobs[start:stop],
        features.prompt_logprobs if is_first and has_all else [],
        seq.num_cached_tokens,
        seq.num_cached_prompt_tokens,
        ending,
    )
    return Update(ticket, token_ids, further)


def pack(message: Message) -> bytes:
    """The message as bytes; ArgumentError if something in it cannot be pickled."""
    try:
        return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # of many types
        raise ArgumentError(
            f"it cannot be sent to a replica: {error} (a callable must be defined at the top level "
            "of a module, a lambda cannot be sent)"
        ) from error


def unpack(packed: bytes) -> Message:
    """The message that `pack` made bytes of."""
    return unpickle(packed)
