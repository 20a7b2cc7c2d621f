"""What the scheduler puts in each step, how sequences end, and what preemption does."""

import random
from math import ceil

import pytest
from scheduling_helpers import (
    EOS,
    FakeEngine,
    check_all_released,
    check_invariants,
    drain,
    expected_completion,
    make_scheduler,
    make_seq,
    step,
)

from nanovllm.engine import priority_queue, scheduling_policy
from nanovllm.engine.recovery import restart
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduling_policy import ADMISSION_INTERVAL
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams


def add_prompts(scheduler: Scheduler, lengths: list[int], **kwargs) -> list[Sequence]:
    """Queue prompts that share nothing."""
    sequences = [
        make_seq([1000 * (i + 1) + j for j in range(length)], request_id=i, **kwargs)
        for i, length in enumerate(lengths)
    ]
    for seq in sequences:
        scheduler.add(seq)
    return sequences


def launch(scheduler: Scheduler, in_flight: bool) -> tuple[list[Sequence], bool]:
    step = scheduler.schedule(in_flight)
    check_invariants(scheduler)
    return step


# Admission


def test_nothing_to_do_is_an_empty_step():
    scheduler = make_scheduler()
    assert scheduler.is_finished()
    assert scheduler.schedule() == ([], False)
    assert scheduler.schedule(in_flight=True) == ([], False)


def test_one_step_admits_all_that_fit_in_order():
    scheduler = make_scheduler()
    sequences = add_prompts(scheduler, [10] * 10)
    assert not scheduler.is_finished()
    seqs, is_prefill = scheduler.schedule()
    assert is_prefill
    assert seqs == sequences == list(scheduler.running)
    assert not scheduler.waiting
    assert all(seq.status is SequenceStatus.RUNNING for seq in seqs)


@pytest.mark.parametrize(
    ("is_chunked", "first_steps"),
    [(False, [[800], [800, 10]]), (True, [[800, 224], [576, 10]])],
    ids=["whole prompts", "chunked"],
)
def test_budget_is_kept_in_order_of_arrival_and_running_is_bounded(is_chunked, first_steps):
    scheduler = make_scheduler(
        max_num_seqs=3,
        max_num_batched_tokens=1024,
        num_kvcache_blocks=200,
        enable_chunked_prefill=is_chunked,
    )
    sequences = add_prompts(scheduler, [800, 800, 10, 10], max_tokens=5)
    scheduled = []
    for _ in first_steps:
        seqs, is_prefill = scheduler.schedule()
        assert is_prefill
        scheduled.append([seq.num_scheduled_tokens for seq in seqs])
        scheduler.postprocess(seqs, [7 if seq.is_prefilled else None for seq in seqs])
    assert scheduled == first_steps
    assert list(scheduler.running) == sequences[:3]
    assert list(scheduler.waiting) == sequences[3:]
    # The fourth comes in when another has ended, not when a step has room.
    while not sequences[0].is_finished:
        assert step(scheduler)[1] < 0
        assert sequences[3] not in scheduler.running
    assert step(scheduler) == ([sequences[3]], 10)
    drain(scheduler)
    check_all_released(scheduler)


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_max_num_seqs_bounds_what_is_resident(max_num_seqs):
    scheduler = make_scheduler(max_num_seqs=max_num_seqs, num_kvcache_blocks=100)
    add_prompts(scheduler, [20] * 20, max_tokens=6)
    held = len(scheduler.block_manager.blocks)
    while not scheduler.is_finished():
        step(scheduler)
        assert len(scheduler.running) <= max_num_seqs
        held = min(held, scheduler.block_manager.num_free_blocks)
    assert held >= 100 - 2 * max_num_seqs


def test_later_short_prompt_does_not_overtake_one_that_waits_for_blocks():
    scheduler = make_scheduler()
    sequences = add_prompts(scheduler, [100, 100, 5])
    assert step(scheduler)[0] == sequences[:1]
    assert step(scheduler)[1] == -1
    assert list(scheduler.waiting) == sequences[1:]


def test_steps_are_never_mixed():
    scheduler = make_scheduler(num_kvcache_blocks=100)
    add_prompts(scheduler, [20, 20], max_tokens=4)
    assert step(scheduler)[1] == 40
    assert step(scheduler)[1] == -2
    scheduler.add(make_seq([5] * 30, max_tokens=4, request_id=2))
    assert step(scheduler)[1] == 30
    assert step(scheduler)[1] == -3


def test_long_prompt_is_computed_in_chunks_and_gets_no_token_before_the_last():
    scheduler = make_scheduler(
        max_num_batched_tokens=1024, num_kvcache_blocks=200, enable_chunked_prefill=True
    )
    [seq] = add_prompts(scheduler, [2500], max_tokens=3)
    numbers, lengths = [], []
    while not scheduler.is_finished():
        numbers.append(step(scheduler)[1])
        lengths.append(seq.num_completion_tokens)
    assert numbers == [1024, 1024, 452, -1, -1]
    assert lengths == [0, 0, 1, 2, 3]


