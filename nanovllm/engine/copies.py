"""Copies between host and device that never wait and never rewrite memory still being copied."""

import numpy as np
import torch

NUM_SLOTS = 4  # steps in flight at once are at most 2
ALIGNMENT = 16  # bytes; compiled kernels may rely on it
TORCH_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class UploadRing:
    """Host arrays to the device, all of a step in one asynchronous copy through pinned memory.

    Invariants: a pinned slot is rewritten only after its copy's event; the device half of a slot is
    overwritten by a later copy on the same stream, so after all kernels that read it.

    Args:
        capacity: bytes of the largest upload, each array's `aligned`.
        device: where to; on the CPU an upload is a plain copy.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            shape = (NUM_SLOTS, aligned(capacity))
            self.pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            self.staged = torch.empty(shape, dtype=torch.uint8, device=device)
            self.events = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
            self.next_slot = 0

    def upload(self, arrays: list[np.ndarray]) -> list[torch.Tensor]:
        """The arrays as tensors of their shapes and dtypes; valid for this step's kernels."""
        if not self.is_cuda:
            return [torch.from_numpy(array.copy()) for array in arrays]
        slot, self.next_slot = self.next_slot, (self.next_slot + 1) % NUM_SLOTS
        self.events[slot].synchronize()
        pinned, staged = self.pinned[slot], self.staged[slot]
        pinned_bytes = pinned.numpy()
        tensors = []
        end = 0
        for array in arrays:
            start, end = aligned(end), aligned(end) + array.nbytes
            pinned_bytes[start:end] = array.reshape(-1).view(np.uint8)
            tensors.append(staged[start:end].view(TORCH_DTYPES[array.dtype]).view(array.shape))
        staged[:end].copy_(pinned[:end], non_blocking=True)
        self.events[slot].record()
        return tensors


class Download:
    """Sampled token ids on their way to the host; `wait` gives them.

    Args:
        pinned: [B] int32 host memory that nothing else writes until `wait` has returned.
        event: recorded after the copy into `pinned`; None: the copy is done.
    """

    def __init__(self, pinned: torch.Tensor, event: "torch.cuda.Event | None") -> None:
        self.pinned = pinned
        self.event = event

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.event is None or self.event.query()

    def wait(self) -> list[int]:
        """The token ids; blocks until they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.pinned.tolist()


class DownloadRing:
    """Device tensors to the host, through pinned slots that are reused in turn.

    A slot comes round again after NUM_SLOTS downloads, when the step that filled it has long been
    committed or dropped; its event is waited for all the same.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.pinned = torch.empty((NUM_SLOTS, capacity), dtype=torch.int32, pin_memory=True)
            self.events = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
            self.next_slot = 0

    def download(self, token_ids: torch.Tensor) -> Download:
        """Start copying `token_ids` [B] int32."""
        if not self.is_cuda:
            return Download(token_ids.clone(), None)
        slot, self.next_slot = self.next_slot, (self.next_slot + 1) % NUM_SLOTS
        self.events[slot].synchronize()
        pinned = self.pinned[slot, : len(token_ids)]
        pinned.copy_(token_ids, non_blocking=True)
        self.events[slot].record()
        return Download(pinned, self.events[slot])
