"""Two checkouts of the library, each in a process and an engine of its own, timed in turn.

Both engines live at the same time, and one idles while the other runs, so that both meet the same
state of the machine. The processes run this file as a module, `serve` is their side.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workloads import Row, workloads

# Of the GPU's memory for each of the two engines, unless the command line says otherwise.
MEMORY_SHARE = 0.45


@dataclass(frozen=True)
class Comparison:
    """A row's times in both checkouts, one for each repetition."""

    name: str
    unit: str
    num_tokens: int  # of one repetition, of the row's unit
    old_seconds: list[float]
    new_seconds: list[float]

    @property
    def old_speed(self) -> float:
        """Tokens per second of the median repetition."""
        return self.num_tokens / median(self.old_seconds)

    @property
    def new_speed(self) -> float:
        """Tokens per second of the median repetition."""
        return self.num_tokens / median(self.new_seconds)


def median(numbers: Sequence[float]) -> float:
    """The median, the lower of two."""
    return sorted(numbers)[(len(numbers) - 1) // 2]


class Checkout:
    """An engine of the `nanovllm` package in the folder `root`, in a process that times rows.

    Raises:
        RuntimeError: the process took another package, or it failed; its stderr has the reason.
    """

    def __init__(self, root: Path, model: str, settings: dict[str, Any], rows: list[Row]) -> None:
        self.root = root.resolve()
        own = Path(__file__).resolve().parent
        job = {
            "model": str(Path(model).resolve()),
            "settings": settings,
            "rows": [asdict(row) for row in rows],
        }
        present_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        module_path = [self.root, own, *(Path(p).resolve() for p in present_path if p)]
        # The working directory is the first on the module path: one that holds no nanovllm.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "compare", json.dumps(job)],
            cwd=own,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, module_path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        package = Path(self._receive())
        if package.resolve().parents[1] != self.root:
            self.process.kill()
            self.close()
            raise RuntimeError(f"{self.root} holds no nanovllm: {package} was imported")
        self._receive()  # the engine is there

    def time(self, row: Row) -> tuple[float, int]:
        """Seconds of the next repetition of `row`, and its tokens of the row's unit."""
        assert self.process.stdin is not None
        self.process.stdin.write(row.name + "\n")
        self.process.stdin.flush()
        seconds, num_tokens = json.loads(self._receive())
        return seconds, num_tokens

    def _receive(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise RuntimeError(f"the process of {self.root} ended with exit status {status}")
        return line.rstrip("\n")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()  # the end of its input

    def __enter__(self) -> "Checkout":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(model: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the package's path, and a line when its engine is there.

    Then, for each row that stdin names, seconds and tokens of a run.

    Only what every version of the library offers is used.
    """
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    import nanovllm

    print(nanovllm.__file__, file=reply, flush=True)
    with nanovllm.LLM(model, **settings) as llm:
        vocab_size = llm.config.hf_config.vocab_size
        draws = {row["name"]: workloads(Row(**row), vocab_size) for row in rows}
        units = {row["name"]: row["unit"] for row in rows}
        llm.generate(["Benchmark: "], nanovllm.SamplingParams(), use_tqdm=False)
        print(file=reply, flush=True)
        for line in sys.stdin:
            name = line.rstrip("\n")
            workload = next(draws[name])
            params = workload.sampling_params
            start = time.perf_counter()
            completions = workload.generate(llm, params)
            seconds = time.perf_counter() - start
            if list(map(len, completions)) != workload.output_lens:
                raise RuntimeError("a request ended before its max_tokens")
            num_tokens = workload.num_counted_tokens(units[name])
            print(json.dumps([seconds, num_tokens]), file=reply, flush=True)


def compare_row(old: Checkout, new: Checkout, row: Row, repeat: int) -> Comparison:
    """Time `repeat` repetitions of `row` in both; who comes first alternates."""
    seconds: dict[Checkout, list[float]] = {old: [], new: []}
    for repetition in range(repeat):
        for checkout in (old, new) if repetition % 2 == 0 else (new, old):
            elapsed, num_tokens = checkout.time(row)
            seconds[checkout].append(elapsed)
    return Comparison(row.name, row.unit, num_tokens, seconds[old], seconds[new])


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
