"""Decides what the next step computes: prefill of waiting sequences, else decode of running ones.

A step is one of the two, never a mix. With a step in flight the scheduler plans the next one from
what is already certain; what it cannot know yet is settled when the step in flight is committed.
"""

from collections import deque
from math import ceil

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    """Waiting and running queues over a pool of KV blocks.

    `config` needs max_num_seqs, max_num_batched_tokens, enable_chunked_prefill, watermark,
    eos_token_ids, num_kvcache_blocks, kvcache_block_size and enable_prefix_caching.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        # A decode step computes one token of each running sequence.
        self.max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.enable_chunked_prefill = config.enable_chunked_prefill
        self.watermark = config.watermark
        self.eos_token_ids = config.eos_token_ids
        self.num_preemptions = 0
        self.restart([])

    def restart(self, seqs: list[Sequence]) -> None:
        """Start over with an empty cache and `seqs` waiting, after a step that failed half-way.

        A sequence whose end was committed already is finished instead.
        """
        config = self.config
        assert config.num_kvcache_blocks is not None
        self.block_manager = BlockManager(
            config.num_kvcache_blocks, config.kvcache_block_size, config.enable_prefix_caching
        )
        self.free_rows = deque(range(self.max_num_seqs))
        self.running: deque[Sequence] = deque()
        self.waiting: deque[Sequence] = deque()
        for seq in seqs:
            seq.reset()
            if reason := self._reason_to_end(seq):
                self.finish(seq, reason)
            else:
                self.waiting.append(seq)

    def is_finished(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        """Queue `seq` behind all others."""
        self.waiting.append(seq)

    def schedule(self, in_flight: bool = False) -> tuple[list[Sequence], bool]:
        """The next step's sequences and whether it is a prefill; an empty list: nothing to do yet.

        Each sequence's `num_scheduled_tokens` says how many tokens the step computes for it, ending
        at `num_computed_tokens`. A sequence that is prefilled afterwards gets one new token.

        Args:
            in_flight: a launched step is not committed yet, so nothing may be preempted; if only a
                preemption would help, the list is empty and the caller commits first.
        """
        seqs = self._schedule_prefill()
        if seqs:
            return seqs, True
        return self._schedule_decode(in_flight), False

    def _schedule_prefill(self) -> list[Sequence]:
        scheduled: list[Sequence] = []
        budget = self.max_num_batched_tokens
        # Only the sequence admitted last can be part-way through its prompt.
        if self.running and not self.running[-1].is_prefilled:
            seq = self.running[-1]
            budget -= self._schedule_chunk(seq, budget)
            scheduled.append(seq)
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            seq = self.waiting[0]
            matched = self.block_manager.match_prefix(seq)
            num_shared_tokens = len(matched) * self.block_manager.block_size
            # A full hit still computes its last token, whose logits are needed.
            num_cached_tokens = min(num_shared_tokens, seq.num_tokens - 1)
            if seq.num_tokens - num_cached_tokens > budget and not self.enable_chunked_prefill:
                break
            reserved = ceil(self.watermark * len(self.running))
            if not self.block_manager.can_allocate(seq, matched, reserved):
                break
            self.waiting.popleft()
            self.block_manager.allocate(seq, matched)
            seq.status = SequenceStatus.RUNNING
            seq.row = self.free_rows.popleft()
            seq.num_cached_tokens = seq.num_computed_tokens = num_cached_tokens
            seq.num_shared_tokens = num_shared_tokens
            budget -= self._schedule_chunk(seq, budget)
            self.running.append(seq)
            scheduled.append(seq)
        return scheduled

    def _schedule_chunk(self, seq: Sequence, budget: int) -> int:
        num_tokens = min(seq.num_prefill_tokens - seq.num_computed_tokens, budget)
        self._advance(seq, num_tokens)
        # A later sequence, in this step even, may share these blocks: every layer writes the K/V of
        # the whole batch before its attention reads.
        self.block_manager.cache_blocks(seq, seq.num_computed_tokens)
        return num_tokens

    def _schedule_decode(self, in_flight: bool) -> list[Sequence]:
        scheduled: list[Sequence] = []
        candidates = deque(
            seq for seq in self.running if seq.num_tokens_with_pending < seq.max_length
        )
        while candidates:
            seq = candidates.popleft()
            while not self.block_manager.can_append(seq):
                if in_flight:
                    return self._cancel(scheduled)
                victim = candidates.pop() if candidates else seq
                self.preempt(victim)
                if victim is seq:
                    return scheduled
            self.block_manager.may_append(seq)
            self._advance(seq, 1)
            scheduled.append(seq)
        # Longest first: the attention kernel starts its programs in this order, and the short ones
        # then fill the tail. All grow alike, so the order changes only with the batch.
        scheduled.sort(key=len, reverse=True)
        return scheduled

    def _advance(self, seq: Sequence, num_tokens: int) -> None:
        seq.num_scheduled_tokens = num_tokens
        seq.num_computed_tokens += num_tokens
        if seq.is_prefilled:
            seq.num_pending_tokens += 1

    def _cancel(self, scheduled: list[Sequence]) -> list[Sequence]:
        # The blocks appended stay: they are needed in the retried step just the same.
        for seq in scheduled:
            seq.num_computed_tokens -= 1
            seq.num_pending_tokens -= 1
        return []

    def preempt(self, seq: Sequence) -> None:
        """Put a running sequence back at the front of the waiting queue, to be computed anew."""
        self.running.remove(seq)
        self._release(seq)
        seq.reset()
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def postprocess(self, seqs: list[Sequence], token_ids: list[int | None]) -> list[Sequence]:
        """Commit a step: append each sequence's token and end those that are done.

        Args:
            seqs: the step's sequences, as `schedule` returned them.
            token_ids: the token sampled for each; None for a prompt that is not complete yet.

        Returns:
            The sequences of the step that were still alive, in its order.
        """
        alive = [seq for seq in seqs if not seq.is_finished]
        for seq, token_id in zip(seqs, token_ids, strict=True):
            # A sequence that ended while this step was in flight: its token is dropped.
            if token_id is None or seq.is_finished:
                continue
            seq.token_ids.append(token_id)
            seq.num_pending_tokens -= 1
            # All tokens but the newest are computed now; cached before a finish releases them.
            if (seq.num_tokens - 1) % self.block_manager.block_size == 0:
                self.block_manager.cache_blocks(seq, seq.num_tokens - 1)
            if reason := self._reason_to_end(seq):
                self.finish(seq, reason)
        return alive

    def _reason_to_end(self, seq: Sequence) -> str | None:
        """Why `seq` ends with its newest token; None: it goes on."""
        if (
            seq.num_completion_tokens > 0
            and not seq.sampling_params.ignore_eos
            and seq.token_ids[-1] in self.eos_token_ids
        ):
            return "stop"
        return "length" if seq.num_tokens >= seq.max_length else None

    def abort(self, seqs: list[Sequence]) -> None:
        """End sequences that run or wait, in one pass over the queue however many they are."""
        for seq in seqs:
            self.finish(seq, "abort")
        self.waiting = deque(seq for seq in self.waiting if not seq.is_finished)

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence and release what it holds; one that waits is left in the queue."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def _release(self, seq: Sequence) -> None:
        self.block_manager.deallocate(seq)
        assert seq.row is not None
        self.free_rows.append(seq.row)
        seq.row = None