def test_whole_prompt_longer_than_what_is_left_of_the_budget_waits():
    scheduler = make_scheduler(max_num_batched_tokens=100, num_kvcache_blocks=50)
    sequences = add_prompts(scheduler, [60, 60], max_tokens=2)
    assert step(scheduler) == (sequences[:1], 60)
    assert step(scheduler) == (sequences[1:], 60)


def test_only_uncached_tokens_count_against_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=70, num_kvcache_blocks=50)
    for request_id in range(4):
        scheduler.add(make_seq([3] * 64 + [request_id], max_tokens=2, request_id=request_id))
    assert step(scheduler)[1] == 65 + 3
    assert len(scheduler.running) == 4


# Admission while others decode


def fill_slots(num_waiting: int, first_to_end: int) -> Scheduler:
    """16 sequences run and decode, of which the first few end with the next step; others wait."""
    scheduler = make_scheduler(max_num_seqs=16, num_kvcache_blocks=1000)
    for seq in add_prompts(scheduler, [20] * (16 + num_waiting), max_tokens=200)[:first_to_end]:
        seq.max_length = 22
    assert step(scheduler)[1] == 16 * 20
    assert step(scheduler)[1] == -16
    return scheduler


@pytest.mark.parametrize(
    ("num_free", "num_waiting", "num_decodes"),
    [
        (2, 10, 1),  # an eighth of the slots is free
        (1, 1, 1),  # all that wait get a slot
        (1, 2, ADMISSION_INTERVAL),
        (1, 10, ADMISSION_INTERVAL),
    ],
)
def test_few_freed_slots_are_filled_together_at_intervals(num_free, num_waiting, num_decodes):
    scheduler = fill_slots(num_waiting, first_to_end=num_free)
    waiting = list(scheduler.waiting)
    for _ in range(num_decodes - 1):
        assert step(scheduler)[1] == num_free - 16
    num_admitted = min(num_free, num_waiting)
    assert step(scheduler) == (waiting[:num_admitted], 20 * num_admitted)


def test_slot_freed_long_after_the_last_prefill_is_filled_at_once():
    scheduler = fill_slots(num_waiting=10, first_to_end=0)
    scheduler.running[5].max_length = 24 + ADMISSION_INTERVAL
    numbers = [step(scheduler)[1] for _ in range(ADMISSION_INTERVAL + 4)]
    assert numbers == [-16] * (ADMISSION_INTERVAL + 2) + [20, -16]


def test_new_request_is_admitted_at_once_where_little_runs():
    scheduler = make_scheduler(max_num_seqs=16, num_kvcache_blocks=1000)
    for request_id in range(14):
        seq = make_seq([request_id] * 20, request_id=request_id)
        scheduler.add(seq)
        assert step(scheduler) == ([seq], 20)
        assert step(scheduler)[1] == -1 - request_id


@pytest.mark.parametrize(
    ("prompt_lens", "num_decodes"),
    [([320], 1), ([160, 160], 1), ([319], ADMISSION_INTERVAL), ([160, 159], ADMISSION_INTERVAL)],
)
def test_prompts_that_fill_a_step_are_admitted_at_once(prompt_lens, num_decodes):
    """One or two of 32 slots are free, less than an eighth, and more wait than these."""
    num_free = len(prompt_lens)
    scheduler = make_scheduler(max_num_seqs=32, max_num_batched_tokens=320, num_kvcache_blocks=1000)
    running = add_prompts(scheduler, [10] * 32, max_tokens=200)
    waiting = add_prompts(scheduler, [*prompt_lens, 320, 320, 320, 320])
    for seq in running[:num_free]:
        seq.max_length = 12
    assert step(scheduler) == (running, 320)
    assert step(scheduler)[1] == -32
    for _ in range(num_decodes - 1):
        assert step(scheduler)[1] == num_free - 32
    assert step(scheduler) == (waiting[:num_free], sum(prompt_lens))


def test_cached_tokens_fill_no_step():
    """All prompts begin with the same 160 tokens, and two of 32 slots are free."""
    scheduler = make_scheduler(max_num_seqs=32, max_num_batched_tokens=320, num_kvcache_blocks=1000)
    seqs = [make_seq([3] * 160 + [i], max_tokens=200, request_id=i) for i in range(40)]
    for seq in seqs:
        scheduler.add(seq)
    for seq in seqs[:2]:
        seq.max_length = 163
    assert step(scheduler) == (seqs[:32], 161 + 31)
    assert step(scheduler)[1] == -32
    for _ in range(ADMISSION_INTERVAL - 1):
        assert step(scheduler)[1] == -30
    assert step(scheduler) == (seqs[32:34], 2)


