"""A scheduler with a fake device below it, for tests that need no model.

The fake device executes packed step plans as the runner does: it keeps a row table, and for each
cache slot a number that stands for the K/V of a whole prefix. A sampled token is a function of what
the sequence reads through its block table, so a wrong slot anywhere changes the completion. There
is a cache for each cache group.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from nanovllm.engine import common_prefix
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.cache_groups import WindowedBlockManager
from nanovllm.engine.packed_tokens import pack_tokens
from nanovllm.engine.recovery import restart
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import PlanBuilder, StepPlan
from nanovllm.kernels import row_state
from nanovllm.parallel.packed_plans import max_packed_size, pack, unpack
from nanovllm.sampling_params import SamplingParams

EOS = 1
EMPTY_PREFIX = 0


def make_config(**overrides: Any) -> SimpleNamespace:
    """What the Scheduler reads of a Config: ample by default, watermark 0."""
    settings: dict[str, Any] = {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 16384,
        "enable_chunked_prefill": False,
        "watermark": 0.0,
        "eos_token_ids": frozenset({EOS}),
        "num_kvcache_blocks": 10,
        "kvcache_block_size": 16,
        "enable_prefix_caching": True,
        "scheduling_policy": "fcfs",
        "cache_windows": (None,),
    }
    assert not overrides.keys() - settings.keys()
    return SimpleNamespace(**(settings | overrides))


def make_scheduler(**overrides: Any) -> Scheduler:
    return Scheduler(make_config(**overrides))


def make_seq(
    prompt: list[int],
    max_tokens: int | None = 64,
    ignore_eos: bool = False,
    request_id: int = 0,
    max_length: int | None = None,
) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)
    return Sequence(prompt, params, request_id=request_id, max_length=max_length)


def step(scheduler: Scheduler, token: int = 7) -> tuple[list[Sequence], int]:
    """One synchronous step that samples `token` everywhere: its sequences and `num_tokens`."""
    seqs, is_prefill = scheduler.schedule()
    num_tokens = sum(seq.num_scheduled_tokens for seq in seqs)
    scheduler.postprocess(seqs, [token if seq.is_prefilled else None for seq in seqs])
    check_invariants(scheduler)
    return seqs, num_tokens if is_prefill else -num_tokens


def drain(scheduler: Scheduler, token: int = 7) -> list[int]:
    """Step until nothing is left; the `num_tokens` of each step."""
    numbers = []
    while not scheduler.is_finished():
        seqs, num_tokens = step(scheduler, token)
        assert seqs, "the scheduler stalls"
        numbers.append(num_tokens)
    return numbers


def check_invariants(scheduler: Scheduler) -> None:
    """What must hold between any two calls of the scheduler."""
    manager = scheduler.block_manager
    holders = [0] * len(manager.blocks)
    for seq in scheduler.running:
        held = held_tables(manager, seq)[0]
        assert len(set(held.values())) == len(held)
        for block_id in held.values():
            holders[block_id] += 1
    assert [block.ref_count for block in manager.blocks] == holders
    assert sorted(manager.free_block_ids) == [i for i, n in enumerate(holders) if n == 0]

    if isinstance(manager, WindowedBlockManager):
        check_pools(scheduler.running, manager)

    num_rows = scheduler.max_num_seqs
    assert len(scheduler.running) <= num_rows
    used_rows = [seq.row for seq in scheduler.running]
    assert sorted([*used_rows, *scheduler.free_rows]) == list(range(num_rows))
    for seq in scheduler.waiting:
        assert seq.row is None
        assert not seq.block_table and not seq.further_tables
        assert seq.num_pending_tokens == seq.num_computed_tokens == 0

    listed = [i for block_ids in manager.hash_to_block_ids.values() for i in block_ids]
    assert sorted(listed) == [b.block_id for b in manager.blocks if b.hash is not None]
    for block_hash, block_ids in manager.hash_to_block_ids.items():
        assert block_ids
        assert all(manager.blocks[i].hash == block_hash for i in block_ids)


def held_tables(manager: BlockManager, seq: Sequence) -> list[dict[int, int]]:
    """The blocks that a sequence holds by their place in its table, of each cache group."""
    tables = [seq.block_table, *seq.further_tables]
    is_windowed = isinstance(manager, WindowedBlockManager)
    firsts = manager.num_released[seq] if is_windowed else [0]
    return [
        {index: block_id for index, block_id in enumerate(table) if index >= first}
        for table, first in zip(tables, firsts, strict=True)
    ]


def check_pools(running: Iterable[Sequence], manager: WindowedBlockManager) -> None:
    """What must hold of the cache groups behind the first."""
    assert manager.num_released.keys() == set(running)
    tables = [held_tables(manager, seq) for seq in running]
    for group, pool in enumerate(manager.pools, 1):
        holders = [0] * len(pool.ref_counts)
        for of_seq in tables:
            for index, block_id in of_seq[group].items():
                holders[block_id] += 1
                assert pool.leaders[block_id] == of_seq[0][index]
        assert pool.ref_counts == holders
        assert sorted(pool.free_block_ids) == [i for i, n in enumerate(holders) if n == 0]
        pairs = {leader: i for i, leader in enumerate(pool.leaders) if leader is not None}
        assert pool.block_ids == pairs


def check_all_released(scheduler: Scheduler) -> None:
    """What must hold when every request has ended."""
    assert scheduler.is_finished()
    check_invariants(scheduler)
    manager = scheduler.block_manager
    assert manager.num_free_blocks == len(manager.blocks)
    assert len(scheduler.free_rows) == scheduler.max_num_seqs


def extend_prefix(prefix: int, token: int) -> int:
    """The number of a prefix with one more token; the same in every run, as all are ints."""
    return hash((prefix, token))


def sample(prefix: int, temperature: int, seed: tuple[int, int], vocab_size: int) -> int:
    return hash((prefix, temperature, *seed)) % vocab_size


def temperature_bits(seq: Sequence) -> int:
    return int(np.float32(seq.sampling_params.temperature).view(np.int32))


def seed_words(seq: Sequence) -> tuple[int, int]:
    low, high = np.array([seq.seed], dtype=np.uint64).view(np.int32)
    return int(low), int(high)


def expected_completion(
    seq: Sequence, vocab_size: int, eos_token_ids: frozenset[int]
) -> tuple[list[int], str]:
    """What the fake model completes `seq` with, computed without cache or batch; and the reason."""
    tokens: list[int] = []
    prefix = EMPTY_PREFIX
    for token in seq.prompt_token_ids:
        prefix = extend_prefix(prefix, token)
    while True:
        token = sample(prefix, temperature_bits(seq), seed_words(seq), vocab_size)
        tokens.append(token)
        if token in eos_token_ids and not seq.sampling_params.ignore_eos:
            return tokens, "stop"
        if seq.num_prompt_tokens + len(tokens) >= seq.max_length:
            return tokens, "length"
        prefix = extend_prefix(prefix, token)


@dataclass
class Launched:
    """A step that the fake device has executed and nobody has committed."""

    seqs: list[Sequence]
    is_prefill: bool
    token_ids: list[int | None]


class FakeDevice:
    """Executes plans in launch order, and checks that each reads what its sequence needs."""

    def __init__(self, scheduler: Scheduler, vocab_size: int, max_blocks_per_seq: int) -> None:
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.block_size = scheduler.block_manager.block_size
        self.windows = scheduler.config.cache_windows
        self.num_columns = max_blocks_per_seq
        width = row_state.BLOCK_TABLE + len(self.windows) * max_blocks_per_seq
        self.plan_builder = PlanBuilder(scheduler.max_num_seqs, width, self.block_size)
        self.unit = getattr(scheduler.block_manager, "unit", self.block_size)
        self.capacity = max_packed_size(
            scheduler.max_num_seqs,
            scheduler.config.max_num_batched_tokens,
            width,
            self.block_size // self.unit,
        )
        self.row_table = np.full((scheduler.max_num_seqs, width), -7, dtype=np.int32)
        # Of each cache group, slot -> (token, number of its prefix).
        self.caches: list[dict[int, tuple[int, int]]] = [{} for _ in self.windows]
        self.sampled: dict[int, list[int]] = {}  # request_id -> all that was sampled for it
        self.num_copies = 0
        self.num_common_copied = 0  # tokens behind common blocks, in all decode steps

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> Launched:
        with patch.object(common_prefix, "MIN_SPARED_TOKENS", 1):
            packed = pack(self.plan_builder.build(seqs, is_prefill))
        assert packed.dtype == np.int32
        assert len(packed) <= self.capacity
        plan = unpack(packed)
        for index, value in plan.updates:
            self.row_table.reshape(-1)[index] = value
        token_ids = self._prefill(plan, seqs) if is_prefill else self._decode(plan, seqs)
        self._check_cached_blocks()
        return Launched(seqs, is_prefill, token_ids)

    def _prefill(self, plan: StepPlan, seqs: list[Sequence]) -> list[int | None]:
        assert (
            len(plan.token_ids)
            == plan.lengths.sum()
            <= self.scheduler.config.max_num_batched_tokens
        )
        assert (plan.lengths > 0).all()
        token_ids: list[int | None] = []
        chunks = np.split(plan.token_ids, np.cumsum(plan.lengths)[:-1])
        numbers = zip(plan.rows, plan.starts, plan.shared, plan.is_last, chunks, strict=True)
        for seq, (row, start, shared, is_last, chunk) in zip(seqs, numbers, strict=True):
            self._copy(plan, int(row))
            for position, token in enumerate(chunk.tolist(), int(start)):
                self._compute(seq, int(row), position, token, is_written=position >= shared)
            end = int(start) + len(chunk)
            self._check_context(seq, int(row), int(start), end)
            assert bool(is_last) == (end == seq.num_prefill_tokens)
            token_ids.append(self._sample(seq, int(row), end - 1) if is_last else None)
        self._check_copies(plan)
        return token_ids

    def _copy(self, plan: StepPlan, row: int) -> None:
        """What goes into the row's blocks, from rows before it too. The device copies all at once,
        behind the writes of all rows."""
        table = set(self.row_table[row, row_state.BLOCK_TABLE :].tolist())
        for target, source in plan.copies.tolist():
            if target * self.unit // self.block_size in table:
                for offset in range(self.unit):
                    content = self.caches[0][source * self.unit + offset]
                    self.caches[0][target * self.unit + offset] = content

    def _check_copies(self, plan: StepPlan) -> None:
        """Nothing that the step has written changes what is copied; the order does not matter."""
        targets, sources = plan.copies.T.tolist()
        assert len(set(targets)) == len(targets)
        assert not set(targets) & set(sources)
        for target, source in plan.copies.tolist():
            for offset in range(self.unit):
                content = self.caches[0][source * self.unit + offset]
                assert self.caches[0][target * self.unit + offset] == content
        self.num_copies += len(targets)

    def _decode(self, plan: StepPlan, seqs: list[Sequence]) -> list[int | None]:
        self._check_common_tokens(plan)
        token_ids: list[int | None] = []
        for seq, row in zip(seqs, plan.rows.tolist(), strict=True):
            token = int(self.row_table[row, row_state.LAST_TOKEN])
            position = int(self.row_table[row, row_state.LENGTH]) - 1
            assert position + 1 == seq.num_computed_tokens
            self._compute(seq, row, position, token, is_written=True)
            self._check_context(seq, row, position, position + 1)
            token_ids.append(self._sample(seq, row, position))
        return token_ids

    def _check_common_tokens(self, plan: StepPlan) -> None:
        """The rows hold the same K/V, of all blocks that they share at least; nobody writes it."""
        if self.windows[0] is not None:  # the runner does without them
            return
        tables = self.row_table[plan.rows, row_state.BLOCK_TABLE :][:, : self.num_columns]
        lengths = self.row_table[plan.rows, row_state.LENGTH]
        is_used = np.arange(tables.shape[1]) < -(-lengths.min() // self.block_size)
        is_shared = (tables == tables[0]).all(axis=0) & is_used
        num_shared = int(np.cumprod(is_shared).sum()) if len(plan.rows) > 1 else 0
        num_common = plan.num_common_tokens
        assert num_shared * self.block_size <= num_common < lengths.min()
        for position in range(num_common):
            contents = {self.caches[0][self._slot(row, position)] for row in plan.rows.tolist()}
            assert len(contents) == 1
        self.num_common_copied += num_common - num_shared * self.block_size

    def _slot(self, row: int, position: int, group: int = 0) -> int:
        column = group * self.num_columns + position // self.block_size
        block_id = self.row_table[row, row_state.BLOCK_TABLE + column]
        assert block_id >= 0, "a block that was never sent"
        return int(block_id) * self.block_size + position % self.block_size

    def _tokens(self, seq: Sequence, num_tokens: int) -> list[int]:
        tokens = (seq.prompt_token_ids + self.sampled.get(seq.request_id, []))[:num_tokens]
        assert len(tokens) == num_tokens
        return tokens

    def _compute(
        self, seq: Sequence, row: int, position: int, token: int, is_written: bool
    ) -> None:
        before = EMPTY_PREFIX
        if self.windows[0] == 1:  # nothing before is in sight
            for previous in self._tokens(seq, position):
                before = extend_prefix(before, previous)
        elif position:
            before = self.caches[0][self._slot(row, position - 1)][1]
        content = (token, extend_prefix(before, token))
        for group, cache in enumerate(self.caches):
            slot = self._slot(row, position, group)
            if is_written:
                cache[slot] = content
            else:
                assert cache[slot] == content, "a shared block holds something else"

    def _check_context(self, seq: Sequence, row: int, start: int, end: int) -> None:
        """All that the queries of the positions [start, end) see, in every cache group."""
        prefix = EMPTY_PREFIX
        for position, token in enumerate(self._tokens(seq, end)):
            prefix = extend_prefix(prefix, token)
            for group, (window, cache) in enumerate(zip(self.windows, self.caches, strict=True)):
                if window is None or position > start - window:
                    assert cache[self._slot(row, position, group)] == (token, prefix), (
                        f"position {position} of sequence {seq.request_id}, group {group}"
                    )

    def _sample(self, seq: Sequence, row: int, position: int) -> int:
        state = self.row_table[row].tolist()
        prefix = self.caches[0][self._slot(row, position)][1]
        seed = (state[row_state.SEED], state[row_state.SEED + 1])
        token = sample(prefix, state[row_state.TEMPERATURE], seed, self.vocab_size)
        self.row_table[row, row_state.LAST_TOKEN] = token
        self.row_table[row, row_state.LENGTH] = position + 2
        generated = self.sampled.setdefault(seq.request_id, [])
        del generated[position + 1 - seq.num_prompt_tokens :]  # sampled before a restart
        generated.append(token)
        return token

    def _check_cached_blocks(self) -> None:
        """A block in the prefix cache holds the tokens that it is listed with, in every group."""
        manager = self.scheduler.block_manager
        pools = manager.pools if isinstance(manager, WindowedBlockManager) else []
        for block in manager.blocks:
            if block.hash is not None:
                self._check_block(self.caches[0], block.block_id, block.tokens)
                for cache, pool in zip(self.caches[1:], pools, strict=True):
                    if block.block_id in pool.block_ids:
                        self._check_block(cache, pool.block_ids[block.block_id], block.tokens)

    def _check_block(self, cache: dict[int, tuple[int, int]], block_id: int, tokens: bytes) -> None:
        first = block_id * self.block_size
        held = [cache[slot][0] for slot in range(first, first + self.block_size)]
        assert pack_tokens(held) == tokens


class FakeEngine:
    """Steps scheduler and fake device in turn, as LLMEngine does, synchronously or overlapped."""

    def __init__(
        self, scheduler: Scheduler, vocab_size: int, max_blocks_per_seq: int, is_overlapped: bool
    ) -> None:
        self.scheduler = scheduler
        self.device = FakeDevice(scheduler, vocab_size, max_blocks_per_seq)
        self.is_overlapped = is_overlapped
        self.in_flight: Launched | None = None

    def step(self) -> Launched | None:
        """Commit one step; None if there was nothing to do."""
        current = self.in_flight or self._launch(in_flight=False)
        if current is None:
            return None
        self.in_flight = self._launch(in_flight=True) if self.is_overlapped else None
        self._commit(current)
        self._drop_dead_step()
        return current

    def abort(self, seq: Sequence) -> None:
        self.scheduler.abort([seq])
        self._drop_dead_step()
        check_invariants(self.scheduler)

    def fail(self, unfinished: list[Sequence]) -> None:
        """A step that breaks after its launch: nothing is committed, all is computed anew."""
        if self.in_flight is None:
            self.in_flight = self._launch(in_flight=False)
        self.in_flight = None
        restart(self.scheduler, unfinished)
        check_invariants(self.scheduler)
        manager = self.scheduler.block_manager
        assert manager.num_free_blocks == len(manager.blocks)
        assert not manager.hash_to_block_ids

    def _launch(self, in_flight: bool) -> Launched | None:
        scheduler = self.scheduler
        num_preemptions = scheduler.num_preemptions
        seqs, is_prefill = scheduler.schedule(in_flight)
        check_invariants(scheduler)
        if in_flight:
            assert scheduler.num_preemptions == num_preemptions
        else:
            assert bool(seqs) or scheduler.is_finished(), "the scheduler stalls"
        if not seqs:
            return None
        assert len({id(seq) for seq in seqs}) == len(seqs)
        assert all(seq.num_tokens_with_pending <= seq.max_length for seq in seqs)
        if not is_prefill:
            assert all(seq.num_scheduled_tokens == 1 for seq in seqs)
        return self.device.launch(seqs, is_prefill)

    def _commit(self, launched: Launched) -> None:
        before = [(seq.is_finished, seq.num_tokens) for seq in launched.seqs]
        alive = self.scheduler.postprocess(launched.seqs, launched.token_ids)
        check_invariants(self.scheduler)
        assert alive == [
            seq for seq, (ended, _) in zip(launched.seqs, before, strict=True) if not ended
        ]
        for seq, (ended, num_tokens), token in zip(
            launched.seqs, before, launched.token_ids, strict=True
        ):
            num_new = 0 if ended or token is None else 1
            assert seq.num_tokens == num_tokens + num_new
            assert not num_new or seq.token_ids[-1] == token

    def _drop_dead_step(self) -> None:
        if self.in_flight and all(seq.is_finished for seq in self.in_flight.seqs):
            self.in_flight = None
