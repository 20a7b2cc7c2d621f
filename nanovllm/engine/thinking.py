"""Ends reasoning that has used up its tokens: vLLM's `thinking_token_budget`."""

from collections import deque

from nanovllm.engine.sequence import Sequence, Wants


class ThinkingBudget:
    """A `FinishRule` that ends nothing: `seq.features.forced_token` is the token that must follow.

    Tokens behind `start` count until `end` comes. When there are as many as the budget, the tokens
    of `end` are the only ones that can follow, one after the other.

    Args:
        seq: with all that it wants otherwise.
        budget: tokens of reasoning at most; what the prompt has of it counts.
        start: token ids with which reasoning begins, in the prompt or the completion.
        end: those with which it ends.
    """

    def __init__(self, seq: Sequence, budget: int, start: list[int], end: list[int]) -> None:
        self.seq = seq
        self.budget = self._limit = budget
        self.start, self.end = start, end
        self._newest: deque[int] = deque(maxlen=max(len(start), len(end)))
        self._count: int | None = None  # of tokens behind the start; None: it does not reason
        self._waits_always = bool(seq.wants & Wants.CONFIRMED)
        for token_id in seq.token_ids:
            self._take(token_id)
        if self._count is not None:
            self._limit = max(budget, self._count)
        seq.features.may_be_forced = True
        self._tell()

    def on_token(self, token_id: int) -> None:
        """See `FinishRule.on_token`."""
        self._take(token_id)
        self._tell()

    def _take(self, token_id: int) -> None:
        self._newest.append(token_id)
        newest = list(self._newest)
        if newest[-len(self.start) :] == self.start:
            self._count, self._limit = 0, self.budget
        elif newest[-len(self.end) :] == self.end:
            self._count = None
        elif self._count is not None:
            self._count += 1

    def _tell(self) -> None:
        seq, count = self.seq, self._count
        seq.features.forced_token = None
        if count is not None and count >= self._limit:
            seq.features.forced_token = self.end[min(count - self._limit, len(self.end) - 1)]
        # A token that is pending may be the last free one, or begin reasoning that has no tokens.
        must_wait = self.budget == 0 if count is None else count + 1 >= self._limit
        if must_wait or self._waits_always:
            seq.wants |= Wants.CONFIRMED
        else:
            seq.wants &= ~Wants.CONFIRMED
