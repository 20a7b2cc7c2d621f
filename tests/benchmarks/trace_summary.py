"""Where the GPU's time goes, kernel by kernel, in decode and prefill steps; run by hand:

    python tests/benchmarks/trace_summary.py --model DIR [--load-format dummy]
        [--decode 1x128 64x1100 ...]
        [--prefill 16x1024 ...] [--rows bench ...] [--steps 60]

nanovllm must be installed or on PYTHONPATH. Every window of steps is timed twice: plainly, and
under torch.profiler, whose events give the table. The last line of stdout is one JSON object.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from random import Random

import torch
from engine_options import add_engine_options, engine_settings
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from variants import constants_set
from workloads import ONE_CALL_ROWS, ROWS, check_fits, workloads

from nanovllm import LLM, SamplingParams

# ---- device events ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceEvent:
    """A kernel, copy or fill that ran on the device; times in us."""

    name: str
    start: float
    end: float


LINEARS, SAMPLER, LM_HEAD, OTHER = "linears", "sampler", "LM head", "other"

# The first pattern found in a kernel's name decides. "LM head" is told by its place: see `group`.
GROUP_PATTERNS = (
    ("all-reduce", r"nccl|all_?reduce|^embedding_kernel|^argmax_kernel"),
    ("attention", r"attention|_(decode|prefill|combine|plan|common_prefix)_kernel|flash"),
    ("RoPE, KV write", r"rope"),
    ("norms", r"norm_kernel"),
    ("activation", r"act_and_mul|silu"),
    ("delta nets", r"delta_rule|conv1d|^_invert_kernel|^_chunks_kernel|^_sigmoid_gate_kernel"),
    ("quantization", r"^_quantize_kernel"),
    ("experts", r"experts_kernel|^_route_kernel|^_sort_pairs_kernel"),
    (SAMPLER, r"sampl|^_(chunk|row|start|pass|finish)_"),
    ("row table", r"^_gather_kernel|^_write_back_kernel"),
    (LINEARS, r"linear|dequantize|gemm|gemv|nvjet|cutlass|xmma|splitk|cublas"),
    ("adapters", r"^_shrink_kernel|^_add_kernel"),
    ("copies", r"^mem(cpy|set)|copy_kernel|^_copy_units_kernel"),
)
GROUPS = (
    *("attention", LINEARS, "experts", "quantization", LM_HEAD, "norms", "RoPE, KV write"),
    *("delta nets", "activation", "adapters", SAMPLER, "row table", "copies", "all-reduce", OTHER),
)


def group_of_name(name: str) -> str:
    """The group that a kernel's name tells, `OTHER` if none."""
    for group, pattern in GROUP_PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return OTHER


def group_events(events: Sequence[DeviceEvent]) -> list[str]:
    """The group of each event; `events` are in the order of their start.

    The LM head is the product right before the sampler; a split product ends in a reduction.
    """
    groups = [group_of_name(event.name) for event in events]
    for i in range(1, len(groups)):
        if groups[i] == SAMPLER and groups[i - 1] == LINEARS:
            j = i - 1
            if "reduce" in events[j].name.lower() and groups[j - 1] == LINEARS:
                groups[j] = LM_HEAD
                j -= 1
            groups[j] = LM_HEAD
    return groups


def own_times(events: Sequence[DeviceEvent]) -> list[float]:
    """Each event's time (us) without what events before it cover; their sum is the busy time.

    `events` are in the order of their start. A kernel launched ahead of the previous one's end
    spends the overlap waiting for it, so that time belongs to the previous one.
    """
    times = []
    covered_until = float("-inf")
    for event in events:
        times.append(max(0.0, event.end - max(event.start, covered_until)))
        covered_until = max(covered_until, event.end)
    return times


