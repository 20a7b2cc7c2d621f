"""The replicas' processes: how an engine starts them, talks with them and learns of a death.

Messages travel through a pipe to each replica. One thread reads all of them, so that no replica
waits for the engine. Another one for each replica writes, so that the engine waits for none.
"""

import logging
import os
import pickle
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection

from nanovllm.config import Config
from nanovllm.errors import ArgumentError, EngineDeadError
from nanovllm.guards.visible_gpus import VARIABLE, gpus_of
from nanovllm.parallel.calls import Reply
from nanovllm.parallel.process import check_script, open_standard_files, start_process
from nanovllm.parallel.replica_messages import CallReply, Death, Exit, Message, pack, unpack
from nanovllm.parallel.workers import (
    JOIN_SECONDS,
    POLL_SECONDS,
    cause_of_death,
    is_stopped,
)

logger = logging.getLogger("nanovllm")


@dataclass
class Replica:
    """The engine's end of one replica."""

    index: int
    process: "subprocess.Popen[bytes]"
    pipe: connection.Connection
    errors: connection.Connection  # the time and the traceback, if the replica fails
    outbox: "queue.SimpleQueue[bytes | None]" = field(default_factory=queue.SimpleQueue)
    stopped_seconds: float = 0.0  # since somebody has stopped it
    is_given_up: bool = False  # and has been killed therefore

    def __str__(self) -> str:
        return f"replica {self.index} (pid {self.process.pid})"


