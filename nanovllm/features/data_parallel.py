"""Data parallelism: a replica's process, with an engine of its own that is driven by messages."""

import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.executor import Executor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.sequence_errors import tell_rules
from nanovllm.errors import EngineDeadError, describe, is_fault
from nanovllm.features.prefix_cache import reset_prefix_cache
from nanovllm.features.rpc import call_ranks
from nanovllm.parallel.calls import Reply, sendable
from nanovllm.parallel.executor import start_executor
from nanovllm.parallel.process import unpickle
from nanovllm.parallel.replica_executor import ReplicaExecutor
from nanovllm.parallel.replica_messages import (
    Call,
    CallReply,
    Cancel,
    Ending,
    Exit,
    Further,
    Message,
    Progress,
    ResetPrefixCache,
    Snapshot,
    Started,
    Submission,
    Submit,
    Update,
    pack,
    unpack,
    update_of,
)

TELL_SECONDS = 0.02  # between two messages with tokens, at most by one step more


def start_any_executor(config: Config, device: torch.device) -> Executor:
    """The executor over one or more replicas; errors as of `ReplicaExecutor`."""
    if config.data_parallel_size > 1:
        return ReplicaExecutor(config, device, serve)
    return start_executor(config, device)


def serve(config: Config, pipe: connection.Connection) -> None:
    """Run a replica until it is told to end; what it raises ends its process."""
    assert config.replica is not None
    outcome = Reply.of(lambda: LLMEngine(config))
    if (llm := outcome.result) is not None:
        outcome = Reply(Started(llm.executor.num_kvcache_blocks, llm.model_runner.has_lm_head))
    pipe.send_bytes(pack(CallReply(0, outcome.pack(config.replica))))
    if llm is None:
        pipe.recv_bytes()  # the engine has the error, and ends this process
        return
    with llm:
        ReplicaLoop(llm, pipe).run()


class _Told:
    """What the engine has been told of a sequence."""

    def __init__(self, request: Request, num_tokens: int) -> None:
        self.request = request
        self.num_tokens = num_tokens
        self.is_fresh = True  # it was told nothing

    @property
    def sequence(self) -> Sequence:
        """The request's only one."""
        return self.request.sequences[0]


class ReplicaLoop:
    """Steps of a replica's engine, and messages in between.

    Args:
        llm: the engine.
        pipe: to the engine whose replica this is.
    """

    def __init__(self, llm: LLMEngine, pipe: connection.Connection) -> None:
        self.llm = llm
        self.pipe = pipe
        self._told: dict[int, _Told] = {}  # by ticket, of what has not ended
        self._refused: list[Update] = []
        self._num_prompt_tokens = 0  # computed since the last message
        self._last_time = time.monotonic()

    def run(self) -> None:
        """Until there is an `Exit`."""
        while True:
            while not self._told or self.pipe.poll():
                message = unpack(self.pipe.recv_bytes())
                if isinstance(message, Exit):
                    return
                self._obey(message)
                if self._refused:
                    self._tell()
            self._num_prompt_tokens += max(0, self.llm.advance())
            is_due = time.monotonic() - self._last_time >= TELL_SECONDS
            if is_due or self.llm.scheduler.is_finished():
                self._tell()

    def _obey(self, message: Message) -> None:
        match message:
            case Submit(submissions):
                for submission in submissions:
                    self._queue(submission)
            case Cancel(tickets):
                told = [self._told.pop(ticket) for ticket in tickets if ticket in self._told]
                requests = [one.request for one in told]
                self.llm.abort(requests)
                self.llm.requests.forget(requests)
            case Call(number, packed_call):

                def call() -> list[Any]:
                    method, args, kwargs = unpickle(packed_call)
                    return call_ranks(self.llm, method, None, args, kwargs)

                self._answer(number, call)
            case ResetPrefixCache(number):
                self._answer(number, lambda: reset_prefix_cache(self.llm, True))
            case _:
                raise AssertionError(f"a replica was told {message!r}")

    def _answer(self, number: int, call: Callable[[], Any]) -> None:
        packed = Reply.of(call).pack(self.llm.config.replica or 0)
        self.pipe.send_bytes(pack(CallReply(number, packed)))
        if self.llm.executor.cause_of_death is not None:
            raise EngineDeadError(self.llm.executor.cause_of_death)

    def _queue(self, submission: Submission) -> None:
        """Queue a sequence as a request of its own, as far as it has come on another replica."""
        try:
            request = self._new_request(submission)
        except BaseException as error:
            if not is_fault(error):
                raise
            ending = Ending("abort", describe(error), sendable(error), None)
            further = Further([], [], 0, 0, ending)
            self._refused.append(Update(submission.ticket, [], further))
            return
        self.llm.queue([request])
        [seq] = request.sequences
        seq.seed = submission.seed  # `queue` has drawn one
        self.llm.requests.claim({request.request_id})
        self._told[submission.ticket] = _Told(request, seq.num_completion_tokens)

    def _new_request(self, submission: Submission) -> Request:
        [request] = self.llm.input_processor.process(
            [submission.token_ids],
            submission.params,
            [submission.priority],
            None,
            pooler=submission.pooler,
            pooling_type=submission.pooling_type,
        )
        [seq] = request.sequences
        seq.max_length = submission.max_length
        for token_id in submission.completion:
            seq.token_ids.append(token_id)
            tell_rules(seq, token_id)
        seq.features.logprobs[:] = submission.logprobs
        seq.reset()
        return request

    def _tell(self) -> None:
        """Send all that is new: what prefill steps have brought, then the rest."""
        first, further = self._refused, list[Update]()
        for ticket, told in self._told.items():
            seq, start = told.sequence, told.num_tokens
            stop = seq.num_completion_tokens
            if not (stop > start or seq.is_finished):
                continue
            if told.is_fresh and self._num_prompt_tokens:  # its first token is of a prefill
                told.num_tokens = min(start + 1, stop)
                first.append(update_of(ticket, seq, start, told.num_tokens, True))
                told.is_fresh = False
                if told.num_tokens == stop:
                    continue
            further.append(update_of(ticket, seq, told.num_tokens, stop, told.is_fresh))
            told.num_tokens, told.is_fresh = stop, False
        self._told = {t: told for t, told in self._told.items() if not told.sequence.is_finished}
        self._refused = []
        snapshot = Snapshot.of(self.llm.scheduler)
        if self._num_prompt_tokens or first:
            self._send(Progress(True, self._num_prompt_tokens, first, snapshot))
        if further:
            self._send(Progress(False, 0, further, snapshot))
        self._num_prompt_tokens = 0
        self._last_time = time.monotonic()

    def _send(self, progress: Progress) -> None:
        self.pipe.send_bytes(pack(progress))
