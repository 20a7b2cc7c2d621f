"""Prefixes that end within a block: which units are copied, and that copies are always right."""

from unittest.mock import patch

import pytest
import test_scheduler_properties as properties
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import check_all_released, drain, make_scheduler, make_seq, step

from nanovllm.engine import cache_groups, prefix_units
from nanovllm.engine.packed_tokens import TOKEN_BYTES, pack_tokens
from nanovllm.engine.prefix_units import Beginnings, UnitBlockManager, copied_units
from nanovllm.kernels.cache_units import COPY_UNIT

RUNS = settings(deadline=None, derandomize=True, database=None)


def run(workload: properties.Workload, unit: int) -> tuple[int, int]:
    """All completions come out right, and invariants hold.

    Returns:
        The number of copied units, and of tokens behind common blocks that decode steps read once.
    """
    workload.block_size *= unit
    workload.max_model_len = min(workload.max_model_len, 24)
    with (
        patch.object(cache_groups, "COPY_UNIT", unit),
        patch.object(cache_groups, "MIN_COPIED_TOKENS", 0),
        patch.object(prefix_units, "MIN_COPIED_TOKENS", 1),
    ):
        engine = properties.run(workload)
        assert isinstance(engine.scheduler.block_manager, UnitBlockManager)
    return engine.device.num_copies, engine.device.num_common_copied


def least_sum(workloads, max_examples: int) -> int:
    """Of all workloads together, the smaller one of what `run` counts."""
    sums = [0, 0]

    @settings(RUNS, max_examples=max_examples)
    @given(workloads, st.integers(1, 3), st.none() | st.integers(4, 20))
    def run_and_count(workload, unit, stem_length):
        for request in workload.requests if stem_length else ():  # all begin alike
            request.stem_length = stem_length
        sums[:] = map(sum, zip(sums, run(workload, unit), strict=True))

    run_and_count()
    return min(sums)


def test_any_workload_completes_rightly_and_leaves_nothing_behind():
    assert least_sum(properties.workloads(), 150) > 30


def test_workloads_with_many_preemptions_complete_rightly():
    assert least_sum(properties.tight_workloads(), 60) > 30


def test_conversations_complete_rightly():
    """Every second request goes on behind the one before it, when that has ended or earlier."""
    find, found = prefix_units.Beginnings.longest_in, []

    def count(*args):
        found.append(find(*args))
        return found[-1]

    @settings(RUNS, max_examples=150)
    @given(properties.workloads(), st.integers(1, 3), st.integers(0, 20))
    def run_conversations(workload, unit, pause):
        workload.is_caching, workload.max_model_len = True, 24
        workload.block_size, workload.budget = max(3, workload.block_size), workload.budget + 24
        for before, request in zip(workload.requests[::2], workload.requests[1::2], strict=False):
            request.goes_on, request.arrival = True, before.arrival + pause
        run(workload, unit)

    with patch.object(prefix_units.Beginnings, "longest_in", count):
        run_conversations()
    assert sum(block is not None for block in found) > 30


TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(pack_tokens)


@settings(RUNS, max_examples=400)
@given(st.lists(TEXTS, max_size=30), TEXTS, st.integers(1, 4))
def test_the_longest_entry_with_which_tokens_begin_is_found(texts, tokens, num_least):
    entries, least = Beginnings(), num_least * TOKEN_BYTES
    for block_id, text in enumerate(texts):
        entries.set(block_id, 1, text)
        if block_id % 4 == 3:  # sorts them
            entries.of_key(1)
    for block_id in range(0, len(texts), 3):
        entries.pop(block_id)
        texts[block_id] = b""
    fitting = [len(text) for text in texts if len(text) >= least and tokens.startswith(text)]
    found = entries.longest_in(1, tokens, least)
    assert (found and len(found[1])) == (max(fitting) if fitting else None)
    assert found is None or texts[found[0]] == found[1]
    assert entries.longest_in(2, tokens, least) is None


# ---- what is found ------------------------------------------------------------------------------

STEM = list(range(1000))


