"""The order in which one call's sequences are queued."""

import pytest
from scheduling_helpers import check_all_released, drain, make_scheduler, make_seq

from nanovllm.engine.queue_order import queue_order


def order_of(limits: list[int], num_prompt_tokens: int = 4, **config: int) -> list[int]:
    """Request ids as they are queued, by what each may get."""
    settings = {"kvcache_block_size": 4, "max_num_seqs": 2} | config
    prompts = [list(range(num_prompt_tokens))] * len(limits)
    seqs = [
        make_seq(prompt, max_tokens=limit, request_id=i, ignore_eos=True)
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    scheduler = make_scheduler(**settings)
    queued = queue_order(seqs, scheduler)
    for seq in queued:
        scheduler.add(seq)
    drain(scheduler)
    check_all_released(scheduler)
    return [seq.request_id for seq in queued]


@pytest.mark.parametrize(
    ("num_blocks", "order"),
    [
        (10, [1, 3, 2, 5, 0, 4]),  # the longest two end with 5 blocks each
        (9, [0, 1, 2, 3, 5, 4]),  # all keep their order, but of the last two the longest is first
    ],
)
def test_the_longest_start_first_if_the_cache_holds_them(num_blocks, order):
    limits = [8, 16, 12, 16, 5, 9]
    assert order_of(limits, num_kvcache_blocks=num_blocks) == order


def test_sequences_that_all_have_slots_keep_their_order():
    assert order_of([1, 3, 2], max_num_seqs=3, num_kvcache_blocks=9) == [0, 1, 2]


@pytest.mark.parametrize("num_blocks", [3, 20])
def test_equal_ones_keep_their_order(num_blocks):
    assert order_of([7] * 5, num_kvcache_blocks=num_blocks) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("num_blocks", "order"), [(13, [1, 3, 2, 0]), (12, [0, 1, 3, 2])])
def test_prompts_need_blocks_and_are_no_part_of_what_is_longest(num_blocks, order):
    """Prompts of 5 blocks: the longest two end with 7 and 6."""
    assert order_of([2, 5, 3, 4], num_prompt_tokens=20, num_kvcache_blocks=num_blocks) == order
