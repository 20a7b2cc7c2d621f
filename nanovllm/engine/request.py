"""A request's life: queued, running, finished, taken, forgotten.

A request has a sequence for each of its `n` completions.
"""

import time
from collections.abc import Iterable

from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestMetrics
from nanovllm.sampling.seeds import derived_seed
from nanovllm.sampling_params import SamplingParams


class Request:
    """What `generate` makes of each prompt; numbered and given seeds when it is queued.

    Args:
        prompt: the prompt's text; None if token ids were given.
        token_ids: the prompt's ids.
        params: checked parameters, which nobody else changes.
        max_length: tokens at which a sequence ends with reason "length", prompt included.
        priority: the lower, the earlier under `scheduling_policy="priority"`.
    """

    def __init__(
        self,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        max_length: int,
        priority: int = 0,
    ) -> None:
        self.request_id = -1
        self.prompt = prompt
        self.params = params
        self.metrics = RequestMetrics(arrival_time=time.time())
        self.sequences = [
            Sequence(token_ids, params, max_length=max_length, index=index, priority=priority)
            for index in range(params.n)
        ]

    def number(self, request_id: int, engine_seed: int) -> None:
        """Give the request its number, and with it the sequences their seeds."""
        self.request_id = request_id
        self.metrics.arrival_time = time.time()
        for seq in self.sequences:
            seq.request_id = request_id
            if self.params.seed is None:
                seq.seed = derived_seed(engine_seed, request_id, seq.index)
            else:
                seq.seed = (self.params.seed + seq.index) % 2**64

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences have ended."""
        return all(seq.is_finished for seq in self.sequences)


class RequestTable:
    """An engine's requests by id, from the queue until their output is forgotten.

    A request is unfinished until its last sequence has ended. Then it is for whoever has claimed
    its id, or else for the next `take`. `find` knows all but the outputs that were taken before the
    last ones: a long loop needs no more memory than a short one.
    """

    def __init__(self) -> None:
        self.unfinished: dict[int, Request] = {}
        self._finished: list[Request] = []  # for `take`, in the order in which they ended
        self._taken: dict[int, Request] = {}  # last, and what was aborted since
        self._claims: dict[int, set[int]] = {}  # id -> all ids that its owner still waits for

    def add(self, request: Request) -> None:
        """Enter a numbered request that is being queued."""
        self.unfinished[request.request_id] = request

    def claim(self, request_ids: set[int]) -> None:
        """Keep these requests from `take`. Each id leaves the caller's set when it has ended."""
        self._claims.update(dict.fromkeys(request_ids, request_ids))

    @property
    def has_finished(self) -> bool:
        """Whether `take` has anything to give."""
        return bool(self._finished)

    def sequences(self) -> list[Sequence]:
        """Those of all unfinished requests, ended ones included."""
        return [seq for request in self.unfinished.values() for seq in request.sequences]

    def unfinished_of(self, seqs: Iterable[Sequence]) -> list[Request]:
        """The unfinished requests that `seqs` are of, each once, by their numbers."""
        ids = self.unfinished.keys() & {seq.request_id for seq in seqs}
        return [self.unfinished[request_id] for request_id in sorted(ids)]

    def note_first_tokens(self, seqs: Iterable[Sequence]) -> None:
        """Take note of when requests got their first token, if that was just now."""
        now = time.time()
        for seq in seqs:
            request = self.unfinished.get(seq.request_id)  # None: not a request's (`Scheduler.add`)
            if request is not None and seq.num_completion_tokens > 0:
                request.metrics.first_token_time = request.metrics.first_token_time or now

    def finish(self, seqs: Iterable[Sequence]) -> list[Request]:
        """Take note of requests that have ended with one of `seqs`, and return them."""
        ended: list[Request] = []
        for seq in seqs:
            # None: it ended with a sequence before, or is not a request's (`Scheduler.add`).
            request = self.unfinished.get(seq.request_id) if seq.is_finished else None
            if request is not None and request.is_finished:
                ended.append(request)
                if not self._remove(request):
                    self._finished.append(request)
        return ended

    def take(self) -> list[Request]:
        """What has ended and nobody has claimed; if there is any, earlier ones are forgotten."""
        finished, self._finished = self._finished, []
        if finished:
            self._taken = {request.request_id: request for request in finished}
        return finished

    def drop(self, requests: Iterable[Request]) -> list[Request]:
        """Remove those of `requests` that are unfinished here; nobody waits for them any more."""
        dropped = [r for r in requests if self.unfinished.get(r.request_id) is r]
        for request in dropped:
            self._remove(request)
        return dropped

    def _remove(self, request: Request) -> bool:
        """It is unfinished no longer; whether somebody had claimed it, who is told."""
        del self.unfinished[request.request_id]
        request.metrics.finished_time = time.time()
        claim = self._claims.pop(request.request_id, None)
        if claim is not None:
            claim.discard(request.request_id)
        return claim is not None

    def keep(self, requests: Iterable[Request]) -> None:
        """Let `find` know requests that were dropped."""
        self._taken.update((request.request_id, request) for request in requests)

    def forget(self, requests: Iterable[Request] | None = None) -> None:
        """Nobody will ask for these outputs, by default for all that were taken or kept."""
        if requests is None:
            self._taken.clear()
        else:
            for request in requests:
                self._taken.pop(request.request_id, None)

    def find(self, request_id: int) -> Request | None:
        """The request, None if there is none or it is forgotten."""
        request = self.unfinished.get(request_id) or self._taken.get(request_id)
        return request or next((r for r in self._finished if r.request_id == request_id), None)

    def clear(self) -> None:
        """Forget what has ended."""
        self._finished.clear()
        self.forget()
