"""How launches become a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: object) -> Iterator[None]:
    """Within it what this thread launches goes into `graph` and is not run.

    `torch.cuda.graph` would each time wait for the device and give the allocator's free memory
    back, which takes several milliseconds. Here only the first graph of a pool does the latter, and
    work of the engine may still be under way.

    Args:
        graph: as yet empty.
        pool: another graph's, for its tensors; None: one of its own.
    """
    if dist.is_initialized():  # no collective is captured while another one runs
        torch.cuda.synchronize()
    if pool is None:
        torch.cuda.empty_cache()  # as the pool can take no memory from there
    with torch.cuda.stream(_side_stream(torch.cuda.current_device())):
        graph.capture_begin(pool, capture_error_mode="thread_local")  # type: ignore[arg-type]
        try:
            yield
        finally:
            graph.capture_end()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures on a device, as libraries keep memory for each stream that they use."""
    return torch.cuda.Stream(device)
