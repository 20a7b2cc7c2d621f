"""Where the time of one call of `generate` goes, on the host and on the device; run by hand:

    python tests/benchmarks/timeline.py --model DIR [--load-format dummy]
        [--rows NAME ...] [--repeat 2] [--scale 1.0]

Rows are those of bench_suite.py. The table is that of the last repetition. A step lasts from the
commit of the step before it to its own. With overlap the host plans and launches the next step
meanwhile, so these columns are about that one. All times are milliseconds: `total` of all steps of
a line, the others of one step on the mean. `in, out` is the making of requests and outputs, `else`
whatever of the host's time has no column. These columns add up to `each`. `device` is the time from
the start of the step's first kernel to the end of its last one, `idle` that before it. A CPU has
neither: there the launch is the computation. nanovllm must be installed or on PYTHONPATH.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from engine_options import add_engine_options, engine_settings
from timing import check_empty
from workloads import ROW_NAMES, ROWS, Row, Workload, check_fits, workloads

from nanovllm import LLM, SamplingParams
from nanovllm.engine import request_output
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.sequence import Sequence as EngineSequence

PARTS = ("plan", "launch", "wait", "commit", "in, out", "else")
BEFORE, AFTER = "before the first step", "after the last step"
PREFILL, DECODE_BEFORE_PREFILL = "prefill", "decode before prefill"


@dataclass
class Interval:
    """The time from one step's commit to the next one's, before the first step, or after the last.

    Args:
        kind: a line of the table.
        num_rows: sequences of the step; 0 without one.
        seconds: of each of PARTS.
        device: seconds of the step on the device, and idle ones before it; None without a GPU.
    """

    kind: str = AFTER
    num_rows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    device: tuple[float, float] | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Recorder:
    """Charges every moment of a call to one part of one interval."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self.seconds = 0.0  # of the whole call
        self._current = Interval(BEFORE)
        self._open = ["else"]  # parts that were entered, the innermost last
        self._launches_prefill = False
        # Around each step, by its id until it is committed: a step itself holds pinned memory.
        self._events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._committed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._start = self._mark = perf_counter()

    def end(self) -> None:
        """The call is over."""
        self._charge()
        self.seconds = self._mark - self._start
        self._close()
        self._read_events()

    def _charge(self) -> None:
        now = perf_counter()
        self._current.seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def _close(self) -> None:
        self.intervals.append(self._current)
        self._current = Interval()

    def timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, whose time is charged to `part`, without that of other parts inside it."""

        def timed_method(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._open.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()

        return timed_method

    def schedule(self, method: Callable[..., Any]) -> Callable[..., Any]:
        timed_method = self.timed("plan", method)

        def schedule(in_flight: bool = False) -> tuple[list[EngineSequence], bool]:
            if not self.intervals:
                self._charge()
                self._close()
            seqs, is_prefill = timed_method(in_flight)
            self._launches_prefill |= bool(seqs) and is_prefill
            return seqs, is_prefill

        return schedule

    def execute(self, method: Callable[..., LaunchedStep]) -> Callable[..., LaunchedStep]:
        """On a GPU: with an event before and one behind the step."""

        def execute(*args: Any) -> LaunchedStep:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step = method(*args)
            end.record()
            self._events[id(step)] = start, end
            return step

        return execute

    def commit(self, method: Callable[[LaunchedStep], int]) -> Callable[[LaunchedStep], int]:
        timed_method = self.timed("commit", method)

        def commit(launched: LaunchedStep) -> int:
            num_tokens: int = timed_method(launched)
            self._current.num_rows = len(launched.plan.rows)
            if launched.plan.is_prefill:
                self._current.kind = PREFILL
            elif self._launches_prefill:
                self._current.kind = DECODE_BEFORE_PREFILL
            else:
                self._current.kind = decode_kind(len(launched.plan.rows))
            self._launches_prefill = False
            if id(launched) in self._events:
                self._committed.append(self._events.pop(id(launched)))
            self._close()
            return num_tokens

        return commit

    def _read_events(self) -> None:
        if not self._committed:
            return
        torch.cuda.synchronize()
        previous = None
        for interval, (start, end) in zip(self.intervals[1:], self._committed, strict=False):
            idle = previous.elapsed_time(start) if previous else 0.0
            interval.device = start.elapsed_time(end) / 1e3, idle / 1e3
            previous = end


def decode_kind(num_rows: int) -> str:
    """The line of a decode step: rows up to a power of two."""
    high = 1 << (num_rows - 1).bit_length()
    return f"decode, rows {high // 2 + 1}-{high}" if high > 2 else f"decode, rows {num_rows}"


@contextmanager
def recording(llm: LLM) -> Iterator[Recorder]:
    """The engine's methods are wrapped in their instances, and as before afterwards."""
    recorder = Recorder()
    wrapped: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (llm.input_processor, "process", lambda method: recorder.timed("in, out", method)),
        (llm.scheduler, "schedule", recorder.schedule),
        (llm.executor.plan_builder, "build", lambda method: recorder.timed("plan", method)),
        (llm.executor, "launch", lambda method: recorder.timed("launch", method)),
        (llm.executor, "wait", lambda method: recorder.timed("wait", method)),
        (llm, "_commit", recorder.commit),
        (request_output, "make_output", lambda method: recorder.timed("in, out", method)),
        (request_output.Outputs, "make_during", lambda method: recorder.timed("in, out", method)),
    ]
    if llm.model_runner.is_cuda:
        wrapped.append((llm.model_runner, "execute", recorder.execute))
    with ExitStack() as stack:
        for owner, name, wrap in wrapped:
            stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))
        yield recorder


