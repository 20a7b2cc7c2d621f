"""GPU memory of each rank that every rank of the host can write, by CUDA's inter-process handles.

Through the driver itself: torch's symmetric memory counts its exchanges per process, so a second
engine of rank 0's process would wait for ever, and it makes multicast objects that nothing uses.
"""

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
HANDLE_BYTES = 64
# What is smaller shares a block with other allocations, and both would be exported.
BLOCK_BYTES = 2 << 20
logger = logging.getLogger(__name__)


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


class IpcMemory:
    """Memory of this rank on `device`, which other processes can open by its `handle`.

    Raises:
        RuntimeError: the driver refuses.
        OSError: there is no driver.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._device = device
        self.addresses: list[int] = []  # where this process sees each rank's memory, once opened
        address, handle = ctypes.c_uint64(), _Handle()
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes the device's context that of this thread
            allocated = ctypes.c_size_t(-(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES)
            self._call("cuMemAlloc_v2", ctypes.byref(address), allocated)
            self._address = address.value
            try:
                self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
            except RuntimeError:
                self.close()
                raise
        self.handle = bytes(handle.bytes).hex()
        self.num_bytes = num_bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self._address, False)}
        return {**data, "strides": None, "version": 3}

    def tensor(self) -> torch.Tensor:
        """This rank's memory, uint8 [num_bytes]; not to be used after `close`."""
        return torch.as_tensor(self, device=self._device)

    def open(self, handles: list[str], rank: int) -> None:
        """Open the memory of all ranks by their handles, and fill in `addresses`."""
        with torch.cuda.device(self._device):
            for peer, handle in enumerate(handles):
                address = ctypes.c_uint64(self._address)
                if peer != rank:
                    self._call(
                        "cuIpcOpenMemHandle_v2",
                        ctypes.byref(address),
                        _Handle.from_buffer_copy(bytes.fromhex(handle)),
                        ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS),
                    )
                self.addresses.append(address.value)

    def close(self) -> None:
        """Wait for the device, then let go of the memory, own and others'. May be called again."""
        own, self._address = self._address, 0
        addresses, self.addresses = self.addresses, []
        if not own:
            return
        with torch.cuda.device(self._device):
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return  # the device has failed, its memory can only go with the process
            for address in addresses:
                if address != own:
                    self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))
            self._call("cuMemFree_v2", ctypes.c_uint64(own))

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"{function} failed: {(name.value or b'unknown error').decode()}")


def share_memory(
    rank: int,
    size: int,
    store: dist.Store,
    allocate: Callable[[], IpcMemory],
) -> IpcMemory | None:
    """This rank's memory, opened by all ranks; None on every rank if one of them cannot have it.

    Waits for all ranks. Each rank that cannot logs why.

    Args:
        store: through which the ranks talk to each other, for nothing else.
        allocate: makes this rank's memory, ready to be written by others; RuntimeError, OSError or
            ImportError if it cannot.
    """
    memory: IpcMemory | None = None
    try:
        memory = allocate()
    except (RuntimeError, OSError, ImportError) as error:
        _log(rank, error)
    handles = _exchange(store, "handle", rank, size, "" if memory is None else memory.handle)
    is_open = memory is not None and all(handles)
    if is_open:
        assert memory is not None
        try:
            memory.open(handles, rank)
        except RuntimeError as error:
            _log(rank, error)
            is_open = False
    # Whoever has opened the others' memory must know whether they could open his.
    if all(_exchange(store, "open", rank, size, "yes" if is_open else "")):
        return memory
    if memory is not None:
        memory.close()
    return None


def _log(rank: int, error: Exception) -> None:
    logger.warning("rank %d cannot share GPU memory, so NCCL sums alone: %s", rank, error)


def _exchange(store: dist.Store, what: str, rank: int, size: int, value: str) -> list[str]:
    """All ranks' values of `what`."""
    store.set(f"{what}/{rank}", value)
    return [store.get(f"{what}/{peer}").decode() for peer in range(size)]
