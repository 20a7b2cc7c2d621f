"""Ctrl-C: KeyboardInterrupt at the caller, nothing held, nothing lost, the engine goes on."""

import json
import os
import signal
import threading
import time

import hanging_workers
import pytest
import rank_functions
from engine_checks import (
    check_nothing_is_held,
    descendants,
    drain,
    fork_script,
    generate,
    greedy,
    is_running,
    random_prompts,
    read_until,
    tiny_engine,
    wait_until,
    worker_pids,
)
from tiny_models import reference_greedy

from nanovllm.engine import request_output
from nanovllm.engine.launched_step import LaunchedStep

pytestmark = pytest.mark.usefixtures("forked_workers")
PROMPTS = random_prompts((5, 250, 505, 40, 257), seed=60)
MAX_TOKENS = 20


@pytest.fixture(scope="module")
def reference(tiny_dir):
    return reference_greedy(tiny_dir, PROMPTS, MAX_TOKENS)


# ---- signals that arrive inside a step, at a known place -------------------------------------


def press_ctrl_c(llm, monkeypatch, calls, times=1):
    """Send SIGINT to this process in these calls of the model (counted from 0)."""
    execute, count = llm.model_runner.execute, iter(range(10**9))

    def interrupted(plan, seqs=()):
        if next(count) in calls:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return execute(plan, seqs)

    monkeypatch.setattr(llm.model_runner, "execute", interrupted)


@pytest.mark.parametrize(
    ("overlap", "num_blocks", "times"),
    [(True, 128, 1), (True, 4, 2), (False, 128, 2), (False, 4, 1)],
)
def test_a_manual_loop_loses_nothing(tiny_dir, reference, monkeypatch, overlap, num_blocks, times):
    """A second signal breaks the step off: it is computed again."""
    limits = [3, 20, 7, 12, 1]
    with tiny_engine(
        tiny_dir, async_scheduling=overlap, num_kvcache_blocks=num_blocks, watermark=0
    ) as llm:
        press_ctrl_c(llm, monkeypatch, set(range(0, 200, 3)), times)
        for prompt, limit in zip(PROMPTS, limits, strict=True):
            llm.add_request(prompt, greedy(limit))
        completions, num_interrupts = {}, 0
        while not llm.is_finished():
            try:
                outputs, _ = llm.step()
                assert not completions.keys() & dict(outputs).keys()
                completions.update(outputs)
            except KeyboardInterrupt:
                num_interrupts += 1
        assert num_interrupts >= 6
        assert completions == {i: reference[i][:limit] for i, limit in enumerate(limits)}
        check_nothing_is_held(llm)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["schedule", "postprocess", "finish", "preempt"])
def test_a_signal_while_the_scheduler_is_half_changed_waits(
    tiny_dir, reference, monkeypatch, overlap, name
):
    """Only a second signal in the same step would break it off."""
    with tiny_engine(tiny_dir, async_scheduling=overlap, num_kvcache_blocks=4, watermark=0) as llm:
        method, is_sent = getattr(llm.scheduler, name), False

        def interrupted(*args):
            nonlocal is_sent
            result = method(*args)
            if not is_sent:
                is_sent = True
                os.kill(os.getpid(), signal.SIGINT)
            return result

        monkeypatch.setattr(llm.scheduler, name, interrupted)
        for prompt in PROMPTS:
            llm.add_request(prompt, greedy(MAX_TOKENS))
        completions, num_steps, num_interrupts = {}, 0, 0
        while not llm.is_finished():
            # Every step schedules: some must get through to return what has finished.
            num_steps += 1
            is_sent = name == "schedule" and num_steps % 2 == 0
            try:
                completions.update(llm.step()[0])
            except KeyboardInterrupt:
                num_interrupts += 1
        assert num_interrupts >= 1
        assert completions == dict(enumerate(reference))
        check_nothing_is_held(llm)


@pytest.mark.parametrize("overlap", [True, False])
def test_generate_drops_its_own_requests_and_keeps_the_others(
    tiny_dir, reference, monkeypatch, overlap
):
    with tiny_engine(tiny_dir, async_scheduling=overlap) as llm:
        llm.add_request(PROMPTS[0], greedy(4))  # ends before the interrupt
        llm.add_request(PROMPTS[1], greedy(MAX_TOKENS))
        with monkeypatch.context() as patch:
            press_ctrl_c(llm, patch, {8})
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS[2:], greedy(MAX_TOKENS), use_tqdm=False)
        completions = {}
        while not llm.is_finished():
            completions.update(llm.step()[0])
        assert completions == {0: reference[0][:4], 1: reference[1]}
        check_nothing_is_held(llm)
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