def read_events(profiler: profile) -> list[DeviceEvent]:
    """What ran on the device, in the order of start; kernels of a CUDA graph are events, too."""
    found = [
        DeviceEvent(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda event: (event.start, event.end))


# ---- windows of steps ---------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelTotal:
    """All calls of one kernel."""

    name: str
    group: str
    calls_per_step: float
    us_per_step: float  # own time, as in `own_times`


@dataclass(frozen=True)
class Window:
    """Consecutive steps of one workload, once plainly timed and then as many profiled."""

    name: str
    prefill_steps: int  # of the profiled ones
    decode_steps: int
    mean_prefill_tokens: float
    mean_decode_batch: float
    plain_step_us: float
    profiled_step_us: float  # from the first kernel's start to the last one's end
    busy_share: float  # of the profiled time, with a kernel or copy on the device
    kernels_per_step: float
    group_us: dict[str, float]  # own time per step
    kernels: list[KernelTotal]  # the most expensive first


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def summarize(
    name: str, plain_step_us: float, counts: Sequence[int], events: Sequence[DeviceEvent]
) -> Window:
    """A window from the counts that `LLM.step` returned and what ran on the device meanwhile."""
    if not events:
        raise SystemExit("the profiler saw nothing on the device: this script needs a GPU")
    num_steps = len(counts)
    group_us = dict.fromkeys(GROUPS, 0.0)
    calls: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event, group, us in zip(events, group_events(events), own_times(events), strict=True):
        group_us[group] += us / num_steps
        calls[event.name, group].append(us)
    kernels = [
        KernelTotal(kernel, group, len(times) / num_steps, sum(times) / num_steps)
        for (kernel, group), times in calls.items()
    ]
    busy_us = sum(group_us.values())
    span_us = (max(event.end for event in events) - events[0].start) / num_steps
    prefills = [count for count in counts if count > 0]
    decodes = [-count for count in counts if count < 0]
    return Window(
        name=name,
        prefill_steps=len(prefills),
        decode_steps=len(decodes),
        mean_prefill_tokens=mean(prefills),
        mean_decode_batch=mean(decodes),
        plain_step_us=plain_step_us,
        profiled_step_us=span_us,
        busy_share=busy_us / span_us,
        kernels_per_step=len(events) / num_steps,
        group_us=group_us,
        kernels=sorted(kernels, key=lambda kernel: -kernel.us_per_step),
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def record_events(run: Callable[[], None]) -> list[DeviceEvent]:
    """What runs on the device between the start of `run` and the end of all that it launched."""
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    return read_events(profiler)


def measure_window(llm: LLM, name: str, num_steps: int) -> Window:
    """Time the next `num_steps` steps, and profile as many after them.

    With overlap a step is in flight before each window and another one after it: as many steps are
    launched in a window as are committed.
    """
    synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        llm.step()
    synchronize()
    plain_step_us = (time.perf_counter() - start) / num_steps * 1e6
    counts: list[int] = []

    def run() -> None:
        counts.extend(llm.step()[1] for _ in range(num_steps))

    events = record_events(run)
    return summarize(name, plain_step_us, counts, events)


def drain(llm: LLM) -> None:
    while not llm.is_finished():
        llm.step()


# ---- workloads ----------------------------------------------------------------------------------

LEAD_STEPS = 8  # decode steps before a window: the batch is complete, the overlap has settled
NUM_PREFILL_STEPS = 4  # of each of the two windows


@dataclass(frozen=True)
class Shape:
    """Equal requests."""

    batch_size: int
    length: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """ "64x1100" """
        batch_size, length = map(int, text.split("x"))
        return cls(batch_size, length)

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.length}"


def add_requests(llm: LLM, rng: Random, count: int, prompt_len: int, max_tokens: int) -> None:
    """Queue `count` random prompts, none like an earlier one."""
    max_token_id = min(10000, llm.config.hf_config.vocab_size - 1)
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)
    for _ in range(count):
        llm.add_request([rng.randint(0, max_token_id) for _ in range(prompt_len)], params)


def measure_decode(llm: LLM, rng: Random, shape: Shape, num_steps: int) -> Window:
    """Decode steps of a constant batch, whose context is `shape.length` amid the profiled ones."""
    # The step in flight comes before the window, and each step attends to its own token.
    steps_before = LEAD_STEPS + 1 + num_steps + num_steps // 2
    prompt_len = max(1, shape.length - steps_before - 1)
    max_tokens = 1 + LEAD_STEPS + 2 * num_steps + LEAD_STEPS
    add_requests(llm, rng, shape.batch_size, prompt_len, max_tokens)
    while llm.step()[1] != -shape.batch_size:
        if llm.is_finished():
            raise SystemExit(f"{shape}: the batch was never complete, the KV cache is too small")
    for _ in range(LEAD_STEPS - 1):
        llm.step()
    window = measure_window(llm, str(shape), num_steps)
    drain(llm)
    return window


def measure_prefill(llm: LLM, rng: Random, shape: Shape) -> Window:
    """Prefill steps of `shape.batch_size` prompts each, if that is what the token budget admits."""
    num_steps = 1 + 2 * NUM_PREFILL_STEPS + 1
    add_requests(llm, rng, num_steps * shape.batch_size, shape.length, max_tokens=1)
    llm.step()
    window = measure_window(llm, f"prefill {shape}", NUM_PREFILL_STEPS)
    drain(llm)
    return window


