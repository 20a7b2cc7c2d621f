"""A row of the suite on an engine: timed, checked, and counted into a line of the table."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from limits import (
    Hardware,
    ModelCost,
    count_decode_contexts,
    count_prefill_flops,
    limit_seconds,
)
from workloads import Row, Workload, workloads

from nanovllm import LLM


@dataclass(frozen=True)
class Step:
    """A step that was committed."""

    num_tokens: int  # as `LLM.step` returns: > 0 prompt tokens, < 0 minus the decode batch
    seconds: float  # since the step before it was committed, or since the start


@dataclass(frozen=True)
class Run:
    """One repetition as it went."""

    workload: Workload
    seconds: float
    steps: list[Step]
    num_preemptions: int


@dataclass(frozen=True)
class RowResult:
    """A line of the table. Tokens, bytes and operations are those of one repetition."""

    name: str
    unit: str
    seconds: float
    tokens_per_second: float
    prefill_seconds: float  # until a prefill step was committed, since the step before it
    decode_seconds: float
    prefill_steps: int
    decode_steps: int
    mean_decode_batch: float  # 0 without decode steps
    prompt_tokens: int
    computed_prompt_tokens: int  # without those found in the prefix cache
    output_tokens: int
    preemptions: int
    kv_bytes_read: int
    kv_bytes_per_second: float  # over the whole time of the row
    prefill_flops: int
    limit_seconds: float
    share_of_limit: float
    all_seconds: list[float]  # of every repetition, in their order


@contextmanager
def recorded_steps(llm: LLM) -> Iterator[list[Step]]:
    """Every step that is committed inside; a clock and a list append are all that it costs.

    `generate` commits each step once; the method is wrapped in the instance and restored after.
    """
    steps: list[Step] = []
    commit = llm._commit
    last = time.perf_counter()

    def recording_commit(launched: Any) -> int:
        nonlocal last
        num_tokens = commit(launched)
        now = time.perf_counter()
        steps.append(Step(num_tokens, now - last))
        last = now
        return num_tokens

    llm._commit = recording_commit  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        del llm._commit


def time_workload(llm: LLM, workload: Workload) -> Run:
    """Generate `workload`; it must have run in full and leave an empty engine."""
    params = workload.sampling_params
    preemptions_before = llm.scheduler.num_preemptions
    with recorded_steps(llm) as steps:
        start = time.perf_counter()
        completions = workload.generate(llm, params)
        seconds = time.perf_counter() - start
    num_preemptions = llm.scheduler.num_preemptions - preemptions_before
    run = Run(workload, seconds, steps, num_preemptions)
    check_run(run, list(map(len, completions)))
    check_empty(llm)
    return run


def check_run(run: Run, output_lens: list[int]) -> None:
    """RuntimeError if tokens are missing, or the prefix cache served what it must not know."""
    if output_lens != run.workload.output_lens:
        raise RuntimeError("a request ended before its max_tokens")
    computed = sum(step.num_tokens for step in run.steps if step.num_tokens > 0)
    expected = run.workload.num_prompt_tokens
    if computed != expected and not any(run.workload.known_lens) and not run.num_preemptions:
        raise RuntimeError(f"{computed} prompt tokens were computed, not {expected}")


def check_empty(llm: LLM) -> None:
    """RuntimeError if the engine still holds a request or a KV block."""
    block_manager = llm.scheduler.block_manager
    num_held = len(block_manager.blocks) - block_manager.num_free_blocks
    if not llm.is_finished() or llm._in_flight is not None or num_held:
        raise RuntimeError(f"the engine is not empty: {num_held} KV blocks are held")


def measure_row(llm: LLM, row: Row, repeat: int, cost: ModelCost, hardware: Hardware) -> RowResult:
    """Time `repeat` repetitions; all figures are of the median one (the lower of two)."""
    draws = workloads(row, llm.config.hf_config.vocab_size)
    runs = [time_workload(llm, next(draws)) for _ in range(repeat)]
    median = sorted(runs, key=lambda run: run.seconds)[(repeat - 1) // 2]
    return summarize(row, median, cost, hardware, [run.seconds for run in runs])


def summarize(
    row: Row, run: Run, cost: ModelCost, hardware: Hardware, all_seconds: list[float]
) -> RowResult:
    """The row's line of the table from one of its runs."""
    workload = run.workload
    prefills = [step for step in run.steps if step.num_tokens > 0]
    decodes = [step for step in run.steps if step.num_tokens < 0]
    decode_batches = [-step.num_tokens for step in decodes]
    kv_bytes = cost.kv_bytes * count_decode_contexts(workload)
    limit = limit_seconds(workload, cost, hardware, decode_batches)
    return RowResult(
        name=row.name,
        unit=row.unit,
        seconds=run.seconds,
        tokens_per_second=workload.num_counted_tokens(row.unit) / run.seconds,
        prefill_seconds=sum(step.seconds for step in prefills),
        decode_seconds=sum(step.seconds for step in decodes),
        prefill_steps=len(prefills),
        decode_steps=len(decodes),
        mean_decode_batch=sum(decode_batches) / len(decodes) if decodes else 0.0,
        prompt_tokens=workload.num_prompt_tokens,
        computed_prompt_tokens=sum(step.num_tokens for step in prefills),
        output_tokens=workload.num_output_tokens,
        preemptions=run.num_preemptions,
        kv_bytes_read=kv_bytes,
        kv_bytes_per_second=kv_bytes / run.seconds,
        prefill_flops=count_prefill_flops(workload, cost),
        limit_seconds=limit,
        share_of_limit=limit / run.seconds,
        all_seconds=all_seconds,
    )
