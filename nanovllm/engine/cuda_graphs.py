"""Decode steps captured as CUDA graphs, one for each padded batch size."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.engine.late_capture import capture_late


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Captured sizes, ascending: 1, 2, 4, 8, then multiples of 16; `max_num_seqs` always last.

    From 256 on they are multiples of 32, from 512 on of 128.
    """
    sizes = [1, 2, 4, 8, *range(16, 256, 16), *range(256, 512, 32), *range(512, max_num_seqs, 128)]
    return sorted({size for size in (*sizes, max_num_seqs) if size <= max_num_seqs})


class DecodeGraphs:
    """Graphs of `decode(rows[:size], has_common_blocks)` for every size; all share one memory pool.

    A replay reads `rows` and the row table as they are then. Slots beyond the batch must hold the
    padding row. Graphs for batches with common blocks are captured when they are first wanted.

    Args:
        max_num_seqs: the largest batch.
        rows: [max_num_seqs] int32, where replays find their rows.
        decode: one decode step, without host synchronisation; returns token ids [size] int32.
    """

    def __init__(
        self,
        max_num_seqs: int,
        rows: torch.Tensor,
        decode: Callable[[torch.Tensor, bool], torch.Tensor],
    ) -> None:
        self.rows = rows
        self.decode = decode
        self.sizes = batch_sizes(max_num_seqs)
        # Both by (size, has_common_blocks).
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.outputs: dict[tuple[int, bool], torch.Tensor] = {}
        self._pool: Any = None
        with torch.inference_mode():
            # The largest first: smaller ones then fit in the pool it leaves.
            for size in reversed(self.sizes):
                self._run_and_capture(size)

    def padded_size(self, num_seqs: int) -> int:
        """The captured size that serves a batch of `num_seqs`."""
        return self.sizes[bisect_left(self.sizes, num_seqs)]

    def replay(self, size: int, has_common_blocks: bool = False) -> torch.Tensor:
        """Run the step of `size`; its token ids [size] int32, valid until the next replay."""
        key = size, has_common_blocks
        if key not in self.graphs:
            step = self.rows[:size], has_common_blocks
            token_ids = self.decode(*step)  # builds what a capture may not build
            self.graphs[key], self.outputs[key] = capture_late(self.decode, step, self._pool)
            return token_ids
        self.graphs[key].replay()
        return self.outputs[key]

    def _run_and_capture(self, size: int) -> None:
        """One step launch by launch, which builds what a capture may not build; then its graph.

        The capture itself computes nothing.
        """
        self.decode(self.rows[:size], False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self.decode(self.rows[:size], False)
        self._pool = self._pool or graph.pool()
        self.graphs[size, False], self.outputs[size, False] = graph, output
