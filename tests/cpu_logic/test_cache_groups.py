"""Cache groups: block tables, pools and the prefix cache of models with sliding windows."""

from collections.abc import Sequence as Items
from dataclasses import replace
from unittest.mock import patch

import pytest
import test_scheduler_properties as properties
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scheduling_helpers import (
    check_all_released,
    drain,
    held_tables,
    make_config,
    make_scheduler,
    make_seq,
    step,
)

from nanovllm.engine import cache_groups
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.cache_groups import WindowedBlockManager, WindowPool
from nanovllm.engine.scheduler import Scheduler

BLOCK_SIZE = 16
RUNS = settings(deadline=None, derandomize=True, database=None)
Windows = Items[int | None]


def run(workload: properties.Workload, windows: Windows) -> properties.FakeEngine:
    """All completions come out right, and invariants hold after every step."""

    def make(**overrides) -> Scheduler:
        return make_scheduler(cache_windows=tuple(windows), **overrides)

    with patch.object(properties, "make_scheduler", make):
        return properties.run(workload)


@st.composite
def group_windows(draw) -> Windows:
    """One group or several; the first one may see everything."""
    finite = sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=2)), reverse=True)
    return [None, *finite] if draw(st.booleans()) else finite


@settings(RUNS, max_examples=90)
@given(properties.workloads(), group_windows())
def test_any_workload_completes_rightly_and_leaves_nothing_behind(workload, windows):
    run(workload, windows)


def test_workloads_with_many_preemptions_complete_rightly():
    num_preemptions = 0

    @settings(RUNS, max_examples=50)
    @given(properties.tight_workloads(), group_windows())
    def run_and_count(workload, windows):
        nonlocal num_preemptions
        num_preemptions += run(workload, windows).scheduler.num_preemptions

    run_and_count()
    assert num_preemptions > 30, "the workloads do not test what they are meant to"


def test_pools_are_as_small_as_proved_and_never_run_out():
    """The first group has blocks for everything: the bound by windows is the smaller one."""
    fullest = 0.0

    @settings(RUNS, max_examples=150)
    @given(properties.workloads(), st.integers(1, 8), st.integers(1, 3))
    def run_and_measure(workload, window, num_rows):
        nonlocal fullest
        held = []
        take = WindowPool.take

        def counting_take(pool: WindowPool, leader: int) -> int:
            block_id = take(pool, leader)
            held.append(1 - len(pool.free_block_ids) / len(pool.ref_counts))
            return block_id

        with patch.object(WindowPool, "take", counting_take):
            engine = run(replace(workload, num_blocks=200, max_num_seqs=num_rows), [None, window])
        [pool] = engine.scheduler.block_manager.pools
        bound = cache_groups.max_window_blocks(engine.scheduler.config, window)
        assert len(pool.ref_counts) == bound < 200
        fullest = max([fullest, *held])

    run_and_measure()
    assert fullest > 0.8, "the pools are far too large, or the workloads do not fill them"


def release_one_block_too_many(position, window, block_size):
    return max(0, position - window + 1) // block_size + 1


def keep_a_forgotten_leader(pool, leader):
    pass


def match_without_looking_at_pools(manager, seq):
    return BlockManager.match_prefix(manager, seq)


def append_to_the_first_group_only(manager, seq):
    BlockManager.may_append(manager, seq)


@pytest.mark.parametrize(
    "owner, name, defect",
    [
        (cache_groups, "first_visible_block", release_one_block_too_many),
        (WindowPool, "forget", keep_a_forgotten_leader),
        (WindowedBlockManager, "match_prefix", match_without_looking_at_pools),
        (WindowedBlockManager, "may_append", append_to_the_first_group_only),
    ],
    ids=["released too early", "never forgotten", "pools not asked", "a block is missing"],
)
def test_these_checks_notice_a_defect(owner, name, defect, monkeypatch):
    monkeypatch.setattr(owner, name, defect)

    @settings(RUNS, max_examples=200, phases=[Phase.generate])
    @given(properties.workloads(), st.integers(2, 8))
    def run_defective(workload, window):
        run(workload, [None, window])

    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_defective()


