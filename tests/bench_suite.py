"""Every workload that has a speed goal, in one process start and on one engine; run by hand:

    python tests/bench_suite.py --model DIR [--load-format dummy] [--only NAME ...] [--repeat 3]

nanovllm must be installed or on PYTHONPATH. Each row shows one repetition, the median by its time;
each repetition draws new token ids. The last line of stdout is one JSON object.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PretrainedConfig

import nanovllm
from nanovllm import LLM, SamplingParams

# ---- workloads ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A workload's shape; lengths are inclusive bounds, drawn uniformly for each request."""

    name: str
    num_requests: int
    input_len: tuple[int, int]  # without the shared prefix
    output_len: tuple[int, int]
    shared_prefix_len: int = 0
    seed: int = 0  # differs between rows, or the prefix cache would know their first prompts
    unit: str = "output"  # the tokens that tokens/s counts: "output" or "prompt"

    def scaled(self, scale: float) -> "Row":
        """Numbers and lengths times `scale`, at least 1 (no prefix stays none)."""

        def resize(number: int) -> int:
            return max(1, round(number * scale))

        return replace(
            self,
            num_requests=resize(self.num_requests),
            input_len=(resize(self.input_len[0]), resize(self.input_len[1])),
            output_len=(resize(self.output_len[0]), resize(self.output_len[1])),
            shared_prefix_len=resize(self.shared_prefix_len) if self.shared_prefix_len else 0,
        )

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that can be drawn."""
        return self.shared_prefix_len + self.input_len[1] + self.output_len[1]


ROWS = (
    Row("bench", 256, (100, 1024), (100, 1024), seed=0),  # seed and draws are bench.py's
    Row("1x512", 1, (128, 128), (512, 512), seed=1),
    Row("8x512", 8, (128, 128), (512, 512), seed=2),
    Row("32x512", 32, (128, 128), (512, 512), seed=3),
    Row("1024-short", 1024, (32, 256), (32, 256), seed=4),
    Row("prefill", 128, (2000, 4000), (1, 1), seed=5, unit="prompt"),
    Row("shared-prefix", 256, (30, 30), (32, 32), shared_prefix_len=1000, seed=6),
)
START = "start"
NAMES = (*(row.name for row in ROWS), START)


@dataclass(frozen=True)
class Workload:
    """The requests of one repetition."""

    prompts: list[list[int]]
    output_lens: list[int]
    shared_prefix_len: int

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def sampling_params(self) -> list[SamplingParams]:
        return [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length)
            for length in self.output_lens
        ]


def workloads(row: Row, vocab_size: int) -> Iterator[Workload]:
    """Endless repetitions of `row`: the same lengths, new ids (a new shared prefix too).

    Draws as bench.py does: ids up to 10,000, a prompt's length before its ids, outputs last.
    """
    rng = Random(row.seed)
    max_token_id = min(10000, vocab_size - 1)

    def draw_ids(length: int) -> list[int]:
        return [rng.randint(0, max_token_id) for _ in range(length)]

    prefix = draw_ids(row.shared_prefix_len)
    own = [draw_ids(rng.randint(*row.input_len)) for _ in range(row.num_requests)]
    output_lens = [rng.randint(*row.output_len) for _ in range(row.num_requests)]
    while True:
        yield Workload([prefix + ids for ids in own], output_lens, row.shared_prefix_len)
        prefix = draw_ids(row.shared_prefix_len)
        own = [draw_ids(len(ids)) for ids in own]


# ---- counted from the workload: bytes, operations, the physical limit ---------------------------


@dataclass(frozen=True)
class ModelCost:
    """What one token costs a model; norms and biases are left out."""

    layer_params: int  # weights of all layers' matrix products
    head_params: int
    pair_flops: int  # attention of all layers: one query token on one key token
    kv_bytes: int  # K and V of one token in all layers
    weight_bytes: int  # read by every decode step; of the embedding only a few rows are

    @classmethod
    def of(cls, hf_config: PretrainedConfig, itemsize: int) -> "ModelCost":
        """Of a Qwen3 config, with weights and KV cache of `itemsize` bytes an element."""
        hidden, num_layers = hf_config.hidden_size, hf_config.num_hidden_layers
        q_size = hf_config.num_attention_heads * hf_config.head_dim
        kv_size = hf_config.num_key_value_heads * hf_config.head_dim
        attention = hidden * (q_size + 2 * kv_size) + q_size * hidden
        mlp = 3 * hidden * hf_config.intermediate_size
        layer_params = num_layers * (attention + mlp)
        head_params = hidden * hf_config.vocab_size
        return cls(
            layer_params=layer_params,
            head_params=head_params,
            pair_flops=num_layers * 4 * q_size,  # q k and p v, a multiplication and an addition
            kv_bytes=num_layers * 2 * kv_size * itemsize,
            weight_bytes=(layer_params + head_params) * itemsize,
        )


def sum_of_range(first: int, last: int) -> int:
    """first + ... + last, both included; 0 if there is nothing in between."""
    return (first + last) * max(0, last - first + 1) // 2


def count_decode_contexts(workload: Workload) -> int:
    """Tokens whose K/V the decode steps attend to, summed over steps and sequences.

    The first output token comes from the prefill; the step of output token k + 1 attends to the
    prompt and k tokens more, itself included. Each row counts on its own, shared prefix or not. A
    preemption turns one such step into a second prefill, which is not counted.
    """
    return sum(
        sum_of_range(len(prompt) + 1, len(prompt) + output_len - 1)
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True)
    )


def count_distinct_contexts(workload: Workload, num_decode_steps: int) -> int:
    """`count_decode_contexts`, but a decode step reads the shared prefix only once."""
    num_decode_tokens = workload.num_output_tokens - len(workload.prompts)
    repeated_reads = num_decode_tokens - num_decode_steps
    return count_decode_contexts(workload) - workload.shared_prefix_len * repeated_reads


def count_prefill_flops(workload: Workload, cost: ModelCost) -> int:
    """2 per weight and token, causal attention, the LM head for last tokens; the prefix once."""
    prefix_len = workload.shared_prefix_len
    num_prompts = len(workload.prompts)
    num_tokens = workload.num_prompt_tokens - prefix_len * (num_prompts - 1)
    num_pairs = sum_of_range(1, prefix_len) + sum(
        sum_of_range(prefix_len + 1, len(prompt)) for prompt in workload.prompts
    )
    linear = 2 * cost.layer_params * num_tokens + 2 * cost.head_params * num_prompts
    return linear + cost.pair_flops * num_pairs


@dataclass(frozen=True)
class Hardware:
    """What one device reached in this run, and how many devices share the work."""

    bandwidth: float  # bytes/s
    matrix_rate: float  # bf16 FLOP/s
    num_devices: int = 1


def limit_seconds(
    workload: Workload, cost: ModelCost, hardware: Hardware, num_decode_steps: int
) -> float:
    """The time of the reads and products alone, one after the other, everything else free.

    KV and weights that the decode steps read (as many steps as the engine made) at the measured
    bandwidth, then the prefill's operations at the measured matrix rate. A shared prefix is
    computed once and read once a step. Decode arithmetic could hide behind the reads: not counted.
    """
    kv_bytes = cost.kv_bytes * count_distinct_contexts(workload, num_decode_steps)
    read_bytes = kv_bytes + cost.weight_bytes * num_decode_steps
    read_seconds = read_bytes / hardware.bandwidth
    prefill_seconds = count_prefill_flops(workload, cost) / hardware.matrix_rate
    return (read_seconds + prefill_seconds) / hardware.num_devices


# ---- the device's own limits --------------------------------------------------------------------


def best_seconds(call: Callable[[], Any], device: torch.device, num_calls: int) -> float:
    """Mean time of back-to-back calls, in the best of five series."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def time_series() -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        synchronize()
        return (time.perf_counter() - start) / num_calls

    call()
    return min(time_series() for _ in range(5))


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over 8 GiB reads (64 MiB on the CPU)."""
    num_bytes = 2**26
    if device.type == "cuda":
        num_bytes = min(2**33, torch.cuda.mem_get_info(device)[0] // 4)
    data = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    return data.nbytes / best_seconds(data.sum, device, num_calls=10)


def measure_matrix_rate(device: torch.device) -> float:
    """FLOP per second of an 8192^3 bf16 product (256^3 on the CPU), random values."""
    size, num_calls = (8192, 10) if device.type == "cuda" else (256, 2)
    left, right = torch.empty(2, size, size, dtype=torch.bfloat16, device=device).normal_()
    out = torch.empty_like(left)
    seconds = best_seconds(lambda: torch.matmul(left, right, out=out), device, num_calls)
    return 2 * size**3 / seconds


def measure_hardware(device: torch.device, tensor_parallel_size: int) -> Hardware:
    """Measured on rank 0's device, whose memory is given back; CPU ranks share one device."""
    num_devices = tensor_parallel_size if device.type == "cuda" else 1
    hardware = Hardware(measure_bandwidth(device), measure_matrix_rate(device), num_devices)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return hardware


