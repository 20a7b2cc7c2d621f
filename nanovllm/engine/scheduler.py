"""Decides what the next step computes: prefill of waiting sequences, else decode of running ones.

A step is one of the two, never a mix. With a step in flight the scheduler plans the next one from
what is already certain; what it cannot know yet is settled when the step in flight is committed.
"""

from collections import deque
from math import ceil
from operator import attrgetter

from nanovllm.config import Config
from nanovllm.engine.cache_groups import new_block_manager
from nanovllm.engine.priority_queue import POLICIES
from nanovllm.engine.scheduler_stats import SchedulerStats
from nanovllm.engine.scheduling_policy import is_worth_admitting
from nanovllm.engine.sequence import Sequence, SequenceStatus, Wants
from nanovllm.engine.sequence_errors import tell_rules


class Scheduler:
    """Waiting and running queues over a pool of KV blocks.

    `config` needs max_num_seqs, max_num_batched_tokens, enable_chunked_prefill, watermark,
    eos_token_ids, num_kvcache_blocks, kvcache_block_size, enable_prefix_caching, cache_windows and
    scheduling_policy.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        # A decode step computes one token of each running sequence.
        self.max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.eos_token_ids = config.eos_token_ids
        self.new_queue = POLICIES[config.scheduling_policy]
        self.num_preemptions = 0
        self.stats = SchedulerStats()
        self.clear()

    def clear(self) -> None:
        """Nothing waits or runs, and the cache is empty."""
        self.block_manager = new_block_manager(self.config)
        self.free_rows = deque(range(self.max_num_seqs))
        self.running: deque[Sequence] = deque()
        self.waiting = self.new_queue()
        self.held: list[Sequence] = []  # by the recovery from an error: they wait for `clear`
        self.num_decodes_since_prefill = 0

    def is_finished(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running and not self.held

    def add(self, seq: Sequence) -> None:
        """Queue `seq` behind all others, or by its priority.

        A sequence that comes here past `LLMEngine.add_request` is computed like any other, but
        `step` does not return it: its owner sees that it `is_finished`. A failed step drops it.
        """
        params = seq.sampling_params
        eos_token_ids = frozenset() if params.ignore_eos else self.eos_token_ids
        seq.end_token_ids = eos_token_ids.union(params.stop_token_ids or ())
        self.waiting.add(seq)

    def schedule(self, in_flight: bool = False) -> tuple[list[Sequence], bool]:
        """The next step's sequences and whether it is a prefill; an empty list: nothing to do yet.

        Each sequence's `num_scheduled_tokens` says how many tokens the step computes for it, ending
        at `num_computed_tokens`. A sequence that is prefilled afterwards gets one new token.

        Args:
            in_flight: a launched step is not committed yet, so nothing may be preempted; if only a
                preemption would help, the list is empty and the caller commits first.
        """
        self.block_manager.begin_step(self.running)
        if self._is_prefill_due() and (seqs := self._schedule_prefill()):
            self.num_decodes_since_prefill = 0
            return seqs, True
        seqs = self._schedule_decode(in_flight)
        if seqs:
            self.num_decodes_since_prefill += 1
        return seqs, False

    def _is_prefill_due(self) -> bool:
        """Whether what waits is worth a prefill step now, as far as it fits."""
        if not self.running or not (last := self.running[-1]).is_prefilled:
            return True
        num_running, manager, config = len(self.running), self.block_manager, self.config
        num_decodes, block_size = self.num_decodes_since_prefill, manager.block_size
        num_free_tokens = (manager.num_free_blocks - config.watermark * num_running) * block_size
        slots = (self.max_num_seqs - num_running, self.max_num_seqs)
        tokens = (num_free_tokens, len(manager.blocks) * block_size, config.max_num_batched_tokens)
        return is_worth_admitting(self.waiting, last.num_cached_tokens, num_decodes, slots, tokens)

    def _schedule_prefill(self) -> list[Sequence]:
        scheduled: list[Sequence] = []
        config, budget = self.config, self.config.max_num_batched_tokens
        # Only the sequence admitted last can be part-way through its prompt.
        if self.running and not self.running[-1].is_prefilled:
            budget -= self._schedule_chunk(self.running[-1], budget)
            scheduled.append(self.running[-1])
        while len(self.running) < self.max_num_seqs and budget > 0:
            if (seq := self.waiting.head(self.running)) is None:
                break
            matched = self.block_manager.match_prefix(seq) if seq.may_read_prefix_cache else []
            num_shared_tokens = len(matched) * self.block_manager.block_size
            # A full hit still computes its last token, whose logits are needed.
            num_cached_tokens = min(num_shared_tokens, seq.num_tokens - 1)
            if seq.num_tokens - num_cached_tokens > budget and not config.enable_chunked_prefill:
                break
            reserved = ceil(config.watermark * len(self.running))
            if not self.block_manager.can_allocate(seq, matched, reserved):
                break
            self.waiting.remove(seq)
            self.block_manager.allocate(seq, matched)
            seq.status = SequenceStatus.RUNNING
            seq.row = self.free_rows.popleft()
            seq.num_computed_tokens = num_cached_tokens + seq.num_copied_tokens
            seq.num_cached_tokens = seq.num_computed_tokens
            self.stats.count_admission(seq, is_caching=self.block_manager.enable_prefix_caching)
            seq.num_shared_tokens = num_shared_tokens
            budget -= self._schedule_chunk(seq, budget)
            self.running.append(seq)
            scheduled.append(seq)
        return scheduled

    def _schedule_chunk(self, seq: Sequence, budget: int) -> int:
        num_tokens = min(seq.num_prefill_tokens - seq.num_computed_tokens, budget)
        seq.num_scheduled_tokens = num_tokens
        seq.num_computed_tokens += num_tokens
        if seq.is_prefilled:
            seq.num_pending_tokens += 1
        # A later sequence, in this step even, may share these blocks: every layer writes the K/V of
        # the whole batch before its attention reads.
        self.block_manager.cache_blocks(seq, seq.num_computed_tokens)
        return num_tokens

    def _schedule_decode(self, in_flight: bool) -> list[Sequence]:
        manager, block_size = self.block_manager, self.block_manager.block_size
        while True:
            # A sequence whose last token is pending already has nothing left to compute.
            seqs = [
                seq
                for seq in self.running
                if seq.num_computed_tokens + 1 < seq.max_length
                and not (seq.num_pending_tokens and seq.wants & Wants.CONFIRMED)
            ]
            # Those whose next token opens a block.
            full = [s for s in seqs if s.num_computed_tokens == len(s.block_table) * block_size]
            if len(full) <= manager.num_free_blocks:
                break
            if in_flight:
                return []
            self.preempt(self.waiting.victim(self.running))
        for seq in full:
            manager.may_append(seq)
        for seq in seqs:
            seq.num_scheduled_tokens = 1
            seq.num_computed_tokens += 1
            seq.num_pending_tokens += 1
        # Longest first: the attention kernel starts its programs in this order, and the short ones
        # then fill the tail. All grow alike, so the order changes only with the batch.
        seqs.sort(key=attrgetter("num_computed_tokens"), reverse=True)
        return seqs

    def preempt(self, seq: Sequence) -> None:
        """Put a running sequence back at the front of the waiting queue, to be computed anew."""
        self.running.remove(seq)
        self._release(seq)
        seq.reset()
        self.waiting.put_back(seq)
        self.num_preemptions += 1

    def postprocess(self, seqs: list[Sequence], token_ids: list[int | None]) -> list[Sequence]:
        """Commit a step: append each sequence's token and end those that are done.

        Args:
            seqs: the step's sequences, as `schedule` returned them.
            token_ids: the token sampled for each; None for a prompt that is not complete yet.

        Returns:
            The sequences of the step that were still alive, in its order.
        """
        alive: list[Sequence] = []
        block_size = self.block_manager.block_size
        for seq, token_id in zip(seqs, token_ids, strict=True):
            if seq.is_finished:  # while this step was in flight: its token is dropped
                continue
            alive.append(seq)
            if token_id is None:
                continue
            seq.num_pending_tokens -= 1
            if seq.error is not None or seq.wants & Wants.POOLING:  # the token means nothing
                self.finish(seq, seq.reason_to_end(self.eos_token_ids) or "stop")
                continue
            seq.token_ids.append(token_id)
            self.stats.num_generation_tokens += 1
            # All tokens but the newest are computed now; cached before a finish releases them.
            num_tokens = len(seq.token_ids)
            if (num_tokens - 1) % block_size == 0:
                self.block_manager.cache_blocks(seq, num_tokens - 1)
            if seq.finish_rules:
                tell_rules(seq, token_id)
            elif num_tokens < seq.max_length and token_id not in seq.end_token_ids:
                continue
            if reason := seq.reason_to_end(self.eos_token_ids):
                self.finish(seq, reason)
        return alive

    def abort(self, seqs: list[Sequence]) -> None:
        """End sequences that run or wait, in one pass over the queue however many they are."""
        if not seqs:  # as after almost every step: no pass over a long queue
            return
        for seq in seqs:
            self.finish(seq, "abort")
        self.waiting.drop_finished()
        self.held = [seq for seq in self.held if not seq.is_finished]

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence and release what it holds; one that waits is left in the queue."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        self.stats.num_finished[reason] += 1

    def _release(self, seq: Sequence) -> None:
        self.block_manager.deallocate(seq)
        assert seq.row is not None
        self.free_rows.append(seq.row)
        seq.row = None
