"""What the scheduler counts, and how `get_metrics` shows it."""

from types import SimpleNamespace

import pytest
from scheduling_helpers import EOS, drain, make_scheduler, make_seq, step

from nanovllm.features.metrics import Counter, Gauge, Metrics, RequestHistograms, get_metrics
from nanovllm.outputs import RequestMetrics
from nanovllm.stats import FinishedRequestStats

NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:num_preemptions",
]


def metrics_of(scheduler) -> Metrics:
    config = SimpleNamespace(model="m")
    return get_metrics(SimpleNamespace(scheduler=scheduler, config=config, stat_loggers=[]))


def prompt(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


def test_names_types_and_labels():
    metrics = metrics_of(make_scheduler())
    assert isinstance(metrics, list)
    assert [metric.name for metric in metrics] == [*NAMES, *["vllm:request_success"] * 4]
    assert [type(metric) for metric in metrics] == [Gauge] * 3 + [Counter] * 9
    assert [metric.value for metric in metrics] == [0] * 12
    assert metrics[0].labels == {"model_name": "m"}
    reasons = [metric.labels["finished_reason"] for metric in metrics[-4:]]
    assert reasons == ["stop", "length", "abort", "repetition"]


def test_values_by_name():
    metrics = Metrics(
        [Gauge("vllm:a", {}, 0.5), Counter("vllm:b", {"x": "1"}, 2), Counter("vllm:b", {}, 3)]
    )
    assert metrics.get("vllm:a") == metrics.get("a") == 0.5
    assert metrics.get("b") == 5
    assert metrics.get("gpu_cache_usage", 0) == 0
    assert metrics.get("c") is None


def test_histograms_of_requests():
    observed = RequestHistograms(max_model_len=100)
    for tokens, first, end in [(1, 10.5, 11.0), (7, 10.001, 14.0), (100, 9000.0, None)]:
        metrics = RequestMetrics(10.0, first, end)
        observed.record(None, [FinishedRequestStats(0, 20, 0, tokens, ["stop"], metrics)])
    by_name = Metrics(observed.snapshot({"model_name": "m"}))
    tokens = by_name.get("request_generation_tokens")
    assert (tokens.count, tokens.sum, tokens.labels) == (3, 108, {"model_name": "m"})
    assert tokens.buckets == {
        "1.0": 1, "2.0": 1, "5.0": 1, "10.0": 2, "20.0": 2, "50.0": 2, "100.0": 3, "+Inf": 3,
    }  # fmt: skip
    first = by_name.get("vllm:time_to_first_token_seconds")
    assert (first.buckets["0.5"], first.buckets["2560.0"], first.buckets["+Inf"]) == (2, 2, 3)
    latency = by_name.get("e2e_request_latency_seconds")
    assert (latency.count, latency.sum, latency.buckets["1.0"]) == (2, 5.0, 1)


def test_a_life_of_requests():
    scheduler = make_scheduler(max_num_seqs=2)
    seqs = [make_seq(prompt(20, 100 * i), max_tokens=3, request_id=i) for i in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    assert metrics_of(scheduler).get("num_requests_waiting") == 3
    step(scheduler)
    metrics = metrics_of(scheduler)
    assert metrics.get("num_requests_running") == 2
    assert metrics.get("num_requests_waiting") == 1
    assert metrics.get("kv_cache_usage_perc") == pytest.approx(4 / 10)  # two blocks of 16 each
    assert metrics.get("prompt_tokens") == 40
    assert metrics.get("generation_tokens") == 2
    scheduler.abort([seqs[0]])
    step(scheduler, EOS)
    drain(scheduler)
    metrics = metrics_of(scheduler)
    assert metrics.get("num_requests_running") == metrics.get("num_requests_waiting") == 0
    assert metrics.get("kv_cache_usage_perc") == 0
    assert metrics.get("prompt_tokens") == 60
    by_reason = {metric.labels.get("finished_reason"): metric.value for metric in metrics[-4:]}
    assert by_reason == {"stop": 1, "length": 1, "abort": 1, "repetition": 0}
    assert metrics.get("request_success") == 3
    assert metrics.get("generation_tokens") == sum(seq.num_completion_tokens for seq in seqs)


def test_hits_are_tokens_that_the_cache_spared():
    scheduler = make_scheduler()
    for _ in range(2):
        scheduler.add(make_seq(prompt(40), max_tokens=1))
        drain(scheduler)
    assert metrics_of(scheduler).get("prefix_cache_queries") == 80
    assert metrics_of(scheduler).get("prefix_cache_hits") == 32


def test_a_request_that_is_refused_for_some_steps_counts_once():
    scheduler = make_scheduler(num_kvcache_blocks=4)
    scheduler.add(make_seq(prompt(50), max_tokens=10, request_id=0))
    scheduler.add(make_seq(prompt(40, 500), max_tokens=2, request_id=1))
    for _ in range(5):
        step(scheduler)
    assert len(scheduler.waiting) == 1
    assert scheduler.stats.num_prefix_cache_queries == 50
    drain(scheduler)
    assert scheduler.stats.num_prefix_cache_queries == 90
    assert scheduler.stats.num_preempted_queries == 0


def test_preempted_requests_are_counted_apart():
    """Case 24: the second of two prompts of 80 comes back with 81 tokens, 48 of them cached."""
    scheduler = make_scheduler()
    for request_id in range(2):
        scheduler.add(make_seq(prompt(80, 1000 * request_id), max_tokens=20, request_id=request_id))
    drain(scheduler)
    stats = scheduler.stats
    assert metrics_of(scheduler).get("num_preemptions") == 1
    assert (stats.num_prefix_cache_queries, stats.num_prefix_cache_hits) == (160, 0)
    assert (stats.num_preempted_queries, stats.num_preempted_hits) == (81, 48)
    assert metrics_of(scheduler).get("prompt_tokens") == 160
    assert metrics_of(scheduler).get("generation_tokens") == 40


def test_nothing_is_asked_of_a_cache_that_is_off():
    scheduler = make_scheduler(enable_prefix_caching=False)
    for _ in range(2):
        scheduler.add(make_seq(prompt(40), max_tokens=1))
    drain(scheduler)
    assert metrics_of(scheduler).get("prefix_cache_queries") == 0
    assert metrics_of(scheduler).get("prefix_cache_hits") == 0
    assert metrics_of(scheduler).get("prompt_tokens") == 80
