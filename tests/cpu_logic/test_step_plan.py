"""Step plans: packing, and what the builder sends of each row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scheduling_helpers import make_scheduler, make_seq, seed_words, temperature_bits

from nanovllm.engine import common_prefix
from nanovllm.engine.common_prefix import MIN_SPARED_TOKENS, count_common, num_common_tokens
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import PlanBuilder, StepPlan
from nanovllm.kernels import row_state
from nanovllm.parallel.packed_plans import max_packed_size, pack, unpack
from nanovllm.sampling_params import SamplingParams

ROW_WIDTH = row_state.BLOCK_TABLE + 8
FIELDS = (
    "rows",
    "updates",
    "wants",
    "token_ids",
    "starts",
    "lengths",
    "shared",
    "is_last",
    "copies",
)

int32s = st.integers(-(2**31), 2**31 - 1)


@st.composite
def plans(draw) -> StepPlan:
    is_prefill = draw(st.booleans())
    num_seqs, num_updates = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    num_tokens = draw(st.integers(0, 12)) if is_prefill else 0
    per_seq = num_seqs if is_prefill else 0

    def array(*shape):
        return draw(arrays(np.int32, shape, elements=int32s))

    return StepPlan(
        is_prefill,
        array(num_seqs),
        array(num_updates, 2),
        array(draw(st.sampled_from([0, num_seqs]))),
        0 if is_prefill else draw(st.integers(0, 9)),
        array(num_tokens),
        *(array(per_seq) for _ in range(4)),
        array(draw(st.integers(0, 6)) if is_prefill else 0, 2),
    )


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(plans(), st.integers(0, 5))
def test_unpacking_gives_the_plan_back(plan, num_stale_words):
    packed = pack(plan)
    assert packed.dtype == np.int32
    # A slot of the ring may hold the end of a longer, older plan.
    unpacked = unpack(np.concatenate([packed, np.full(num_stale_words, 99, np.int32)]))
    assert unpacked.is_prefill is plan.is_prefill
    assert unpacked.num_common_tokens == plan.num_common_tokens
    for name in FIELDS:
        field, expected = getattr(unpacked, name), getattr(plan, name)
        assert field.shape == expected.shape, name
        assert np.array_equal(field, expected), name
        assert field.dtype == np.int32


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_max_packed_size_bounds_every_plan(data):
    max_num_seqs = data.draw(st.integers(1, 6))
    num_blocks = data.draw(st.integers(1, 9))
    budget = data.draw(st.integers(1, 30))
    max_copies = data.draw(st.integers(0, 3))
    num_seqs = data.draw(st.integers(1, min(max_num_seqs, budget)))
    builder = PlanBuilder(max_num_seqs, row_state.BLOCK_TABLE + num_blocks, budget)
    is_prefill = data.draw(st.booleans())
    sequences = []
    num_left = budget
    for i in range(num_seqs):  # the worst: all rows new, all tables full
        num_tokens = data.draw(st.integers(1, num_left - (num_seqs - i - 1)))
        num_left -= num_tokens
        seq = make_seq([1] * num_tokens, request_id=i)
        seq.row = i
        seq.block_table = list(range(num_blocks))
        seq.copies = [(i, 9, 1)] * max_copies
        seq.num_scheduled_tokens = seq.num_computed_tokens = num_tokens
        sequences.append(seq)
    plan = builder.build(sequences, is_prefill)
    bound = max_packed_size(max_num_seqs, budget, row_state.BLOCK_TABLE + num_blocks, max_copies)
    assert len(pack(plan)) <= bound


def updates_of(plan: StepPlan) -> dict[int, int]:
    indices = plan.updates[:, 0].tolist()
    assert len(set(indices)) == len(indices)
    return dict(plan.updates.tolist())


def row_head(seq: Sequence) -> dict[int, int]:
    assert seq.row is not None
    first = seq.row * ROW_WIDTH
    low, high = seed_words(seq)
    return {
        first + row_state.TEMPERATURE: temperature_bits(seq),
        first + row_state.SEED: low,
        first + row_state.SEED + 1: high,
        first + row_state.ADAPTER: 0,
    }


def table(seq: Sequence, start: int, end: int) -> dict[int, int]:
    assert seq.row is not None
    first = seq.row * ROW_WIDTH + row_state.BLOCK_TABLE
    return {first + i: seq.block_table[i] for i in range(start, end)}


class Steps:
    """Schedules, builds and commits steps."""

    def __init__(self, **overrides) -> None:
        self.scheduler = make_scheduler(kvcache_block_size=4, **overrides)
        self.builder = PlanBuilder(self.scheduler.max_num_seqs, ROW_WIDTH, block_size=4)

    def next(self, token: int = 7) -> StepPlan:
        seqs, is_prefill = self.scheduler.schedule()
        plan = self.builder.build(seqs, is_prefill)
        self.scheduler.postprocess(seqs, [token if seq.is_prefilled else None for seq in seqs])
        return plan


def new_seq(prompt: list[int], request_id: int, max_tokens: int = 20, seed: int = 0) -> Sequence:
    params = SamplingParams(temperature=0.5 + request_id, max_tokens=max_tokens)
    return Sequence(prompt, params, request_id, seed=seed)


def test_prefill_sends_new_rows_and_their_tokens():
    steps = Steps(max_num_seqs=3)
    first = new_seq([1, 2, 3, 4, 5], 0, seed=2**64 - 1)
    second = new_seq([1, 2, 3, 4], 1, seed=2**63 + 5)
    steps.scheduler.add(first)
    steps.scheduler.add(second)
    plan = steps.next()
    assert plan.is_prefill
    assert plan.rows.tolist() == [0, 1]
    assert plan.token_ids.tolist() == [1, 2, 3, 4, 5, 4]
    assert plan.starts.tolist() == [0, 3]
    assert plan.lengths.tolist() == [5, 1]
    assert plan.shared.tolist() == [0, 4]
    assert plan.is_last.tolist() == [1, 1]
    assert updates_of(plan) == (
        row_head(first) | table(first, 0, 2) | row_head(second) | table(second, 0, 1)
    )
    assert row_head(first)[row_state.TEMPERATURE] == np.float32(0.5).view(np.int32)


def test_decode_sends_a_block_once_and_otherwise_nothing():
    steps = Steps()
    seq = new_seq([1, 2, 3], 0)
    steps.scheduler.add(seq)
    steps.next()
    sent = []
    for _ in range(9):
        plan = steps.next()
        assert not plan.is_prefill
        assert plan.rows.tolist() == [0]
        assert all(getattr(plan, name).size == 0 for name in FIELDS[2:])
        sent.append(updates_of(plan))
    # Decode steps compute positions 3 to 11; positions 4 and 8 open a block.
    assert sent == [{}, table(seq, 1, 2), {}, {}, {}, table(seq, 2, 3), {}, {}, {}]


def test_head_and_table_of_a_row_are_sent_with_the_first_chunk_only():
    steps = Steps(max_num_batched_tokens=5, enable_chunked_prefill=True)
    seq = new_seq(list(range(12)), 0)
    steps.scheduler.add(seq)
    chunks = [steps.next() for _ in range(3)]
    assert updates_of(chunks[0]) == row_head(seq) | table(seq, 0, 3)
    assert [updates_of(plan) for plan in chunks[1:]] == [{}, {}]
    assert [plan.starts.tolist() for plan in chunks] == [[0], [5], [10]]
    assert [plan.lengths.tolist() for plan in chunks] == [[5], [5], [2]]
    assert [plan.is_last.tolist() for plan in chunks] == [[0], [0], [1]]
    assert [plan.token_ids.tolist() for plan in chunks] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11],
    ]


def test_row_that_changes_hands_is_sent_anew():
    steps = Steps(max_num_seqs=1)
    first, second = new_seq([1] * 9, 0, max_tokens=1), new_seq([2] * 5, 1)
    steps.scheduler.add(first)
    steps.next()
    steps.scheduler.add(second)
    assert updates_of(steps.next()) == row_head(second) | table(second, 0, 2)


def test_preempted_sequence_is_sent_anew_with_its_completion():
    steps = Steps(max_num_seqs=2)
    seq = new_seq([1, 2, 3, 4, 5], 0)
    steps.scheduler.add(seq)
    for token in (6, 7, 8, 9):
        steps.next(token)
    steps.scheduler.preempt(seq)
    plan = steps.next()
    assert seq.row == 1  # rows are reused oldest first
    assert updates_of(plan) == row_head(seq) | table(seq, 0, 3)
    assert plan.starts.tolist() == plan.shared.tolist() == [8]
    assert plan.token_ids.tolist() == [9]


def test_block_that_a_step_was_put_off_for_is_sent_with_the_retry():
    steps = Steps(num_kvcache_blocks=3)
    scheduler = steps.scheduler
    first, second = new_seq([1] * 4, 0), new_seq([2] * 4, 1)
    scheduler.add(first)
    scheduler.add(second)
    prefill, _ = scheduler.schedule()
    steps.builder.build(prefill, True)
    assert scheduler.schedule(in_flight=True) == ([], False)
    assert len(first.block_table) == 1
    scheduler.postprocess(prefill, [7, 7])
    assert updates_of(steps.next()) == table(first, 1, 2)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_seed_is_sent_as_two_words(seed):
    steps = Steps()
    seq = new_seq([1], 0, seed=seed)
    steps.scheduler.add(seq)
    sent = updates_of(steps.next())
    low, high = (sent[row_state.SEED + i] & 0xFFFFFFFF for i in range(2))
    assert low | high << 32 == seed


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=5))
def test_what_lists_share_is_their_longest_common_prefix(tables):
    shortest = min(map(len, tables))
    lengths = [n for n in range(shortest + 1) if all(t[:n] == tables[0][:n] for t in tables)]
    assert count_common(tables) == max(lengths)


def test_common_blocks_follow_the_batch(monkeypatch):
    num_seqs = 9
    monkeypatch.setattr(common_prefix, "MIN_SPARED_TOKENS", (num_seqs - 1) * 8)
    prefix = [3, 1, 4, 1, 5, 9, 2, 6]  # two blocks

    def decode_plan() -> StepPlan:
        while True:
            if not (plan := steps.next()).is_prefill:
                return plan

    steps = Steps(num_kvcache_blocks=200, max_num_seqs=num_seqs)
    for i in range(num_seqs):
        # The last sequence ends after its third token.
        max_tokens = 3 if i == num_seqs - 1 else 20
        steps.scheduler.add(new_seq([*prefix, i], i, max_tokens=max_tokens))
    assert steps.next().num_common_tokens == 0  # a prefill
    whole_batch = decode_plan()
    assert whole_batch.num_common_tokens == 8
    # With the row that the last sequence leaves, another prefix joins the same rows.
    stranger = new_seq([0, *prefix], num_seqs)
    steps.scheduler.add(stranger)
    assert steps.next().num_common_tokens == 8
    plan = decode_plan()
    assert plan.rows.tolist() == whole_batch.rows.tolist()
    assert plan.num_common_tokens == 0
    steps.scheduler.abort([stranger])
    plan = decode_plan()
    assert len(plan.rows) == num_seqs - 1
    assert plan.num_common_tokens == 0, "fewer reads are spared than are worth a kernel"
    steps.scheduler.add(new_seq([*prefix, 99], num_seqs + 1))
    plans = [decode_plan() for _ in range(3)]
    assert plans[-1].num_common_tokens == 8


def test_a_single_sequence_has_no_common_tokens():
    steps = Steps(num_kvcache_blocks=2100)
    steps.scheduler.add(new_seq(list(range(MIN_SPARED_TOKENS + 1)), 0))
    steps.next()
    assert steps.next().num_common_tokens == 0


# ---- common tokens behind common blocks ---------------------------------------------------------

STEM = list(range(100, 150))  # a block of 32 tokens, and 18 of the next one


def running(prompts: list[list[int]], roots: list[int] | None = None) -> list[Sequence]:
    """Sequences that have been prefilled in one step, as the scheduler shows them in a decode."""
    scheduler = make_scheduler(kvcache_block_size=32, num_kvcache_blocks=200)
    for number, prompt in enumerate(prompts):
        seq = new_seq(prompt, number)
        seq.features.prefix_root = roots[number] if roots else 0
        scheduler.add(seq)
    seqs, is_prefill = scheduler.schedule()
    assert is_prefill and len(seqs) == len(prompts)
    scheduler.postprocess(seqs, [7] * len(seqs))
    return scheduler.schedule()[0]


@pytest.fixture
def without_threshold(monkeypatch):
    monkeypatch.setattr(common_prefix, "MIN_SPARED_TOKENS", 1)


@pytest.mark.parametrize(
    ("num_shared", "expected"),
    [
        ([50, 50, 50], 32 + 16),  # of 18 tokens two units of 8 are copied
        ([50, 48, 50], 32 + 16),
        ([50, 50, 40], 40),  # 8 tokens, too few for a copy, were computed twice
        ([30, 30, 30], 24),  # no block is shared
        ([10, 50, 50], 10),
        ([50], 0),
    ],
)
@pytest.mark.usefixtures("without_threshold")
def test_copied_tokens_are_common_ones(num_shared, expected):
    seqs = running([STEM[:n] + [900 + i] * 5 for i, n in enumerate(num_shared)])
    assert num_common_tokens(seqs, 32) == expected


@pytest.mark.usefixtures("without_threshold")
def test_nothing_is_common_to_different_adapters():
    prompts = [[*STEM[:30], 900 + i] for i in range(4)]
    assert num_common_tokens(running(prompts, [5, 5, 5, 5]), 32) == 24
    seqs = running(prompts, [5, 5, 6, 6])
    assert [seq.num_copied_tokens for seq in sorted(seqs, key=lambda seq: seq.request_id)] == [
        *(0, 24, 0, 24)
    ]
    assert num_common_tokens(seqs, 32) == 0


@pytest.mark.usefixtures("without_threshold")
def test_no_sequence_finds_its_newest_token_among_the_common_ones():
    seqs = running([STEM[:30], [*STEM[:30], 8, 9]])
    shortest = min(seqs, key=len)
    shortest.num_computed_tokens = 20
    assert num_common_tokens(seqs, 32) == 19