@pytest.mark.parametrize(
    ("step_size", "num_free", "num_decodes"),
    [
        (16384, 5, 1),  # an eighth of the blocks
        (16384, 4, ADMISSION_INTERVAL),
        (128, 2, 1),  # as many as a step's tokens take
        (128, 1, ADMISSION_INTERVAL),
    ],
)
def test_few_freed_blocks_are_given_out_together_at_intervals(step_size, num_free, num_decodes):
    """40 blocks, one for each sequence, bound what runs."""
    scheduler = make_scheduler(
        max_num_batched_tokens=step_size, num_kvcache_blocks=40, kvcache_block_size=64
    )
    sequences = add_prompts(scheduler, [20] * 50, max_tokens=40)
    for seq in sequences[:num_free]:
        seq.max_length = 22
    numbers = [step(scheduler)[1]]
    while numbers[-1] > 0:
        numbers.append(step(scheduler)[1])
    assert (sum(numbers[:-1]), numbers[-1]) == (40 * 20, -40)
    for _ in range(num_decodes - 1):
        assert step(scheduler)[1] == num_free - 40
    assert step(scheduler) == (sequences[40 : 40 + num_free], 20 * num_free)


def test_long_prompt_goes_on_whatever_waits_or_decodes():
    scheduler = make_scheduler(
        max_num_seqs=2, max_num_batched_tokens=8, num_kvcache_blocks=50, enable_chunked_prefill=True
    )
    add_prompts(scheduler, [4, 30, 5, 5], max_tokens=20)
    assert [step(scheduler)[1] for _ in range(7)] == [8, 8, 8, 8, 2, -2, -2]


def test_short_requests_are_admitted_in_few_prefill_steps(monkeypatch):
    """1,024 requests over 512 slots: with a prefill step for each freed slot there are 170."""
    rng = random.Random(4)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(32, 256))] for _ in range(1024)]
    requests = [(prompt, rng.randint(32, 256)) for prompt in prompts]
    num_prefills, num_decodes = [], []
    for interval in (0, ADMISSION_INTERVAL):
        monkeypatch.setattr("nanovllm.engine.scheduling_policy.ADMISSION_INTERVAL", interval)
        for is_overlapped in (False, True):
            _, numbers, _ = run_bench(requests, 4000, 0.25, is_overlapped)
            num_prefills.append(sum(n > 0 for n in numbers))
            num_decodes.append(sum(n < 0 for n in numbers))
    assert min(num_prefills[:2]) > 150
    assert max(num_prefills[2:]) < 20
    assert max(num_decodes[2:]) < 1.03 * min(num_decodes[:2])


def longest_wait_for_what_is_free(seed: int) -> int:
    """Decode steps in a row before each of which the first that waits would have fit."""
    rng = random.Random(seed)
    is_chunked = rng.random() < 0.5
    scheduler = make_scheduler(
        max_num_seqs=rng.choice([2, 16, 32]),
        max_num_batched_tokens=40 if is_chunked else 400,
        enable_chunked_prefill=is_chunked,
        num_kvcache_blocks=rng.choice([60, 200, 800]),
        kvcache_block_size=4,
        watermark=rng.choice([0.0, 0.25]),
    )
    manager = scheduler.block_manager
    num_to_come = 100 if scheduler.max_num_seqs > 2 else 25  # two at a time take long
    num_decodes, longest_wait = 0, 0
    while num_to_come or not scheduler.is_finished():
        while num_to_come and rng.random() < 0.5:
            num_to_come -= 1
            prompt = [rng.randint(2, 9) for _ in range(rng.randint(1, 24))]
            max_tokens = rng.choice([rng.randint(1, 24), 100])
            scheduler.add(make_seq(prompt, max_tokens, request_id=num_to_come))
        is_free = False
        if scheduler.waiting and len(scheduler.running) < scheduler.max_num_seqs:
            seq = scheduler.waiting[0]
            num_reserved = ceil(scheduler.config.watermark * len(scheduler.running))
            is_free = manager.can_allocate(seq, manager.match_prefix(seq), num_reserved)
        _, num_tokens = step(scheduler)
        num_decodes = num_decodes + 1 if is_free and num_tokens < 0 else 0
        longest_wait = max(longest_wait, num_decodes)
    check_all_released(scheduler)
    return longest_wait


def test_what_fits_is_never_left_waiting_for_more_than_an_interval():
    waits = [longest_wait_for_what_is_free(seed) for seed in range(32)]
    assert max(waits) == ADMISSION_INTERVAL


# Ends


def finish_with(tokens: list[int], params: SamplingParams, eos=(EOS,), **kwargs) -> Sequence:
    scheduler = make_scheduler(eos_token_ids=frozenset(eos))
    seq = Sequence([10, 11, 12], params, **kwargs)
    scheduler.add(seq)
    for token in tokens:
        assert not seq.is_finished
        step(scheduler, token)
    assert seq.is_finished
    check_all_released(scheduler)
    return seq


