"""Micro-benchmark of sampling with filters, run by hand: python tests/benchmarks/bench_sampling.py

151,936 logits in bfloat16, in CUDA graphs: the plain race, and thresholds with the race among what
survives. `--set triton_filters.CHUNK=4096,8192` overrides modules' constants, `--kernels` tells how
long each kernel takes.
"""

import argparse
import importlib
import itertools
from collections.abc import Callable

import torch
from graph_timing import microseconds

from nanovllm.kernels.triton.filters import filter_thresholds
from nanovllm.kernels.triton.sampling import sample

VOCAB = 151_936
# top_k, top_p, min_p
FILTERS = {
    "k=20 p=.95": (20, 0.95, 0.0),
    "k=50": (50, 1.0, 0.0),
    "p=.9": (0, 0.9, 0.0),
    "min_p=.05": (0, 1.0, 0.05),
    "off": (0, 1.0, 0.0),
}
REPEATS = 8


def mean_microseconds(run: Callable[[], object]) -> float:
    """Of a call, several in a CUDA graph."""

    def run_repeatedly() -> None:
        for _ in range(REPEATS):
            run()

    return microseconds(run_repeatedly, REPEATS)


def print_kernels(run: Callable[[], object]) -> None:
    """The kernels of a call in their order, with their times."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    times = [f"{e.name.strip('_')} {e.device_time:.1f}" for e in events if "kernel" in e.name]
    print("    " + ", ".join(times))


def bench(batch_size: int, deviation: float, options: argparse.Namespace) -> None:
    logits = torch.empty(batch_size, VOCAB, device="cuda", dtype=torch.bfloat16)
    logits.normal_(std=deviation)
    words = torch.randint(2**31, (batch_size, 2), device="cuda").int()
    temperatures = torch.full((batch_size,), options.temperature, device="cuda")
    race = logits, temperatures, words, words[:, 0] % 4096, 0, VOCAB
    plain = mean_microseconds(lambda: sample(*race))
    line = f"{batch_size:4} rows, std {deviation:<3g} plain {plain:6.1f}"
    runs = {}
    for name, (k, p, min_p) in FILTERS.items():
        filters = (
            torch.full((batch_size,), k, dtype=torch.int32, device="cuda"),
            torch.full((batch_size,), p, device="cuda"),
            torch.full((batch_size,), min_p, device="cuda"),
        )

        def find(filters=filters) -> torch.Tensor:
            return filter_thresholds(logits, temperatures, *filters, VOCAB)

        def draw(find=find) -> object:
            return sample(*race, find())

        runs[name] = draw
        line += f"  {name} {mean_microseconds(find):6.1f} {mean_microseconds(draw):6.1f}"
    print(line, flush=True)
    if options.kernels:
        for name, run in runs.items():
            print(f"    {name}:")
            print_kernels(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--std", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="MODULE.NAME=INT[,INT...]",
        help="modules' constants; everything runs once for every combination",
    )
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "us: plain race; thresholds, thresholds and race")
    targets = [assignment.split("=")[0] for assignment in options.set]
    values = [map(int, assignment.split("=")[1].split(",")) for assignment in options.set]
    for combination in itertools.product(*values):
        for target, value in zip(targets, combination, strict=True):
            module, name = target.split(".")
            setattr(importlib.import_module(f"nanovllm.kernels.{module}"), name, value)
            print(f"{target}={value}")
        for deviation, batch_size in itertools.product(options.std, options.batch):
            bench(batch_size, deviation, options)


if __name__ == "__main__":
    main()
