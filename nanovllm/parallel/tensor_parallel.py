"""One rank's place among the tensor-parallel ranks, and the reductions that the layers need.

Few rows, those of a decode step, go through memory that the GPUs share, a
few microseconds a sum; many rows through NCCL, which also serves where GPUs cannot share memory.
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import LinearOutput, PartialSums, Unreduced, summed
from nanovllm.parallel.ipc_memory import IpcMemory, share_memory

if TYPE_CHECKING:
    from nanovllm.kernels.triton.peer_memory import PeerMemory

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
POLL_TIME = timedelta(seconds=0.2)
NO_TIMEOUT = timedelta(days=1000)
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
        peers: memory that the ranks share, if they can.

    Attributes:
        on_collective: called for each collective on the CPU, before the host waits for it.
        while_waiting: called now and then during that wait; it may raise.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: Any = None,
        peers: "PeerMemory | None" = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.group = group
        self.peers = peers
        self._ipc_memory: IpcMemory | None = None
        self._abort_lock = threading.Lock()
        self._aborting: threading.Thread | None = None
        self.on_collective: Callable[[], None] = _nothing
        self.while_waiting: Callable[[], None] = _nothing

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        store: dist.Store,
        device: torch.device,
        hidden_size: int,
        dtype: torch.dtype,
        shares_memory: bool = True,
    ) -> "TensorParallel":
        """Join the other ranks through `store`: NCCL on CUDA, gloo on CPU. Blocks until all do.

        Args:
            device: this rank's, with its index; all ranks are on one host.
            hidden_size: elements of the rows that are summed.
            dtype: of these rows.
            shares_memory: whether few rows go through memory that the GPUs share.
        """
        if device.type == "cuda":
            if not dist.is_initialized():
                # All ranks are on this host. A group of the caller's own may reach further.
                os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            nccl: Any = dist.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = COLLECTIVE_TIMEOUT
            group = nccl(dist.PrefixStore("nccl", store), rank, size, options)
            tp = cls(rank, size, group)
            if shares_memory:
                tp._share_memory(dist.PrefixStore("peers", store), device, hidden_size, dtype)
            return tp
        group = new_gloo_group(dist.PrefixStore("gloo", store), rank, size, "127.0.0.1")
        # From here on rank 0 decides how long to wait. It may be stopped itself, for hours.
        group._set_default_timeout(NO_TIMEOUT)
        return cls(rank, size, group)

    def _share_memory(
        self, store: dist.Store, device: torch.device, width: int, dtype: torch.dtype
    ) -> None:
        """Set `peers`, on all ranks or on none."""

        def allocate() -> IpcMemory:
            from nanovllm.kernels.triton.peer_memory import clear_memory, num_memory_bytes

            for peer in set(range(self.size)) - {self.rank}:
                if not torch.cuda.can_device_access_peer(self.rank, peer):
                    raise RuntimeError(f"GPU {self.rank} has no access to GPU {peer}")
            memory = IpcMemory(num_memory_bytes(self.size, width, dtype), device)
            clear_memory(memory.tensor(), self.size, width, dtype)
            torch.cuda.synchronize(device)
            return memory

        memory = self._ipc_memory = share_memory(self.rank, self.size, store, allocate)
        if memory is not None:
            from nanovllm.kernels.triton.peer_memory import PeerMemory

            abort = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self.peers = PeerMemory(
                self.rank, memory.addresses, memory.tensor(), width, dtype, abort
            )

    def all_reduce(self, x: Unreduced) -> torch.Tensor:
        """x [T, hidden_size] -> its sum over the ranks; x's memory may be reused."""
        if self.peers is not None and self.peers.takes(_num_rows(x.term)):
            return self.peers.all_reduce(x.term)
        total = summed(x.term)
        if self.size > 1 and total.numel():
            self._reduce(total, dist.ReduceOp.SUM)
        return total

    def sum_over_ranks(self, x: Unreduced) -> LinearOutput:
        """`all_reduce`; of a single rank the term as it is, perhaps in parts."""
        return x.term if self.size == 1 else self.all_reduce(x)

    def mean_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """x, of any shape and of a dtype that adds up well, -> its mean over the ranks, in place.

        Memory that GPUs share is for rows of hidden_size: this goes through NCCL.
        """
        if self.size > 1 and x.numel():
            self._reduce(x, dist.ReduceOp.SUM)
            x /= self.size
        return x

    def add_rms_norm(
        self, ops: Ops, x: Unreduced, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Ops.add_rms_norm` of x's sum over the ranks: (norm(sum + residual), sum + residual).

        One kernel, if the rows go through shared memory.
        """
        if self.peers is not None and self.peers.takes(_num_rows(x.term)):
            return self.peers.add_rms_norm(x.term, residual, weight, eps)
        total = self.sum_over_ranks(x)
        return ops.add_rms_norm(total, residual, weight, eps)

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
        if self.peers is not None and self.peers.takes(len(scores)):
            return self.peers.argmax(scores, token_ids)
        # One int64 a row: the score's bits in an order-preserving form, then the id reversed.
        bits = scores.view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
        packed = (ordered << 32) | (MAX_TOKEN_ID - token_ids.to(torch.int64))
        self._reduce(packed, dist.ReduceOp.MAX)
        return (MAX_TOKEN_ID - (packed & 0xFFFFFFFF)).to(torch.int32)

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Each rank's logits [B, V] -> those of all ranks side by side, [B, V * ranks]."""
        if self.size == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.size)]
        self._finish(self.group.allgather([parts], [logits.contiguous()]), logits.is_cuda)
        return torch.cat(parts, dim=1)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Make every rank's tensor, of one shape and dtype, that of rank 0."""
        if self.size > 1:
            work = self.group.broadcast([tensor], dist.BroadcastOptions())
            self._finish(work, tensor.is_cuda)

    def _reduce(self, tensor: torch.Tensor, op: Any) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        self._finish(self.group.allreduce([tensor], options), tensor.is_cuda)

    def _finish(self, work: Any, is_cuda: bool) -> None:
        """Wait for a collective: on CUDA the stream does. On the CPU the host waits piece by piece.

        So Ctrl-C and `while_waiting` can end a wait for a rank that does not come.
        """
        if is_cuda:
            work.wait()
            return
        self.on_collective()
        while True:
            try:
                work.wait(POLL_TIME)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # it has failed, or has come this moment
                    return
            self.while_waiting()

    def stop_waiting(self) -> None:
        """Let kernels that wait for a rank in shared memory go on, with any numbers."""
        peers = self.peers
        if peers is not None:
            peers.abort.fill_(1)

    def abort(self) -> None:
        """Leave the group at once, breaking off what is in flight. Any thread may call it, again.

        NCCL does not let go of a communicator while a CUDA graph that uses it exists. Should one be
        left, this gives up after some seconds instead of hanging; its kernels have ended by then.
        """
        self.stop_waiting()
        with self._abort_lock:  # a second caller too returns only when kernels have been told
            group, self.group = self.group, None
            if group is not None:
                self._aborting = threading.Thread(target=group.abort, daemon=True)
                self._aborting.start()
        if self._aborting is not None:
            self._aborting.join(ABORT_SECONDS)

    def close(self) -> None:
        """`abort`, then let go of the shared memory; nothing may be launched any more."""
        self.abort()
        memory, self._ipc_memory, self.peers = self._ipc_memory, None, None
        if memory is not None:
            memory.close()


def new_gloo_group(store: dist.Store, rank: int, size: int, hostname: str | None) -> Any:
    """A gloo group of its own that listens on `hostname`; None: where gloo does by default."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    device = gloo.create_device(hostname=hostname) if hostname else gloo.create_default_device()
    options._devices = [device]
    options._timeout = COLLECTIVE_TIMEOUT
    return gloo(store, rank, size, options)


def _nothing() -> None:
    pass


def _num_rows(x: LinearOutput) -> int:
    return x.parts.shape[1] if isinstance(x, PartialSums) else len(x)
