"""The process of a worker or a replica: how another one starts it, and how it ends with that.

The new process first runs `main`, which imports nothing heavy: it watches over rank 0 before it
loads torch or anything of the user's. The user's script is not run again. It is imported only if
something that it defines is sent to the worker.
"""

import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from multiprocessing import connection, spawn
from typing import Any

from nanovllm.guards.garbage import heavy_imports

WATCH_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
# The last place to look, should the others be relative to a folder that has been left.
PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# The module search path comes first, so that a file of the working directory replaces no module.
COMMAND = """import sys
sys.path[:] = {path!r}
from nanovllm.parallel.process import main
main()"""
MAIN_MODULE_KEYS = ("init_main_from_name", "init_main_from_path")
GUARD = (
    "an engine with tensor_parallel_size > 1 cannot be made while another process imports this "
    'script: put what the script runs under `if __name__ == "__main__":`'
)

_main_module: dict[str, Any] = {}  # in a worker: how to import the user's script
_is_main_module_imported = False


# ---- rank 0 -----------------------------------------------------------------------------------


class SharedMemory:
    """Memory of several processes. It has no name, so nothing can collide or stay behind."""

    def __init__(self, num_bytes: int) -> None:
        if hasattr(os, "memfd_create"):
            self._file = open(os.memfd_create("nanovllm"), "r+b")  # noqa: SIM115 (see `close_file`)
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._file.truncate(num_bytes)
        self.buffer = mmap.mmap(self._file.fileno(), num_bytes)

    def fileno(self) -> int:
        """The descriptor that `map_memory` takes in another process."""
        return self._file.fileno()

    def close_file(self) -> None:
        """No other process will map it."""
        self._file.close()


def map_memory(fileno: int) -> mmap.mmap:
    """The memory behind a descriptor, which is closed."""
    buffer = mmap.mmap(fileno, os.fstat(fileno).st_size)
    os.close(fileno)
    return buffer


def open_standard_files() -> None:
    """Let descriptors 0 to 2 be open, as in a daemon that has closed them they are not.

    Else memory or a pipe would get one of these numbers, and what a library prints would go there.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


def check_script() -> None:
    """RuntimeError in a process that is importing the user's script, which must not start any."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(GUARD)


def start_process(
    name: str,
    memory: SharedMemory | None,
    entry_point: Callable[..., None],
    *args: Any,
    environment: Mapping[str, str] | None = None,
) -> tuple["subprocess.Popen[bytes]", connection.Connection, connection.Connection]:
    """Run `entry_point(*args, memory's descriptor, pipe)` in a new process.

    Without memory there is no descriptor.

    It is killed when the calling thread ends, and so with this process.

    Args:
        name: for `ps`.
        memory: shared with it, or None.
        entry_point: defined at the top level of a module; pickled, like `args`.
        environment: its environment variables; None: ours.

    Returns:
        The process; the other end of its pipe; a pipe from which its time of failure and its
        traceback can be received if it fails.
    """
    pipe, worker_pipe = multiprocessing.Pipe()
    errors, worker_errors = multiprocessing.Pipe(duplex=False)
    preparation = spawn.get_preparation_data(name)
    del preparation["authkey"]
    main_module = {key: preparation.pop(key) for key in MAIN_MODULE_KEYS if key in preparation}
    descriptors = [worker_pipe.fileno(), worker_errors.fileno()]
    if memory is not None:
        descriptors.append(memory.fileno())
    command = [
        os.fsdecode(spawn.get_executable()),
        *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
        "-c",
        COMMAND.format(path=[*map(str, preparation["sys_path"]), PACKAGE_FOLDER]),
        name,
        str(os.getpid()),
        *map(str, descriptors),
    ]
    with _interrupts_blocked():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=environment
        )
    # With our copies closed, the end of a process closes its pipes for the other side.
    worker_pipe.close()
    worker_errors.close()
    try:
        # A worker that starts a process itself passes on where the user's script is.
        pipe.send((preparation, _main_module or main_module))
        pipe.send_bytes(pickle.dumps((entry_point, args)))
    except OSError:
        pass  # it has died already, as whoever watches it will see
    return process, pipe, errors


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started within it gets no Ctrl-C until it lets them through."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


# ---- the worker -------------------------------------------------------------------------------


def main() -> None:
    """What a worker process runs; ends it."""
    # Ctrl-C reaches the whole process group; rank 0 alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # sys.argv is "-c", the name, then numbers.
    parent, pipe_fileno, errors_fileno, *memory = map(int, sys.argv[2:])
    _end_with(parent)
    pipe = connection.Connection(pipe_fileno)
    errors = connection.Connection(errors_fileno, readable=False)
    status = 1
    try:
        preparation, main_module = pipe.recv()
        _main_module.update(main_module)
        spawn.prepare(preparation)
        with heavy_imports():
            entry_point, args = unpickle(pipe.recv_bytes())
        entry_point(*args, *memory, pipe)
        status = 0
    except (EOFError, BrokenPipeError):
        pass  # rank 0 is gone
    except BaseException:
        errors.send((time.monotonic(), traceback.format_exc()))
    # At once: nothing is to be saved, and the usual way out waits for device work and for peers.
    os._exit(status)


def _end_with(parent: int) -> None:
    """Let this process end when its parent does: at once, in whatever state it is, if Linux can."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    except (OSError, AttributeError):
        pass  # another system; the thread below needs a moment in which Python code can run

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def unpickle(packed: bytes) -> Any:
    """`pickle.loads`, which in a worker also finds what the user's script defines."""
    return _Unpickler(BytesIO(packed)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name in ("__main__", "__mp_main__"):
            _import_main_module()
        return super().find_class(module_name, global_name)


def _import_main_module() -> None:
    """Import the user's script under another name than `__main__`, once."""
    global _is_main_module_imported
    if _is_main_module_imported or not _main_module:
        return
    main_module = dict(_main_module)
    process = multiprocessing.current_process()
    process._inheriting = True  # type: ignore[attr-defined]  # see `check_script`
    try:
        spawn.prepare(main_module)
    except SystemExit as error:
        raise RuntimeError(f"the script ended while a worker imported it: {GUARD}") from error
    finally:
        del process._inheriting  # type: ignore[attr-defined]
    _is_main_module_imported = True
