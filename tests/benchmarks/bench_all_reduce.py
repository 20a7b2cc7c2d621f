"""Micro-benchmark of the sums over GPUs, run by hand: python tests/benchmarks/bench_all_reduce.py

The sum of a row-parallel layer's output with the residual and its RMS norm, in bfloat16, many calls
in a CUDA graph: NCCL and the norm's kernel; the sum through shared memory and the norm's kernel;
both in one kernel. `MAX_ROWS`, `ELEMENTS_PER_WARP` and `TWO_SHOT_BYTES` follow from this table.
It also times the embedding and the argmax.
"""

import argparse
import multiprocessing
from collections.abc import Callable

import torch
import torch.distributed as dist

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.triton import peer_memory
from nanovllm.kernels.types import Unreduced
from nanovllm.parallel.tensor_parallel import TensorParallel

DTYPE = torch.bfloat16
EPS = 1e-6
NUM_CALLS = 32  # in a graph
NUM_REPLAYS = 20
HIDDEN_SIZES = (1024, 4096, 5120)
NUM_ROWS = (1, 8, 32, 128, 256, 512)


def microseconds(call: Callable[[], object]) -> float:
    """Mean time of one of many calls in a CUDA graph; all ranks time the same."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(NUM_CALLS):
            call()
    for _ in range(3):
        graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(NUM_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / NUM_REPLAYS / NUM_CALLS


def bench_sums(tp: TensorParallel, ops: Ops, hidden_size: int, num_rows: int) -> list[float]:
    """NCCL, then one shot without and with the norm, with more than two ranks two shots with it."""
    x = torch.randn(num_rows, hidden_size, device="cuda").to(DTYPE)
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])

    def add_rms_norm() -> None:
        tp.add_rms_norm(ops, Unreduced(x), residual, weight, EPS)

    def sum_then_norm() -> None:
        ops.add_rms_norm(tp.all_reduce(Unreduced(x)), residual, weight, EPS)

    peers, tp.peers = tp.peers, None
    times = [microseconds(add_rms_norm)]
    tp.peers = peers
    if peers is not None:
        peer_memory.TWO_SHOT_BYTES = 1 << 60
        times += [microseconds(sum_then_norm), microseconds(add_rms_norm)]
        if tp.size > 2:
            peer_memory.TWO_SHOT_BYTES = 0
            times.append(microseconds(add_rms_norm))
    return times


def bench_embedding(tp: TensorParallel, hidden_size: int, num_rows: int) -> float:
    peers = tp.peers
    assert peers is not None
    table = torch.randn(1000, hidden_size, device="cuda").to(DTYPE)
    ids = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    return microseconds(lambda: peers.embedding(ids, table, tp.rank * len(table)))


def bench_argmax(tp: TensorParallel, num_rows: int) -> list[float]:
    """NCCL, then shared memory."""
    scores = torch.randn(num_rows, device="cuda")
    ids = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    times = []
    peers = tp.peers
    for tp.peers in (None, peers):
        times.append(microseconds(lambda: tp.argmax(scores, ids)))
    return times


def bench(rank: int, size: int, port: int) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, size + 1, is_master=False)
    ops = select_ops("triton", device, DTYPE, 128, False)

    def report(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    report(f"{size} GPUs, us a call; GB/s: the rows that one shot sends to one peer")
    names = ["NCCL, norm", "1 shot, norm", "1 shot fused", *(["2 shots fused"] if size > 2 else [])]
    report("hidden  rows" + "".join(f"{name:>15}" for name in [*names, "GB/s", "embedding"]))
    for hidden_size in HIDDEN_SIZES:
        name = str(hidden_size)
        group_store = dist.PrefixStore(name, store)
        tp = TensorParallel.connect(rank, size, group_store, device, hidden_size, DTYPE)
        if tp.peers is None:
            report("the GPUs cannot share memory")
        for num_rows in NUM_ROWS:
            times = bench_sums(tp, ops, hidden_size, num_rows)
            if tp.peers is not None:
                times.append(num_rows * hidden_size * DTYPE.itemsize / times[2] / 1e3)
                times.append(bench_embedding(tp, hidden_size, num_rows))
            report(f"{hidden_size:6}{num_rows:6}" + "".join(f"{time:15.2f}" for time in times))
        if hidden_size == HIDDEN_SIZES[-1]:
            for num_rows in (1, 256):
                times = bench_argmax(tp, num_rows)
                report(f"argmax of {num_rows} rows: NCCL {times[0]:.2f}, shared {times[1]:.2f}")
        # Nobody lets go of memory that another may still use.
        torch.cuda.synchronize()
        store.set(f"{name}/{rank}", "")
        for peer in range(size):
            store.get(f"{name}/{peer}")
        tp.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2, help="number of GPUs")
    size = parser.parse_args().size
    store = dist.TCPStore("127.0.0.1", 0, size + 1, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=bench, args=(rank, size, store.port)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
