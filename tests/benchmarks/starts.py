"""Seconds from the start of a fresh python process to its first token, and where they go."""

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
    package_root = str(Path(nanovllm.__file__).parents[1])
    python_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(python_path),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
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


def read_model_files(model: str, is_dummy: bool) -> None:
    """Bring the model's files into the page cache, so that no start pays for the disk."""
    for path in Path(model).iterdir():
        if path.is_file() and not (is_dummy and path.suffix == ".safetensors"):
            with path.open("rb") as file:
                while file.read(2**26):
                    pass


def measure_starts(model: str, settings: dict[str, Any], repeat: int) -> list[StartResult]:
    """`repeat` pairs of starts, each with an empty kernel cache first and then the filled one."""
    read_model_files(model, is_dummy=settings.get("load_format") == "dummy")
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
