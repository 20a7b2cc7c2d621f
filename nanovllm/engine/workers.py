"""Tensor-parallel worker processes: how rank 0 starts them, feeds them plans and learns of a death.

Plans travel through an anonymous shared-memory ring (no name, so nothing can collide or stay
behind); a pipe to each worker rings the bell and brings the acknowledgement back. Calls, which are
rare and of any size, travel through the pipe, in order with the plans.
"""

import math
import os
import pickle
import signal
import struct
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.step_plan import StepPlan
from nanovllm.engine.worker_calls import Reply, pack_call, reply_to
from nanovllm.errors import EngineDeadError
from nanovllm.layers.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner

NUM_SLOTS = 4  # plans that may wait unread
BELL = struct.Struct("<qq")  # sequence number, int32 words; a negative size is one of the below
EXIT = -1
CALL = -2  # the next message is a packed call, which is answered by a packed reply
JOIN_SECONDS = 5.0
POLL_SECONDS = 0.2


@dataclass
class Worker:
    """Rank 0's end of one worker."""

    rank: int
    process: Any
    pipe: connection.Connection  # bells and acknowledgements, before that the start-up dialogue
    errors: connection.Connection  # a traceback, if the worker fails
    num_unread: int = 0  # plans sent and not acknowledged


class WorkerGroup:
    """The workers of ranks 1 to size - 1, as rank 0 sees them.

    Args:
        config: sent to every worker.
        device_type: "cuda" (rank r uses GPU r) or "cpu".

    Raises:
        EngineDeadError: a worker died during start-up.
    """

    def __init__(self, config: Config, device_type: str) -> None:
        context = get_context("spawn")
        size = config.tensor_parallel_size
        self.slot_size = StepPlan.max_packed_size(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.row_width,
        )
        memory = context.RawArray("i", NUM_SLOTS * self.slot_size)
        self.ring = np.frombuffer(memory, dtype=np.int32).reshape(NUM_SLOTS, self.slot_size)
        self.num_sent = 0
        self.workers: list[Worker] = []
        self.tp: TensorParallel | None = None
        self.is_broken = False  # the ranks are out of step, and may wait for each other for ever
        self._death: str | None = None
        self._is_closing = False
        self._lock = threading.Lock()
        # Port 0: the system picks a free one.
        self._store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        try:
            for rank in range(1, size):
                pipe, worker_pipe = context.Pipe()
                errors, worker_errors = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker_main,
                    args=(
                        rank,
                        config,
                        device_type,
                        self._store.port,
                        memory,
                        worker_pipe,
                        worker_errors,
                    ),
                    name=f"nanovllm-rank-{rank}",
                    daemon=True,
                )
                process.start()
                # With our copies closed, the end of a process closes its pipes for the other side.
                worker_pipe.close()
                worker_errors.close()
                self.workers.append(Worker(rank, process, pipe, errors))
            self._monitor = threading.Thread(target=self._watch, daemon=True)
            self._monitor.start()
            for worker in self.workers:
                self._receive(worker)  # "ready": imported and connected to the store
            self.tp = _connect(0, config, self._store, _device(0, device_type))
        except BaseException:
            self.close()
            raise

    def agree(self, num_blocks: int) -> int:
        """The smallest number of KV blocks of all ranks, which every rank then uses."""
        smallest = min([num_blocks, *(self._receive(worker) for worker in self.workers)])
        for worker in self.workers:
            worker.pipe.send(smallest)
        return smallest

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
        self.num_sent += 1
        for worker in self.workers:
            self._post(worker, bell)
            worker.num_unread += 1

    def call(
        self,
        runner: "ModelRunner",
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
        return [reply.unwrap() for reply in replies]

    def check(self) -> None:
        """EngineDeadError if a worker has died."""
        if self._death is not None:
            raise EngineDeadError(self._death)

    def wait_for_death(self, seconds: float) -> str | None:
        """The cause if a worker has died or dies within `seconds`."""
        deadline = time.monotonic() + seconds
        while self._death is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._death

    def close(self) -> None:
        """End the workers, kindly unless they are broken, and leave the group. May be called again.

        Rank 0's CUDA graphs must be gone by now, see `TensorParallel.abort`.
        """
        with self._lock:
            self._is_closing = True
        for worker in self.workers:
            try:
                worker.pipe.send_bytes(BELL.pack(self.num_sent, EXIT))
            except OSError:
                pass  # it is dead already
        is_healthy = self._death is None and not self.is_broken
        deadline = time.monotonic() + (JOIN_SECONDS if is_healthy else 0.0)
        for worker in self.workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self.workers.clear()
        if self.tp is not None:
            self.tp.close()

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
            self.check()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"tensor-parallel rank {worker.rank} has not answered in time")

    def _raise_death(self, worker: Worker) -> NoReturn:
        # The pipe closes a moment before the process is gone and the monitor knows why.
        cause = self.wait_for_death(JOIN_SECONDS)
        raise EngineDeadError(cause or f"tensor-parallel rank {worker.rank} closed its pipe")

    def _watch(self) -> None:
        """Monitor thread: on a worker's death, record the cause and break the collectives."""
        workers = list(self.workers)
        ended = connection.wait([worker.process.sentinel for worker in workers])
        with self._lock:
            if self._is_closing:
                return
            dead = next(worker for worker in workers if worker.process.sentinel in ended)
            self._death = _cause_of_death(dead)
        # Rank 0 may be blocked in a collective that will never end.
        if self.tp is not None:
            self.tp.abort()


