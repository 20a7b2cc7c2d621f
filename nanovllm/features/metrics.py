"""A snapshot of the engine's counters under vLLM's names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

PREFIX = "vllm:"


@dataclass(frozen=True)
class Metric:
    """One number of the engine; `labels` say of what."""

    name: str
    labels: dict[str, str]
    value: float


class Counter(Metric):
    """A total since the engine started: it never falls."""


class Gauge(Metric):
    """A state at the moment of the snapshot."""


class Metrics(list[Metric]):
    """All metrics; a list, with access by name."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a metric, the sum of those that differ in labels; `default`: no such name.

        The prefix "vllm:" may be left out.
        """
        values = [metric.value for metric in self if metric.name in (name, PREFIX + name)]
        return sum(values) if values else default


def get_metrics(llm: "LLMEngine") -> Metrics:
    """A snapshot of the engine's counters under vLLM's names.

    Returns:
        A list of metrics, each with `name`, `labels` and `value`; `.get(name, default)` gives
        a value by name.
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
    return metrics
