"""One rank's place among the tensor-parallel ranks, and the two reductions that the layers need."""

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
ABORT_SECONDS = 5.0
MAX_TOKEN_ID = 0x7FFFFFFF


class TensorParallel:
    """`size` ranks that hold a slice of every weight each.

    The process group is this object's own: the default group of the process is neither used nor
    created. One rank has no group at all.

    Args:
        rank: this process's number, 0 <= rank < size.
        size: number of ranks.
        group: an all-reduce backend of these ranks (`connect` makes one); None for one rank.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.group = group

    @classmethod
    def connect(
        cls, rank: int, size: int, store: dist.Store, device: torch.device
    ) -> "TensorParallel":
        """Join the other ranks through `store`: NCCL on CUDA, gloo on CPU. Blocks until all do."""
        if device.type == "cuda":
            nccl: Any = dist.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = COLLECTIVE_TIMEOUT
            return cls(rank, size, nccl(dist.PrefixStore("nccl", store), rank, size, options))
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = COLLECTIVE_TIMEOUT
        return cls(rank, size, gloo(dist.PrefixStore("gloo", store), rank, size, options))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; returns `tensor`."""
        if self.size > 1:
            self._reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def argmax(self, scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Per row, the token id of the rank with the highest score; the lowest id wins a tie.

        Args:
            scores: [B] float32, each rank's best score.
            token_ids: [B] int32, the id that has it.

        Returns:
            [B] int32, equal on all ranks.
        """
        if self.size == 1:
            return token_ids
        # One int64 a row: the score's bits in an order-preserving form, then the id reversed.
        bits = scores.view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
        packed = (ordered << 32) | (MAX_TOKEN_ID - token_ids.to(torch.int64))
        self._reduce(packed, dist.ReduceOp.MAX)
        return (MAX_TOKEN_ID - (packed & 0xFFFFFFFF)).to(torch.int32)

    def _reduce(self, tensor: torch.Tensor, op: Any) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        self.group.allreduce([tensor], options).wait()

    def abort(self) -> None:
        """Leave the group at once, breaking off what is in flight. May be called again.

        NCCL does not let go of a communicator while a CUDA graph that uses it exists: drop the
        graphs first. Should one be left, this gives up after some seconds instead of hanging.
        """
        group, self.group = self.group, None
        if group is not None:
            aborting = threading.Thread(target=group.abort, daemon=True)
            aborting.start()
            aborting.join(ABORT_SECONDS)
