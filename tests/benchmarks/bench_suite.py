"""Every workload that has a speed goal, in one process start and on one engine; run by hand:

    python tests/benchmarks/bench_suite.py --model DIR [--load-format dummy]
        [--rows NAME ...] [--repeat 3]

Each row shows one repetition, the median by its time; each repetition draws new token ids. Instead
of the table, `--ablate` runs rows once for each technique that can be switched off (`--variant`
switches several off together), and `--compare DIR` runs them in turn with the nanovllm package of
the checkout DIR. nanovllm must be installed or on PYTHONPATH. The last line of stdout is one JSON
object.
"""

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import compare
import torch
from engine_options import add_engine_options, choose_device, engine_settings
from limits import Hardware, ModelCost, measure_hardware
from starts import StartResult, measure_starts
from timing import RowResult, measure_row
from variants import VARIANTS, constants_of, constants_set, settings_of
from workloads import DEFAULT_ROWS, ROW_NAMES, ROWS, Row, check_fits

import nanovllm
from nanovllm import LLM, ArgumentError, SamplingParams

START = "start"
NAMES = (*ROW_NAMES, START)
ABLATION_ROWS = ("bench", "8x512", "shared-prefix")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    parser.add_argument("--rows", nargs="+", choices=NAMES, metavar="NAME",
                        help=f"rows to run, of {', '.join(NAMES)}; by default all but 4096, "
                        "which takes over a minute")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each row")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on numbers of requests and lengths"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ablate", nargs="*", choices=VARIANTS, metavar="NAME",
                      help="variants to run one by one; without a name all of them")  # fmt: skip
    mode.add_argument("--compare", type=Path, metavar="DIR", help="a checkout to compare with")
    args = parser.parse_args(argv)
    if args.repeat < 1 or args.scale <= 0:
        parser.error("--repeat must be >= 1 and --scale > 0")
    # A constant is set in this process, not in those that are started.
    has_one_process = not args.compare and (args.tensor_parallel_size or 1) == 1
    if args.ablate == []:
        args.ablate = [n for n in VARIANTS if has_one_process or not constants_of([n])]
    if not has_one_process and constants_of([*args.variant, *(args.ablate or [])]):
        parser.error("a variant that sets a constant needs one process: no --compare, one GPU")
    if START in (args.rows or []) and (args.compare or args.ablate):
        parser.error(f"row {START!r} runs on no engine: not with --compare or --ablate")
    return args


def chosen_rows(args: argparse.Namespace, default: Sequence[str]) -> list[Row]:
    """The rows to run on an engine."""
    names = args.rows or default
    return [row.scaled(args.scale) for row in ROWS if row.name in names]


def run_rows(
    model: str, settings: dict[str, Any], rows: Sequence[Row], repeat: int, hardware: Hardware
) -> list[RowResult]:
    """All rows on one engine, printed as soon as they are measured."""
    results = []
    with LLM(model, **settings) as llm:
        check_fits(rows, llm.config.max_model_len)
        cost = ModelCost.of_engine(llm)
        llm.generate(["Benchmark: "], SamplingParams(), use_tqdm=False)
        for row in rows:
            results.append(measure_row(llm, row, repeat, cost, hardware))
            print(format_row(results[-1]), flush=True)
    return results


# ---- the table ----------------------------------------------------------------------------------

HEADER = (
    f"{'row':14} {'seconds':>8} {'tokens/s':>9} {'of':6} {'prefills':>8} {'decodes':>7} "
    f"{'batch':>6} {'KV GB/s':>8} {'limit s':>8} {'share':>7}"
)


def format_row(result: RowResult) -> str:
    """A line under HEADER."""
    return (
        f"{result.name:14} {result.seconds:8.3f} "
        f"{result.tokens_per_second:9,.0f} {result.unit:6} {result.prefill_steps:8} "
        f"{result.decode_steps:7} {result.mean_decode_batch:6.1f} "
        f"{result.kv_bytes_per_second / 1e9:8,.1f} {result.limit_seconds:8.4f} "
        f"{result.share_of_limit:7.1%}"
    )


def format_start(result: StartResult) -> str:
    """A line under HEADER."""
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result.phase_seconds.items())
    return f"{result.name:14} {result.seconds:8.3f} {phases}"