def scheduler_of(num_blocks: int = 40, **overrides):
    settings = {"kvcache_block_size": 256, "num_kvcache_blocks": num_blocks}
    return make_scheduler(**(settings | overrides))


def own_prompt(number: int, num_shared: int = 1000, num_own: int = 30) -> list[int]:
    return STEM[:num_shared] + [2000 + 100 * number + i for i in range(num_own)]


def test_prompts_that_come_together_compute_a_common_prefix_once():
    """3 blocks are shared, 29 units of 8 copied from the first prompt's fourth block."""
    scheduler = scheduler_of()
    seqs = [make_seq(own_prompt(i), max_tokens=1, request_id=i) for i in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    scheduled, num_tokens = step(scheduler)
    assert scheduled == seqs
    assert [seq.num_cached_tokens for seq in seqs] == [0, 1000, 1000, 1000]
    assert num_tokens == 1030 + 3 * 30
    assert {seq.num_shared_tokens for seq in seqs[1:]} == {768}
    # The source is the first prompt's fourth block, 3, whose first unit is 96.
    assert seqs[0].copies == []
    assert [seq.copies for seq in seqs[1:]] == [[(32 * block, 96, 29)] for block in (5, 7, 9)]
    drain(scheduler)
    check_all_released(scheduler)


def test_a_cached_block_that_nobody_holds_is_a_source():
    scheduler = scheduler_of()
    scheduler.add(make_seq(own_prompt(0), max_tokens=1))
    drain(scheduler)
    seq = make_seq(own_prompt(1, num_shared=900), max_tokens=1, request_id=1)
    scheduler.add(seq)
    assert drain(scheduler) == [930 - 896]
    assert seq.num_cached_tokens == 896
    check_all_released(scheduler)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_block_that_is_not_full_is_a_source_while_its_sequence_runs(is_running):
    scheduler = scheduler_of()
    scheduler.add(make_seq(STEM[:600], max_tokens=9))
    step(scheduler)
    if not is_running:
        drain(scheduler)
    seq = make_seq(STEM[:600], max_tokens=1, request_id=1)
    scheduler.add(seq)
    step(scheduler)
    assert seq.num_cached_tokens == (592 if is_running else 512)
    drain(scheduler)
    check_all_released(scheduler)


@pytest.mark.parametrize(
    ("length", "num_cached"),
    [(609, 608), (610, 608), (620, 608), (608, 512), (560, 512), (300, 296)],
)
def test_what_goes_on_behind_an_ended_sequence_copies_its_last_block(length, num_cached):
    """Of 609 tokens 608 were computed: 2 blocks and 12 units. Shorter prompts end within them."""
    scheduler = scheduler_of()
    scheduler.add(make_seq(STEM[:600], max_tokens=9))
    drain(scheduler)
    text = [*STEM[:600], *([7] * 9)]
    seq = make_seq([*text, *STEM[:20]][:length], max_tokens=1, request_id=1)
    scheduler.add(seq)
    assert step(scheduler)[1] == length - num_cached
    assert seq.num_cached_tokens == num_cached
    check_all_released(scheduler)


def test_an_ended_block_that_was_taken_is_no_source():
    scheduler = scheduler_of(num_blocks=2)
    scheduler.add(make_seq(STEM[:300], max_tokens=2))
    drain(scheduler)
    scheduler.add(make_seq([9] * 300, max_tokens=1, request_id=1))
    drain(scheduler)
    scheduler.add(make_seq(STEM[:400], max_tokens=1, request_id=2))
    assert drain(scheduler) == [400]
    check_all_released(scheduler)


@pytest.mark.parametrize(
    ("length", "num_cached"), [(16, 0), (17, 16), (24, 16), (25, 24), (200, 192)]
)
def test_the_last_token_is_always_computed(length, num_cached):
    scheduler = scheduler_of()
    scheduler.add(make_seq(STEM[:200], max_tokens=9))
    step(scheduler)
    seq = make_seq(STEM[:length], max_tokens=1, request_id=1)
    scheduler.add(seq)
    assert step(scheduler)[1] == length - num_cached
    assert seq.num_cached_tokens == num_cached


def test_chunks_are_copied_with_the_first_one_alone():
    scheduler = scheduler_of(enable_chunked_prefill=True, max_num_batched_tokens=100)
    scheduler.add(make_seq(STEM[:200], max_tokens=30, ignore_eos=True))
    while step(scheduler)[1] > 0:
        pass
    seq = make_seq(own_prompt(1, num_shared=190, num_own=150), max_tokens=1, request_id=1)
    scheduler.add(seq)
    numbers = [step(scheduler)[1] for _ in range(40)]
    assert [number for number in numbers if number > 0] == [100, 340 - 184 - 100]
    assert seq.num_cached_tokens == 184


@pytest.mark.parametrize("is_caching", [True, False])
def test_nothing_is_copied_where_prefixes_are_not_read(is_caching):
    scheduler = scheduler_of(enable_prefix_caching=is_caching)
    seqs = [make_seq(own_prompt(i), max_tokens=1, request_id=i) for i in range(2)]
    seqs[1].sampling_params.skip_reading_prefix_cache = is_caching
    for seq in seqs:
        scheduler.add(seq)
    assert drain(scheduler) == [2060]


def test_no_copy_of_a_step_reads_what_another_one_writes():
    """The third prompt goes on like the second one, whose block begins with the first one's."""
    scheduler = scheduler_of()
    second = STEM[:150] + list(range(5000, 5080))
    prompts = [own_prompt(0, num_shared=250), second, [*second, 7]]
    seqs = [make_seq(prompt, max_tokens=2, request_id=i) for i, prompt in enumerate(prompts)]
    for seq in seqs:
        scheduler.add(seq)
    step(scheduler)
    assert [seq.block_table for seq in seqs] == [[0, 1], [2], [3]]
    third = [(3 * 32, 0, 18), (3 * 32 + 18, 2 * 32 + 18, 10)]
    assert [seq.copies for seq in seqs] == [[], [(2 * 32, 0, 18)], third]
    assert [seq.num_cached_tokens for seq in seqs] == [0, 144, 224]
    units = copied_units([copy for seq in seqs for copy in seq.copies])
    assert units.dtype == "int32"
    sources = [*range(18), *range(18), *range(2 * 32 + 18, 2 * 32 + 28)]
    assert units.T.tolist() == [[*range(64, 82), *range(96, 124)], sources]


def test_a_source_is_not_taken_for_the_sequence_that_copies_it():
    """Of 4 blocks the prompt needs all, or 3 beside the source's."""
    for num_blocks, num_cached in ((5, 200), (4, 0)):
        scheduler = scheduler_of(num_blocks)
        scheduler.add(make_seq(STEM[:256], max_tokens=1))
        drain(scheduler)
        seq = make_seq(own_prompt(1, num_shared=200, num_own=800), max_tokens=1, request_id=1)
        scheduler.add(seq)
        assert drain(scheduler) == [1000 - num_cached]
        check_all_released(scheduler)


def test_a_source_is_not_taken_for_another_sequence_of_the_step():
    """Block 0 is free, and the first prompt copies from it: the second one has to wait."""
    scheduler = scheduler_of(num_blocks=3)
    scheduler.add(make_seq(STEM[:256], max_tokens=1))
    drain(scheduler)
    first = make_seq(own_prompt(1, num_shared=200), max_tokens=1, request_id=1)
    second = make_seq([9] * 300, max_tokens=1, request_id=2)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler) == ([first], 30)
    assert first.copies == [(32, 0, 25)]
    assert step(scheduler) == ([second], 300)
    check_all_released(scheduler)


def test_other_block_sizes_and_windows_have_no_units():
    for overrides in ({"kvcache_block_size": 16}, {"cache_windows": (512,)}):
        config = make_scheduler(**({"kvcache_block_size": 256} | overrides)).config
        assert not isinstance(cache_groups.new_block_manager(config), UnitBlockManager)
    assert 256 % COPY_UNIT == 0
