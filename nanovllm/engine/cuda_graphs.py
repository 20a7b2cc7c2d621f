"""Decode steps captured as CUDA graphs, one for each padded batch size."""

from bisect import bisect_left
from collections.abc import Callable

import torch

from nanovllm.engine.capture import capturing

Decode = Callable[[torch.Tensor, bool], torch.Tensor]


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
        rehearse: run before the captures of this constructor, in place of `decode`: launches each
            kernel that `decode` does.
    """

    def __init__(
        self, max_num_seqs: int, rows: torch.Tensor, decode: Decode, rehearse: Decode | None = None
    ) -> None:
        self.rows = rows
        self.decode = decode
        self.sizes = batch_sizes(max_num_seqs)
        # Both by (size, has_common_blocks).
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.outputs: dict[tuple[int, bool], torch.Tensor] = {}
        self._pool: object = None  # that of the first graph
        with torch.inference_mode():
            # The largest first: smaller ones then fit in the pool it leaves.
            for size in reversed(self.sizes):
                # Builds what a capture may not build.
                (rehearse or decode)(rows[:size], False)
                torch.cuda.synchronize()
                self._capture(size, has_common_blocks=False)

    def padded_size(self, num_seqs: int) -> int:
        """The captured size that serves a batch of `num_seqs`."""
        return self.sizes[bisect_left(self.sizes, num_seqs)]

    def replay(self, size: int, has_common_blocks: bool = False) -> torch.Tensor:
        """Run the step of `size`; its token ids [size] int32, valid until the next replay."""
        key = size, has_common_blocks
        if key not in self.graphs:
            token_ids = self.decode(self.rows[:size], has_common_blocks)
            self._capture(*key)
            return token_ids
        self.graphs[key].replay()
        return self.outputs[key]

    def _capture(self, size: int, has_common_blocks: bool) -> None:
        """The graph of a step that was run launch by launch before; computes nothing."""
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):
            output = self.decode(self.rows[:size], has_common_blocks)
        self._pool = graph.pool()
        self.graphs[size, has_common_blocks] = graph
        self.outputs[size, has_common_blocks] = output