def run_table(args: argparse.Namespace) -> dict[str, Any]:
    """Every chosen row, and the start of a process."""
    settings = engine_settings(args)
    rows = chosen_rows(args, DEFAULT_ROWS)
    results: list[dict[str, Any]] = []
    hardware = None
    print(HEADER)
    if START in (args.rows or (START,)):  # first: an engine of ours would hold the memory
        for result in measure_starts(args.model, settings, args.repeat):
            print(format_start(result), flush=True)
            results.append(asdict(result))
    if rows:
        hardware = measure_hardware(choose_device(args), args.tensor_parallel_size or 1)
        with constants_set(args.variant):
            results += map(asdict, run_rows(args.model, settings, rows, args.repeat, hardware))
    return {"hardware": asdict(hardware) if hardware else None, "rows": results}


# ---- one technique after the other --------------------------------------------------------------

BASE = "base"


def run_ablations(args: argparse.Namespace) -> dict[str, Any]:
    """The rows with all techniques, then with each of the named variants on its own."""
    rows = chosen_rows(args, ABLATION_ROWS)
    hardware = measure_hardware(choose_device(args), args.tensor_parallel_size or 1)
    results: dict[str, list[RowResult]] = {}
    skipped: dict[str, str] = {}
    print(HEADER)
    for name in (BASE, *args.ablate):
        variants = args.variant if name == BASE else [*args.variant, name]
        settings = engine_settings(args) | settings_of(variants)
        print(f"-- {name}", flush=True)
        try:
            with constants_set(variants):
                results[name] = run_rows(args.model, settings, rows, args.repeat, hardware)
        except (ArgumentError, LookupError) as error:
            if name == BASE:
                raise
            print(error, flush=True)
            skipped[name] = str(error)
    print(format_ablations(results))
    variants_json = {name: list(map(asdict, measured)) for name, measured in results.items()}
    return {"hardware": asdict(hardware), "variants": variants_json, "skipped": skipped}


def format_ablations(results: dict[str, list[RowResult]]) -> str:
    """A Markdown table: tokens/s of each row, and their ratio to the first variant's."""
    base = next(iter(results.values()))
    titles = " | ".join(f"{result.name}, tokens/s | ratio" for result in base)
    lines = [f"| variant | {titles} |", "| --- |" + " ---: | ---: |" * len(base)]
    for name, measured in results.items():
        cells = [
            f"{result.tokens_per_second:,.0f} | "
            f"{result.tokens_per_second / reference.tokens_per_second:.3f}"
            for result, reference in zip(measured, base, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- two checkouts ------------------------------------------------------------------------------


def run_comparison(args: argparse.Namespace) -> dict[str, Any]:
    """The rows in the old checkout and in this one, in turn."""
    settings = {"gpu_memory_utilization": compare.MEMORY_SHARE} | engine_settings(args)
    rows = chosen_rows(args, DEFAULT_ROWS)
    roots = (args.compare, Path(nanovllm.__file__).parents[1])
    comparisons = []
    print(f"{'row':14} {'old tokens/s':>13} {'new tokens/s':>13} {'new / old':>10}")
    with ExitStack() as stack:
        # One after the other: each takes its share of the memory that it finds free.
        old, new = (
            stack.enter_context(compare.Checkout(root, args.model, settings, rows))
            for root in roots
        )
        for row in rows:
            comparison = compare.compare_row(old, new, row, args.repeat)
            comparisons.append(comparison)
            print(
                f"{row.name:14} {comparison.old_speed:13,.0f} {comparison.new_speed:13,.0f} "
                f"{comparison.new_speed / comparison.old_speed:10.3f}",
                flush=True,
            )
    return {"old": str(roots[0]), "new": str(roots[1]), "rows": list(map(asdict, comparisons))}


# ---- the command --------------------------------------------------------------------------------


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
    if args.compare:
        results = run_comparison(args)
    elif args.ablate is not None:
        results = run_ablations(args)
    else:
        results = run_table(args)
    summary = {
        "device": device_name(choose_device(args)),
        "versions": {name: package_version(name) for name in ("torch", "triton")},
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        **results,
    }
    print(json.dumps(summary, allow_nan=False))


if __name__ == "__main__":
    main()