# ---- rows on the engine -------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One repetition as it went."""

    workload: Workload
    seconds: float
    steps: list[int]  # as `LLM.step` returns: > 0 prompt tokens, < 0 minus the decode batch
    num_preemptions: int


@dataclass(frozen=True)
class RowResult:
    """A line of the table. Tokens, bytes and operations are those of one repetition."""

    name: str
    unit: str
    seconds: float
    tokens_per_second: float
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
def recorded_steps(llm: LLM) -> Iterator[list[int]]:
    """What every committed step would return from `LLM.step`; a list append is all that it costs.

    `generate` commits each step once; the method is wrapped in the instance and restored after.
    """
    steps: list[int] = []
    commit = llm._commit

    def recording_commit(launched: Any) -> int:
        num_tokens = commit(launched)
        steps.append(num_tokens)
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
        outputs = llm.generate(workload.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
    num_preemptions = llm.scheduler.num_preemptions - preemptions_before
    run = Run(workload, seconds, steps, num_preemptions)
    check_run(run, [len(output["token_ids"]) for output in outputs])
    check_empty(llm)
    return run


def check_run(run: Run, output_lens: list[int]) -> None:
    """RuntimeError if tokens are missing, or the prefix cache served what it must not know."""
    if output_lens != run.workload.output_lens:
        raise RuntimeError("a request ended before its max_tokens")
    computed = sum(num_tokens for num_tokens in run.steps if num_tokens > 0)
    expected = run.workload.num_prompt_tokens
    if computed != expected and not run.workload.shared_prefix_len and not run.num_preemptions:
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
    prefills = [num_tokens for num_tokens in run.steps if num_tokens > 0]
    decodes = [-num_tokens for num_tokens in run.steps if num_tokens < 0]
    num_prompt_tokens, num_output_tokens = workload.num_prompt_tokens, workload.num_output_tokens
    counted_tokens = num_prompt_tokens if row.unit == "prompt" else num_output_tokens
    kv_bytes = cost.kv_bytes * count_decode_contexts(workload)
    limit = limit_seconds(workload, cost, hardware, len(decodes))
    return RowResult(
        name=row.name,
        unit=row.unit,
        seconds=run.seconds,
        tokens_per_second=counted_tokens / run.seconds,
        prefill_steps=len(prefills),
        decode_steps=len(decodes),
        mean_decode_batch=sum(decodes) / len(decodes) if decodes else 0.0,
        prompt_tokens=num_prompt_tokens,
        computed_prompt_tokens=sum(prefills),
        output_tokens=num_output_tokens,
        preemptions=run.num_preemptions,
        kv_bytes_read=kv_bytes,
        kv_bytes_per_second=kv_bytes / run.seconds,
        prefill_flops=count_prefill_flops(workload, cost),
        limit_seconds=limit,
        share_of_limit=limit / run.seconds,
        all_seconds=all_seconds,
    )


def check_fits(rows: Sequence[Row], max_model_len: int) -> None:
    """SystemExit if a row can draw a sequence longer than the model allows."""
    for row in rows:
        if row.max_len > max_model_len:
            raise SystemExit(
                f"row {row.name!r} draws sequences of up to {row.max_len} tokens, the maximum "
                f"model length is {max_model_len}; leave it out by --only, or lower --scale"
            )


# ---- python's start to the first token ----------------------------------------------------------

FIRST_TOKEN = """\
import json, sys
from nanovllm import LLM, SamplingParams

llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
llm.generate([[1]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
print("first token", flush=True)
"""


@dataclass(frozen=True)
class StartResult:
    """Seconds from the start of a fresh python process to its first token."""

    name: str
    seconds: float  # the median
    all_seconds: list[float]


def time_start(model: str, settings: dict[str, Any], cache: Path) -> float:
    """One start with its kernels cached in `cache`; the end of the process is not counted."""
    package_root = str(Path(nanovllm.__file__).parents[1])
    python_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(python_path),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    command = [sys.executable, "-c", FIRST_TOKEN, model, json.dumps(settings)]
    seconds = None
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "first token\n":
                seconds = time.perf_counter() - start
    if seconds is None or process.returncode != 0:
        raise RuntimeError(f"a fresh process failed with exit status {process.returncode}")
    return seconds


def read_weights(model: str) -> None:
    """Bring the weights into the page cache, so that no start pays for the disk."""
    for path in Path(model).glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**26):
                pass


