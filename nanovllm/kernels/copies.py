"""Copies between host and device that never wait.

Pinned memory comes from torch's allocator, which gives a block away again only after the copies
in or out of it.
"""

from collections.abc import Iterable

import numpy as np
import torch

ALIGNMENT = 16  # bytes; compiled kernels may rely on it
TORCH_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


def upload(arrays: Iterable[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copies of host arrays on `device`, of their shapes and dtypes, all in one transfer."""
    arrays = list(arrays)
    if device.type != "cuda":
        return [torch.from_numpy(array.copy()).to(device) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]).tolist()
    starts = [0, *ends]
    pinned = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    pinned_bytes = pinned.numpy()
    for start, array in zip(starts, arrays, strict=False):
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        pinned_bytes[start : start + array.nbytes] = source
    staged = pinned.to(device, non_blocking=True)
    return [
        staged[start : start + array.nbytes].view(TORCH_DTYPES[array.dtype]).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


class Download:
    """Device tensors on their way to the host; `wait` gives them."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        is_cuda = tensors[0].is_cuda
        self._tensors = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=is_cuda).copy_(x, non_blocking=True)
            for x in tensors
        ]
        self._event: torch.cuda.Event | None = None
        if is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> list[np.ndarray]:
        """The tensors as arrays of their own; blocks until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        # Copies: who keeps them must not hold pinned memory.
        return [tensor.numpy().copy() for tensor in self._tensors]


def upload_one(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of a host array on `device`."""
    [tensor] = upload([array], device)
    return tensor
