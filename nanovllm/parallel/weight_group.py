"""Process groups of a trainer and an engine's ranks, apart from every other group of a process.

The two classes have vLLM's names and forms, for scripts that use them directly.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.parallel.tensor_parallel import COLLECTIVE_TIMEOUT, new_gloo_group

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class StatelessProcessGroup:
    """Processes that know each other by a store of keys, which rank 0 serves.

    It is no process group of torch's: `PyNcclCommunicator` makes one of it.

    Attributes:
        rank: this process's number.
        world_size: the number of processes.
        store: torch's `TCPStore`.
        host: where rank 0 is.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, host: str) -> None:
        self.rank, self.world_size, self.store, self.host = rank, world_size, store, host

    @classmethod
    def create(
        cls, host: str, port: int, rank: int, world_size: int, store_timeout: float = 300
    ) -> "StatelessProcessGroup":
        """Join the others at rank 0's address; blocks until rank 0 is there.

        Args:
            host, port: where rank 0 listens.
            rank, world_size: this process's number, and how many there are.
            store_timeout: seconds to wait for the others.

        Raises:
            torch.distributed.DistError: they did not come, or the port is taken.
        """
        timeout = timedelta(seconds=store_timeout)
        is_master = rank == 0
        store = dist.TCPStore(host, port, world_size, is_master, timeout, wait_for_workers=False)
        return cls(rank, world_size, store, host)


class PyNcclCommunicator:
    """Broadcasts between the processes of a `StatelessProcessGroup`: NCCL, or gloo on the CPU.

    Blocks until all processes have made theirs. Each needs a GPU of its own.

    Args:
        group: the processes.
        device: this process's device, or the number of its GPU.
    """

    def __init__(self, group: StatelessProcessGroup, device: int | str | torch.device) -> None:
        self.device = (
            torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        )
        self.rank, self.world_size = group.rank, group.world_size
        store = dist.PrefixStore("weights", group.store)
        self._group: Any
        if self.device.type == "cuda":
            nccl: Any = dist.ProcessGroupNCCL
            with torch.cuda.device(self.device):
                self._group = nccl(store, self.rank, self.world_size, COLLECTIVE_TIMEOUT)
        else:
            hostname = "127.0.0.1" if group.host in LOOPBACK else None
            self._group = new_gloo_group(store, self.rank, self.world_size, hostname)

    def broadcast(
        self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None
    ) -> None:
        """Make every rank's tensor, of one shape and dtype, that of rank `src`, in place.

        Args:
            tensor: contiguous, on this communicator's device.
            src: a rank.
            stream: the CUDA stream to follow; None: the current one. The CPU waits.
        """
        options = dist.BroadcastOptions()
        options.rootRank = src
        if tensor.is_cuda:
            with torch.cuda.stream(stream or torch.cuda.current_stream(tensor.device)):
                self._group.broadcast([tensor], options).wait()
        else:
            self._group.broadcast([tensor], options).wait()

    def shutdown(self) -> None:
        """Leave the group."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
