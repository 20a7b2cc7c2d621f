"""A rank that dies or does not answer is named within seconds, and nothing is left behind."""

import os
import signal
import subprocess
import threading
import time

import failing_workers
import hanging_workers
import pytest
import rank_functions
from engine_checks import (
    descendants,
    fork_script,
    generate,
    greedy,
    is_running,
    random_prompts,
    read_until,
    shared_memory_files,
    tiny_engine,
    wait_until,
    worker_pids,
)
from sockets import listeners
from tiny_models import reference_greedy

from nanovllm import EngineDeadError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]
PROMPTS = random_prompts((5, 300, 40), seed=50)
LIMIT_SECONDS = 60  # what is not noticed waits for ten minutes, also on a fast machine


@pytest.fixture(autouse=True)
def _nothing_is_left():
    files, sockets = shared_memory_files(), listeners()
    assert not worker_pids()
    yield
    assert not worker_pids()
    wait_until(lambda: shared_memory_files() <= files)
    # A test before may have left some to a finalizer.
    wait_until(lambda: set(listeners()) <= set(sockets))


def check_dead(llm, message):
    """Every later call says the same, at once."""
    start = time.monotonic()
    for call in (
        lambda: llm.generate(PROMPTS, greedy(1)),
        lambda: llm.add_request(PROMPTS[0], greedy(1)),
        lambda: llm.step(),
    ):
        with pytest.raises(EngineDeadError, match=message):
            call()
    llm.exit()
    assert time.monotonic() - start < LIMIT_SECONDS


def check_a_new_engine_works(tiny_dir):
    with tiny_engine(tiny_dir) as llm:
        assert generate(llm, PROMPTS, greedy(5)) == reference_greedy(tiny_dir, PROMPTS, 5)


def test_a_worker_killed_while_idle(tiny_dir):
    llm = tiny_engine(tiny_dir, tensor_parallel_size=4)
    generate(llm, PROMPTS, greedy(3))
    pids = worker_pids()
    assert sorted(pids) == [1, 2, 3]
    os.kill(pids[2], signal.SIGKILL)
    start = time.monotonic()
    message = rf"rank 2 \(pid {pids[2]}\) was killed by SIGKILL"
    with pytest.raises(EngineDeadError, match=message):
        llm.generate(PROMPTS, greedy(30))
    assert time.monotonic() - start < LIMIT_SECONDS
    wait_until(lambda: not any(map(is_running, pids.values())))
    check_dead(llm, message)
    check_a_new_engine_works(tiny_dir)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_worker_killed_while_generating(tiny_dir, overlap):
    llm = tiny_engine(
        tiny_dir, tensor_parallel_size=2, max_model_len=2048, async_scheduling=overlap
    )
    generate(llm, PROMPTS, greedy(3))
    [pid] = worker_pids().values()
    killed_at = []

    def kill():
        killed_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    threading.Timer(0.7, kill).start()
    message = rf"rank 1 \(pid {pid}\) was killed by SIGKILL"
    with pytest.raises(EngineDeadError, match=message):
        while True:
            llm.generate(PROMPTS, greedy(1500), use_tqdm=False)
    assert time.monotonic() - killed_at[0] < LIMIT_SECONDS
    assert not is_running(pid)
    check_dead(llm, message)


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("raise_in_start_up", r"(?s)rank 1 .*ValueError: injected in the start of rank 1"),
        ("exit_in_start_up", r"rank 1 .* exited with code 7"),
    ],
)
def test_a_worker_that_fails_in_its_start(tiny_dir, monkeypatch, entry_point, message):
    monkeypatch.setattr(
        "nanovllm.parallel.workers._worker_main", getattr(failing_workers, entry_point)
    )
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match=message):
        tiny_engine(tiny_dir, tensor_parallel_size=2)
    assert time.monotonic() - start < 4 * LIMIT_SECONDS  # the start of a process is slow


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("raise_in_step", r"(?s)rank 1 .*ValueError: injected in a step of rank 1"),
        ("exit_in_step", r"rank 1 .* exited with code 7"),
    ],
)
def test_a_worker_that_fails_in_a_step(tiny_dir, monkeypatch, entry_point, message):
    monkeypatch.setattr(
        "nanovllm.parallel.workers._worker_main", getattr(failing_workers, entry_point)
    )
    llm = tiny_engine(tiny_dir, tensor_parallel_size=2)
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match=message):
        llm.generate(PROMPTS, greedy(30))
    assert time.monotonic() - start < LIMIT_SECONDS
    check_dead(llm, message)


