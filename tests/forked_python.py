"""Python processes that are forked from one that has imported the engine already.

To import torch takes a new process two CPU seconds and more. A test whose point is not how a
process starts lets it begin here: a process of its own in all other respects, a child of the
caller, that runs a program as Python's main module and ends as Python ends.

A helper process waits for orders. It forks twice, so that its grandchild is an orphan, and the
caller adopts that (PR_SET_CHILD_SUBREAPER).
"""

import ctypes
import fcntl
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POPEN = subprocess.Popen
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
HELPER = "test helper"  # its name in /proc
MAX_ORDER_BYTES = 1 << 17
MAX_DESCRIPTORS = 16
SECONDS = 600  # to import the engine on a slow machine; a process that could not begin says nothing
FREE_DESCRIPTORS = 500  # from here on none is asked for
FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parent / "cpu_model")]
LIGHT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # read by what the helper imports

arguments_of: dict[int, list[str]] = {}  # of this process's children: /proc does not know them
_helper: "_Helper | None" = None


@dataclass
class Order:
    """What a new process is to be."""

    parent: int
    argv: list[str]  # what follows Python and its flags
    environment: dict[str, str]
    folder: str | None
    descriptors: list[int]  # the numbers of those that come with the order
    blocked: set[int]  # signals
    has_session: bool
    forks_workers: bool


class ForkedPython(POPEN):
    """A `Popen` of `[sys.executable, ...]` whose process has imported the engine.

    Args:
        args: after Python "-c" and a program, "-m" and a module, or the path of a script; then
            arguments. Python's flags and PYTHONPATH are not looked at.
        forks_workers: what an engine of the process starts begins in the same way.
        kwargs: of `Popen`.
    """

    def __init__(self, args: Sequence[str], forks_workers: bool = False, **kwargs: Any) -> None:
        self.forks_workers = forks_workers
        super().__init__(args, **kwargs)

    def _execute_child(self, *args: Any) -> None:
        global _helper
        names = inspect.signature(POPEN._execute_child)
        given = names.bind(self, *args).arguments
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        standard = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        descriptors = {i: i if fd == -1 else fd for i, fd in enumerate(standard)}
        descriptors |= {fd: fd for fd in given["pass_fds"]}
        words = list(map(str, given["args"]))
        programs = (i for i, word in enumerate(words) if word in ("-c", "-m"))
        start = next(programs) if words[1].startswith("-") else 1  # after Python's flags
        order = Order(
            parent=os.getpid(),
            argv=words[start:],
            environment=dict(os.environ if given["env"] is None else given["env"]),
            folder=given["cwd"] and str(given["cwd"]),
            descriptors=list(descriptors),
            blocked=set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
            has_session=given["start_new_session"],
            forks_workers=self.forks_workers,
        )
        if _helper is None or _helper.owner != os.getpid():
            _helper = _Helper.start()
        try:
            self.pid = _helper.carry_out(order, list(descriptors.values()))
        finally:
            self._close_pipe_fds(*(given[name] for name in pipes))
        self._child_created = True
        arguments_of[self.pid] = words


class _Helper:
    """This process's end of its helper, which ends when all copies of this end are closed."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.owner = connection, os.getpid()
        self.connection.settimeout(SECONDS)
        self.lock = threading.Lock()  # an engine starts its processes in a thread

    @classmethod
    def start(cls) -> "_Helper":
        """A new Python process, which imports the engine."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = f"import forked_python\nforked_python.main({theirs.fileno()})"
        paths = [str(Path(__file__).parents[1]), *FOLDERS]
        with theirs:
            POPEN(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | LIGHT | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        return cls(ours)

    def carry_out(self, order: Order, descriptors: list[int]) -> int:
        """The process's id."""
        with self.lock:
            _prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self.connection, [pickle.dumps(order)], descriptors)
                answer = self.connection.recv(100)
            finally:
                _prctl(PR_SET_CHILD_SUBREAPER, 0)
        assert answer, "the helper has ended, see its message"
        return int(answer)


def start(command: Sequence[str], **kwargs: Any) -> subprocess.Popen:
    """`Popen`, and `ForkedPython` for a process of the engine."""
    if not any("nanovllm.parallel.process" in word for word in command):
        return POPEN(command, **kwargs)
    is_replica = any(word.startswith("nanovllm-replica-") for word in command)
    return ForkedPython(command, forks_workers=is_replica, **kwargs)


@contextmanager
def workers_are_forked() -> Iterator[None]:
    """Within it the processes that engines start begin as a `ForkedPython`."""
    subprocess.Popen = start
    try:
        yield
    finally:
        subprocess.Popen = POPEN


def _prctl(option: int, value: int | bytes) -> None:
    assert ctypes.CDLL(None).prctl(option, value) == 0


# ---- the helper -------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """What the helper runs, and each process that it forks; they are of the caller's group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from nanovllm import LLM  # noqa: F401, I001
    import engine_checks  # noqa: F401
    import nanovllm.parallel.replicas
    import nanovllm.parallel.workers  # noqa: F401

    assert "transformers" not in sys.modules  # neither the engine nor engine_checks needs them
    run(serve(socket.socket(fileno=descriptor)))


def run(order: Order) -> None:
    """Run the order's program as Python's main module."""
    global _helper
    if order.forks_workers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            theirs.close()
            _helper = _Helper(ours)
            subprocess.Popen = start
        else:  # a helper of its own; it keeps no pipe of ours open
            ours.close()
            with open(os.devnull, "r+b", buffering=0) as null:
                for descriptor in range(3):
                    os.dup2(null.fileno(), descriptor)
            order = serve(theirs)
    first, *arguments = order.argv
    namespace = vars(sys.modules["__main__"])
    del namespace["forked_python"]
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), [first, *arguments[1:]]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    if first == "-c":
        sys.path[0], sys.argv = "", [first, *arguments[1:]]
        code = compile(arguments[0], "<string>", "exec")
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.realpath(first)), order.argv
        namespace["__file__"] = first
        code = compile(Path(first).read_bytes(), first, "exec")
    exec(code, namespace)


def serve(connection: socket.socket) -> Order:
    """Fork for each order; returns in the new processes alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(PR_SET_NAME, HELPER.encode())
    # Out of the way of the numbers that an order asks for.
    connection = socket.socket(
        fileno=fcntl.fcntl(connection.detach(), fcntl.F_DUPFD_CLOEXEC, FREE_DESCRIPTORS)
    )
    while True:
        packed, received, _, _ = socket.recv_fds(connection, MAX_ORDER_BYTES, MAX_DESCRIPTORS)
        if not packed:
            os._exit(0)
        if first := os.fork():
            os.waitpid(first, 0)
            for descriptor in received:
                os.close(descriptor)
        elif os.fork():
            os._exit(0)
        else:
            order = pickle.loads(packed)
            while os.getppid() != order.parent:
                time.sleep(0.001)
            _become(order, received)
            connection.send(str(os.getpid()).encode())
            connection.close()
            return order


def _become(order: Order, received: list[int]) -> None:
    """Give this process the files, the folder, the environment and the signals of the order."""
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, FREE_DESCRIPTORS) for fd in received]
    for descriptor in received:
        os.close(descriptor)
    for copy, descriptor in zip(copies, order.descriptors, strict=True):
        os.dup2(copy, descriptor)
        os.close(copy)
    if order.has_session:
        os.setsid()
    if order.folder is not None:
        os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    _prctl(PR_SET_NAME, b"python")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, order.blocked)
