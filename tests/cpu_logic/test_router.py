"""Which replica computes a sequence: the one with its prefix, or with the least to do."""

import pytest
from scheduling_helpers import make_config, make_seq

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_stats import SchedulerStats
from nanovllm.errors import ReplicaDiedError
from nanovllm.parallel.replica_messages import Ending, Further, Snapshot, Update
from nanovllm.parallel.router import Router
from nanovllm.sampling_params import SamplingParams

SNAPSHOT = Snapshot(SchedulerStats(), 0, 10)


class Replicas:
    """Takes note of what the router tells the replicas."""

    def __init__(self):
        self.cancelled = []

    def cancel(self, index, tickets):
        self.cancelled.append((index, tickets))

    def reset_prefix_cache(self):
        return True


def make_router(size=2, **config):
    return Router(make_config(**config), Replicas(), [10] * size)


def queue(router, prompts, max_tokens=64, **options):
    seqs = [
        make_seq(prompt, max_tokens, request_id=number, **options)
        for number, prompt in enumerate(prompts)
    ]
    for seq in seqs:
        router.add(seq)
    return seqs


def homes(router, seqs):
    return [router.places[seq].home for seq in seqs]


def sent(router):
    """What is sent now: (replica, request) pairs."""
    router.schedule()
    outgoing, router.outgoing = router.outgoing, []
    return [(router.places[seq].home, seq.request_id) for seq in outgoing]


def tell(router, seq, token_ids, ending=None):
    """A replica's update of a sequence arrives."""
    place = router.places[seq]
    update = Update(place.ticket, token_ids, ending and Further([], [], 0, 0, ending))
    touched = router.take(place.home, [update], SNAPSHOT)
    assert touched == [seq]
    return router.postprocess(touched, [])


def test_sequences_spread_by_load():
    router = make_router(4)
    seqs = queue(router, [[i] for i in range(8)])
    assert homes(router, seqs) == [0, 1, 2, 3, 0, 1, 2, 3]
    long = queue(router, [[9]], max_tokens=1000)
    assert homes(router, [*long, *queue(router, [[10]] * 6)]) == [0, 1, 2, 3, 1, 2, 3]


def test_an_equal_prefix_leads_to_the_same_replica_until_the_load_outweighs_it():
    router = make_router(3)  # blocks of 16 tokens
    first, second = list(range(100, 196)), list(range(300, 396))
    [one, other, *rest] = queue(router, [first, second, [*first, 1], [*second, 2], [*first, 3]], 16)
    assert homes(router, [one, other, *rest]) == [0, 1, 0, 1, 0]
    assert homes(router, queue(router, [[5]], 16)) == [2], "what shares nothing goes by load"
    many = homes(router, queue(router, [[*first, i] for i in range(60)], 16))
    assert {many.count(index) for index in range(3)} <= set(range(15, 26)), "all have it by now"


@pytest.mark.parametrize("own", [{"enable_prefix_caching": False}, {}])
def test_what_the_cache_does_not_share_goes_by_load(own):
    router = make_router(2, **own)
    seqs = queue(router, [list(range(64))] * 2, max_tokens=16)
    assert homes(router, seqs) == ([0, 1] if own else [0, 0])


def test_the_completions_of_a_request_stay_together():
    router = make_router(4)
    requests = [Request(None, [number], SamplingParams(n=3), 20) for number in range(4)]
    for number, request in enumerate(requests):
        request.number(number, 0)
        for seq in request.sequences:
            router.add(seq)
    assert [homes(router, r.sequences) for r in requests] == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]


def test_a_replica_gets_its_slots_and_a_reserve_and_the_rest_waits():
    router = make_router(2, max_num_seqs=4)  # 4 slots, 1 beside
    seqs = queue(router, [[number] for number in range(20)])
    assert len(sent(router)) == 10 and len(router.running) == 10 and len(router.waiting) == 10
    assert sent(router) == []
    ended = Ending("length", None, None, None)
    assert tell(router, seqs[0], [7, 8], ended) == [seqs[0]] * 2
    assert (seqs[0].finish_reason, seqs[0].completion_token_ids) == ("length", [7, 8])
    assert sent(router) == [(0, 10)], "the next of its own queue"


def test_a_replica_that_runs_dry_takes_from_the_longest_queue():
    router = make_router(2, max_num_seqs=1)
    prompt = list(range(640))
    seqs = queue(router, [[*prompt, number] for number in range(6)], max_tokens=4)
    assert set(homes(router, seqs)) == {0}, "all share a long prefix"
    assert sent(router) == [(0, 0), (0, 1), (1, 5), (1, 4)]
    assert homes(router, seqs) == [0, 0, 0, 0, 1, 1] and router.loads[1] > 0


