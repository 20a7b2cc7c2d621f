"""Tensor-parallel workers: how rank 0 starts them, feeds them plans and learns of a death.

Plans travel through an anonymous shared-memory ring; a pipe to each worker rings the bell and
brings the acknowledgement back. Calls, which are rare and of any size, travel through the pipe, in
order with the plans.
"""

import math
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.startup import start_model_runner
from nanovllm.errors import EngineDeadError
from nanovllm.guards.ownership import bind_to_process
from nanovllm.kernels.cache_units import COPY_UNIT
from nanovllm.parallel.calls import Reply, pack_call, reply_to
from nanovllm.parallel.packed_plans import max_packed_size, unpack
from nanovllm.parallel.process import (
    SharedMemory,
    check_script,
    map_memory,
    open_standard_files,
    start_process,
)
from nanovllm.parallel.tensor_parallel import TensorParallel

T = TypeVar("T")
NUM_SLOTS = 4  # plans that may wait unread
BELL = struct.Struct("<qq")  # sequence number, int32 words; a negative size is one of the below
EXIT = -1
CALL = -2  # the next message is a packed call, which is answered by a packed reply
JOIN_SECONDS = 5.0
POLL_SECONDS = 0.2
PLAN = 1 << 20  # more than a plan has sums over the ranks
PROGRESS_STRIDE = 8  # int64 numbers: a rank's progress has a cache line of its own


@dataclass
class Worker:
    """Rank 0's end of one worker."""

    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: connection.Connection  # bells and acknowledgements, before that the start-up dialogue
    errors: connection.Connection  # the time and the traceback, if the worker fails
    num_unread: int = 0  # plans sent and not acknowledged
    progress: int = 0  # when the monitor last looked
    silent_seconds: float = 0.0  # since it last did what rank 0 waits for

    def __str__(self) -> str:
        return f"tensor-parallel rank {self.rank} (pid {self.process.pid})"


