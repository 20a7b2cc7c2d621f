"""Seconds from the start of a fresh python process to its first token, and where they go.

    PYTHONPATH=. python tests/benchmarks/starts.py --model DIR [--load-format dummy] [--device cpu]

prints the parts of 0.2 s or more, with an empty kernel cache and with a filled one.
"""

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nanovllm

PHASES = ("import", "engine", "first token")  # python and the import, LLM(...), generate

FIRST_TOKEN = """\
import json, sys
from nanovllm import LLM, SamplingParams

print("import", flush=True)
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
print("engine", flush=True)
llm.generate([[1]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
print("first token", flush=True)
"""

# Parts of a start: the function that a part is the time of, without the parts that it calls, in
# the main thread.
PARTS = {
    "device": "nanovllm.config:Config.resolve_device",
    "config.json": "nanovllm.config:read_model",
    "tokenizer": "nanovllm.engine.startup:load_tokenizer",
    "CUDA": "torch.cuda:_lazy_init",
    "CUDA context": "torch.cuda:mem_get_info",
    "waits for threads": "threading:Thread.join",
    "note of kernels": "nanovllm.kernels.triton.kernel_index:KernelIndex.__init__",
    "list of kernels": "nanovllm.engine.kernel_variants:record_variants",
    "kernels in the cache": "nanovllm.kernels.triton.compilation:Compilation.__init__",
    "other kernels": "nanovllm.kernels.triton.compilation:Compilation.wait",
    "weights": "nanovllm.engine.rank_state:load_weights",
    "warm-up": "nanovllm.engine.startup:_warm_up",
    "garbage collection": "gc:collect",
    "graphs": "nanovllm.engine.model_runner:ModelRunner.capture_graphs",
}
TIMED_START = """\
import importlib, json, sys, threading, time
begin = time.time()
from nanovllm.guards.garbage import heavy_imports

seconds = {"python": begin - float(sys.argv[3])}
with heavy_imports():  # as with the import of LLM alone
    before = time.time()
    import torch

    seconds["torch"] = time.time() - before
    from nanovllm import LLM, SamplingParams
seconds["nanovllm"] = time.time() - begin - seconds["torch"]
running = []


def timed(part, function):
    def call(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        begin = time.time()
        running.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            whole = time.time() - begin
            seconds[part] = seconds.get(part, 0.0) + whole - running.pop()
            if running:
                running[-1] += whole
    return call


for part, place in json.loads(sys.argv[4]).items():
    module, _, path = place.partition(":")
    names = path.split(".")
    try:
        owner = timed("imports of LLM(...)", importlib.import_module)(module)
    except ImportError:
        continue  # of Triton, where there is none
    for name in names[:-1]:
        owner = getattr(owner, name)
    setattr(owner, names[-1], timed(part, getattr(owner, names[-1])))
begin = time.time()
llm = timed("rest of LLM(...)", LLM)(sys.argv[1], **json.loads(sys.argv[2]))
params = SamplingParams(max_tokens=1, ignore_eos=True)
timed("first token", llm.generate)([[1]], params, use_tqdm=False)
heavy = "transformers sympy torch._dynamo torch._inductor torch.distributed.tensor scipy sklearn"
print(json.dumps([seconds, [name for name in heavy.split() if name in sys.modules]]))
"""


@dataclass(frozen=True)
class StartResult:
    """Several starts; phases are those of the median one."""

    name: str
    seconds: float  # the median
    phase_seconds: dict[str, float]
    all_seconds: list[float]


def time_start(model: str, settings: dict[str, Any], cache: Path) -> dict[str, float]:
    """Seconds of each phase of one start, with its kernels cached in `cache`.

    The end of the process is not counted.
    """
    environment = environment_with(cache)
    command = [sys.executable, "-c", FIRST_TOKEN, model, json.dumps(settings)]
    phases: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.rstrip("\n") in PHASES:
                now = time.perf_counter()
                phases[line.rstrip("\n")] = now - start
                start = now
    if len(phases) < len(PHASES) or process.returncode != 0:
        raise RuntimeError(f"a fresh process failed with exit status {process.returncode}")
    return phases