def test_the_most_urgent_is_taken_with_priorities():
    router = make_router(2, max_num_seqs=1, scheduling_policy="priority")
    seqs = [make_seq(list(range(640)), 4, request_id=number) for number in range(6)]
    for seq, priority in zip(seqs, [5, 4, 3, 2, 1, 0], strict=True):
        seq.priority = priority
        router.add(seq)
    assert sent(router) == [(0, 5), (0, 4), (1, 3), (1, 2)]


def test_an_abort_is_told_once_and_later_news_are_dropped():
    router = make_router(1, max_num_seqs=2)
    seqs = queue(router, [[1], [2], [3], [4]])
    sent(router)
    tickets = [router.places[seq].ticket for seq in seqs[:3]]
    router.abort([seqs[0], seqs[2], seqs[3]])
    assert router.link.cancelled == [(0, [tickets[0], tickets[2]])]
    late = Update(tickets[0], [5], None)
    assert router.take(0, [late], SNAPSHOT) == []
    assert [seq.finish_reason for seq in seqs] == ["abort", None, "abort", "abort"]
    assert list(router.running) == [seqs[1]] and not router.waiting
    router.abort([seqs[1]])
    assert router.is_finished() and not router.places and router.loads == [0.0]


def test_a_sequence_that_is_taken_back_goes_on_with_its_tokens():
    router = make_router(1)
    [seq] = queue(router, [[1, 2]])
    sent(router)
    tell(router, seq, [7])
    old = router.places[seq].ticket
    router.preempt(seq)
    assert router.link.cancelled == [(0, [old])] and not router.running
    assert sent(router) == [(0, 0)] and router.places[seq].ticket != old
    assert seq.token_ids == [1, 2, 7]


def test_what_a_dead_replica_had_goes_elsewhere_in_order():
    router = make_router(2, max_num_seqs=2)
    seqs = queue(router, [[number] for number in range(10)])
    assert [request for index, request in sent(router) if index == 1] == [1, 3, 5]
    tell(router, seqs[1], [7])
    assert router.bury(1, "replica 1 was killed", retries=True) == []
    assert router.alive == [0] and set(homes(router, seqs)) == {0}
    for seq in (seqs[0], seqs[2], seqs[4]):
        tell(router, seq, [], Ending("stop", None, None, None))
    assert sent(router) == [(0, 1), (0, 3), (0, 5)], "what ran is first"
    assert seqs[1].token_ids == [1, 7]


@pytest.mark.parametrize("retries", [True, False])
def test_what_a_dead_replica_had_may_end_by_name(retries):
    """Also where others compute it: what has seen two deaths may cause them."""
    router = make_router(3)
    [seq] = queue(router, [[1]])
    sent(router)
    if retries:
        assert router.bury(0, "replica 0 was killed", retries) == []
        sent(router)
    index = router.places[seq].home
    ended = router.bury(index, f"replica {index} was killed", retries)
    assert ended == [seq] == router.postprocess(ended, [])
    assert seq.finish_reason == "abort" and isinstance(seq.error, ReplicaDiedError)
    assert seq.stop_reason == f"ReplicaDiedError: replica {index} was killed"
    assert router.is_finished() and not router.places


def test_counters_of_all_replicas_are_added_and_never_fall():
    router = make_router(2)
    for index, number in enumerate((3, 4)):
        router.take(index, [], Snapshot(SchedulerStats(num_prompt_tokens=number), number, 8))
    assert router.stats.num_prompt_tokens == 7 and router.num_preemptions == 7
    assert len(router.block_manager.blocks) == 20 and router.block_manager.num_free_blocks == 16
    router.bury(1, "gone", retries=True)
    router.take(0, [], Snapshot(SchedulerStats(num_prompt_tokens=5), 3, 9))
    assert router.stats.num_prompt_tokens == 9 and router.block_manager.num_free_blocks == 19


def test_the_prefix_cache_is_forgotten_only_when_nothing_runs():
    router = make_router(2)
    [seq] = queue(router, [[1]])
    assert router.block_manager.reset_prefix_cache()
    sent(router)
    assert not router.block_manager.reset_prefix_cache()
    router.abort([seq])
    assert router.block_manager.reset_prefix_cache()
