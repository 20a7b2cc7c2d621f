"""What a scheduler has counted since the engine started; `LLM.get_metrics` shows it."""

from dataclasses import dataclass, field


@dataclass
class SchedulerStats:
    """Totals over all requests. With n > 1 each completion counts as a sequence of its own."""

    # Tokens of sequences at their first admission, while prefix caching is on, and how many of
    # them the cache spared; then the same of preempted sequences that were admitted again.
    num_prefix_cache_queries: int = 0
    num_prefix_cache_hits: int = 0
    num_preempted_queries: int = 0
    num_preempted_hits: int = 0
    num_prompt_tokens: int = 0  # of sequences at their first admission, cached or not
    num_generation_tokens: int = 0
    num_finished: dict[str, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0}
    )

    def count_admission(self, num_tokens: int, num_cached_tokens: int, is_again: bool) -> None:
        """A sequence of `num_tokens` leaves the waiting queue; `is_again`: it was preempted."""
        if is_again:
            self.num_preempted_queries += num_tokens
            self.num_preempted_hits += num_cached_tokens
        else:
            self.num_prefix_cache_queries += num_tokens
            self.num_prefix_cache_hits += num_cached_tokens
