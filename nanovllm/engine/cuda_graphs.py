"""Decode steps captured as CUDA graphs, one for each padded batch size."""

from collections.abc import Callable

import torch


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Captured sizes, ascending: 1, 2, 4, 8, then multiples of 16; `max_num_seqs` always last."""
    sizes = [1, 2, 4, 8, *range(16, max_num_seqs, 16), max_num_seqs]
    return sorted({size for size in sizes if size <= max_num_seqs})


class DecodeGraphs:
    """Graphs of `decode(rows[:size])` for every size; all share one memory pool.

    A replay reads `rows` and the row table as they are then. Slots beyond the batch must hold the
    padding row.

    Args:
        max_num_seqs: the largest batch.
        rows: [max_num_seqs] int32, where replays find their rows.
        decode: one decode step, without host synchronisation; returns token ids [size] int32.
    """

    def __init__(
        self,
        max_num_seqs: int,
        rows: torch.Tensor,
        decode: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.sizes = batch_sizes(max_num_seqs)
        self._padded = [0] * (max_num_seqs + 1)
        for size in reversed(self.sizes):
            self._padded[1 : size + 1] = [size] * size
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        pool = None
        with torch.inference_mode():
            # The largest first: smaller ones then fit in the pool it leaves.
            for size in reversed(self.sizes):
                decode(rows[:size])  # builds what a capture may not build
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self.outputs[size] = decode(rows[:size])
                pool = pool or graph.pool()
                self.graphs[size] = graph

    def padded_size(self, num_seqs: int) -> int:
        """The captured size that serves a batch of `num_seqs`."""
        return self._padded[num_seqs]

    def replay(self, size: int) -> torch.Tensor:
        """Run the graph of `size`; its token ids [size] int32, valid until the next replay."""
        self.graphs[size].replay()
        return self.outputs[size]