class WorkerGroup:
    """The workers of ranks 1 to size - 1, as rank 0 sees them.

    Args:
        config: sent to every worker.
        device_type: "cuda" (rank r uses GPU r) or "cpu".

    Raises:
        EngineDeadError: a worker died during start-up.
        RuntimeError: this process is importing the user's script, see `check_script`.
    """

    def __init__(self, config: Config, device_type: str) -> None:
        check_script()
        open_standard_files()
        size = config.tensor_parallel_size
        self.slot_size = max_packed_size(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.row_width,
            config.kvcache_block_size // COPY_UNIT,
        )
        memory = SharedMemory(Progress.num_bytes(size) + 4 * NUM_SLOTS * self.slot_size)
        self.progress, self.ring = _divide(memory.buffer, size)
        self.num_sent = 0
        self.workers: list[Worker] = []
        self.tp: TensorParallel | None = None
        self.is_broken = False  # the ranks are out of step, and may wait for each other for ever
        self.expects_answers = True  # to more than plans: in the start-up, and in a call
        self.timeout = config.worker_timeout
        self._death: str | None = None
        self._is_closing = False
        self._lock = threading.Lock()
        self._store: dist.TCPStore | None = _start_store(size)
        port = self._store.port
        started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def start(rank: int) -> Worker:
            name, arguments = f"nanovllm-rank-{rank}", (rank, config, device_type, port)
            return Worker(rank, *start_process(name, memory, _worker_main, *arguments))

        self._monitor = threading.Thread(
            target=self._watch, args=(start, range(1, size), started), daemon=True
        )
        self._monitor.start()
        try:
            error = started.get()
            if error is not None:
                raise error
            memory.close_file()
            for worker in self.workers:
                self._receive(worker)  # "ready": everything is imported
            device = _device(0, device_type)
            self.tp = self._interruptible(lambda: _connect(0, config, port, device))
            self.tp.on_collective = partial(self.progress.enter_collective, 0)
            self.tp.while_waiting = self._raise_if_dead
            bind_to_process(self, self.tp)
        except BaseException:
            self.is_broken = True
            self.close()
            raise

    def agree(self, num_blocks: int) -> int:
        """The smallest number of KV blocks of all ranks, which every rank then uses."""
        smallest = min([num_blocks, *(self._receive(worker) for worker in self.workers)])
        for worker in self.workers:
            worker.pipe.send(smallest)
        return smallest

    def finish_start(self) -> None:
        """Wait until every worker takes plans."""
        for worker in self.workers:
            self._receive(worker)
        self.expects_answers = False

    def send(self, packed: np.ndarray) -> None:
        """Send a packed plan to every worker; waits only if the ring is full.

        A slot is rewritten only after every worker has acknowledged the plan before in it.
        """
        self.check()
        for worker in self.workers:
            while worker.num_unread >= NUM_SLOTS:
                self._receive(worker)
                worker.num_unread -= 1
        self.ring[self.num_sent % NUM_SLOTS, : len(packed)] = packed
        bell = BELL.pack(self.num_sent, len(packed))
        self.progress.begin(0, self.num_sent)
        self.num_sent += 1
        for worker in self.workers:
            self._post(worker, bell)
            worker.num_unread += 1

    def call(
        self,
        runner: ModelRunner,
        method: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None = None,
    ) -> list[Any]:
        """Call a method on every rank, after all plans sent before; the results in rank order.

        Args:
            runner: rank 0's, in whose process its call is made.
            method: see `ModelRunner.call`.
            args: of the call; pickled for the workers.
            kwargs: likewise.
            timeout: seconds for the workers to answer; rank 0 itself is not broken off.

        Raises:
            ArgumentError: the call cannot be pickled, and was not made; or a result cannot be.
            TimeoutError: the ranks are out of step then (`is_broken`).
            EngineDeadError: a worker died.
            Exception: what the lowest failing rank raised. All ranks have answered.
        """
        message = pack_call(method, args, kwargs)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            self.check()
            self.expects_answers = True
            for worker in self.workers:
                while worker.num_unread:  # acknowledgements come before the reply
                    self._receive(worker)
                    worker.num_unread -= 1
                self._post(worker, BELL.pack(self.num_sent, CALL))
                self._post(worker, message)
            replies = [Reply.of(lambda: runner.call(method, *args, **kwargs))]
            for worker in self.workers:
                packed = self._receive_bytes(worker, deadline)
                replies.append(Reply.unpack(packed, worker.rank))
        except BaseException:
            self.is_broken = True
            raise
        finally:
            self.progress.end(0, self.num_sent - 1)  # the call may have entered collectives
            self.expects_answers = False
        return [reply.unwrap() for reply in replies]

    def check(self) -> None:
        """EngineDeadError if a worker has died. Rank 0 itself has done its part of all plans."""
        self._raise_if_dead()
        self.progress.end(0, self.num_sent - 1)

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def wait_for_death(self, seconds: float) -> str | None:
        """The cause if a worker has died or dies within `seconds`."""
        deadline = time.monotonic() + seconds
        while self._death is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._death

    def break_off(self) -> None:
        """Kill the workers, and end what rank 0 has in flight with them.

        In this order: gloo lets go of a group only when a rank that does not come has ended.
        """
        with self._lock:
            self._is_closing = True
        self._kill()
        if self.tp is not None:
            self.tp.abort()

    def close(self) -> None:
        """End the workers, kindly unless they are broken, and leave the group. May be called again.

        Rank 0's CUDA graphs must be gone by now, see `TensorParallel.abort`.
        """
        with self._lock:
            self._is_closing = True
        try:
            if self._death is None and not self.is_broken:
                self._ask_to_exit()
        finally:  # a second Ctrl-C ends the kindness
            self._kill()
            self._monitor.join(JOIN_SECONDS)  # it reaps them
            for worker in self.workers:
                worker.pipe.close()
            self.workers.clear()
            if self.tp is not None:
                self.tp.close()
            self._store = None

    def _ask_to_exit(self) -> None:
        for worker in self.workers:
            try:
                worker.pipe.send_bytes(BELL.pack(self.num_sent, EXIT))
            except OSError:
                pass  # it is dead already
        self._monitor.join(JOIN_SECONDS)

    def _kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()

    def _interruptible(self, function: Callable[[], T]) -> T:
        """`function()`, which may wait in C++, where neither Ctrl-C nor a death would end it."""
        outcomes: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        threading.Thread(target=lambda: outcomes.put(Reply.of(function)), daemon=True).start()
        while True:
            try:
                return outcomes.get(timeout=POLL_SECONDS).unwrap()
            except queue.Empty:
                self._raise_if_dead()
            except Exception as error:  # perhaps because a worker has failed
                cause = self.wait_for_death(1.0)
                if cause:
                    raise EngineDeadError(cause) from error
                raise

    def _post(self, worker: Worker, message: bytes) -> None:
        try:
            worker.pipe.send_bytes(message)
        except OSError:
            self._raise_death(worker)

    def _receive(self, worker: Worker) -> Any:
        return pickle.loads(self._receive_bytes(worker))

    def _receive_bytes(self, worker: Worker, deadline: float = math.inf) -> bytes:
        """The worker's next message; TimeoutError if there is none by `deadline`."""
        while True:
            seconds = min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            try:
                if worker.pipe.poll(seconds):
                    return worker.pipe.recv_bytes()
            except (EOFError, OSError):
                self._raise_death(worker)
            self._raise_if_dead()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"tensor-parallel rank {worker.rank} has not answered in time")

    def _raise_death(self, worker: Worker) -> NoReturn:
        # The pipe closes a moment before the process is gone and the monitor knows why.
        cause = self.wait_for_death(JOIN_SECONDS)
        raise EngineDeadError(cause or f"tensor-parallel rank {worker.rank} closed its pipe")

    # ---- the monitor thread -------------------------------------------------------------------

    def _watch(
        self,
        start: Callable[[int], Worker],
        ranks: range,
        started: "queue.SimpleQueue[BaseException | None]",
    ) -> None:
        """Start the workers, and stay until they are gone: they are killed when this thread ends.

        If one of them dies, or does not do what rank 0 waits for, the cause is recorded and all
        are killed, which breaks the collectives.
        """
        try:
            for rank in ranks:
                self.workers.append(start(rank))
        except BaseException as error:
            started.put(error)
        else:
            started.put(None)
        if self._is_closing:  # Ctrl-C came meanwhile
            self._kill()
        watched = {worker.errors: worker for worker in self.workers}
        last_look = time.monotonic()
        while watched:
            ready = connection.wait(list(watched), POLL_SECONDS)
            ended = [
                w for w in watched.values() if w.errors in ready or w.process.poll() is not None
            ]
            # While this process itself is stopped or suspended, no time passes.
            now = time.monotonic()
            seconds, last_look = min(now - last_look, 2 * POLL_SECONDS), now
            if self._death is None and not self._is_closing:
                cause = _first_cause(ended) if ended else self._cause_of_silence(seconds)
                if cause is not None:
                    self._die(cause)
            for worker in ended:
                worker.process.wait()
                worker.errors.close()
                del watched[worker.errors]

    def _cause_of_silence(self, seconds: float) -> str | None:
        """What keeps rank 0 waiting too long, if anything; `seconds` after the last look."""
        for worker in list(self.workers):
            progress = self.progress.of(worker.rank)
            is_paused = is_stopped(worker.process.pid)
            # The start-up and a call may take a rank as long as they like, while it runs.
            is_late = is_paused if self.expects_answers else progress < self.progress.of(0)
            has_moved, worker.progress = progress != worker.progress, progress
            worker.silent_seconds += seconds
            if has_moved or not is_late:
                worker.silent_seconds = 0.0
            if worker.silent_seconds >= self.timeout:
                state = "is stopped (SIGSTOP) and " if is_paused else ""
                return (
                    f"{worker} {state}has not answered for {self.timeout:g} s; worker_timeout "
                    "says how long to wait"
                )
        return None

    def _die(self, cause: str) -> None:
        with self._lock:
            if self._is_closing:
                return
            self._death = cause
        self._kill()
        # Rank 0 may be blocked in a collective that will never end.
        if self.tp is not None:
            self.tp.abort()
        self._store = None


