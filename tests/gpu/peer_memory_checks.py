"""One rank of test_peer_memory_gpu.py: python peer_memory_checks.py CHECK RANK SIZE PORT

Every rank can make every rank's inputs, hence every result.
"""

import random
import sys
import time

import torch
import torch.distributed as dist

from nanovllm.kernels import torch_ops
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.triton import norm as triton_norm
from nanovllm.kernels.triton import peer_memory
from nanovllm.kernels.types import PartialSums, Unreduced
from nanovllm.parallel.tensor_parallel import TensorParallel

EPS = 1e-6
TOLERANCES = {torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}
NUM_ROWS = (1, 2, 3, 31, 128, 511, 512, 513, 4096)  # from 513 on through NCCL
GRAPH_ROWS = (1, 64, 3, 512, 1, 7, 130, 2)
NUM_REPLAYS = 1500


class Rank:
    """What every check gets."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device("cuda", rank)
        self.store = dist.TCPStore("127.0.0.1", port, size + 1, is_master=False)
        self.num_connections = 0

    def connect(self, hidden_size: int, dtype: torch.dtype) -> TensorParallel:
        self.num_connections += 1
        store = dist.PrefixStore(str(self.num_connections), self.store)
        tp = TensorParallel.connect(self.rank, self.size, store, self.device, hidden_size, dtype)
        assert tp.peers is not None, "the GPUs cannot share memory"
        return tp

    def rows(self, seed: int, *shape: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Every rank's input of a call."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(shape, device=self.device, generator=generator).to(dtype)
            for _ in range(self.size)
        ]

    def check_equal_on_all(self, what: str, x: torch.Tensor) -> None:
        bits = x.contiguous().view(torch.uint8).long()
        weights = torch.arange(bits.numel(), device=x.device).remainder(1009).view(bits.shape)
        self.store.set(f"{what}/{self.rank}", str((bits * weights).sum().item()))
        sums = {self.store.get(f"{what}/{rank}") for rank in range(self.size)}
        assert len(sums) == 1, what


def sum_rounded_once(xs: list[torch.Tensor]) -> torch.Tensor:
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def check_sums(rank: Rank) -> None:
    """All sizes and dtypes against float64; also that all ranks get the same bits."""
    ops = select_ops("triton", rank.device, torch.bfloat16, 128, False)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden_size in (64, 1000, 4096, 5120):
            tp = rank.connect(hidden_size, dtype)
            for num_rows in NUM_ROWS:
                check_rows(rank, tp, ops, num_rows, hidden_size, dtype)
            tp.close()


def check_rows(
    rank: Rank,
    tp: TensorParallel,
    ops: Ops,
    num_rows: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> None:
    for two_shot in (False, True) if rank.size > 2 else (False,):
        peer_memory.TWO_SHOT_BYTES = 0 if two_shot else 1 << 60
        name = f"{dtype} {hidden_size} {num_rows} {two_shot}"
        xs = rank.rows(num_rows, num_rows, hidden_size, dtype=dtype)
        exact = torch.stack(xs).double().sum(0)
        total = tp.all_reduce(Unreduced(xs[rank.rank].clone()))
        close(total, exact)
        rank.check_equal_on_all(f"sum {name}", total)
        if num_rows <= peer_memory.MAX_ROWS and rank.size == 2:
            assert torch.equal(total, sum_rounded_once(xs))

        [residual, *_] = rank.rows(1, num_rows, hidden_size, dtype=dtype)
        [weight, *_] = rank.rows(2, hidden_size, dtype=dtype)
        expected, expected_sum = triton_norm.add_rms_norm(total, residual.clone(), weight, EPS)
        own = Unreduced(xs[rank.rank].clone())
        normed, new_residual = tp.add_rms_norm(ops, own, residual.clone(), weight, EPS)
        assert torch.equal(new_residual, expected_sum)
        close(normed, expected)
        rank.check_equal_on_all(f"norm {name}", normed)

        if num_rows > 128:
            continue
        parts = rank.rows(3, 4, num_rows, hidden_size, dtype=torch.float32)
        summed = [(p[0] + p[1] + p[2] + p[3]).to(dtype) for p in parts]
        expected, expected_sum = torch_ops.add_rms_norm(
            sum_rounded_once(summed), residual, weight, EPS
        )
        normed, new_residual = tp.add_rms_norm(
            ops,
            Unreduced(PartialSums(parts[rank.rank], dtype)),
            residual.clone(),
            weight,
            EPS,
        )
        close(new_residual, expected_sum)
        close(normed, expected)


def check_embedding_and_argmax(rank: Rank) -> None:
    hidden_size, num_ids = 96, 100
    tp = rank.connect(hidden_size, torch.bfloat16)
    assert tp.peers is not None
    [table, *_] = rank.rows(0, rank.size * num_ids, hidden_size, dtype=torch.bfloat16)
    own = table[rank.rank * num_ids :][:num_ids].contiguous()
    for num_rows in (1, 2, 127, 128, 129, 512):
        generator = torch.Generator().manual_seed(num_rows)
        ids = torch.randint(len(table), (num_rows,), dtype=torch.int32, generator=generator)
        rows = tp.peers.embedding(ids.to(rank.device), own, rank.rank * num_ids)
        assert torch.equal(rows, table[ids.to(rank.device)])

        scores = rank.rows(num_rows, num_rows, dtype=torch.float32)
        token_ids = [
            torch.randint(1 << 20, (num_rows,), dtype=torch.int32, generator=generator)
            for _ in range(rank.size)
        ]
        for score in scores:
            score[0] = -3.0  # a tie: the lowest id wins
        table_of_scores = torch.stack(scores).cpu()
        best = table_of_scores.max(0).values
        candidates = torch.where(table_of_scores == best, torch.stack(token_ids), 1 << 30)
        out = tp.argmax(scores[rank.rank], token_ids[rank.rank].to(rank.device))
        assert torch.equal(out.cpu(), candidates.min(0).values)
    tp.close()


def check_graphs(rank: Rank) -> None:
    """A graph of calls of many sizes whose inputs change with every replay, checked on the device.

    The ranks lag behind each other at random, on the host and on the device; every few replays the
    same calls are launched one by one.
    """
    hidden_size, dtype = 256, torch.bfloat16
    tp = rank.connect(hidden_size, dtype)
    ops = select_ops("triton", rank.device, dtype, 128, False)
    lag = random.Random(rank.rank)
    step = torch.zeros((), device=rank.device)
    num_errors = torch.zeros((), dtype=torch.int64, device=rank.device)
    # Integers, whose sums do not depend on the order.
    noises = [
        [x.mul(4).round() for x in rank.rows(i, n, hidden_size, dtype=torch.float32)]
        for i, n in enumerate(GRAPH_ROWS)
    ]
    weight = torch.ones(hidden_size, dtype=dtype, device=rank.device)

    def run_calls(lags: bool) -> None:
        step.add_(1).remainder_(50)
        for call, noise in enumerate(noises):
            xs = [(x * (step + r)).to(dtype) for r, x in enumerate(noise)]
            expected = sum_rounded_once(xs)
            if lags and lag.random() < 0.5:
                torch.cuda._sleep(lag.choice((1_000, 20_000)))
            own = Unreduced(xs[rank.rank])
            if call % 2:
                residual = torch.zeros_like(expected)
                _, total = tp.add_rms_norm(ops, own, residual, weight, EPS)
            else:
                total = tp.all_reduce(own)
            num_errors.add_((total != expected).sum())

    run_calls(lags=False)
    torch.cuda.synchronize()
    graphs = []
    for _ in range(3):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], capture_error_mode="thread_local"):
            run_calls(lags=True)
    for replay in range(NUM_REPLAYS):
        graphs[replay % 3].replay()
        if replay % 100 == 50:
            time.sleep(lag.random() / 100)
            run_calls(lags=False)
    assert num_errors.item() == 0
    graphs.clear()
    tp.close()


def check_abort(rank: Rank) -> None:
    """A rank whose peers are gone waits until the abort, no longer; and a new start works."""
    tp = rank.connect(64, torch.float32)
    if rank.rank == 0:
        tp.all_reduce(Unreduced(torch.ones(4, 64, device=rank.device)))
        done = torch.cuda.Event()
        done.record()
        time.sleep(0.5)
        assert not done.query()
        start = time.monotonic()
        tp.abort()
        torch.cuda.synchronize()
        assert time.monotonic() - start < 7  # NCCL's own abort may take some seconds
        rank.store.set("aborted", "")
    else:
        rank.store.get("aborted")
    tp.close()
    tp = rank.connect(64, torch.float32)
    total = tp.all_reduce(Unreduced(torch.ones(4, 64, device=rank.device)))
    assert (total == rank.size).all()
    tp.close()


def main(check: str, rank: int, size: int, port: int) -> None:
    torch.cuda.set_device(rank)
    this = Rank(rank, size, port)
    with torch.inference_mode():
        globals()[check](this)
    torch.cuda.synchronize()
    # Nobody leaves while another may still look at the store.
    this.store.set(f"left/{rank}", "")
    for peer in range(size):
        this.store.get(f"left/{peer}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