def test_a_step_that_fails_on_rank_0_ends_the_workers(tiny_dir, monkeypatch):
    llm = tiny_engine(tiny_dir, tensor_parallel_size=2)
    [pid] = worker_pids().values()
    generate(llm, PROMPTS, greedy(3))

    def execute(plan, seqs=()):
        raise ValueError("injected in rank 0")

    monkeypatch.setattr(llm.model_runner, "execute", execute)
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match="injected in rank 0") as raised:
        llm.generate(PROMPTS, greedy(3))
    assert isinstance(raised.value.__cause__, ValueError)
    assert time.monotonic() - start < LIMIT_SECONDS
    wait_until(lambda: not is_running(pid))
    check_dead(llm, "injected in rank 0")


# ---- a rank that neither dies nor answers ------------------------------------------------------


@pytest.fixture
def two_ranks(tiny_dir):
    """An engine that has run, and by now gives a rank up after a second."""
    llm = tiny_engine(tiny_dir, tensor_parallel_size=2)
    generate(llm, PROMPTS, greedy(3))
    llm.executor.workers.timeout = 1.0
    yield llm
    llm.exit()


def check_is_given_up(llm, pid, call, state):
    start = time.monotonic()
    message = rf"rank 1 \(pid {pid}\) {state}has not answered for 1 s; worker_timeout says"
    with pytest.raises(EngineDeadError, match=message):
        call()
    assert time.monotonic() - start < LIMIT_SECONDS
    assert not is_running(pid)
    check_dead(llm, message)


@pytest.mark.parametrize("is_called", [True, False])
def test_a_rank_that_is_stopped(two_ranks, is_called):
    [pid] = worker_pids().values()
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2)  # nobody asks it anything yet
    calls = {
        True: lambda: two_ranks.collective_rpc(rank_functions.echo_rank),
        False: lambda: two_ranks.generate(PROMPTS, greedy(3)),
    }
    check_is_given_up(two_ranks, pid, calls[is_called], r"is stopped \(SIGSTOP\) and ")


def test_a_rank_whose_step_hangs(two_ranks):
    [pid] = worker_pids().values()
    two_ranks.collective_rpc(hanging_workers.sleep_in_the_next_step, args=(1,))
    check_is_given_up(two_ranks, pid, lambda: two_ranks.generate(PROMPTS, greedy(3)), "")


def test_a_rank_that_is_stopped_while_it_starts(tiny_dir, monkeypatch):
    monkeypatch.setattr("nanovllm.parallel.workers._worker_main", hanging_workers.hang_in_start)
    stopped = []

    def stop():
        wait_until(worker_pids, 60)
        stopped.extend(worker_pids().values())
        os.kill(stopped[0], signal.SIGSTOP)

    threading.Thread(target=stop).start()
    with pytest.raises(EngineDeadError, match=r"is stopped \(SIGSTOP\) and has not answered"):
        tiny_engine(tiny_dir, tensor_parallel_size=2, worker_timeout=1)
    assert not is_running(stopped[0])


def test_long_steps_long_calls_and_a_stop_of_all_ranks_are_no_silence(tiny_dir, two_ranks):
    llm, prompt = two_ranks, PROMPTS[0]
    [expected] = reference_greedy(tiny_dir, [prompt], 3)
    llm.collective_rpc(rank_functions.make_steps_slow, args=(1.5,))
    assert generate(llm, [prompt], greedy(2)) == [expected[:2]]
    llm.collective_rpc(rank_functions.make_steps_slow, args=(0,))
    assert llm.collective_rpc(rank_functions.sleep_on_rank, args=(1, 2.5)) == [0, 1]
    [pid] = worker_pids().values()
    processes = f"{os.getpid()} {pid}"
    script = f"kill -STOP {processes}; sleep 3; kill -CONT {processes}"
    with subprocess.Popen(["sh", "-c", script]) as stopping:  # as Ctrl-Z and fg do
        while stopping.poll() is None:
            assert generate(llm, [prompt], greedy(3)) == [expected]
    assert generate(llm, [prompt], greedy(3)) == [expected]


SCRIPT = """
import sys, time
from engine_checks import greedy, tiny_engine

if __name__ == "__main__":
    llm = tiny_engine(sys.argv[1], tensor_parallel_size=2, max_model_len=2048)
    llm.generate([[1, 2, 3]], greedy(3), use_tqdm=False)
    print("ready", flush=True)
    while True:
        if sys.argv[2] == "idle":
            time.sleep(1)
        else:
            llm.generate([[1, 2, 3]], greedy(1000), use_tqdm=False)
"""


@pytest.mark.parametrize("state", ["idle", "generating"])
def test_workers_do_not_outlive_a_killed_rank_0(tiny_dir, tmp_path, state):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with fork_script(path, str(tiny_dir), state) as process:
        read_until(process, "ready")
        time.sleep(0.3)
        pids = descendants(process.pid)
        assert pids
        process.kill()
        wait_until(lambda: not any(map(is_running, pids)), LIMIT_SECONDS)