def environment_with(cache: Path) -> dict[str, str]:
    """The environment of a process with this package, and its kernels cached in `cache`."""
    package_root = str(Path(nanovllm.__file__).parents[1])
    python_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(python_path),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


def time_parts(
    model: str, settings: dict[str, Any], cache: Path
) -> tuple[dict[str, float], list[str]]:
    """Seconds of each part of one start, and the heavy modules that it imported.

    The times are the host's: what a GPU still does counts for the part that waits for it.
    """
    arguments = [model, json.dumps(settings), str(time.time()), json.dumps(PARTS)]
    process = subprocess.run(
        [sys.executable, "-c", TIMED_START, *arguments],
        env=environment_with(cache),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, heavy = json.loads(process.stdout.splitlines()[-1])
    return seconds, heavy


def table_of(columns: dict[str, dict[str, float]], least: float = 0.2) -> str:
    """A Markdown table with a column of seconds for each start, and a row for each part.

    What is less than `least` in all of them is summed up in a row of its own.
    """
    parts = dict.fromkeys(part for seconds in columns.values() for part in seconds)
    large = [p for p in parts if any(s.get(p, 0.0) >= least for s in columns.values())]
    rows = {part: [seconds.get(part, 0.0) for seconds in columns.values()] for part in large}
    totals = [sum(seconds.values()) for seconds in columns.values()]
    shown = [sum(column) for column in zip(*rows.values(), strict=True)] or [0.0] * len(totals)
    rows["the rest"] = [total - part for total, part in zip(totals, shown, strict=True)]
    rows["all"] = totals
    lines = [f"| part | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for part, values in rows.items():
        lines.append(f"| {part} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines)


def prepare_files(model: str, is_dummy: bool) -> None:
    """Bring the model's files into the page cache, and this package's modules into bytecode.

    So no start pays for the disk, and the first one not for what an installation does.
    """
    compileall.compile_dir(str(Path(nanovllm.__file__).parent), quiet=2)
    for path in Path(model).iterdir():
        if path.is_file() and not (is_dummy and path.suffix == ".safetensors"):
            with path.open("rb") as file:
                while file.read(2**26):
                    pass


def measure_starts(model: str, settings: dict[str, Any], repeat: int) -> list[StartResult]:
    """`repeat` pairs of starts, each with an empty kernel cache first and then the filled one."""
    prepare_files(model, is_dummy=settings.get("load_format") == "dummy")
    cold, warm = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(time_start(model, settings, Path(cache)))
            warm.append(time_start(model, settings, Path(cache)))
    return [summarize("start-cold", cold), summarize("start-warm", warm)]


def summarize(name: str, starts: list[dict[str, float]]) -> StartResult:
    """The median start, the lower of two."""
    all_seconds = [sum(phases.values()) for phases in starts]
    seconds = sorted(all_seconds)[(len(starts) - 1) // 2]
    return StartResult(name, seconds, starts[all_seconds.index(seconds)], all_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=3, help="pairs of starts; the best is shown")
    args = parser.parse_args()
    settings = {"load_format": args.load_format, "device": args.device}
    prepare_files(args.model, is_dummy=args.load_format == "dummy")
    starts: dict[str, list[dict[str, float]]] = {"cold kernel cache": [], "warm": []}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as cache:
            for column in starts.values():
                seconds, heavy = time_parts(args.model, settings, Path(cache))
                column.append(seconds)
    best = {name: min(column, key=lambda s: sum(s.values())) for name, column in starts.items()}
    print(table_of(best))
    print(f"heavy modules imported: {', '.join(heavy) or 'none'}")


if __name__ == "__main__":
    main()