def _first_cause(ended: list[Worker]) -> str:
    """Why the first of these workers failed, whose end may have made others fail.

    One that is killed leaves no word, and no word comes first.
    """
    return min(cause_of_death(str(w), w.process, w.errors) for w in ended)[1]


def cause_of_death(
    name: str, process: "subprocess.Popen[bytes]", errors: connection.Connection
) -> tuple[float, str]:
    """Why a process that has closed its pipes failed, and when it says that it did, else 0.0."""
    try:
        if errors.poll():
            seconds, text = errors.recv()
            return seconds, f"{name} failed:\n{text}"
    except (EOFError, OSError):
        pass  # it wrote nothing
    try:
        exitcode = process.wait(JOIN_SECONDS)
    except subprocess.TimeoutExpired:
        return 0.0, f"{name} closed its pipe"
    if exitcode < 0:
        return 0.0, f"{name} was killed by {signal.Signals(-exitcode).name}"
    return 0.0, f"{name} exited with code {exitcode}"


def _device(rank: int, device_type: str) -> torch.device:
    return torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")


def _connect(rank: int, config: Config, port: int, device: torch.device) -> TensorParallel:
    # Rank 0 too is only a client here, so that closing the store ends its waits.
    size, hidden_size = config.tensor_parallel_size, config.model_config.hidden_size
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    dtype = config.resolve_dtype()
    shares_memory = not config.disable_custom_all_reduce
    return TensorParallel.connect(rank, size, store, device, hidden_size, dtype, shares_memory)


