"""CUDA's driver starts while Python imports what needs it."""

import ctypes
import importlib
import threading
from contextlib import suppress


def import_while_cuda_starts(name: str) -> None:
    """Import a module while a thread starts CUDA's driver, without Python's lock; no GPU memory.

    Nothing happens where there is no driver. Whoever needs either of them afterwards sees why it
    is not there.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    thread = threading.Thread(target=library.cuInit, args=(0,), name="nanovllm-cuda", daemon=True)
    thread.start()
    with suppress(ImportError, OSError):
        importlib.import_module(name)
    thread.join()
