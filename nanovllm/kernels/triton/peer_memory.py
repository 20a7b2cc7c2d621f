"""Memory that the GPUs of one host share, and the sums over the ranks that pass through it.

`PeerMemory` launches the kernels of triton_all_reduce.py, which explains how they work.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from nanovllm.kernels.triton.all_reduce import (
    NUM_SLOTS,
    all_reduce_kernel,
    argmax_kernel,
    embedding_kernel,
)
from nanovllm.kernels.triton.launch import overlap_options
from nanovllm.kernels.triton.linear import parts_of
from nanovllm.kernels.types import LinearOutput

MAX_ROWS = 512  # of a call; with more the bandwidth counts, and NCCL is as good
ELEMENTS_PER_WARP = 256  # 8 elements a thread: one 16-byte access in half precision
MAX_WARPS = 16
# From so many bytes on that a rank would send beyond those of two shots (with more than two ranks),
# two shots win, although the second costs another transfer's latency.
TWO_SHOT_BYTES = 600 << 10
ARGMAX_ROWS = 128  # rows of one program of `argmax`, which share a channel
ARGMAX_WARPS = 4


@dataclass(frozen=True)
class Channels:
    """A number of channels, as one rank sees them."""

    memory: torch.Tensor  # [channels, NUM_SLOTS, entries, width] integers, written by all ranks
    addresses: torch.Tensor  # [ranks] int64: where this process sees all ranks' `memory`
    next_slots: torch.Tensor  # [channels] int32

    @classmethod
    def at(cls, memory: torch.Tensor, addresses: list[int]) -> "Channels":
        device = memory.device
        return cls(
            memory,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(len(memory), dtype=torch.int32, device=device),
        )


def memory_shapes(size: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the channels of rows, and of those of `argmax`, for `size` ranks."""
    num_entries = size if size == 2 else size + 1  # two ranks gain nothing by two shots
    rows = (MAX_ROWS, NUM_SLOTS.value, num_entries, width)
    return rows, (MAX_ROWS // ARGMAX_ROWS, NUM_SLOTS.value, size, ARGMAX_ROWS)


def num_memory_bytes(size: int, width: int, dtype: torch.dtype) -> int:
    """What one rank gives to a `PeerMemory` of `size` ranks and rows of `width` elements."""
    rows, winners = memory_shapes(size, width)
    return math.prod(rows) * dtype.itemsize + math.prod(winners) * torch.int64.itemsize


def split_memory(
    memory: torch.Tensor, size: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [num_memory_bytes] as integers of `memory_shapes`."""
    rows, winners = memory_shapes(size, width)
    bits_type = torch.int32 if dtype.itemsize == 4 else torch.int16
    num_row_bytes = math.prod(rows) * dtype.itemsize
    return (
        memory[:num_row_bytes].view(bits_type).view(rows),
        memory[num_row_bytes:].view(torch.int64).view(winners),
    )


def clear_memory(memory: torch.Tensor, size: int, width: int, dtype: torch.dtype) -> None:
    """Empty all slots. Every rank's must be empty before any rank makes a call."""
    for part in split_memory(memory, size, width, dtype):
        part.fill_(torch.iinfo(part.dtype).min)


class PeerMemory:
    """Memory of every rank that all ranks can write, and the sums of rows made through it.

    Methods run on the current stream and never wait on the host.

    Args:
        rank: this process's number among the ranks.
        addresses: where this process sees each rank's memory; multiples of 16.
        memory: uint8 [num_memory_bytes], this rank's, cleared.
        width: elements of a row.
        dtype: of the rows: float32, float16 or bfloat16.
        abort: int32 [1] in host memory that the device can read (pinned). Once it is not 0, no
            kernel waits any more, and results are arbitrary.
    """

    def __init__(
        self,
        rank: int,
        addresses: list[int],
        memory: torch.Tensor,
        width: int,
        dtype: torch.dtype,
        abort: torch.Tensor,
    ) -> None:
        self.size = len(addresses)
        self.width = width
        self.dtype = dtype
        self.abort = abort
        rows, winners = split_memory(memory, self.size, width, dtype)
        self._rows = Channels.at(rows, addresses)
        offset = rows.numel() * dtype.itemsize
        self._winners = Channels.at(winners, [address + offset for address in addresses])
        self._ranks = {
            "RANK": rank,
            "NUM_RANKS": self.size,
            "PADDED_RANKS": triton.next_power_of_2(self.size),
        }

    def takes(self, num_rows: int) -> bool:
        """Whether a call can have so many rows."""
        return 0 < num_rows <= MAX_ROWS

    def all_reduce(self, x: LinearOutput) -> torch.Tensor:
        """x [T, width] -> its sum over the ranks."""
        return self._all_reduce(x, None, None, 0.0)

    def add_rms_norm(
        self, x: LinearOutput, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Ops.add_rms_norm` of the sum of x over the ranks; that of x alone is rounded first."""
        return self._all_reduce(x, residual, weight, eps), residual

    def embedding(
        self, input_ids: torch.Tensor, weight: torch.Tensor, first_token_id: int
    ) -> torch.Tensor:
        """Rows of a table of which a rank holds those from first_token_id on.

        input_ids [T] int32, weight [ids of this rank, width] -> [T, width].
        """
        out = torch.empty((len(input_ids), self.width), dtype=self.dtype, device=weight.device)
        assert input_ids.is_contiguous() and weight.is_contiguous()
        embedding_kernel[(len(out),)](
            out,
            input_ids,
            weight,
            *self._arguments(self._rows),
            first_token_id,
            len(weight),
            **self._row_options(out),
        )
        return out

    def argmax(self, scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """See `TensorParallel.argmax`; 1 to MAX_ROWS rows."""
        out = torch.empty_like(token_ids)
        assert scores.is_contiguous() and token_ids.is_contiguous()
        argmax_kernel[(triton.cdiv(len(out), ARGMAX_ROWS),)](
            out,
            scores,
            token_ids,
            *self._arguments(self._winners),
            len(out),
            ROWS=ARGMAX_ROWS,
            num_warps=ARGMAX_WARPS,
            **self._ranks,
            **overlap_options(out.device),
        )
        return out

    def _all_reduce(
        self,
        x: LinearOutput,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        x, num_parts, stride_part, dtype = parts_of(x)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        assert (x.shape[1], dtype) == (self.width, self.dtype)
        assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
        all_reduce_kernel[(len(out),)](
            out,
            x,
            residual,
            weight,
            *self._arguments(self._rows),
            x.stride(0),
            stride_part,
            0 if residual is None else residual.stride(0),
            eps,
            NUM_PARTS=num_parts,
            ADD_AND_NORM=residual is not None,
            **self._row_options(out),
        )
        return out

    def _arguments(self, channels: Channels) -> tuple[torch.Tensor, ...]:
        return channels.memory, channels.addresses, channels.next_slots, self.abort

    def _row_options(self, rows: torch.Tensor) -> dict[str, Any]:
        padded_width = triton.next_power_of_2(self.width)
        num_entries = self._rows.memory.shape[2]
        # A rank sends each row to the others, or its row or the sum by way of the owner.
        one_shot, two_shot = self.size - 1, 2 * (self.size - 1) / self.size
        row_bytes = rows.numel() * rows.itemsize
        return {
            "NUM_ENTRIES": num_entries,
            "WIDTH": self.width,
            "PADDED_WIDTH": padded_width,
            "TWO_SHOT": self.size > 2 and (one_shot - two_shot) * row_bytes >= TWO_SHOT_BYTES,
            "num_warps": min(MAX_WARPS, max(1, padded_width // ELEMENTS_PER_WARP)),
            **self._ranks,
            **overlap_options(rows.device),
        }