class ReplicaGroup:
    """`config.data_parallel_size` processes, each with an engine of its own.

    Args:
        config: sent to each, as that of a lone engine.
        device_type: "cuda" (replica i has the i-th `tensor_parallel_size` visible GPUs) or "cpu".
        entry_point: `entry_point(config, pipe)` runs in each; its first message is a `CallReply`
            with a `Started`.

    Attributes:
        started: what each replica has answered at its start.

    Raises:
        ArgumentError: a replica's engine cannot be made.
        EngineDeadError: a replica died during start-up.
        RuntimeError: this process is importing the user's script, see `check_script`.
    """

    def __init__(
        self,
        config: Config,
        device_type: str,
        entry_point: Callable[[Config, connection.Connection], None],
    ) -> None:
        check_script()
        open_standard_files()
        _check_picklable(config)
        self.size = config.data_parallel_size
        self.replicas: list[Replica] = []
        self.deaths: dict[int, str] = {}  # as the engine has been told
        self._inbox: queue.SimpleQueue[tuple[int, bytes | Death]] = queue.SimpleQueue()
        self._put_off: deque[tuple[int, Message]] = deque()  # came while a reply was waited for
        self._num_calls = 0
        self._stopped_at_most = config.worker_timeout
        self._is_closing = False
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def start(index: int) -> Replica:
            own = config.replace(data_parallel_size=1, replica=index)
            name = f"nanovllm-replica-{index}"
            environment = _environment(own, device_type, self.size)
            started = start_process(name, None, entry_point, own, environment=environment)
            return Replica(index, *started)

        self._monitor = threading.Thread(target=self._watch, args=(start, outcome), daemon=True)
        self._monitor.start()
        try:
            error = outcome.get()
            if error is not None:
                raise error
            for replica in self.replicas:
                threading.Thread(target=_write, args=(replica,), daemon=True).start()
            self.started = self._gather(dict.fromkeys(range(self.size), 0))
            if self.deaths:
                raise EngineDeadError("; ".join(self.deaths.values()))
        except BaseException:
            self._kill()
            self.close()
            raise

    @property
    def alive(self) -> list[int]:
        """The indices of the replicas that are not known to be dead."""
        return [index for index in range(self.size) if index not in self.deaths]

    def post(self, index: int, packed: bytes) -> None:
        """Send a packed message to a replica, in order with others, without waiting."""
        self.replicas[index].outbox.put(packed)

    def receive(self) -> tuple[int, Message]:
        """Wait for the next message of any replica; a `Death` comes once for each that has died.

        Raises:
            EngineDeadError: this was the last one.
        """
        while True:
            index, message = self._put_off.popleft() if self._put_off else self._next()
            if not isinstance(message, CallReply):  # else of a call that was broken off
                break
        if isinstance(message, Death) and not self.alive:
            raise EngineDeadError("all replicas have died: " + "; ".join(self.deaths.values()))
        return index, message

    def call(
        self, message: Callable[[int], Message], timeout: float | None = None
    ) -> dict[int, object]:
        """Send each replica a call; their results, without those of replicas that die meanwhile.

        Args:
            message: makes the message of the call's number.
            timeout: seconds to wait for the answers.

        Raises:
            TimeoutError: one has not answered in time.
            EngineDeadError: all have died.
            Exception: what the first failing replica raised. All have answered.
        """
        self._num_calls += 1
        number = self._num_calls
        packed = pack(message(number))
        for index in self.alive:
            self.post(index, packed)
        return self._gather(dict.fromkeys(self.alive, number), timeout)

    def _gather(self, numbers: dict[int, int], timeout: float | None = None) -> dict[int, object]:
        """The results of the calls of these numbers, by the replicas that answer them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: dict[int, Reply] = {}
        while numbers.keys() - replies.keys() - self.deaths.keys():
            index, message = self._next(deadline)
            if isinstance(message, CallReply):
                if numbers.get(index) == message.number:
                    replies[index] = Reply.unpack(message.packed_reply, index)
            else:
                self._put_off.append((index, message))
        results = {index: replies[index].unwrap() for index in sorted(replies)}
        if not self.alive:
            raise EngineDeadError("all replicas have died: " + "; ".join(self.deaths.values()))
        return results

    def _next(self, deadline: float | None = None) -> tuple[int, Message]:
        while True:
            try:
                index, received = self._inbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError("a replica has not answered in time") from None
                continue
            if not isinstance(received, Death):
                return index, unpack(received)
            self.deaths[index] = received.cause
            logger.warning("%s", received.cause)
            return index, received

    def close(self) -> None:
        """End the replicas, kindly if they listen. May be called again."""
        self._is_closing = True
        exit_message = pack(Exit())
        try:
            for index in self.alive:
                if index < len(self.replicas):
                    self.post(index, exit_message)
            self._monitor.join(JOIN_SECONDS)
        finally:  # a second Ctrl-C ends the kindness
            self._kill()
            self._monitor.join(JOIN_SECONDS)  # it reaps them

    def _kill(self) -> None:
        for replica in self.replicas:
            replica.process.kill()

    # ---- the monitor thread -------------------------------------------------------------------

    def _watch(
        self,
        start: Callable[[int], Replica],
        outcome: "queue.SimpleQueue[BaseException | None]",
    ) -> None:
        """Start the replicas, pass on what they write, and stay until they are gone.

        They are killed when this thread ends.
        """
        try:
            for index in range(self.size):
                self.replicas.append(start(index))
        except BaseException as error:
            self._kill()
            outcome.put(error)
        else:
            outcome.put(None)
        pipes = {replica.pipe: replica for replica in self.replicas}
        last_look = time.monotonic()
        while pipes:
            if (now := time.monotonic()) - last_look >= POLL_SECONDS:
                # While this process itself is stopped or suspended, no time passes.
                seconds, last_look = min(now - last_look, 2 * POLL_SECONDS), now
                for replica in pipes.values():
                    self._give_up_if_stopped(replica, seconds)
            for ready in connection.wait(list(pipes), POLL_SECONDS):
                replica = pipes[ready]  # type: ignore[index]
                try:
                    self._inbox.put((replica.index, replica.pipe.recv_bytes()))
                except (EOFError, OSError):  # it has ended, or is about to
                    del pipes[replica.pipe]
                    self._bury(replica)

    def _give_up_if_stopped(self, replica: Replica, seconds: float) -> None:
        """Kill a replica that is stopped for too long; `seconds` after the last look."""
        is_paused = is_stopped(replica.process.pid)
        replica.stopped_seconds = replica.stopped_seconds + seconds if is_paused else 0.0
        if replica.stopped_seconds >= self._stopped_at_most:
            replica.is_given_up = True
            replica.process.kill()

    def _bury(self, replica: Replica) -> None:
        cause = cause_of_death(str(replica), replica.process, replica.errors)[1]
        if replica.is_given_up:
            cause = f"{replica} was stopped (SIGSTOP) for {self._stopped_at_most:g} s and given up"
        replica.process.kill()
        replica.process.wait()
        replica.errors.close()
        replica.outbox.put(None)
        if not self._is_closing:
            self._inbox.put((replica.index, Death(cause)))


def _write(replica: Replica) -> None:
    """Send what is in the outbox, until there is a None; the pipe is closed then."""
    while (packed := replica.outbox.get()) is not None:
        try:
            replica.pipe.send_bytes(packed)
        except OSError:
            pass  # it has ended, as the monitor sees
    replica.pipe.close()


def _check_picklable(config: Config) -> None:
    try:
        pickle.dumps(config)
    except Exception as error:  # of many types
        raise ArgumentError(
            f"the engine's parameters cannot be sent to its replicas: {error} (instead of a "
            "tokenizer object give the path of its directory)"
        ) from error


def _environment(config: Config, device_type: str, size: int) -> dict[str, str]:
    """Environment variables of a replica: ours, with its own GPUs, and as of no rank of vLLM's.

    size: how many replicas share the host's CPUs.
    """
    ours = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_DP_")}
    if device_type != "cuda":
        num_threads = max(1, (os.cpu_count() or 1) // (size * config.tensor_parallel_size))
        return {"OMP_NUM_THREADS": str(num_threads)} | ours
    assert config.replica is not None
    gpus = gpus_of(config.replica, config.tensor_parallel_size, os.environ.get(VARIABLE))
    return ours | {VARIABLE: gpus}