@pytest.mark.parametrize(
    ("tokens", "params", "eos", "reason"),
    [
        ([EOS], SamplingParams(), (EOS,), "stop"),
        ([5, 6, EOS], SamplingParams(), (EOS,), "stop"),
        ([5, 42], SamplingParams(), (EOS, 42), "stop"),
        ([5, EOS], SamplingParams(), (42, EOS), "stop"),
        ([5, 6], SamplingParams(max_tokens=2), (EOS,), "length"),
        ([5], SamplingParams(max_tokens=1), (EOS,), "length"),
        ([5, EOS], SamplingParams(max_tokens=2), (EOS,), "stop"),
        ([EOS, 42, EOS], SamplingParams(max_tokens=3, ignore_eos=True), (EOS, 42), "length"),
        ([5, 6, 7], SamplingParams(max_tokens=3), (), "length"),
    ],
)
def test_a_sequence_ends_for_the_right_reason_and_keeps_its_last_token(tokens, params, eos, reason):
    seq = finish_with(tokens, params, eos)
    assert seq.completion_token_ids == tokens
    assert seq.finish_reason == reason


@pytest.mark.parametrize("max_tokens", [30, None])
def test_max_length_ends_a_sequence(max_tokens):
    seq = finish_with([5] * 17, SamplingParams(max_tokens=max_tokens), max_length=20)
    assert (seq.num_tokens, seq.finish_reason) == (20, "length")


def test_max_length_is_needed_without_max_tokens():
    with pytest.raises(ValueError, match="max_length"):
        Sequence([1], SamplingParams(max_tokens=None))


def test_prompt_is_copied():
    prompt = [1, 2, 3]
    seq = Sequence(prompt)
    prompt.append(4)
    assert seq.token_ids == seq.prompt_token_ids == [1, 2, 3]
    assert (len(seq), seq.num_completion_tokens, seq.completion_token_ids) == (3, 0, [])


def test_lone_sequence_may_fill_the_pool_and_one_token_more():
    """2 blocks of 16, prompt 30: ends at 33 tokens, whose last needs no K/V, and does not hang."""
    scheduler = make_scheduler(num_kvcache_blocks=2)
    [seq] = add_prompts(scheduler, [30], max_tokens=20, max_length=33)
    assert drain(scheduler) == [30, -1, -1]
    assert (seq.num_tokens, seq.finish_reason) == (33, "length")
    assert scheduler.num_preemptions == 0
    check_all_released(scheduler)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_aborted_sequences_release_everything_at_once(num_steps):
    scheduler = make_scheduler(max_num_seqs=6, num_kvcache_blocks=30)
    sequences = add_prompts(scheduler, [20] * 10)
    for _ in range(num_steps):
        step(scheduler)
    for i, seq in enumerate(sequences):
        scheduler.abort([seq])
        check_invariants(scheduler)
        assert len(scheduler.running) + len(scheduler.waiting) == 9 - i
        assert (seq.is_finished, seq.finish_reason) == (True, "abort")
        assert seq.block_table == []
    check_all_released(scheduler)


class CountingQueue(scheduling_policy.FCFSQueue):
    """Counts how often it is gone through, whole or in search of something."""

    num_passes = 0

    def __iter__(self):
        self.num_passes += 1
        return super().__iter__()

    def __contains__(self, item):
        self.num_passes += 1
        return super().__contains__(item)

    def remove(self, item):
        self.num_passes += 1
        super().remove(item)


def test_aborting_a_long_queue_takes_one_pass():
    scheduler = make_scheduler(max_num_seqs=4)
    seqs = add_prompts(scheduler, [5] * 5_000)
    scheduler.schedule()
    queue = scheduler.waiting = CountingQueue(scheduler.waiting)
    scheduler.abort(seqs[:-1])
    assert queue.num_passes == 1
    assert list(scheduler.waiting) == seqs[-1:]
    assert not scheduler.running


def test_sequence_aborted_between_two_chunks_makes_room_for_the_next():
    scheduler = make_scheduler(max_num_batched_tokens=32, enable_chunked_prefill=True)
    first, second = add_prompts(scheduler, [100, 20], max_tokens=1)
    assert step(scheduler) == ([first], 32)
    scheduler.abort([first])
    assert step(scheduler) == ([second], 20)
    check_all_released(scheduler)


# Preemption


def test_last_sequence_is_preempted_and_comes_back_with_what_is_still_cached():
    scheduler = make_scheduler()
    first, second = add_prompts(scheduler, [80, 80], max_tokens=20)
    assert step(scheduler) == ([first, second], 160)
    assert scheduler.block_manager.num_free_blocks == 0
    assert step(scheduler) == ([first], -1)
    assert list(scheduler.waiting) == [second]
    assert scheduler.block_manager.num_free_blocks == 4
    assert second.num_tokens == 81
    assert (second.status, second.row) == (SequenceStatus.WAITING, None)
    while not first.is_finished:
        assert step(scheduler)[0] == [first]
    assert step(scheduler) == ([second], 33)
    assert second.num_cached_tokens == 48
    drain(scheduler)
    assert (first.num_completion_tokens, second.num_completion_tokens) == (20, 20)
    assert scheduler.num_preemptions == 1
    check_all_released(scheduler)


