"""How the micro-benchmarks of kernels take times."""

from collections.abc import Callable

import torch


def microseconds(run: Callable[[], object], num_calls: int = 1) -> float:
    """Mean time of one of the `num_calls` calls that `run` makes, all in one CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / 10 / num_calls
