"""Statistics of an engine's steps and finished requests, and the protocol of what takes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from nanovllm.outputs import RequestMetrics


@dataclass(slots=True)
class StepStats:
    """A committed step, the queues and blocks after it, and totals since the engine started.

    Args:
        is_prefill: whether it computed prompts; else it decoded.
        num_seqs: sequences in the step.
        num_tokens: tokens computed: of prompts, or one for each sequence that decoded.
        seconds: spent on launching the step and on waiting for it.
        time: of the commit, on the clock of `time.perf_counter`.
        num_running: sequences that hold blocks.
        num_waiting: sequences that are queued.
        num_used_blocks: KV blocks that sequences hold.
        num_blocks: KV blocks that there are.
        num_prompt_tokens: tokens of admitted prompts, cached ones included.
        num_generation_tokens: tokens generated.
        num_prefix_cache_queries: prompt tokens that were looked up in the prefix cache.
        num_prefix_cache_hits: those that were found.
        num_preemptions: sequences put back in the queue for lack of blocks.
        num_finished: completions by finish reason; the engine's own counter, which goes on.
    """

    is_prefill: bool
    num_seqs: int
    num_tokens: int
    seconds: float
    time: float
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_prefix_cache_queries: int
    num_prefix_cache_hits: int
    num_preemptions: int
    num_finished: Mapping[str, int]


@dataclass(slots=True)
class FinishedRequestStats:
    """A request that has ended.

    Args:
        request_id: its number in the engine.
        num_prompt_tokens: of its prompt.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        num_generation_tokens: of all its completions.
        finish_reasons: one for each completion.
        metrics: its times.
    """

    request_id: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    finish_reasons: list[str | None]
    metrics: RequestMetrics


class StatLogger(Protocol):
    """What `LLMEngine.stat_loggers` holds. It must not raise: the step would count as failed."""

    def record(self, step: StepStats, finished: list[FinishedRequestStats]) -> None:
        """Take a step that was committed just now, and the requests that ended with it."""

    def close(self) -> None:
        """Take note that the engine has ended; may be called again."""
