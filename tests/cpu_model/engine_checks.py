"""What the tests of this folder share: prompts, small engines, scripts, what must hold after."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from forked_python import HELPER, ForkedPython, arguments_of
from vocabulary import VOCAB_SIZE

from nanovllm import LLM, SamplingParams
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"


def random_prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int | None, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def token_ids(outputs: list[dict]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


def tiny_engine(model_dir: Path, **kwargs) -> LLM:
    settings = {
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "num_kvcache_blocks": 128,
        "device": "cpu",
    }
    return LLM(str(model_dir), **(settings | kwargs))


def generate(llm: LLM, prompts, params) -> list[list[int]]:
    """The token ids of every completion."""
    return token_ids(llm.generate(prompts, params, use_tqdm=False))


def drain(llm: LLM) -> tuple[dict[int, list[int]], list[int]]:
    """Step until nothing is left: completions by request id, and the steps' numbers of tokens."""
    completions: dict[int, list[int]] = {}
    counts = []
    while not llm.is_finished():
        outputs, num_tokens = llm.step()
        counts.append(num_tokens)
        for request_id, completion in outputs:
            assert request_id not in completions, "a request was returned twice"
            completions[request_id] = completion
    return completions, counts


def up_to_eos(completion: list[int], eos: Iterable[int]) -> list[int]:
    """The completion cut after its first EOS token."""
    end = next((i + 1 for i, token in enumerate(completion) if token in eos), len(completion))
    return completion[:end]


def check_varied(reference: list[list[int]]) -> None:
    """The reference is worth comparing with: completions differ, most go through many tokens."""
    distinct = sorted(len(set(completion)) for completion in reference)
    assert distinct[len(distinct) // 2] >= 6, distinct
    assert len({tuple(completion) for completion in reference}) >= 0.5 * len(reference)


def check_nothing_is_held(llm: LLM) -> None:
    """No request is left, and every block and every row is free."""
    assert llm.is_finished()
    scheduler, manager = llm.scheduler, llm.scheduler.block_manager
    assert not scheduler.waiting
    assert not scheduler.running
    assert manager.num_free_blocks == len(manager.blocks) == llm.config.num_kvcache_blocks
    assert all(block.ref_count == 0 for block in manager.blocks)
    assert sorted(scheduler.free_rows) == list(range(llm.config.max_num_seqs))


# ---- processes ------------------------------------------------------------------------------


def processes_named(prefix: str) -> list[tuple[int, int]]:
    """(number, pid) of this process's descendants with such a name and a number as an argument."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if pid in arguments_of and is_running(pid):
            arguments = arguments_of[pid]
        found += [(int(a.removeprefix(prefix)), pid) for a in arguments if a.startswith(prefix)]
    return found


def worker_processes() -> list[tuple[int, int]]:
    """(rank, pid) of the tensor-parallel workers that this process has, of all its engines."""
    return processes_named("nanovllm-rank-")


def worker_pids() -> dict[int, int]:
    """Rank -> pid of the tensor-parallel workers of this process (of one engine)."""
    return dict(worker_processes())


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and they; without what forks for tests."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"({HELPER})" in stat:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = list(children.get(pid, []))
    for child in found:  # grows while it is walked
        found += children.get(child, [])
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def shared_memory_files() -> set[str]:
    """Names under /dev/shm that look like ours or Python's; other programs' are left out."""
    prefixes = ("nanovllm", "psm_", "pym-", "sem.", "torch_")
    folder = Path("/dev/shm")
    names = os.listdir(folder) if folder.is_dir() else []
    return {name for name in names if name.startswith(prefixes)}


def script_environment(**changes: str) -> dict[str, str]:
    paths = [str(REPO), str(REPO / "tests"), str(Path(__file__).parent)]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return os.environ | settings | changes


OUTPUT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def start_script(path: Path, *arguments: str, cwd: Path | None = None) -> subprocess.Popen:
    """A Python script in a process group of its own; stdout and stderr are one pipe of text."""
    command = [sys.executable, str(path), *arguments]
    settings = {"env": script_environment(), "start_new_session": True}
    return subprocess.Popen(command, cwd=cwd, **OUTPUT, **settings)


def fork_script(path: Path, *arguments: str, forks_workers: bool = True) -> subprocess.Popen:
    """The same in a process that has imported the engine already, as its workers have."""
    command = [sys.executable, str(path), *arguments]
    settings = {"env": script_environment(), "start_new_session": True}
    return ForkedPython(command, forks_workers, **OUTPUT, **settings)


def read_until(process: subprocess.Popen, line_start: str) -> str:
    """The first line of the script's output that begins so."""
    seen = []
    for line in process.stdout:
        if line.startswith(line_start):
            return line
        seen.append(line)
    raise AssertionError(f"no line starts with {line_start!r} in:\n{''.join(seen)}")


def scripted_step(plan: StepPlan, seqs: Iterable[Sequence], token_ids: list[int]) -> LaunchedStep:
    """What `ModelRunner.execute` returns, with these tokens."""
    step = LaunchedStep(plan, list(seqs))
    step.token_ids = torch.tensor(token_ids, dtype=torch.int32)
    step.start_download()
    return step
