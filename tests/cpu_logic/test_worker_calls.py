"""Calls on every rank: order with the plans, results, errors. The workers are threads here."""

import pickle
import threading
import time
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest

from nanovllm.errors import ArgumentError, EngineDeadError
from nanovllm.parallel import workers
from nanovllm.parallel.calls import RemoteTraceback
from nanovllm.parallel.workers import NUM_SLOTS, Progress, Worker, WorkerGroup

SLOT_SIZE = 64


class OddError(Exception):
    """Cannot be unpickled: its arguments are not those of its constructor."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Runner:
    """What a rank runs plans and calls on."""

    def __init__(self, rank):
        self.rank = rank
        self.log = []

    def execute(self, plan):
        self.log.append(plan)

    def call(self, method, /, *args, **kwargs):
        self.log.append(method)
        if isinstance(method, str):
            return getattr(self, method)(*args, **kwargs)
        return method(self, *args, **kwargs)

    def echo(self, *args, **kwargs):
        return self.rank, args, kwargs


def fail_on(runner, ranks, error):
    if runner.rank in ranks:
        raise error
    return runner.rank


def raise_odd(runner):
    if runner.rank == 2:
        raise OddError(1, 2)


def make_lambda(runner):
    return lambda: 0


def wait_on(runner, rank, seconds):
    if runner.rank == rank:
        time.sleep(seconds)
    return runner.rank


RELEASED = threading.Event()


def hold(runner, rank):
    """Answers once the test is over: whoever waits for it waits until pytest's own limit."""
    if runner.rank == rank:
        RELEASED.wait()
    return runner.rank


def big(runner, size):
    return bytes([runner.rank]) * size


def serve(runner, progress, ring, pipe):
    try:
        workers._run_plans(runner, progress, ring, pipe)
    except (EOFError, OSError):
        pass  # the test is over


@pytest.fixture
def ranks(monkeypatch):
    """A group of three ranks, and their runners."""
    monkeypatch.setattr(workers, "unpack", lambda packed: packed.tolist())
    group = WorkerGroup.__new__(WorkerGroup)
    memory = bytearray(Progress.num_bytes(3) + 4 * NUM_SLOTS * SLOT_SIZE)
    group.progress, group.ring = workers._divide(memory, 3)
    group.num_sent, group.is_broken, group._death, group.workers = 0, False, None, []
    runners = [Runner(rank) for rank in range(3)]
    for runner in runners[1:]:
        pipe, worker_pipe = Pipe()
        arguments = runner, group.progress, group.ring, worker_pipe
        threading.Thread(target=serve, args=arguments, daemon=True).start()
        group.workers.append(Worker(runner.rank, SimpleNamespace(), pipe, pipe))
    RELEASED.clear()
    yield group, runners
    RELEASED.set()
    for worker in group.workers:
        worker.pipe.send_bytes(workers.BELL.pack(0, workers.EXIT))


def call(ranks, method, *args, timeout=None, **kwargs):
    group, runners = ranks
    return group.call(runners[0], method, args, kwargs, timeout)


def check_in_step(ranks):
    group, _ = ranks
    assert not group.is_broken
    assert [rank for rank, _, _ in call(ranks, "echo")] == [0, 1, 2]


def test_results_are_in_rank_order(ranks):
    assert call(ranks, "echo", 1, key=[2]) == [(rank, (1,), {"key": [2]}) for rank in range(3)]
    assert call(ranks, wait_on, 1, 0.1) == [0, 1, 2]  # though rank 2 answers before rank 1
    size = 5 << 20  # more than a pipe holds
    assert call(ranks, big, size) == [bytes([rank]) * size for rank in range(3)]
    assert call(ranks, "echo", b"x" * size)[2] == (2, (b"x" * size,), {})


def test_calls_keep_their_place_among_the_plans(ranks):
    group, runners = ranks
    for number in range(NUM_SLOTS + 1):
        group.send(np.array([number], dtype=np.int32))
    call(ranks, "echo")
    group.send(np.array([99], dtype=np.int32))
    call(ranks, "echo")
    plans = [[number] for number in range(NUM_SLOTS + 1)]
    for runner in runners[1:]:
        assert runner.log == [*plans, "echo", [99], "echo"]


@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_an_exception_comes_back_as_it_is(ranks, failing):
    with pytest.raises(KeyError, match="what failed") as raised:
        call(ranks, fail_on, failing, KeyError("what failed"))
    if failing[0] == 0:
        assert raised.value.__cause__ is None
    else:
        cause = raised.value.__cause__
        assert isinstance(cause, RemoteTraceback)
        assert f"On rank {failing[0]}" in str(cause)
        assert "in fail_on" in str(cause)
    check_in_step(ranks)


def test_an_exception_that_cannot_be_pickled_keeps_its_text(ranks):
    with pytest.raises(RuntimeError, match="OddError: 1 and 2") as raised:
        call(ranks, raise_odd)
    assert "in raise_odd" in str(raised.value.__cause__)
    check_in_step(ranks)


def test_what_cannot_be_pickled_is_named(ranks):
    with pytest.raises(ArgumentError, match=r"lambda.* cannot be sent to the other ranks"):
        call(ranks, lambda runner: 0)
    with pytest.raises(ArgumentError, match=r"result of rank 1, of type function"):
        call(ranks, make_lambda)
    check_in_step(ranks)


def test_a_reply_that_cannot_be_read_is_an_error(ranks, monkeypatch):
    monkeypatch.setattr(workers, "reply_to", lambda runner, packed: b"garbage")
    with pytest.raises(ArgumentError, match="the reply of rank 1 cannot be read here"):
        call(ranks, "echo")
    monkeypatch.undo()
    check_in_step(ranks)


def test_a_timeout_breaks_the_group(ranks):
    assert call(ranks, wait_on, 1, 0.05, timeout=300) == [0, 1, 2]
    assert call(ranks, wait_on, 0, 1.0, timeout=0.2) == [0, 1, 2]  # rank 0 is not broken off
    with pytest.raises(TimeoutError, match="rank 2"):
        call(ranks, hold, 2, timeout=0.1)
    assert ranks[0].is_broken


def test_a_worker_that_has_died_breaks_the_group(ranks):
    group, _ = ranks
    group._death = "rank 1 was killed"
    with pytest.raises(EngineDeadError, match="rank 1 was killed"):
        call(ranks, "echo")
    assert group.is_broken


def test_a_worker_that_dies_during_a_call_is_noticed(ranks):
    group, _ = ranks
    threading.Timer(0.1, lambda: setattr(group, "_death", "rank 2 was killed")).start()
    with pytest.raises(EngineDeadError, match="rank 2 was killed"):
        call(ranks, hold, 2)


def test_messages_are_plain_pickles(ranks):
    """So that tensors travel by value: multiprocessing's own pickler shares their memory."""
    message = workers.pack_call("echo", (1,), {})
    assert pickle.loads(message) == ("echo", (1,), {})