def record_call(llm: LLM, workload: Workload) -> Recorder:
    """Generate `workload` and see where the time goes; between turns to the next step."""
    params = workload.sampling_params
    with recording(llm) as recorder:
        recorder.start()
        workload.generate(llm, params)
        recorder.end()
    check_empty(llm)
    return recorder


# ---- the table ----------------------------------------------------------------------------------

COLUMNS = ("each", *PARTS, "device", "idle")
HEADER = f"{'ms':21} {'steps':>5} {'rows':>4} {'total':>8}" + "".join(f" {c:>7}" for c in COLUMNS)


def format_line(name: str, intervals: Sequence[Interval]) -> str:
    """A line under HEADER: the intervals' total, and their mean."""
    number = len(intervals)
    total = 1e3 * sum(interval.total for interval in intervals)
    rows = sum(interval.num_rows for interval in intervals) / number
    parts = [1e3 * sum(i.seconds[part] for i in intervals) / number for part in PARTS]
    counts = f"{number:5} {rows:4.0f}" if rows else f"{'':10}"
    devices = [interval.device for interval in intervals if interval.device is not None]
    of_device = [1e3 * sum(values) / number for values in zip(*devices, strict=True)]
    numbers = (total / number, *parts, *of_device)
    return f"{name:21} {counts} {total:8.1f}" + "".join(f" {number:7.2f}" for number in numbers)


def grouped(intervals: Sequence[Interval]) -> dict[str, list[Interval]]:
    """The lines of the table: decode steps by their number of rows."""
    lines: dict[str, list[Interval]] = {BEFORE: [], PREFILL: []}
    for interval in sorted(intervals, key=lambda interval: interval.num_rows):
        lines.setdefault(interval.kind, []).append(interval)
    lines[AFTER] = lines.pop(AFTER, [])
    return {name: group for name, group in lines.items() if group}


def format_table(title: str, recorder: Recorder) -> str:
    """One call of `generate`."""
    lines = [title, HEADER]
    lines += [format_line(name, group) for name, group in grouped(recorder.intervals).items()]
    lines.append(f"{'all':32} {1e3 * recorder.seconds:8.1f}")
    return "\n".join(lines)


# ---- the command --------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    parser.add_argument("--rows", nargs="+", choices=ROW_NAMES, default=["bench", "1x512"],
                        metavar="NAME", help=f"rows to run, of {', '.join(ROW_NAMES)}")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=2, help="repetitions; the last one counts")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on numbers of requests and lengths"
    )
    args = parser.parse_args(argv)
    if args.repeat < 1 or args.scale <= 0:
        parser.error("--repeat must be >= 1 and --scale > 0")
    return args


def show_row(llm: LLM, row: Row, repeat: int) -> None:
    draws = workloads(row, llm.config.hf_config.vocab_size)
    for _ in range(repeat):
        workload = next(draws)
        recorder = record_call(llm, workload)
    title = (
        f"{row.name}: {len(workload.output_lens)} requests, "
        f"{workload.num_prompt_tokens:,} tokens in, {workload.num_output_tokens:,} out"
    )
    print(format_table(title, recorder), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows = [row.scaled(args.scale) for row in ROWS if row.name in args.rows]
    with LLM(args.model, **engine_settings(args)) as llm:
        check_fits(rows, llm.config.max_model_len)
        llm.generate(["Benchmark: "], SamplingParams(), use_tqdm=False)
        for row in rows:
            show_row(llm, row, args.repeat)


if __name__ == "__main__":
    main()
