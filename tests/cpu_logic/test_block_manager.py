"""Paged blocks and the prefix cache, with the numbers of the acceptance cases."""

import random

import pytest
from scheduling_helpers import (
    check_all_released,
    check_invariants,
    drain,
    make_config,
    make_scheduler,
    make_seq,
    step,
)

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.packed_tokens import pack_tokens
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

PREFIX = [100 + i // 16 for i in range(48)]  # three full blocks of 16


def admit(manager: BlockManager, prompt: list[int]) -> tuple[Sequence, int]:
    """Allocate a prompt and cache its blocks, as one prefill does: the sequence, tokens matched."""
    seq = make_seq(prompt)
    matched = manager.match_prefix(seq)
    assert manager.can_allocate(seq, matched)
    manager.allocate(seq, matched)
    manager.cache_blocks(seq, seq.num_tokens)
    return seq, len(matched) * manager.block_size


def refs(manager: BlockManager, block_ids: list[int]) -> list[int]:
    return [manager.blocks[block_id].ref_count for block_id in block_ids]


def num_entries(manager: BlockManager) -> int:
    return sum(map(len, manager.hash_to_block_ids.values()))


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(10, 16)


def test_prompt_takes_blocks_in_order_and_only_full_ones_are_hashed(manager):
    seq, num_matched = admit(manager, PREFIX + [7] * 7)
    assert num_matched == 0
    assert seq.block_table == [0, 1, 2, 3]
    assert refs(manager, seq.block_table) == [1, 1, 1, 1]
    assert [manager.blocks[i].hash is not None for i in seq.block_table] == [True] * 3 + [False]
    assert manager.num_free_blocks == 6


def test_running_prefix_is_shared_by_a_second_prompt(manager):
    first, _ = admit(manager, PREFIX + [7] * 7)
    second, num_matched = admit(manager, PREFIX + [8] * 5)
    assert (num_matched, second.num_tokens - num_matched) == (48, 5)
    assert second.block_table == [0, 1, 2, 4]
    assert refs(manager, [0, 1, 2, 3, 4]) == [2, 2, 2, 1, 1]
    assert manager.num_free_blocks == 5
    assert first.block_table == [0, 1, 2, 3]


@pytest.fixture
def after_two(manager) -> BlockManager:
    """A pool in which two prompts with a common prefix have come and gone."""
    first, _ = admit(manager, PREFIX + [7] * 7)
    second, _ = admit(manager, PREFIX + [8] * 5)
    manager.deallocate(first)
    manager.deallocate(second)
    return manager


def test_freed_blocks_queue_behind_unused_ones_tails_before_shared_prefix(after_two):
    assert list(after_two.free_block_ids) == [5, 6, 7, 8, 9, 3, 4, 2, 1, 0]
    assert refs(after_two, list(range(10))) == [0] * 10


def test_cached_blocks_come_back_out_of_the_free_list(after_two):
    third, num_matched = admit(after_two, PREFIX + [9] * 6)
    assert num_matched == 48
    assert third.block_table == [0, 1, 2, 5]
    assert list(after_two.free_block_ids) == [6, 7, 8, 9, 3, 4]


def test_reused_blocks_leave_no_stale_hash(after_two):
    third, _ = admit(after_two, PREFIX + [9] * 6)
    after_two.deallocate(third)
    old_hashes = set(after_two.hash_to_block_ids)
    fourth = make_seq(list(range(1000, 1160)))
    assert after_two.match_prefix(fourth) == []
    after_two.allocate(fourth, [])
    assert fourth.block_table == [6, 7, 8, 9, 3, 4, 5, 2, 1, 0]
    assert after_two.hash_to_block_ids == {}
    after_two.cache_blocks(fourth, 160)
    assert num_entries(after_two) == 10
    assert not old_hashes & set(after_two.hash_to_block_ids)
    assert after_two.match_prefix(make_seq(PREFIX)) == []


def test_eviction_takes_the_oldest_and_leaves_a_prefix_to_hit(manager):
    first, _ = admit(manager, list(range(87)))
    second, _ = admit(manager, list(range(500, 548)))
    assert (len(first.block_table), len(second.block_table)) == (6, 3)
    assert manager.num_free_blocks == 1
    manager.deallocate(first)
    manager.deallocate(second)
    assert manager.num_free_blocks == 10
    third, num_matched = admit(manager, [*range(32), 900, 901, 902])
    assert (num_matched, third.num_tokens - num_matched) == (32, 3)
    assert manager.num_free_blocks == 7


def test_full_hit_computes_the_last_token_alone_and_writes_nothing():
    scheduler = make_scheduler()
    scheduler.add(make_seq(PREFIX, max_tokens=5, request_id=0))
    assert step(scheduler)[1] == 48
    second = make_seq(PREFIX, max_tokens=5, request_id=1)
    scheduler.add(second)
    [scheduled], num_tokens = step(scheduler)
    assert scheduled is second
    assert num_tokens == 1
    assert (second.num_cached_tokens, second.num_shared_tokens) == (47, 48)
    assert second.block_table == [0, 1, 2]
    assert refs(scheduler.block_manager, [0, 1, 2]) == [2, 2, 2]
    drain(scheduler)
    check_all_released(scheduler)


def test_repeated_prompt_of_600_tokens_hits_two_blocks_of_256():
    scheduler = make_scheduler(kvcache_block_size=256)
    numbers, cached = [], []
    for request_id in range(2):
        seq = make_seq(list(range(600)), max_tokens=1, request_id=request_id)
        scheduler.add(seq)
        numbers += drain(scheduler)
        cached.append(seq.num_cached_tokens)
    assert numbers == [600, 88]
    assert cached == [0, 512]


@pytest.mark.parametrize(
    ("block_size", "num_generated", "num_cached"),
    [
        *((256, 300, 592), (256, 212, 504), (256, 213, 512), (256, 3, 296)),  # units of 8
        *((15, 300, 585), (15, 285, 570), (15, 286, 585)),  # whole blocks alone
    ],
)
def test_next_turn_hits_what_was_computed(block_size, num_generated, num_cached):
    """The last token's K/V was never written, so a block that ends with it cannot be cached."""
    scheduler = make_scheduler(kvcache_block_size=block_size, num_kvcache_blocks=90)
    first = make_seq(list(range(300)), max_tokens=num_generated)
    scheduler.add(first)
    drain(scheduler)
    second = make_seq([*first.token_ids, *range(2000, 2010)], max_tokens=1, request_id=1)
    scheduler.add(second)
    assert drain(scheduler) == [310 + num_generated - num_cached]
    assert second.num_cached_tokens == num_cached


def test_hashed_block_that_is_reused_for_a_partial_prompt_loses_its_hash():
    manager = BlockManager(1, 16)
    first, _ = admit(manager, PREFIX[:16])
    manager.deallocate(first)
    second, _ = admit(manager, [5] * 10)
    assert second.block_table == [0]
    assert manager.blocks[0].hash is None
    assert manager.blocks[0].tokens == b""
    assert manager.hash_to_block_ids == {}


def test_own_cached_block_is_not_evicted_to_serve_the_request():
    manager = BlockManager(2, 16)
    first, _ = admit(manager, PREFIX[:32])
    manager.deallocate(first)
    assert list(manager.free_block_ids) == [1, 0]
    second, num_matched = admit(manager, PREFIX[:16] + [9] * 10)
    assert num_matched == 16
    assert second.block_table == [0, 1]


def test_own_cached_block_is_not_evicted_even_if_it_is_the_oldest():
    manager = BlockManager(2, 16)
    hit, _ = admit(manager, PREFIX[:16])
    other, _ = admit(manager, [3] * 16)
    manager.deallocate(hit)
    manager.deallocate(other)
    assert list(manager.free_block_ids) == [0, 1]
    second, num_matched = admit(manager, PREFIX[:16] + [9] * 10)
    assert num_matched == 16
    assert second.block_table == [0, 1]


def test_refused_request_changes_no_reference_count():
    """Six cached blocks, of which three are held, and too little room for the rest."""
    scheduler = make_scheduler()
    manager = scheduler.block_manager
    long_prefix = [200 + i // 16 for i in range(96)]
    scheduler.add(make_seq(long_prefix, max_tokens=1, request_id=0))
    drain(scheduler)
    scheduler.add(make_seq([*long_prefix[:48], 1], request_id=1))
    scheduler.add(make_seq([3] * 40, request_id=2))
    step(scheduler)
    assert refs(manager, range(6)) == [1, 1, 1, 0, 0, 0]
    assert manager.num_free_blocks == 3
    free = list(manager.free_block_ids)
    refused = make_seq(long_prefix + [9] * 16, request_id=3)
    assert len(manager.match_prefix(refused)) == 6
    scheduler.add(refused)
    before = {h: list(ids) for h, ids in manager.hash_to_block_ids.items()}
    for _ in range(3):
        assert len(step(scheduler)[0]) == 2  # the others decode
    assert list(scheduler.waiting) == [refused]
    assert refs(manager, range(6)) == [1, 1, 1, 0, 0, 0]
    assert list(manager.free_block_ids) == free
    assert manager.hash_to_block_ids == before
    check_invariants(scheduler)


@pytest.mark.parametrize(
    ("token_ids", "prefix", "expected"),
    [
        (list(range(256)), None, 5218229187174952702),
        (list(range(256)), 5218229187174952702, 16997810615526222485),
        ([1, 2, 3], None, 9771088612715187706),
    ],
)
def test_chain_hash_values(token_ids, prefix, expected):
    assert BlockManager.compute_hash(pack_tokens(token_ids), prefix) == expected


def test_hashes_are_those_of_each_prompts_own_chain_whichever_came_before():
    manager = BlockManager(num_blocks=64, block_size=2)
    prompts = [(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 7, 8), (9, 9, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6)]
    for root in (0, 77, 0):  # what an adapter's prompts begin with
        for token_ids in prompts:
            seq = Sequence(list(token_ids))
            seq.features.prefix_root = root
            manager.match_prefix(seq)
            manager.allocate(seq, [])
            manager.cache_blocks(seq, 6)
            parent, hashes = root or None, []
            for start in (0, 2, 4):
                tokens = pack_tokens(list(token_ids[start : start + 2]))
                parent = BlockManager.compute_hash(tokens, parent)
                hashes.append(parent)
            assert [block_hash for block_hash, _ in seq.block_keys] == hashes


def test_equal_block_after_another_prefix_does_not_hit(manager):
    a, b, c = [1] * 16, [2] * 16, [3] * 16
    admit(manager, a + b)
    assert manager.match_prefix(make_seq(c + b)) == []
    assert manager.match_prefix(make_seq(b + a)) == []
    assert manager.match_prefix(make_seq(b)) == []
    assert manager.match_prefix(make_seq(a + c)) == [0]


def test_colliding_hashes_miss_because_tokens_are_compared(manager, monkeypatch):
    monkeypatch.setattr(BlockManager, "compute_hash", staticmethod(lambda *_: 42))
    admit(manager, [1] * 32)
    assert manager.match_prefix(make_seq([2] * 32)) == []
    assert manager.match_prefix(make_seq([1] * 32)) == [0, 1]
    admit(manager, [2] * 32)
    assert manager.match_prefix(make_seq([2] * 32)) == [2, 3]


def test_equal_block_under_a_colliding_prefix_misses(manager, monkeypatch):
    """Tokens and hash of the second block agree; only its prefix differs."""
    monkeypatch.setattr(BlockManager, "compute_hash", staticmethod(lambda *_: 42))
    admit(manager, [1] * 16 + [9] * 16)
    admit(manager, [2] * 16 + [8] * 16)
    assert manager.match_prefix(make_seq([2] * 16 + [9] * 16)) == [2]
    assert manager.match_prefix(make_seq([9] * 16)) == []


def test_equal_prompts_of_one_step_share_their_full_blocks():
    scheduler = make_scheduler()
    first, second = (make_seq(PREFIX[:40], request_id=i) for i in range(2))
    scheduler.add(first)
    scheduler.add(second)
    seqs, is_prefill = scheduler.schedule()
    assert (seqs, is_prefill) == ([first, second], True)
    assert [seq.num_scheduled_tokens for seq in seqs] == [40, 8]
    assert [seq.num_cached_tokens for seq in seqs] == [0, 32]
    assert first.block_table[:2] == second.block_table[:2]
    assert refs(scheduler.block_manager, first.block_table[:2]) == [2, 2]
    assert first.block_table[2] != second.block_table[2]


@pytest.mark.parametrize("reused", [0, 1])
def test_twin_blocks_are_forgotten_one_by_one(reused):
    """Two sequences that grow to the same text hold two blocks of one hash."""
    scheduler = make_scheduler(num_kvcache_blocks=4)
    manager = scheduler.block_manager
    twins = [make_seq(PREFIX[:15], request_id=i) for i in range(2)]
    for seq in twins:
        scheduler.add(seq)
    for _ in range(3):
        step(scheduler)
    [block_ids] = manager.hash_to_block_ids.values()
    assert sorted(block_ids) == sorted(seq.block_table[0] for seq in twins)
    survivor = twins[1 - reused]
    scheduler.abort([twins[reused]])
    # Takes the free blocks, the freed twin among them.
    scheduler.add(make_seq([4] * 30, request_id=2))
    step(scheduler)
    assert manager.num_free_blocks == 0
    again = make_seq([*survivor.token_ids[:16], 5], request_id=3)
    assert manager.match_prefix(again) == [survivor.block_table[0]]


def test_block_cached_after_one_twin_is_found_after_the_other(manager):
    admit(manager, [1] * 16)
    second = make_seq([1] * 16 + [2] * 16)
    manager.allocate(second, [])  # as if both had been computed before either was cached
    manager.cache_blocks(second, 32)
    assert second.block_table == [1, 2]
    assert manager.match_prefix(make_seq([1] * 16 + [2] * 16)) == [0, 2]


def test_prefix_cache_is_reset_when_no_block_is_in_use(manager):
    seq, _ = admit(manager, PREFIX + [7] * 7)
    entries = dict(manager.hash_to_block_ids)
    assert manager.reset_prefix_cache() is False
    assert manager.hash_to_block_ids == entries
    assert len(entries) == 3
    manager.deallocate(seq)
    assert manager.reset_prefix_cache() is True
    assert manager.hash_to_block_ids == {}
    assert all(block.hash is None and not block.tokens for block in manager.blocks)
    again, num_matched = admit(manager, PREFIX + [7] * 7)
    assert num_matched == 0
    manager.deallocate(again)
    assert len(manager.match_prefix(make_seq([*PREFIX, 9]))) == 3


def test_caching_off_shares_nothing_and_refuses_when_full():
    scheduler = Scheduler(
        make_config(kvcache_block_size=4, num_kvcache_blocks=7, enable_prefix_caching=False)
    )
    manager = scheduler.block_manager
    sequences = [make_seq([1] * length, request_id=i) for i, length in enumerate((10, 16, 1))]
    for seq in sequences:
        scheduler.add(seq)
    assert scheduler.schedule() == (sequences[:2], True)
    assert [len(seq.block_table) for seq in sequences] == [3, 4, 0]
    assert [seq.num_cached_tokens for seq in sequences] == [0, 0, 0]
    assert manager.hash_to_block_ids == {}
    assert manager.num_free_blocks == 0
    assert list(scheduler.waiting) == sequences[2:]


@pytest.mark.parametrize("seed", range(20))
def test_random_allocation_accounts_for_every_block(seed):
    """Each block's references are its tables, whatever comes, grows and goes."""
    rng = random.Random(seed)
    manager = BlockManager(rng.randint(4, 30), rng.choice([1, 3, 4, 16]), rng.random() < 0.8)
    held: list[Sequence] = []
    for _ in range(200):
        action = rng.random()
        if action < 0.5:
            stem = [rng.randint(0, 1)] * rng.randint(0, 3 * manager.block_size)
            seq = make_seq([*stem, *(rng.randint(0, 3) for _ in range(rng.randint(1, 20)))])
            matched = manager.match_prefix(seq)
            if manager.can_allocate(seq, matched):
                manager.allocate(seq, matched)
                manager.cache_blocks(seq, seq.num_tokens)
                held.append(seq)
        elif held and action < 0.8:
            seq = rng.choice(held)
            if manager.num_free_blocks:
                manager.may_append(seq)
                seq.token_ids.append(rng.randint(0, 3))
                manager.cache_blocks(seq, seq.num_tokens - 1)
        elif held:
            manager.deallocate(held.pop(rng.randrange(len(held))))
        tables = [block_id for seq in held for block_id in seq.block_table]
        assert [block.ref_count for block in manager.blocks] == [
            tables.count(block_id) for block_id in range(len(manager.blocks))
        ]
        assert manager.num_free_blocks + len(set(tables)) == len(manager.blocks)
        assert not set(tables) & set(manager.free_block_ids)
        listed = sum(map(len, manager.hash_to_block_ids.values()))
        assert listed == sum(block.hash is not None for block in manager.blocks)
    for seq in held:
        manager.deallocate(seq)
    assert manager.num_free_blocks == len(manager.blocks)


def test_block_is_appended_when_the_token_that_needs_it_is_about_to_be_computed():
    scheduler = make_scheduler()
    seq = make_seq([1] * 15, max_tokens=20)
    scheduler.add(seq)
    blocks_at_length = {}
    while not scheduler.is_finished():
        seqs, _ = scheduler.schedule()
        blocks_at_length[seq.num_tokens] = len(seq.block_table)
        scheduler.postprocess(seqs, [7])
    assert blocks_at_length[15] == blocks_at_length[16] == 1
    assert blocks_at_length[17] == blocks_at_length[32] == 2
    assert blocks_at_length[33] == 3
    assert seq.num_tokens == 35


def test_appending_twice_adds_one_block(manager):
    seq, _ = admit(manager, [1] * 16)
    seq.token_ids.append(2)
    manager.may_append(seq)
    manager.may_append(seq)
    assert len(seq.block_table) == 2


def test_reserve_counts_blocks_left_after_the_request(manager):
    seq = make_seq([1] * 40)
    assert manager.can_allocate(seq, [], num_reserved=7)
    assert not manager.can_allocate(seq, [], num_reserved=8)


def test_matched_free_blocks_count_as_taken(manager):
    first, _ = admit(manager, PREFIX)
    manager.deallocate(first)
    seq = make_seq(PREFIX + [5] * 112)
    matched = manager.match_prefix(seq)
    assert len(matched) == 3
    assert manager.can_allocate(seq, matched)
    too_long = make_seq(PREFIX + [5] * 113)
    assert not manager.can_allocate(too_long, manager.match_prefix(too_long))
