"""Copies of this process that do tasks, which need not be compilations."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from nanovllm.kernels.triton import compiler_processes
from nanovllm.kernels.triton.compiler_processes import CompilerProcesses

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be copied here")


def nothing() -> None:
    pass


def write(path: Path, result: bool) -> bool:
    path.write_text(str(os.getpid()))
    return result


def fail() -> bool:
    raise ValueError


def die() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def run(tasks, num_processes=2, prepare=nothing) -> dict[int, bool]:
    processes = CompilerProcesses(tasks, num_processes, prepare)
    try:
        return dict(processes.done())
    finally:
        processes.close()


def test_every_task_is_done_once_by_a_copy(tmp_path):
    tasks = [partial(write, tmp_path / str(i), i % 3 == 0) for i in range(300)]
    assert run(tasks, 3) == {i: i % 3 == 0 for i in range(300)}
    pids = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert os.getpid() not in pids and 1 <= len(pids) <= 3
    assert len(list(tmp_path.iterdir())) == 300


def test_what_fails_is_left_out():
    assert run([fail, lambda: True, fail, lambda: False]) == {1: True, 3: False}


def test_a_copy_that_dies_leaves_its_task_alone():
    assert run([die] + [lambda: True] * 20) == dict.fromkeys(range(1, 21), True)
    assert run([die, die, lambda: True]) == {}, "nobody is left"


def test_copies_that_cannot_be_prepared_do_nothing():
    assert run([lambda: True], prepare=fail) == {}


def test_nobody_waits_for_a_copy_that_hangs(monkeypatch):
    monkeypatch.setattr(compiler_processes, "SILENCE_SECONDS", 0.1)
    before = time.monotonic()
    assert run([lambda: bool(time.sleep(600))], 1) == {}
    assert time.monotonic() - before < 60


def test_without_processes_nothing_is_done(monkeypatch):
    def no_fork() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", no_fork)
    assert run([lambda: True]) == {}


def test_nothing_is_left_running():
    files = set(os.listdir("/proc/self/fd"))
    run([partial(time.sleep, 0)] * 3)
    processes = CompilerProcesses([partial(time.sleep, 600)] * 3, 3, nothing)
    processes.close()
    processes.close()
    assert set(os.listdir("/proc/self/fd")) == files


def test_copies_die_with_this_process(tmp_path):
    script = f"""
import os, signal, time
from functools import partial
from pathlib import Path
from nanovllm.kernels.triton.compiler_processes import CompilerProcesses
def work():
    Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    time.sleep(600)
processes = CompilerProcesses([work], 1, lambda: None)
path = Path({str(tmp_path / "pid")!r})
while not path.exists() or not path.read_text():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert process.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    for _ in range(600):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return  # whoever has to has not asked for its end yet
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def test_copies_are_made_without_a_word():
    script = """
from tokenizers import Tokenizer, models
from nanovllm.kernels.triton.compiler_processes import CompilerProcesses
Tokenizer(models.WordLevel({"a": 0}, "a")).encode_batch(["a"] * 100)  # in threads of Rust's
processes = CompilerProcesses([lambda: True] * 3, 2, lambda: None)
assert len(list(processes.done())) == 3
processes.close()
"""
    command = [sys.executable, "-W", "always", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout + run.stderr == ""


def test_other_threads_forbid_copies():
    script = """
import threading
from nanovllm.kernels.triton.compiler_processes import may_fork
assert may_fork()
found, is_over = [], threading.Event()
thread = threading.Thread(target=lambda: (found.append(may_fork()), is_over.wait()))
thread.start()
assert not may_fork()
is_over.set()
thread.join()
assert may_fork() and found == [False]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
