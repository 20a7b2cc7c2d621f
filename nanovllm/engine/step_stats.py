"""The statistics that an engine gives its stat loggers; made only while it has any."""

from time import perf_counter

from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.stats import FinishedRequestStats, StatLogger, StepStats


def log_step(
    stat_loggers: list[StatLogger],
    scheduler: Scheduler,
    launched: LaunchedStep,
    num_tokens: int,
    seconds: float,
    ended: list[Request],
) -> None:
    """Tell the loggers of a step that was committed just now, and of the requests it ended."""
    step = _step_stats(scheduler, launched, abs(num_tokens), seconds)
    finished = [_request_stats(request) for request in ended]
    for stat_logger in stat_loggers:
        stat_logger.record(step, finished)


def _step_stats(
    scheduler: Scheduler, launched: LaunchedStep, num_tokens: int, seconds: float
) -> StepStats:
    manager, totals = scheduler.block_manager, scheduler.stats
    num_blocks = len(manager.blocks)
    return StepStats(
        launched.plan.is_prefill,
        len(launched.seqs),
        num_tokens,
        seconds,
        perf_counter(),
        len(scheduler.running),
        len(scheduler.waiting) + len(scheduler.held),
        num_blocks - manager.num_free_blocks,
        num_blocks,
        totals.num_prompt_tokens,
        totals.num_generation_tokens,
        totals.num_prefix_cache_queries,
        totals.num_prefix_cache_hits,
        scheduler.num_preemptions,
        totals.num_finished,
    )


def _request_stats(request: Request) -> FinishedRequestStats:
    first = request.sequences[0]
    return FinishedRequestStats(
        request.request_id,
        first.num_prompt_tokens,
        first.num_cached_prompt_tokens,
        sum(seq.num_completion_tokens for seq in request.sequences),
        [seq.finish_reason for seq in request.sequences],
        request.metrics,
    )
