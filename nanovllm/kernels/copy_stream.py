"""Copies of pinned host memory to the GPU, beside what the GPU computes."""

import mmap
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class PendingCopy(Protocol):
    """What `CopyStream.start` returns."""


class CopyStream(Protocol):
    """Runs copies one after another. Nothing waits for them by itself, nor they for anything."""

    def follow_compute(self) -> None:
        """Begin the copies started from now on when all work launched so far is done."""

    def start(self, target: Tensor, source: Tensor) -> PendingCopy:
        """Copy `source` to `target` as soon as the copies before are done."""

    def wait(self, copy: PendingCopy) -> None:
        """Begin the work launched from now on when this copy is done."""

    def finish(self) -> None:
        """Return when all copies are done."""


class CudaCopyStream:
    """`CopyStream` of a GPU. A CUDA graph captures its copies as nodes beside the kernels.

    That takes pinned memory: see `new_pinned`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._fence = torch.zeros(1, dtype=torch.int32, device=device)

    def follow_compute(self) -> None:
        """See `CopyStream`."""
        self._stream.wait_stream(torch.cuda.current_stream())

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """See `CopyStream`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copy: PendingCopy) -> None:
        """See `CopyStream`."""
        assert isinstance(copy, torch.cuda.Event)
        torch.cuda.current_stream().wait_event(copy)
        # Kernels that overlap read weights before the kernel ahead of them has ended, as no kernel
        # writes these (triton/launch.py). This one does not overlap: it starts after the copy, and
        # all that follows after it.
        self._fence.add_(1)

    def finish(self) -> None:
        """See `CopyStream`."""
        self._stream.synchronize()


def new_pinned(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 of page-locked host memory, until `unpin`.

    Torch's own pinned memory takes the next power of two.

    Raises:
        OSError, MemoryError: the system does not give or lock so much.
    """
    size = max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
    # Whole pages, shared with nothing. `is_pinned` looks at where a storage begins.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
    if error:
        raise MemoryError(f"cudaHostRegister of {size} bytes failed with error {error}")
    return memory[:num_bytes]


def unpin(memories: Sequence[Tensor]) -> None:
    """Undo `new_pinned`, when no copy reads the memory. It is freed with the last of its views."""
    for memory in memories:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