def measure_starts(model: str, settings: dict[str, Any], repeat: int) -> list[StartResult]:
    """`repeat` pairs of starts, each with an empty kernel cache first and then the filled one."""
    if settings["load_format"] != "dummy":
        read_weights(model)
    cold, warm = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(time_start(model, settings, Path(cache)))
            warm.append(time_start(model, settings, Path(cache)))
    return [
        StartResult(name, sorted(times)[(repeat - 1) // 2], times)
        for name, times in ((f"{START}-cold", cold), (f"{START}-warm", warm))
    ]


# ---- the command --------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME",
                        help=f"rows to run, of {', '.join(NAMES)}")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each row")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on numbers of requests and lengths"
    )
    library = parser.add_argument_group("passed on to LLM, whose defaults hold otherwise")
    library.add_argument("--no-async-scheduling", action="store_true", help="no overlap")
    library.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    library.add_argument("--no-prefix-caching", action="store_true")
    for name in ("--attention-backend", "--dtype", "--device"):
        library.add_argument(name)
    for name in ("--tensor-parallel-size", "--max-num-seqs", "--kvcache-block-size"):
        library.add_argument(name, type=int)
    args = parser.parse_args(argv)
    if args.repeat < 1 or args.scale <= 0:
        parser.error("--repeat must be >= 1 and --scale > 0")
    return args


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `LLM` that the command line sets."""
    settings: dict[str, Any] = {
        "load_format": args.load_format,
        "enforce_eager": args.enforce_eager,
        "async_scheduling": not args.no_async_scheduling,
        "enable_prefix_caching": not args.no_prefix_caching,
    }
    optional = (
        *("attention_backend", "dtype", "device"),
        *("tensor_parallel_size", "max_num_seqs", "kvcache_block_size"),
    )
    given = {name: getattr(args, name) for name in optional if getattr(args, name) is not None}
    return settings | given


HEADER = (
    f"{'row':14} {'seconds':>8} {'tokens/s':>9} {'of':6} {'prefills':>8} {'decodes':>7} "
    f"{'batch':>6} {'KV GB/s':>8} {'limit s':>8} {'share':>7}"
)


def format_row(result: RowResult | StartResult) -> str:
    """A line under HEADER."""
    line = f"{result.name:14} {result.seconds:8.3f}"
    if isinstance(result, StartResult):
        return line
    return (
        f"{line} {result.tokens_per_second:9,.0f} {result.unit:6} {result.prefill_steps:8} "
        f"{result.decode_steps:7} {result.mean_decode_batch:6.1f} "
        f"{result.kv_bytes_per_second / 1e9:8,.1f} {result.limit_seconds:8.4f} "
        f"{result.share_of_limit:7.1%}"
    )


def report(result: RowResult | StartResult) -> dict[str, Any]:
    """Print a row as soon as it is measured; returns it for the JSON line."""
    print(format_row(result), flush=True)
    return asdict(result)


def measure_rows(
    args: argparse.Namespace, rows: Sequence[Row], settings: dict[str, Any]
) -> tuple[Hardware, list[dict[str, Any]]]:
    """Measure the device, then all rows on one engine."""
    device = choose_device(args)
    hardware = measure_hardware(device, args.tensor_parallel_size or 1)
    results = []
    llm = LLM(args.model, **settings)
    with llm:
        check_fits(rows, llm.config.max_model_len)
        cost = ModelCost.of(llm.config.hf_config, llm.config.resolve_dtype().itemsize)
        llm.generate(["Benchmark: "], SamplingParams(), use_tqdm=False)
        for row in rows:
            results.append(report(measure_row(llm, row, args.repeat, cost, hardware)))
    return hardware, results


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that `LLM` takes for rank 0."""
    has_gpu = torch.cuda.is_available() and args.device != "cpu"
    return torch.device("cuda", 0) if has_gpu else torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings = engine_settings(args)
    rows = [row.scaled(args.scale) for row in ROWS if row.name in args.only]
    print(HEADER)
    results = []
    if START in args.only:  # first: an engine of ours would hold the memory
        results += [report(r) for r in measure_starts(args.model, settings, args.repeat)]
    hardware = None
    if rows:
        hardware, row_results = measure_rows(args, rows, settings)
        results += row_results
    summary = {
        "device": device_name(choose_device(args)),
        "versions": {name: package_version(name) for name in ("torch", "triton")},
        "arguments": vars(args),
        "hardware": asdict(hardware) if hardware else None,
        "rows": results,
    }
    print(json.dumps(summary, allow_nan=False))


if __name__ == "__main__":
    main()
