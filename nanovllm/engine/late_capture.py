"""CUDA graphs that are captured while the engine runs, behind work that the device still does."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def capture_late(
    decode: Callable[[torch.Tensor, bool], torch.Tensor], step: tuple[torch.Tensor, bool], pool: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """The graph of decode(*step), and what it returns; nothing is computed.

    `torch.cuda.graph`, which has captured other ones before, would wait for the device and give its
    free memory away first.

    Args:
        decode: as in `DecodeGraphs`.
        step: its arguments, with which it has been called before.
        pool: the graph's memory.
    """
    if dist.is_initialized():  # no collective is captured while another one runs
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.graph.default_capture_stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            output = decode(*step)
        finally:
            graph.capture_end()
    return graph, output
