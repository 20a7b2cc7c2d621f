"""Speed against the number of requests and against the length of the context; run by hand:

    python tests/benchmarks/scaling.py --model DIR [--load-format dummy] [--requests 64 128 ...]
        [--contexts 1024 2048 ...] [--svg FILE]

The requests are of bench.py's lengths; the contexts are those of 16 prompts with 256 tokens each to
come. nanovllm must be installed or on PYTHONPATH. The last line of stdout is one JSON object, from
which `--from-json FILE --svg FILE` draws the plot later, without a GPU; only that needs matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_options import add_engine_options, choose_device, engine_settings
from limits import Hardware, ModelCost, measure_hardware
from timing import RowResult, measure_row
from variants import constants_set
from workloads import Row

from nanovllm import LLM, SamplingParams

BENCH_LEN = (100, 1024)  # of bench.py's prompts and completions
REQUESTS = (64, 128, 256, 512, 1024, 2048, 4096)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
TOKEN_BUDGET = 16384  # of a step, unless a prompt is longer


def request_rows(counts: Sequence[int]) -> list[Row]:
    """bench.py's workload with other numbers of requests."""
    return [
        Row(f"{count} requests", count, BENCH_LEN, BENCH_LEN, seed=100 + i)
        for i, count in enumerate(counts)
    ]


def context_rows(prompt_lens: Sequence[int], batch_size: int, output_len: int) -> list[Row]:
    """Batches of equal prompts."""
    return [
        Row(f"context {length}", batch_size, (length,) * 2, (output_len,) * 2, seed=200 + i)
        for i, length in enumerate(prompt_lens)
    ]


def measure_series(
    args: argparse.Namespace, rows: Sequence[Row], settings: dict[str, Any], hardware: Hardware
) -> list[RowResult]:
    """The rows that fit, on one engine; the first one runs once more before, to warm up."""
    results: list[RowResult] = []
    if not rows:
        return results
    max_len = max(row.max_len for row in rows)
    lengths = {"max_model_len": max_len, "max_num_batched_tokens": max(max_len, TOKEN_BUDGET)}
    with constants_set(args.variant), LLM(args.model, **(lengths | settings)) as llm:
        cost = ModelCost.of_engine(llm)
        llm.generate(["Benchmark: "], SamplingParams(), use_tqdm=False)
        for i, row in enumerate(rows):
            if row.max_len > llm.config.max_model_len:
                limit = llm.config.max_model_len
                print(f"{row.name}: {row.max_len} tokens, the limit is {limit}", flush=True)
                continue
            result = measure_row(llm, row, args.repeat + (i == 0), cost, hardware)
            results.append(result)
            print(
                f"{result.name:16} {result.seconds:8.2f} s {result.tokens_per_second:10,.0f} "
                f"tokens/s {result.share_of_limit:7.1%} of the limit",
                flush=True,
            )
    return results


# ---- tables -------------------------------------------------------------------------------------


def format_requests(results: Sequence[RowResult]) -> str:
    """A Markdown table of `request_rows`."""
    lines = [
        "| requests | output tokens | seconds | tokens/s | mean batch | share of limit |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        lines.append(
            f"| {first_number(result.name, 'requests'):,} | {result.output_tokens:,} | "
            f"{result.seconds:.2f} | {result.tokens_per_second:,.0f} | "
            f"{result.mean_decode_batch:.0f} | {result.share_of_limit:.0%} |"
        )
    return "\n".join(lines)


def format_contexts(results: Sequence[RowResult]) -> str:
    """A Markdown table of `context_rows`."""
    lines = [
        "| prompt tokens each | prefill, prompt tokens/s | decode, tokens/s | KV read, TB/s |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        prefill_speed, decode_speed = split_speeds(result)
        kv_speed = result.kv_bytes_read / result.decode_seconds / 1e12
        lines.append(
            f"| {first_number(result.name, 'context'):,} | {prefill_speed:,.0f} | "
            f"{decode_speed:,.0f} | {kv_speed:.2f} |"
        )
    return "\n".join(lines)


def first_number(name: str, word: str) -> int:
    """The number in a row's name."""
    return int(name.replace(word, ""))


def split_speeds(result: RowResult) -> tuple[float, float]:
    """Prompt tokens per second of prefill, and output tokens per second of decoding."""
    num_decoded = result.mean_decode_batch * result.decode_steps
    return (
        result.computed_prompt_tokens / result.prefill_seconds,
        num_decoded / result.decode_seconds,
    )


# ---- the plot -----------------------------------------------------------------------------------


def draw(requests: Sequence[RowResult], contexts: Sequence[RowResult], path: Path) -> None:
    """Both series as an SVG with text as text; a message instead if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not written: matplotlib is not installed")
        return
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nanovllm"})
    from matplotlib import pyplot

    num_panels = bool(requests) + bool(contexts)
    figure, panels = pyplot.subplots(
        1, num_panels, figsize=(4.5 * num_panels, 3.4), layout="constrained", squeeze=False
    )
    if requests:
        counts = [first_number(result.name, "requests") for result in requests]
        axes = panels[0, 0]
        axes.plot(counts, [result.tokens_per_second for result in requests], "o-")
        axes.set(xlabel="requests", ylabel="output tokens/s", title="bench.py's lengths")
        _scale(axes, counts)
        axes.set_ylim(bottom=0)
    if contexts:
        lengths = [first_number(result.name, "context") for result in contexts]
        prefill, decode = zip(*(split_speeds(result) for result in contexts), strict=True)
        axes = panels[0, -1]
        axes.plot(lengths, prefill, "o-", label="prefill, prompt tokens/s")
        axes.plot(lengths, decode, "s-", label="decode, tokens/s")
        batch_size = contexts[0].output_tokens // (contexts[0].decode_steps + 1)
        axes.set(xlabel="prompt tokens of a request", title=f"{batch_size} requests")
        axes.set_yscale("log")
        axes.legend()
        _scale(axes, lengths)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _scale(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:,.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


# ---- the command --------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser, model_required=False)
    parser.add_argument("--requests", type=int, nargs="*", default=REQUESTS, metavar="N")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS, metavar="TOKENS")
    parser.add_argument("--batch-size", type=int, default=16, help="requests of each context")
    parser.add_argument("--output-len", type=int, default=256, help="tokens after each context")
    parser.add_argument("--repeat", type=int, default=1, help="repetitions; the median counts")
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    parser.add_argument("--from-json", type=Path, help="an earlier output to show again")
    args = parser.parse_args(argv)
    if not args.model and not args.from_json:
        parser.error("--model or --from-json is needed")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.from_json:
        summary = json.loads(args.from_json.read_text().splitlines()[-1])
        requests, contexts = (
            [RowResult(**row) for row in summary[series]] for series in ("requests", "contexts")
        )
    else:
        hardware = measure_hardware(choose_device(args), args.tensor_parallel_size or 1)
        settings = engine_settings(args)
        requests = measure_series(args, request_rows(args.requests), settings, hardware)
        rows = context_rows(args.contexts, args.batch_size, args.output_len)
        contexts = measure_series(args, rows, settings, hardware)
        series = {"requests": requests, "contexts": contexts}
        summary = {name: [asdict(result) for result in series[name]] for name in series}
    print(format_requests(requests))
    print(format_contexts(contexts))
    if args.svg:
        draw(requests, contexts, args.svg)
    print(json.dumps(summary, allow_nan=False))


if __name__ == "__main__":
    main()
