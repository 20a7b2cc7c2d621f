"""What the report of a run shows, summed up in memory that does not grow with the run."""

import heapq
from collections import Counter
from copy import copy
from dataclasses import dataclass
from math import floor, log2

from nanovllm.stats import FinishedRequestStats, StepStats

MAX_INTERVALS = 1024
FIRST_WIDTH = 1 / 64  # seconds of an interval; doubled as the run grows
NUM_SLOWEST = 20
BINS_PER_OCTAVE = 8


@dataclass(slots=True)
class Interval:
    """Sums over the steps of an interval of time; `max_*` are the highest values in it.

    A step that spans several intervals is counted in the last one, but its tokens and its seconds
    are spread over all. `waiting_seconds` and `block_seconds` are weighted by time: divided by
    `seconds` they are the mean number of waiting sequences and of used blocks.
    """

    seconds: float = 0.0
    waiting_seconds: float = 0.0
    block_seconds: float = 0.0
    num_generation_tokens: int = 0
    num_prefill_tokens: int = 0
    num_prefix_cache_queries: int = 0
    num_prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_prefills: int = 0
    num_decodes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_decoded_seqs: int = 0  # over the decode steps
    max_decoded_seqs: int = 0
    max_waiting: int = 0
    max_used_blocks: int = 0

    def add(self, other: "Interval") -> None:
        """Make it the interval of both."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, theirs) if name.startswith("max_") else mine + theirs)


def merge_pairs(intervals: list[Interval]) -> list[Interval]:
    """Half as many intervals of twice the width."""
    pairs = [copy(interval) for interval in intervals[::2]]
    for pair, other in zip(pairs, intervals[1::2], strict=False):
        pair.add(other)
    return pairs


class Distribution:
    """Durations: quantiles to within 5 %, everything else exactly."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.highest = 0.0
        self._bins: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count += 1
        self.total += seconds
        self.highest = max(self.highest, seconds)
        self._bins[floor(BINS_PER_OCTAVE * log2(max(seconds, 1e-9)))] += 1

    @property
    def mean(self) -> float:
        """0 if there are none."""
        return self.total / max(self.count, 1)

    def quantile(self, share: float) -> float:
        """What `share` of the durations do not exceed; 0 if there are none."""
        num_left = share * self.count
        for number, count in sorted(self._bins.items()):
            num_left -= count
            if num_left <= 0:
                return min(2 ** ((number + 0.5) / BINS_PER_OCTAVE), self.highest)
        return self.highest


def running_seconds(request: FinishedRequestStats) -> float:
    """From the first token to the end, waiting and prefill left out; of a pooled prompt all."""
    metrics = request.metrics
    assert metrics.finished_time is not None
    return max(metrics.finished_time - (metrics.first_token_time or metrics.arrival_time), 0.0)


class RunRecord:
    """Sums over all steps and finished requests; times are seconds since the first step's start."""

    def __init__(self) -> None:
        self.last: StepStats | None = None  # with the totals
        self.width = FIRST_WIDTH
        self.intervals: list[Interval] = []  # of `width` seconds each
        self.prefills, self.decodes = Distribution(), Distribution()  # of seconds of a step
        self.num_prefill_tokens = self.num_decode_tokens = 0  # computed
        self.latencies, self.first_token_times = Distribution(), Distribution()
        self._start = 0.0  # on the clock of StepStats.time
        self._slowest: list[tuple[float, int, FinishedRequestStats]] = []  # a heap

    @property
    def seconds(self) -> float:
        """From the first step's start to the last one's end."""
        return 0.0 if self.last is None else self.last.time - self._start

    @property
    def slowest(self) -> list[FinishedRequestStats]:
        """The requests that took longest by `running_seconds`, NUM_SLOWEST at most."""
        return [request for _, _, request in sorted(self._slowest, reverse=True)]

    def add(self, step: StepStats, finished: list[FinishedRequestStats]) -> None:
        """Count a step and the requests that ended with it."""
        last = self.last
        if last is None:
            self._start = step.time - step.seconds
            last = StepStats(False, 0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {})
        self.last = step
        num_generation_tokens = step.num_generation_tokens - last.num_generation_tokens
        num_prefill_tokens = step.num_tokens if step.is_prefill else 0
        interval = self._spread(step, num_generation_tokens, num_prefill_tokens)
        interval.num_prefix_cache_queries += (
            step.num_prefix_cache_queries - last.num_prefix_cache_queries
        )
        interval.num_prefix_cache_hits += step.num_prefix_cache_hits - last.num_prefix_cache_hits
        interval.num_preemptions += step.num_preemptions - last.num_preemptions
        if step.num_waiting > interval.max_waiting:
            interval.max_waiting = step.num_waiting
        if step.num_used_blocks > interval.max_used_blocks:
            interval.max_used_blocks = step.num_used_blocks
        if step.is_prefill:
            self.prefills.add(step.seconds)
            self.num_prefill_tokens += num_prefill_tokens
            interval.num_prefills += 1
            interval.prefill_seconds += step.seconds
        else:
            self.decodes.add(step.seconds)
            self.num_decode_tokens += step.num_tokens
            interval.num_decodes += 1
            interval.decode_seconds += step.seconds
            interval.num_decoded_seqs += step.num_seqs
            if step.num_seqs > interval.max_decoded_seqs:
                interval.max_decoded_seqs = step.num_seqs
        for request in finished:
            self._count(request)

    def _spread(
        self, step: StepStats, num_generation_tokens: int, num_prefill_tokens: int
    ) -> Interval:
        """Add the step's tokens and seconds to the intervals that it spans; returns the last."""
        end = step.time - self._start
        start = max(end - step.seconds, 0.0)
        while end >= MAX_INTERVALS * self.width:
            self.width, self.intervals = 2 * self.width, merge_pairs(self.intervals)
        first, last = int(start / self.width), int(end / self.width)
        while len(self.intervals) <= last:
            self.intervals.append(Interval())
        generation_left, prefill_left = num_generation_tokens, num_prefill_tokens
        for index in range(first, last + 1):
            seconds = min(end, (index + 1) * self.width) - max(start, index * self.width)
            if index == last:  # as of most steps the first is too
                num_generated, num_prefilled = generation_left, prefill_left
            else:
                share = seconds / step.seconds
                num_generated = int(num_generation_tokens * share)
                num_prefilled = int(num_prefill_tokens * share)
                generation_left -= num_generated
                prefill_left -= num_prefilled
            interval = self.intervals[index]
            interval.seconds += seconds
            interval.waiting_seconds += seconds * step.num_waiting
            interval.block_seconds += seconds * step.num_used_blocks
            interval.num_generation_tokens += num_generated
            interval.num_prefill_tokens += num_prefilled
        return interval

    def _count(self, request: FinishedRequestStats) -> None:
        metrics = request.metrics
        self.latencies.add(metrics.latency or 0.0)
        if metrics.time_to_first_token is not None:
            self.first_token_times.add(metrics.time_to_first_token)
        entry = running_seconds(request), request.request_id, request
        if len(self._slowest) < NUM_SLOWEST:
            heapq.heappush(self._slowest, entry)
        else:
            heapq.heappushpop(self._slowest, entry)

    def merged(self, max_intervals: int) -> tuple[float, list[Interval]]:
        """Width and intervals after neighbours were merged until there are no more than so many."""
        width, intervals = self.width, self.intervals
        while len(intervals) > max_intervals:
            width, intervals = 2 * width, merge_pairs(intervals)
        return width, intervals