def measure_row(llm: LLM, name: str, num_steps: int) -> Window:
    """The steps in the middle of a row of the benchmark suite, which runs twice to know them."""
    row = next(row for row in ROWS if row.name == name)
    check_fits([row], llm.config.max_model_len)
    draws = workloads(row, llm.config.hf_config.vocab_size)

    def queue_next() -> None:
        workload = next(draws)
        for prompt, params in zip(workload.prompts, workload.sampling_params, strict=True):
            llm.add_request(prompt, params)

    queue_next()
    num_row_steps = 0
    while not llm.is_finished():
        num_row_steps += bool(llm.step()[1])
    num_steps = max(1, min(num_steps, num_row_steps // 2 - 1))
    queue_next()
    for _ in range(num_row_steps // 2 - num_steps):
        llm.step()
    window = measure_window(llm, name, num_steps)
    drain(llm)
    return window


# ---- the command --------------------------------------------------------------------------------

DECODE_SHAPES = ("1x128", "8x128", "32x128", "64x1100", "128x1100", "256x850")
PREFILL_SHAPES = ("16x1024", "4x4000")


def format_table(windows: Iterable[Window]) -> str:
    """A Markdown table with a column for each window; groups without any time are left out."""
    windows = list(windows)
    lines = {
        "": [window.name for window in windows],
        "steps: prefill + decode": [f"{w.prefill_steps} + {w.decode_steps}" for w in windows],
        "prompt tokens": [f"{w.mean_prefill_tokens:,.0f}" for w in windows],
        "decode batch": [f"{w.mean_decode_batch:,.1f}" for w in windows],
        "step, us": [f"{w.plain_step_us:,.0f}" for w in windows],
        "profiled step, us": [f"{w.profiled_step_us:,.0f}" for w in windows],
        "GPU busy": [f"{w.busy_share:.1%}" for w in windows],
        "kernels, copies": [f"{w.kernels_per_step:,.1f}" for w in windows],
    }
    for group in GROUPS:
        if any(window.group_us[group] for window in windows):
            lines[group] = [f"{window.group_us[group]:,.1f}" for window in windows]
    rows = [[label, *cells] for label, cells in lines.items()]
    rows.insert(1, ["---", *["---:"] * len(windows)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        f"| {row[0]:{widths[0]}} | "
        + " | ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in rows
    )


def format_kernels(window: Window, num_kernels: int) -> str:
    """The most expensive kernels of a window."""
    lines = [f"{window.name}: us per step, calls per step, group, kernel"]
    for kernel in window.kernels[:num_kernels]:
        lines.append(
            f"{kernel.us_per_step:10,.1f} {kernel.calls_per_step:7.1f}  {kernel.group:14} "
            f"{kernel.name[:60]}"
        )
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    parser.add_argument("--decode", nargs="*", default=DECODE_SHAPES, metavar="BATCHxCONTEXT")
    parser.add_argument("--prefill", nargs="*", default=PREFILL_SHAPES, metavar="PROMPTSxTOKENS")
    parser.add_argument("--rows", nargs="*", default=["bench"], choices=ONE_CALL_ROWS,
                        metavar="ROW",
                        help=f"rows of bench_suite.py, of {', '.join(ONE_CALL_ROWS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=60, help="decode steps of a window")
    parser.add_argument("--top", type=int, default=12, help="kernels listed for each window")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be >= 2")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    rng = Random(7)
    windows: list[Window] = []
    with constants_set(args.variant), LLM(args.model, **engine_settings(args)) as llm:
        llm.generate(["Benchmark: "], SamplingParams(), use_tqdm=False)
        record_events(lambda: None)  # the first start of the profiler takes seconds

        def show(window: Window) -> None:
            windows.append(window)
            print(format_kernels(window, args.top), flush=True)

        for text in args.decode:
            show(measure_decode(llm, rng, Shape.parse(text), args.steps))
        for text in args.prefill:
            show(measure_prefill(llm, rng, Shape.parse(text)))
        for name in args.rows:
            show(measure_row(llm, name, args.steps))
    print("\nOwn time of each group in us per step (a launch ahead of time counts from its turn):")
    print(format_table(windows))
    print(json.dumps({"arguments": vars(args), "windows": [asdict(window) for window in windows]}))


if __name__ == "__main__":
    main()