def test_a_signal_while_an_output_is_made(tiny_dir, reference, monkeypatch):
    """The first output of the call, while other requests run."""
    make_output = request_output.make_output

    def interrupted(request, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return make_output(request, *args)

    with tiny_engine(tiny_dir) as llm:
        llm.add_request(PROMPTS[0], greedy(MAX_TOKENS))
        with monkeypatch.context() as patch:
            patch.setattr(LaunchedStep, "is_done", lambda step: False)
            patch.setattr(request_output, "make_output", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS[1:3], [greedy(3), greedy(MAX_TOKENS)], use_tqdm=False)
        assert drain(llm)[0] == {0: reference[0]}
        check_nothing_is_held(llm)


def test_the_callers_handler_is_called_and_put_back(tiny_dir, reference, monkeypatch):
    received = []

    def handler(signum, frame):
        received.append(signum)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        with tiny_engine(tiny_dir) as llm:
            press_ctrl_c(llm, monkeypatch, {2, 5})
            assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert received == [signal.SIGINT] * 2


@pytest.mark.parametrize("setting", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_process_that_does_not_handle_the_signal(tiny_dir, reference, setting):
    previous = signal.signal(signal.SIGINT, setting)
    try:
        with tiny_engine(tiny_dir) as llm:
            assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
        assert signal.getsignal(signal.SIGINT) is setting
    finally:
        signal.signal(signal.SIGINT, previous)


# ---- a rank that does not come ----------------------------------------------------------------


def press_when(condition, times):
    """Send SIGINT to this process as soon as the condition holds, and again."""

    def press():
        wait_until(condition, 60)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    threading.Thread(target=press).start()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step", "call", "exit"])
def test_a_second_signal_ends_the_wait_for_a_rank_that_is_stopped(tiny_dir, monkeypatch, place):
    llm = tiny_engine(tiny_dir, tensor_parallel_size=2, worker_timeout=3600)
    generate(llm, PROMPTS, greedy(3))
    [pid] = worker_pids().values()
    os.kill(pid, signal.SIGSTOP)
    progress = llm.executor.workers.progress
    begun = threading.Event()
    calls = {
        "step": lambda: llm.generate(PROMPTS, greedy(3), use_tqdm=False),
        "call": lambda: llm.collective_rpc(rank_functions.announce),
        "exit": lambda: begun.set() or llm.exit(),
    }
    monkeypatch.setattr(rank_functions, "on_announcement", begun.set)
    if place == "step":
        press_when(lambda: progress.of(0) > progress.of(1), 2)
    else:
        press_when(begun.is_set, 1 if place == "exit" else 2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        calls[place]()
    assert time.monotonic() - start < 60  # `worker_timeout` would take an hour
    llm.exit()
    wait_until(lambda: not is_running(pid))


@pytest.mark.slow
def test_a_signal_while_the_workers_start(tiny_dir, monkeypatch):
    monkeypatch.setattr("nanovllm.parallel.workers._worker_main", hanging_workers.hang_in_start)
    press_when(worker_pids, 1)
    with pytest.raises(KeyboardInterrupt):
        tiny_engine(tiny_dir, tensor_parallel_size=2)
    assert not worker_pids()


# ---- a script at a terminal -------------------------------------------------------------------


SCRIPT = """
import json, sys
from engine_checks import check_nothing_is_held, generate, greedy, tiny_engine

NUM_ROUNDS = 2

class Bar:
    def __init__(self, **kwargs):
        self.is_announced = False
    def update(self, n):
        pass
    def set_postfix(self, values):
        if not self.is_announced:
            self.is_announced = True
            print("stepping", flush=True)
    def close(self):
        pass

def main():
    model, size, prompts, reference = json.loads(sys.argv[1])
    llm = tiny_engine(model, tensor_parallel_size=size, max_model_len=2048)
    for _ in range(NUM_ROUNDS):
        try:
            while True:
                llm.generate(prompts, greedy(1500), use_tqdm=Bar)
        except KeyboardInterrupt:
            check_nothing_is_held(llm)
        assert generate(llm, prompts, greedy(len(reference[0]))) == reference
        print("right", flush=True)
    llm.generate(prompts, greedy(1500), use_tqdm=Bar)  # and now nobody catches it

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_ctrl_c_at_a_terminal(tiny_dir, tmp_path, reference, size):
    """The signal goes to the whole process group, so to the tensor-parallel workers too."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    arguments = json.dumps([str(tiny_dir), size, PROMPTS, reference])
    with fork_script(path, arguments) as process:
        try:
            for _ in range(2):
                read_until(process, "stepping")
                os.killpg(process.pid, signal.SIGINT)
                read_until(process, "right")
            read_until(process, "stepping")
            pids = descendants(process.pid)
            assert len(pids) >= size - 1
            os.killpg(process.pid, signal.SIGINT)
            read_until(process, "KeyboardInterrupt")
            assert process.wait(10) in (130, -signal.SIGINT)
            wait_until(lambda: not any(map(is_running, pids)))
        finally:
            process.kill()