def _start_store(size: int) -> dist.TCPStore:
    """Where the ranks meet. By itself a store listens on all interfaces, so it gets a socket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # the system picks a free port
        listener.listen()
        port = listener.getsockname()[1]
        return dist.TCPStore(
            "127.0.0.1",
            port,
            size,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store closes it
        )


def is_stopped(pid: int) -> bool:
    """Whether a child of this process is stopped, as by SIGSTOP; False where nobody can tell."""
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


class Progress:
    """How far each rank has got with the plans, in shared memory; a rank writes its own number.

    The number of a plan begun is its place, counted from 1, times PLAN, and 1 more for each sum
    over the ranks that has been entered since.
    """

    def __init__(self, buffer: Any) -> None:
        self._numbers = memoryview(buffer).cast("q")

    @staticmethod
    def num_bytes(size: int) -> int:
        """Of `size` ranks."""
        return size * PROGRESS_STRIDE * 8

    def of(self, rank: int) -> int:
        """The rank's number."""
        return self._numbers[rank * PROGRESS_STRIDE]

    def begin(self, rank: int, plan: int) -> None:
        """The rank has taken up the plan of this number, counted from 0."""
        self._numbers[rank * PROGRESS_STRIDE] = (plan + 1) * PLAN

    def end(self, rank: int, plan: int) -> None:
        """The rank has done its part of this plan, and of all before."""
        self._numbers[rank * PROGRESS_STRIDE] = (plan + 2) * PLAN - 1

    def enter_collective(self, rank: int) -> None:
        """The rank waits for the others from now on."""
        self._numbers[rank * PROGRESS_STRIDE] += 1


def _worker_main(
    rank: int,
    config: Config,
    device_type: str,
    port: int,
    memory: int,
    pipe: connection.Connection,
) -> None:
    size = config.tensor_parallel_size
    device = _device(rank, device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    pipe.send("ready")
    tp = _connect(rank, config, port, device)
    progress, ring = _divide(map_memory(memory), size)
    tp.on_collective = partial(progress.enter_collective, rank)

    def agree(num_blocks: int) -> int:
        pipe.send(num_blocks)
        return pipe.recv()

    runner = start_model_runner(config, device, tp, agree)
    pipe.send("serving")
    _run_plans(runner, progress, ring, pipe)
    if device_type == "cuda":
        torch.cuda.synchronize(device)  # other ranks may still wait for what this one sends


def _divide(buffer: Any, size: int) -> tuple[Progress, np.ndarray]:
    """The two parts of the shared memory: each rank's progress, and the ring of plans."""
    end = Progress.num_bytes(size)
    ring = np.frombuffer(buffer, dtype=np.int32, offset=end).reshape(NUM_SLOTS, -1)
    return Progress(memoryview(buffer)[:end]), ring


def _run_plans(
    runner: ModelRunner, progress: Progress, ring: np.ndarray, pipe: connection.Connection
) -> None:
    expected = 0
    progress.end(runner.rank, expected - 1)
    while True:
        number, size = BELL.unpack(pipe.recv_bytes())
        if size == EXIT:
            return
        if size == CALL:
            reply = reply_to(runner, pipe.recv_bytes())
            progress.end(runner.rank, expected - 1)
            pipe.send_bytes(reply)
            continue
        assert number == expected, f"plan {number} arrived, {expected} was next"
        expected += 1
        progress.begin(runner.rank, number)
        plan = unpack(ring[number % NUM_SLOTS, :size].copy())
        pipe.send(None)  # the slot is free
        runner.execute(plan)
        progress.end(runner.rank, number)