# ---- what is held ----------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(None, 40, 17), (40, 17), (40,)])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_long_sequence_holds_no_more_than_its_windows(windows, enable_prefix_caching):
    scheduler = make_scheduler(
        cache_windows=windows,
        num_kvcache_blocks=20,
        enable_prefix_caching=enable_prefix_caching,
        max_num_seqs=2,
    )
    seq = make_seq(list(range(100, 150)), max_tokens=200, ignore_eos=True)
    scheduler.add(seq)
    step(scheduler)
    while seq.num_tokens < 249:
        scheduler.schedule()
        tables = held_tables(scheduler.block_manager, seq)
        scheduler.postprocess([seq], [7])
        newest = seq.num_computed_tokens - 1
        for window, table in zip(windows, tables, strict=True):
            first = 0 if window is None else max(0, newest - window + 1) // BLOCK_SIZE
            assert list(table) == list(range(first, newest // BLOCK_SIZE + 1))
    drain(scheduler)
    check_all_released(scheduler)


def test_sequences_behind_windows_run_together_where_whole_ones_would_not_fit():
    """All layers have windows: 4 sequences of 10 blocks each run in 16 blocks to their ends."""
    for window, is_preempted in ((32, False), (1000, True)):
        scheduler = make_scheduler(cache_windows=(window,), num_kvcache_blocks=16, max_num_seqs=4)
        for request_id in range(4):
            prompt = [100 + request_id] * 20
            scheduler.add(make_seq(prompt, 140, ignore_eos=True, request_id=request_id))
        drain(scheduler)
        assert (scheduler.num_preemptions > 0) == is_preempted
        check_all_released(scheduler)


def test_a_long_prompt_in_chunks_takes_blocks_of_one_chunk_at_a_time():
    scheduler = make_scheduler(
        cache_windows=(None, 16),
        num_kvcache_blocks=64,
        max_num_seqs=1,
        max_num_batched_tokens=32,
        enable_chunked_prefill=True,
    )
    [pool] = scheduler.block_manager.pools
    assert len(pool.ref_counts) == 3 + 2  # of a window, and of 32 tokens
    scheduler.add(make_seq(list(range(1000)), max_tokens=1))
    assert drain(scheduler) == [32] * 31 + [8]


# ---- the prefix cache ------------------------------------------------------------------------


def complete(scheduler, prompt: list[int], max_tokens: int = 1, request_id: int = 0) -> int:
    """Run a prompt to its end; how many of its tokens were cached."""
    seq = make_seq(prompt, max_tokens, ignore_eos=True, request_id=request_id)
    scheduler.add(seq)
    drain(scheduler)
    return seq.num_cached_prompt_tokens


def numbered(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


@pytest.mark.parametrize("length, expected", [(70, 64), (65, 64), (64, 63), (33, 32), (15, 0)])
def test_a_prefix_is_found_again(length, expected):
    scheduler = make_scheduler(cache_windows=(None, 20), num_kvcache_blocks=30)
    complete(scheduler, numbered(80))
    assert complete(scheduler, numbered(length)) == expected


def test_a_hit_is_cut_to_what_all_groups_still_have():
    """The pool of the windows is the smaller one: of an old prompt it has lost some blocks."""
    scheduler = make_scheduler(cache_windows=(None, 17), num_kvcache_blocks=60, max_num_seqs=1)
    manager = scheduler.block_manager
    [pool] = manager.pools
    complete(scheduler, numbered(112))
    leaders = manager.match_prefix(make_seq(numbered(112)))
    assert len(leaders) == 7
    for lost, num_usable in ((6, 6), (3, 6), (5, 5), (2, 5), (4, 2), (1, 1), (0, 0)):
        # After n blocks the next query sees a token of the last one. A full hit would see two.
        pool.forget(leaders[lost])
        assert len(manager.match_prefix(make_seq(numbered(112)))) == num_usable


def test_of_equal_blocks_the_one_that_all_groups_have_is_found():
    scheduler = make_scheduler(cache_windows=(None, 17), num_kvcache_blocks=60, max_num_seqs=1)
    manager = scheduler.block_manager
    [pool] = manager.pools
    complete(scheduler, numbered(40))
    first = manager.match_prefix(make_seq(numbered(40)))
    pool.forget(first[1])
    pool.forget(first[0])
    assert complete(scheduler, numbered(40)) == 0, "it is computed again, into other blocks"
    second = manager.match_prefix(make_seq(numbered(40)))
    assert len(second) == 2 and not set(first) & set(second)
    assert complete(scheduler, numbered(40)) == 32


def test_reset_forgets_all_groups():
    scheduler = make_scheduler(cache_windows=(None, 20), num_kvcache_blocks=30)
    complete(scheduler, numbered(80))
    [pool] = scheduler.block_manager.pools
    assert pool.block_ids
    assert scheduler.block_manager.reset_prefix_cache()
    assert not pool.block_ids
    assert complete(scheduler, numbered(80)) == 0


def test_a_pool_that_runs_out_says_so():
    pool = WindowPool(1, window=4)
    pool.take(leader=7)
    with pytest.raises(AssertionError, match="num_group_blocks"):
        pool.take(leader=8)


# ---- sizes -----------------------------------------------------------------------------------


def test_models_without_windows_keep_the_plain_manager():
    assert type(make_scheduler().block_manager) is BlockManager
    assert type(make_scheduler(cache_windows=(8,)).block_manager) is WindowedBlockManager


@settings(RUNS, max_examples=200)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=3, unique=True),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.integers(0, 3000),
)
def test_pools_fill_the_memory_and_no_more(finite, has_full, per_block, num_bytes):
    windows = ([None] if has_full else []) + sorted(finite, reverse=True)
    per_block = per_block[: len(windows)]
    config = make_config(cache_windows=tuple(windows), max_num_seqs=2, max_num_batched_tokens=64)

    def bytes_with(num_blocks: int) -> int:
        numbers = cache_groups.num_group_blocks(config, num_blocks)
        return sum(n * size for n, size in zip(numbers, per_block, strict=True))

    most = cache_groups.most_blocks(config, per_block, num_bytes)
    assert bytes_with(most) <= num_bytes < bytes_with(most + 1)