def test_preempted_sequences_keep_their_order_ahead_of_those_that_wait():
    scheduler = make_scheduler(num_kvcache_blocks=4, max_num_seqs=4)
    sequences = add_prompts(scheduler, [16, 15, 15, 15, 5], max_tokens=16)
    step(scheduler)
    assert list(scheduler.running) == sequences[:4]
    step(scheduler)  # the first needs a block
    assert list(scheduler.waiting) == sequences[3:]
    step(scheduler)  # the second and the third need one each; the fourth's is taken
    assert list(scheduler.running) == sequences[:2]
    assert list(scheduler.waiting) == sequences[2:]
    drain(scheduler)
    assert [seq.num_completion_tokens for seq in sequences] == [16] * 5
    check_all_released(scheduler)


@pytest.mark.parametrize("length", [32, 33])
def test_sequence_preempted_at_a_block_boundary_is_prefilled_with_all_its_tokens(length):
    scheduler = make_scheduler(num_kvcache_blocks=5)
    _, second = add_prompts(scheduler, [20, 30], max_tokens=40)
    while second.num_tokens < length:
        step(scheduler)
    scheduler.preempt(second)
    assert scheduler.waiting[0] is second
    assert (second.num_prefill_tokens, second.num_computed_tokens) == (length, 0)
    seqs, is_prefill = scheduler.schedule()
    assert (seqs, is_prefill) == ([second], True)
    assert second.num_computed_tokens == length
    # Its own blocks are still cached, those whose K/V were complete: not that of the newest token.
    assert second.num_cached_tokens == (length - 1) // 16 * 16
    scheduler.postprocess(seqs, [7])
    drain(scheduler)
    assert second.num_completion_tokens == 40


def test_an_abort_of_none_does_not_walk_through_the_queue():
    """It comes after every step, and the queue may hold a night's requests."""
    scheduler = make_scheduler()
    add_prompts(scheduler, [10] * 3)
    waiting = scheduler.waiting
    scheduler.abort([])
    assert scheduler.waiting is waiting


def test_with_a_step_in_flight_nothing_is_preempted():
    scheduler = make_scheduler()
    first, second = add_prompts(scheduler, [80, 80], max_tokens=20)
    prefill, _ = launch(scheduler, in_flight=False)

    def visible():
        return [
            (
                seq.status,
                seq.row,
                list(seq.token_ids),
                seq.num_computed_tokens,
                seq.num_pending_tokens,
            )
            for seq in (first, second)
        ]

    before = visible()
    for _ in range(3):  # asking again changes nothing either
        assert launch(scheduler, in_flight=True) == ([], False)
        assert visible() == before
    assert list(scheduler.running) == [first, second]
    assert not scheduler.waiting
    assert scheduler.num_preemptions == 0

    scheduler.postprocess(prefill, [7, 7])
    assert launch(scheduler, in_flight=False) == ([first], False)
    assert list(scheduler.waiting) == [second]
    assert scheduler.num_preemptions == 1


def test_step_put_off_for_want_of_blocks_takes_none_until_its_retry():
    """There is one free block for the first, and none for the second."""
    scheduler = make_scheduler(num_kvcache_blocks=11)
    first, second = add_prompts(scheduler, [80, 80], max_tokens=20)
    prefill, _ = launch(scheduler, in_flight=False)
    blocks = list(first.block_table)
    assert launch(scheduler, in_flight=True) == ([], False)
    assert first.block_table == blocks
    assert scheduler.block_manager.num_free_blocks == 1
    assert first.num_pending_tokens == second.num_pending_tokens == 1
    scheduler.postprocess(prefill, [7, EOS])
    assert second.finish_reason == "stop"
    assert launch(scheduler, in_flight=False) == ([first], False)
    assert first.block_table == [*blocks, 10]
    assert scheduler.num_preemptions == 0


# Watermark


def test_watermark_keeps_blocks_free_for_those_that_run():
    scheduler = make_scheduler(watermark=0.5, num_kvcache_blocks=12)
    sequences = add_prompts(scheduler, [33] * 4)
    step(scheduler)
    # 3 + 3 blocks; the third needs 3 and leaves 3 >= ceil(0.5 * 2); the fourth would leave 0 < 2.
    assert list(scheduler.running) == sequences[:3]
    assert scheduler.block_manager.num_free_blocks == 3


@pytest.mark.parametrize(("watermark", "num_running"), [(0.0, 2), (0.01, 1), (0.25, 1)])
def test_watermark_is_rounded_up_to_whole_blocks(watermark, num_running):
    scheduler = make_scheduler(watermark=watermark)
    add_prompts(scheduler, [80, 80])
    step(scheduler)
    assert len(scheduler.running) == num_running


