"""What a scheduler has counted since the engine started; `LLM.get_metrics` shows it."""

from dataclasses import dataclass, field

from nanovllm.engine.sequence import Sequence


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
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "repetition": 0}
    )

    def count_admission(self, seq: Sequence, is_caching: bool) -> None:
        """A sequence leaves the waiting queue, perhaps not for the first time."""
        is_again, seq.was_admitted = seq.was_admitted, True
        is_counted = is_caching and seq.may_read_prefix_cache
        if is_again and is_counted:
            self.num_preempted_queries += seq.num_tokens
            self.num_preempted_hits += seq.num_cached_tokens
        elif is_counted:
            self.num_prefix_cache_queries += seq.num_tokens
            self.num_prefix_cache_hits += seq.num_cached_tokens
        if not is_again:
            seq.num_cached_prompt_tokens = seq.num_cached_tokens
            self.num_prompt_tokens += seq.num_prompt_tokens