def _device(rank: int, device_type: str) -> torch.device:
    return torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")


def _connect(rank: int, config: Config, store: dist.Store, device: torch.device) -> TensorParallel:
    size, hidden_size = config.tensor_parallel_size, config.hf_config.hidden_size
    dtype = config.resolve_dtype()
    shares_memory = not config.disable_custom_all_reduce
    return TensorParallel.connect(rank, size, store, device, hidden_size, dtype, shares_memory)


def _cause_of_death(worker: Worker) -> str:
    worker.process.join()
    exitcode = worker.process.exitcode
    where = f"tensor-parallel rank {worker.rank} (pid {worker.process.pid})"
    try:
        if worker.errors.poll():
            return f"{where} failed:\n{worker.errors.recv()}"
    except (EOFError, OSError):
        pass  # it wrote nothing
    if exitcode is not None and exitcode < 0:
        return f"{where} was killed by {signal.Signals(-exitcode).name}"
    return f"{where} exited with code {exitcode}"


def _worker_main(
    rank: int,
    config: Config,
    device_type: str,
    port: int,
    memory: Any,
    pipe: connection.Connection,
    errors: connection.Connection,
) -> None:
    # Ctrl-C reaches the whole process group; rank 0 alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _serve(rank, config, device_type, port, memory, pipe)
        status = 0
    except (EOFError, BrokenPipeError):
        status = 1  # rank 0 is gone
    except BaseException:
        errors.send(traceback.format_exc())
        status = 1
    # At once: nothing is to be saved, and the usual way out waits for device work and for peers.
    os._exit(status)


def _exit_with_parent() -> None:
    """Watchdog thread: a rank blocked in a collective must not outlive rank 0."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _serve(
    rank: int,
    config: Config,
    device_type: str,
    port: int,
    memory: Any,
    pipe: connection.Connection,
) -> None:
    from nanovllm.engine.model_runner import ModelRunner

    device = _device(rank, device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.tensor_parallel_size))
    store = dist.TCPStore("127.0.0.1", port, config.tensor_parallel_size, is_master=False)
    pipe.send("ready")
    tp = _connect(rank, config, store, device)

    def agree(num_blocks: int) -> int:
        pipe.send(num_blocks)
        return pipe.recv()

    runner = ModelRunner(config, device, tp, agree)
    _run_plans(runner, memory, pipe)
    if device_type == "cuda":
        torch.cuda.synchronize(device)  # other ranks may still wait for what this one sends


def _run_plans(runner: "ModelRunner", memory: Any, pipe: connection.Connection) -> None:
    ring = np.frombuffer(memory, dtype=np.int32).reshape(NUM_SLOTS, -1)
    expected = 0
    while True:
        number, size = BELL.unpack(pipe.recv_bytes())
        if size == EXIT:
            return
        if size == CALL:
            pipe.send_bytes(reply_to(runner, pipe.recv_bytes()))
            continue
        assert number == expected, f"plan {number} arrived, {expected} was next"
        expected += 1
        plan = StepPlan.unpack(ring[number % NUM_SLOTS, :size].copy())
        pipe.send(None)  # the slot is free
        runner.execute(plan)