def test_watermark_never_keeps_out_a_sequence_that_would_run_alone():
    scheduler = make_scheduler(watermark=100.0)
    sequences = add_prompts(scheduler, [160, 160], max_tokens=1)
    assert step(scheduler) == (sequences[:1], 160)
    assert step(scheduler) == (sequences[1:], 160)


@pytest.fixture(scope="module")
def bench_requests() -> list[tuple[list[int], int]]:
    """Prompts and max_tokens, drawn in the order of the benchmark script."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    requests = [(prompt, rng.randint(100, 1024)) for prompt in prompts]
    assert sum(map(len, prompts)) == 142827
    assert sum(max_tokens for _, max_tokens in requests) == 133966
    return requests


def run_bench(requests, num_blocks: int, watermark: float, is_overlapped: bool = False):
    """The scheduler, the numbers of tokens of its steps, and the most blocks in use."""
    scheduler = make_scheduler(
        max_num_seqs=512,
        num_kvcache_blocks=num_blocks,
        kvcache_block_size=256,
        watermark=watermark,
    )
    for request_id, (prompt, max_tokens) in enumerate(requests):
        scheduler.add(make_seq(prompt, max_tokens, ignore_eos=True, request_id=request_id))
    numbers: list[int] = []
    peak = 0
    manager = scheduler.block_manager

    def launch_next(in_flight):
        nonlocal peak
        seqs, is_prefill = scheduler.schedule(in_flight)
        peak = max(peak, num_blocks - manager.num_free_blocks)
        if seqs:
            num_tokens = sum(seq.num_scheduled_tokens for seq in seqs)
            numbers.append(num_tokens if is_prefill else -num_tokens)
        return seqs

    in_flight: list[Sequence] = []
    while not scheduler.is_finished():
        current = in_flight or launch_next(False)
        in_flight = launch_next(True) if is_overlapped else []
        scheduler.postprocess(current, [7] * len(current))
    check_all_released(scheduler)
    return scheduler, numbers, peak


@pytest.mark.parametrize("is_overlapped", [False, True], ids=["synchronous", "overlapped"])
@pytest.mark.parametrize("watermark", [0.0, 0.25])
def test_bench_trace_with_ample_blocks(bench_requests, watermark, is_overlapped):
    scheduler, numbers, peak = run_bench(bench_requests, 4000, watermark, is_overlapped)
    prefills = [n for n in numbers if n > 0]
    decodes = [-n for n in numbers if n < 0]
    assert (len(numbers), len(prefills), len(decodes)) == (1032, 9, 1023)
    assert numbers == prefills + [-n for n in decodes]
    assert (sum(prefills), sum(decodes)) == (142827, 133710)
    assert max(prefills) <= 16384
    assert max(decodes) == 256
    # Overlapped, a sequence that ends holds its blocks until the next step is planned.
    assert peak == 791 + is_overlapped
    assert scheduler.num_preemptions == 0


def test_watermark_cuts_recomputation_on_a_small_pool(bench_requests):
    num_prompt_tokens = 142827
    recomputed, decode_steps, preemptions = [], [], []
    for watermark in (0.0, 0.25):
        scheduler, numbers, _ = run_bench(bench_requests, 170, watermark)
        recomputed.append(sum(n for n in numbers if n > 0) - num_prompt_tokens)
        decode_steps.append(sum(n < 0 for n in numbers))
        preemptions.append(scheduler.num_preemptions)
    assert recomputed[0] > 0.3 * num_prompt_tokens
    assert recomputed[1] < 0.1 * num_prompt_tokens
    assert preemptions[1] < preemptions[0] / 5
    assert decode_steps[1] < 1.1 * decode_steps[0]


# Overlap: step n + 1 is scheduled before step n is committed


def test_nothing_is_scheduled_past_max_length():
    scheduler = make_scheduler()
    short, long = add_prompts(scheduler, [5, 5], max_tokens=2)
    long.max_length = 9
    prefill, _ = launch(scheduler, in_flight=False)
    second, _ = launch(scheduler, in_flight=True)
    assert second == [short, long]
    assert short.num_tokens_with_pending == 7
    scheduler.postprocess(prefill, [7, 7])
    third, _ = launch(scheduler, in_flight=True)
    assert third == [long]
    scheduler.postprocess(second, [7, 7])
    assert short.finish_reason == "length"
    fourth, _ = launch(scheduler, in_flight=True)
    assert fourth == [long]
    scheduler.postprocess(third, [7])
    assert launch(scheduler, in_flight=True) == ([], False)
    scheduler.postprocess(fourth, [7])
    assert (short.num_completion_tokens, long.num_completion_tokens) == (2, 4)
    check_all_released(scheduler)


def test_late_eos_drops_one_row_and_its_token():
    scheduler = make_scheduler()
    first, second = add_prompts(scheduler, [5, 5], max_tokens=10)
    prefill, _ = launch(scheduler, in_flight=False)
    decode, _ = launch(scheduler, in_flight=True)
    assert decode == [first, second]
    assert scheduler.postprocess(prefill, [EOS, 7]) == [first, second]
    assert first.is_finished
    following, _ = launch(scheduler, in_flight=True)
    assert following == [second]
    assert scheduler.postprocess(decode, [8, 8]) == [second]
    assert first.completion_token_ids == [EOS]
    assert second.completion_token_ids == [7, 8]
    assert (first.finish_reason, second.finish_reason) == ("stop", None)
    check_invariants(scheduler)


def test_row_and_blocks_of_a_late_end_serve_the_next_request_at_once():
    scheduler = make_scheduler(max_num_seqs=1, num_kvcache_blocks=1)
    first, second = add_prompts(scheduler, [5, 6], max_tokens=3)
    prefill, _ = launch(scheduler, in_flight=False)
    decode, _ = launch(scheduler, in_flight=True)
    scheduler.postprocess(prefill, [EOS])
    assert launch(scheduler, in_flight=True) == ([second], True)
    assert (second.row, second.block_table) == (0, [0])
    assert scheduler.postprocess(decode, [8]) == []
    assert second.num_tokens == 6
    assert first.completion_token_ids == [EOS]


def test_sequence_aborted_in_flight_is_dropped_when_its_step_is_committed():
    scheduler = make_scheduler()
    first, second = add_prompts(scheduler, [5, 5], max_tokens=10)
    prefill, _ = launch(scheduler, in_flight=False)
    scheduler.abort([first])
    assert scheduler.postprocess(prefill, [7, 7]) == [second]
    assert first.completion_token_ids == []
    assert first.finish_reason == "abort"


def test_missing_tokens_of_partial_prompts_are_ignored():
    scheduler = make_scheduler(max_num_batched_tokens=8, enable_chunked_prefill=True)
    [seq] = add_prompts(scheduler, [20], max_tokens=2)
    steps = [launch(scheduler, in_flight=False)[0]]
    for expected_length, token in ((20, None), (20, None), (21, 7), (22, 7)):
        following, _ = launch(scheduler, in_flight=True)
        assert scheduler.postprocess(steps[-1], [token]) == [seq]
        assert seq.num_tokens == expected_length
        steps.append(following)
    assert len(steps[:-1]) == 4
    assert seq.finish_reason == "length"
    check_all_released(scheduler)


def test_waiting_sequence_is_admitted_while_a_decode_is_in_flight():
    scheduler = make_scheduler()
    [first] = add_prompts(scheduler, [20], max_tokens=10)
    step(scheduler)
    decode, _ = launch(scheduler, in_flight=False)
    second = make_seq([5] * 20, request_id=1)
    scheduler.add(second)
    assert launch(scheduler, in_flight=True) == ([second], True)
    assert scheduler.postprocess(decode, [7]) == [first]


@pytest.mark.parametrize("num_blocks", [12, 100])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["whole prompts", "chunked"])
def test_overlapped_and_synchronous_stepping_complete_alike(num_blocks, is_chunked):
    completions = []
    for is_overlapped in (False, True):
        scheduler = make_scheduler(
            max_num_seqs=5,
            max_num_batched_tokens=20 if is_chunked else 64,
            enable_chunked_prefill=is_chunked,
            num_kvcache_blocks=num_blocks,
            kvcache_block_size=4,
        )
        engine = FakeEngine(scheduler, 30, 12, is_overlapped)
        sequences = add_prompts(scheduler, [5, 9, 3, 16, 8, 7, 12, 4], max_tokens=30)
        while engine.step():
            pass
        check_all_released(scheduler)
        assert (scheduler.num_preemptions > 0) == (num_blocks == 12)
        completions.append([seq.completion_token_ids for seq in sequences])
        for seq in sequences:
            expected = expected_completion(seq, 30, scheduler.eos_token_ids)
            assert (seq.completion_token_ids, seq.finish_reason) == expected
    assert completions[0] == completions[1]


# After an error


@pytest.mark.parametrize("num_launched", [1, 2])
def test_restart_keeps_confirmed_tokens_and_accounts_for_every_block(num_launched):
    scheduler = make_scheduler(max_num_seqs=3, num_kvcache_blocks=20)
    sequences = add_prompts(scheduler, [20] * 4, max_tokens=6)
    step(scheduler)
    step(scheduler)
    for i in range(num_launched):
        launch(scheduler, in_flight=i > 0)  # and never commit
    restart(scheduler, sequences)
    check_invariants(scheduler)
    manager = scheduler.block_manager
    assert manager.num_free_blocks == 20
    assert manager.hash_to_block_ids == {}
    assert list(scheduler.waiting) == sequences
    assert not scheduler.running
    assert [seq.num_tokens for seq in sequences] == [22, 22, 22, 20]
    assert step(scheduler) == (sequences[:3], 66)
    drain(scheduler)
    assert [seq.completion_token_ids for seq in sequences] == [[7] * 6] * 4
    check_all_released(scheduler)


def test_restart_without_requests_leaves_an_empty_scheduler():
    scheduler = make_scheduler()
    add_prompts(scheduler, [20, 20])
    step(scheduler)
    restart(scheduler, [])
    check_all_released(scheduler)


def test_decode_steps_keep_the_token_budget_too():
    scheduler = make_scheduler(max_num_batched_tokens=4, enable_chunked_prefill=True)
    seqs = add_prompts(scheduler, [1] * 10, max_tokens=3)
    assert all(abs(num_tokens) <= 4 for num_tokens in drain(scheduler))
    assert all(seq.num_completion_tokens == 3 for seq in seqs)


# ---- stops and priorities ------------------------------------------------------------------------


def run(scheduler: Scheduler, seq: Sequence, tokens: list[int]) -> Sequence:
    """Sample `tokens` for `seq`, one a step, until it ends."""
    scheduler.add(seq)
    for token in tokens:
        if seq.is_finished:
            break
        step(scheduler, token)
    return seq


@pytest.mark.parametrize(
    ("params", "tokens", "completion", "reasons"),
    [
        ({}, [10, EOS, 11], [10, EOS], ("stop", None)),
        ({"ignore_eos": True}, [10, EOS, 11, 12], [10, EOS, 11, 12], ("length", None)),
        ({"stop_token_ids": [42, 43]}, [10, 42, 11], [10, 42], ("stop", 42)),
        ({"stop_token_ids": [43, 42]}, [42, 43], [42], ("stop", 42)),
        ({"stop_token_ids": [EOS]}, [EOS], [EOS], ("stop", None)),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [EOS], [EOS], ("stop", EOS)),
        ({"max_tokens": 2}, [10, 11, 12], [10, 11], ("length", None)),
        ({"min_tokens": 4}, [10, 11, EOS, 12], [10, 11, EOS, 12], ("length", None)),
        ({"min_tokens": 3}, [10, 11, EOS, 12], [10, 11, EOS], ("stop", None)),
        ({"min_tokens": 3, "stop_token_ids": [42]}, [42, 42, 42, 42], [42, 42, 42], ("stop", 42)),
    ],
)
def test_stops(params, tokens, completion, reasons):
    """Cases 28 and 29."""
    scheduler = make_scheduler()
    seq = Sequence([1, 2, 3], SamplingParams(**({"max_tokens": 4} | params)))
    run(scheduler, seq, tokens)
    assert seq.completion_token_ids == completion
    assert (seq.finish_reason, seq.stop_reason) == reasons


def make_priority_seqs(*priorities: int, length: int = 10) -> list[Sequence]:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    return [
        Sequence([i] * length, params, request_id=i, priority=priority)
        for i, priority in enumerate(priorities)
    ]


def test_the_lower_priority_number_is_admitted_first_then_the_older():
    scheduler = make_scheduler(scheduling_policy="priority", max_num_seqs=2)
    seqs = make_priority_seqs(5, 1, 5, 1, -3)
    for seq in seqs:
        scheduler.add(seq)
    assert list(scheduler.waiting) == [seqs[i] for i in (4, 1, 3, 0, 2)]
    assert scheduler.schedule() == ([seqs[4], seqs[1]], True)


def test_priorities_change_nothing_under_fcfs():
    scheduler = make_scheduler()
    seqs = make_priority_seqs(5, 1, 3)
    for seq in seqs:
        scheduler.add(seq)
    assert list(scheduler.waiting) == seqs


def test_the_highest_priority_number_is_preempted_and_waits_behind_the_lower():
    scheduler = make_scheduler(scheduling_policy="priority", num_kvcache_blocks=10)
    seqs = make_priority_seqs(1, 9, 2, length=48)
    for seq in seqs:
        scheduler.add(seq)
    step(scheduler)
    late = make_priority_seqs(4)[0]
    late.request_id = 3
    scheduler.add(late)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert seqs[1] not in scheduler.running
    assert list(scheduler.waiting)[-1] is seqs[1]
    drain(scheduler)
    assert {seq.finish_reason for seq in (*seqs, late)} == {"length"}


def test_an_abort_while_a_priority_is_searched_for(monkeypatch):
    """As a garbage collection in the search may cause, which finds a stream that was dropped."""
    scheduler = make_scheduler(scheduling_policy="priority")
    old, new = (make_seq([5] * 30, request_id=i) for i in range(2))
    scheduler.add(old)
    rank = priority_queue._rank

    def abort_and_rank(seq):
        if not old.is_finished:
            scheduler.abort([old])
        return rank(seq)

    monkeypatch.setattr(priority_queue, "_rank", abort_and_rank)
    scheduler.add(new)
    assert list(scheduler.waiting) == [new]
