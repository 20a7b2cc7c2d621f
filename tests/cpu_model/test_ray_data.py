"""Batch files over Ray Data: two engines give what one gives, though one of them is killed.

Ray is several hundred MB and takes twenty seconds to start, so it is not in the test extra:
`pip install -e ".[ray]"`.
"""

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from engine_checks import descendants, random_prompts
from test_batch import bodies_of, write

from nanovllm.batch import ray_data, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="not installed: ray"),
]
PROMPTS = random_prompts((5, 30, 12, 260, 7, 3, 18, 40, 9, 11, 6), seed=71)


def actors() -> list[int]:
    """The processes that have an engine."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if command.startswith(b"ray::") and b"LLMActor" in command:
            found.append(pid)
    return found


def kill_an_actor(folder: Path, killed: list[int]) -> None:
    """As soon as an actor has written more than there was."""
    deadline = time.monotonic() + 1000
    before = None
    while time.monotonic() < deadline and not killed:
        size = sum(path.stat().st_size for path in folder.glob("lines-*.jsonl"))
        before = size if before is None else before
        if size > before:
            killed += actors()[:1]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def merged(folder: Path, target: Path) -> Path:
    target.write_text("".join(path.read_text() for path in sorted(folder.glob("lines-*.jsonl"))))
    return target


def test_two_actors_give_what_one_engine_gives(shallow_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token file is written
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [Path(run.__file__).parents[2]])))
    lines = {i: {"prompt": prompt, "max_tokens": 80 + i} for i, prompt in enumerate(PROMPTS)}
    source = write(tmp_path / "in.jsonl", lines | {"hot": {"prompt": [5], "temperature": -1}})
    whole, folder = tmp_path / "whole.jsonl", tmp_path / "parts"
    options = ["--model", str(shallow_dir), "--device", "cpu", "--num-kvcache-blocks", "16"]
    options += ["--max-num-seqs", "2", "--no-progress", "--temperature", "1", "--ignore-eos"]
    options += ["--return-token-ids", "--seed", "3"]
    assert run.main([str(source), str(whole), *options]) == 1  # the last line's error
    command = [str(source), str(folder), *options, "--num-actors", "2", "--part-lines", "3"]

    killed: list[int] = []
    watcher = threading.Thread(target=kill_an_actor, args=(folder, killed))
    watcher.start()
    assert ray_data.main(command) == 1
    watcher.join()
    assert killed and not actors()
    assert sorted(path.name for path in folder.iterdir()) == [
        f"lines-{first:012}.jsonl" for first in (1, 4, 7, 10)
    ]
    assert bodies_of(merged(folder, tmp_path / "merged.jsonl")) == bodies_of(whole)

    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert ray_data.main(command) == 1  # nothing is left to do: Ray is not even started
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept
