"""CUDA starts in a thread while Python imports the kernels and reads the tokenizer."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F

SIZE = 1024  # of the matrices: cuBLAS takes the kernels of large products from another place


@contextmanager
def starting_cuda(dtype: torch.dtype | None) -> Iterator[bool]:
    """Within it a thread starts CUDA's driver, most of the time without Python's lock.

    Gives whether there is a driver; nothing happens where there is none. Whoever needs CUDA
    afterwards sees why it is not there. The thread has ended when this ends.

    Args:
        dtype: of products and look-ups on the first GPU, whose context and libraries are started as
            well; some hundred MiB of its memory are taken. None: this process does not use it.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        yield False
        return

    def start() -> None:
        library.cuInit(0)
        if dtype is not None:
            with suppress(Exception):
                _compute(dtype)

    thread = threading.Thread(target=start, name="nanovllm-cuda", daemon=True)
    thread.start()
    try:
        yield True
    finally:
        thread.join()


def _compute(dtype: torch.dtype) -> None:
    """What loads the large libraries, the one that takes longest last.

    A tokenizer is read with Python's lock held: one call goes on meanwhile, the next one waits.
    """
    matrix = torch.zeros(SIZE, SIZE, dtype=dtype, device="cuda:0")
    F.embedding(torch.zeros(1, dtype=torch.int32, device="cuda:0"), matrix)  # few ids: as decoding
    F.linear(matrix, matrix)
