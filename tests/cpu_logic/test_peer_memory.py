"""Sums through shared memory: the kernels in Triton's interpreter, a process for each rank.

The ranks' memory is files that all of them map. And who gets shared memory at all.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanovllm.kernels import torch_ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import PartialSums, Unreduced
from nanovllm.parallel.ipc_memory import share_memory
from nanovllm.parallel.tensor_parallel import TensorParallel


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), [(2, "float16"), (3, "float32")])
def test_ranks_sum_through_shared_memory(tmp_path, size, dtype):
    pytest.importorskip("triton", reason="triton is not installed")
    script = Path(__file__).with_name("peer_memory_rank.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(size), dtype],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in finished.stdout:
        pytest.skip("this triton's interpreter cannot run on this numpy (2.4 or later)")
    assert finished.returncode == 0, finished.stdout


class FakeMemory:
    """Stands for `IpcMemory`; remembers what was opened."""

    def __init__(self, rank: int, opens: bool = True) -> None:
        self.handle = f"{rank:02x}"
        self.opens = opens
        self.opened: list[str] | None = None
        self.closed = False

    def open(self, handles: list[str], rank: int) -> None:
        assert not self.closed and handles[rank] == self.handle
        if not self.opens:
            raise RuntimeError("injected: cannot open")
        self.opened = handles

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    "failing",
    [{}, {1: "allocate"}, {0: "open"}, {2: "driver"}, {0: "allocate", 1: "allocate", 2: "open"}],
)
def test_all_ranks_share_memory_or_none(failing, caplog):
    size = 3
    store = dist.HashStore()
    memories = [FakeMemory(rank, failing.get(rank) != "open") for rank in range(size)]
    shared = {}

    def join(rank: int) -> None:
        def allocate() -> FakeMemory:
            if failing.get(rank) == "allocate":
                raise RuntimeError("injected: cannot allocate")
            if failing.get(rank) == "driver":
                raise OSError("injected: no driver")
            return memories[rank]

        shared[rank] = share_memory(rank, size, store, allocate)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(shared) == size  # nobody waits for ever
    if failing:
        assert list(shared.values()) == [None] * size
        allocated = [memories[r] for r in range(size) if failing.get(r) in (None, "open")]
        assert all(memory.closed for memory in allocated)
        assert "injected" in caplog.text
        return
    assert [shared[rank] for rank in range(size)] == memories
    assert all(memory.opened == ["00", "01", "02"] for memory in memories)
    assert not any(memory.closed for memory in memories) and not caplog.text


def test_one_rank_adds_up_parts():
    tp, ops = TensorParallel(), select_ops("torch", torch.device("cpu"), torch.float32, 64, False)
    parts = PartialSums(torch.randn(3, 4, 16), torch.float32)
    exact = parts.parts.double().sum(0)
    torch.testing.assert_close(
        tp.all_reduce(Unreduced(parts)).double(), exact, rtol=1e-6, atol=1e-6
    )
    x, residual, weight = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    expected = torch_ops.add_rms_norm(x, residual, weight, 1e-6)
    for actual, right in zip(
        tp.add_rms_norm(ops, Unreduced(x), residual, weight, 1e-6), expected, strict=True
    ):
        torch.testing.assert_close(actual, right)
