"""A snapshot of the engine's counters under vLLM's names."""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from nanovllm.stats import FinishedRequestStats, StepStats

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

PREFIX = "vllm:"
# Upper limits of the buckets, in seconds; vLLM's.
FIRST_TOKEN_LIMITS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5]
FIRST_TOKEN_LIMITS += [5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0]
LATENCY_LIMITS = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0]
LATENCY_LIMITS += [120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0]


@dataclass(frozen=True)
class Metric:
    """Something that is measured of the engine; `labels` say of what."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Counter(Metric):
    """A total since the engine started: it never falls."""

    value: float


@dataclass(frozen=True)
class Gauge(Metric):
    """A state at the moment of the snapshot."""

    value: float


@dataclass(frozen=True)
class Vector(Metric):
    """vLLM's row of counters; there is none here."""

    values: list[int]


@dataclass(frozen=True)
class Histogram(Metric):
    """How a number is spread over requests.

    Args:
        count: how many were observed.
        sum: their sum.
        buckets: upper limit, as text, -> how many are no larger; "+Inf": all.
    """

    count: int
    sum: float
    buckets: dict[str, int]


class RequestHistograms:
    """A `StatLogger` that observes each request that ends, aborted ones left out.

    max_model_len: the longest completion.
    """

    def __init__(self, max_model_len: int) -> None:
        lengths = [float(k * 10**e) for e in range(10) for k in (1, 2, 5)]
        lengths = [limit for limit in lengths if limit <= max_model_len]
        limits = {
            "time_to_first_token_seconds": FIRST_TOKEN_LIMITS,
            "e2e_request_latency_seconds": LATENCY_LIMITS,
            "request_prompt_tokens": lengths,
            "request_generation_tokens": lengths,
        }
        self._limits = limits
        self._counts = {name: [0] * (len(values) + 1) for name, values in limits.items()}
        self._sums = dict.fromkeys(limits, 0.0)

    def record(self, step: StepStats, finished: list[FinishedRequestStats]) -> None:
        """Observe the requests that ended with a step."""
        for request in finished:
            self._observe("time_to_first_token_seconds", request.metrics.time_to_first_token)
            self._observe("e2e_request_latency_seconds", request.metrics.latency)
            self._observe("request_prompt_tokens", request.num_prompt_tokens)
            self._observe("request_generation_tokens", request.num_generation_tokens)

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._counts[name][bisect_left(self._limits[name], value)] += 1
            self._sums[name] += value

    def snapshot(self, labels: dict[str, str]) -> list[Histogram]:
        """What was observed by now."""
        histograms = []
        for name, limits in self._limits.items():
            totals = list(accumulate(self._counts[name]))
            buckets = dict(zip([*map(str, limits), "+Inf"], totals, strict=True))
            histograms.append(
                Histogram(PREFIX + name, labels, totals[-1], self._sums[name], buckets)
            )
        return histograms

    def close(self) -> None:
        """Nothing is open."""


class Metrics(list[Metric]):
    """All metrics; a list, with access by name."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a metric, the sum of those that differ in labels; `default`: no such name.

        Of a histogram it is the `Histogram`. The prefix "vllm:" may be left out.
        """
        found = [metric for metric in self if metric.name in (name, PREFIX + name)]
        if found and isinstance(found[0], (Histogram, Vector)):
            return found[0]
        values = [metric.value for metric in found if isinstance(metric, (Counter, Gauge))]
        return sum(values) if values else default


def get_metrics(llm: "LLMEngine") -> Metrics:
    """A snapshot of the engine's counters under vLLM's names.

    Returns:
        A list of metrics, each with `name`, `labels` and `value`; `.get(name, default)` gives
        a value by name. With `disable_log_stats=False` there are histograms of requests too: times
        to the first token and to the end, in seconds, and numbers of tokens.
    """
    scheduler = llm.scheduler
    manager, stats = scheduler.block_manager, scheduler.stats
    num_blocks = len(manager.blocks)
    labels = {"model_name": llm.config.model}
    gauges = {
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": len(scheduler.waiting) + len(scheduler.held),
        "kv_cache_usage_perc": 1 - manager.num_free_blocks / num_blocks,
    }
    counters = {
        "prefix_cache_queries": stats.num_prefix_cache_queries,
        "prefix_cache_hits": stats.num_prefix_cache_hits,
        "prompt_tokens": stats.num_prompt_tokens,
        "generation_tokens": stats.num_generation_tokens,
        "num_preemptions": scheduler.num_preemptions,
    }
    metrics = Metrics()
    metrics += [Gauge(PREFIX + name, labels, value) for name, value in gauges.items()]
    metrics += [Counter(PREFIX + name, labels, value) for name, value in counters.items()]
    metrics += [
        Counter(f"{PREFIX}request_success", labels | {"finished_reason": reason}, number)
        for reason, number in stats.num_finished.items()
    ]
    for stat_logger in llm.stat_loggers:
        if isinstance(stat_logger, RequestHistograms):
            metrics += stat_logger.snapshot(labels)
    return metrics
