"""The ranks of test_peer_memory.py: python peer_memory_rank.py DIRECTORY SIZE DTYPE

Each is a process, forked when torch and Triton are imported. Its memory is a file that all ranks
map. Every rank makes the same random calls at its own pace, and knows all ranks' inputs, hence
every result.
"""

import multiprocessing
import random
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import fast_interpreter  # noqa: F401 (patches Triton's interpreter)
import torch
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import all_reduce, peer_memory
from nanovllm.kernels.triton.peer_memory import PeerMemory, clear_memory, num_memory_bytes
from nanovllm.kernels.types import PartialSums

WIDTH = 40
NUM_IDS = 11  # of the embedding's table, per rank
NUM_CALLS = 24  # each kind twice with each number of shots, and with each number of slots before
SECONDS = 1000  # for a machine on which everything is slow
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3}


def slow_down_polls(pace: random.Random) -> None:
    """A rank that polls leaves the processor to the others, and soon looks whether to give up.

    At times they are a call ahead before it goes on with what it has received.
    """
    load = interpreter_builder.create_masked_load

    def load_and_sleep(*args: Any) -> Any:
        values = load(*args)
        is_volatile = args[-1]
        if is_volatile:
            time.sleep(pace.choice((0.001, 0.001, 0.03)))
        return values

    interpreter_builder.create_masked_load = load_and_sleep
    all_reduce.POLLS_PER_LOOK_AT_ABORT = tl.constexpr(8)


def map_memory(directory: Path, rank: int, num_bytes: int) -> torch.Tensor:
    return torch.from_file(
        str(directory / f"memory-{rank}"), shared=True, size=num_bytes, dtype=torch.uint8
    )


def wait_for_all(directory: Path, what: str, rank: int, size: int) -> None:
    (directory / f"{what}-{rank}").touch()
    while not all((directory / f"{what}-{r}").exists() for r in range(size)):
        time.sleep(0.01)


def round_once(rows: list[torch.Tensor]) -> torch.Tensor:
    """Their sum in the order of the ranks, in float32, rounded to their type."""
    total = rows[0].float()
    for row in rows[1:]:
        total = total + row.float()
    return total.to(rows[0].dtype)


def check_all_reduce(peers: PeerMemory, rank: int, num_rows: int, dtype: torch.dtype) -> None:
    xs = [torch.randn(num_rows, WIDTH).to(dtype) for _ in range(peers.size)]
    xs[0][0, :3] = torch.tensor([0.0, -0.0, float("inf")])
    xs[-1][0, :2] = -0.0
    own = xs[rank].clone()
    total = peers.all_reduce(own)
    assert torch.equal(own, xs[rank])
    exact = torch.stack(xs).double().sum(0)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(total.double(), exact, rtol=tolerance, atol=tolerance)


def check_add_rms_norm(peers: PeerMemory, rank: int, num_rows: int, dtype: torch.dtype) -> None:
    """Of a product in parts, each of which is rounded before it is sent."""
    parts = [torch.randn(3, num_rows, WIDTH) for _ in range(peers.size)]
    residual, weight = torch.randn(num_rows, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    rows = [(p[0] + p[1] + p[2]).to(dtype) for p in parts]
    expected, expected_sum = torch_ops.add_rms_norm(round_once(rows), residual, weight, 1e-6)
    normed, total = peers.add_rms_norm(PartialSums(parts[rank], dtype), residual, weight, 1e-6)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(total, expected_sum, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)


def check_embedding(peers: PeerMemory, rank: int, num_rows: int, dtype: torch.dtype) -> None:
    table = torch.randn(peers.size * NUM_IDS, WIDTH).to(dtype)
    ids = torch.randint(len(table), (num_rows,), dtype=torch.int32)
    first = rank * NUM_IDS
    rows = peers.embedding(ids, table[first : first + NUM_IDS], first)
    assert torch.equal(rows, table[ids.long()])


def check_argmax(peers: PeerMemory, rank: int, num_rows: int) -> None:
    scores = torch.randn(peers.size, num_rows)
    token_ids = torch.randint(1000, (peers.size, num_rows), dtype=torch.int32)
    scores[:, 0] = -1.5  # a tie: the lowest id wins
    scores[:, num_rows // 2] = float("-inf")
    scores[-1, num_rows // 2] = -1e30
    expected = []
    for score, ids in zip(scores.T.tolist(), token_ids.T.tolist(), strict=True):
        best = max(score)
        expected.append(min(i for s, i in zip(score, ids, strict=True) if s == best))
    assert peers.argmax(scores[rank], token_ids[rank]).tolist() == expected


def run_rank(directory: Path, rank: int, size: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    pace = random.Random(rank)
    slow_down_polls(pace)
    num_bytes = num_memory_bytes(size, WIDTH, dtype)
    own = map_memory(directory, rank, num_bytes)
    clear_memory(own, size, WIDTH, dtype)
    wait_for_all(directory, "cleared", rank, size)
    memories = [own if r == rank else map_memory(directory, r, num_bytes) for r in range(size)]
    addresses = [memory.data_ptr() for memory in memories]
    abort = torch.zeros(1, dtype=torch.int32)
    peers = PeerMemory(rank, addresses, own, WIDTH, dtype, abort)

    for call in range(NUM_CALLS):
        torch.manual_seed(call)
        num_rows = random.Random(call).choice((1, 1, 2, 3, 7))
        peer_memory.TWO_SHOT_BYTES = 0 if call % 3 == 0 else 1 << 30
        time.sleep(pace.choice((0.0, 0.0, 0.02)))
        if call % 4 == 3:
            check_argmax(peers, rank, (1, 5, 130)[call // 4 % 3])
        else:
            check = (check_all_reduce, check_add_rms_norm, check_embedding)[call % 4]
            check(peers, rank, num_rows, dtype)

    wait_for_all(directory, "done", rank, size)
    if rank == 0:  # the other ranks are gone: nothing would come
        abort.fill_(1)
        peers.all_reduce(torch.ones(1, WIDTH, dtype=dtype))


def main(directory: Path, size: int, dtype: torch.dtype) -> int:
    """Run all ranks; the number of those that did not succeed."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=run_rank, args=(directory, rank, size, dtype), name=f"rank {rank}")
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + SECONDS
    while alive := [rank.sentinel for rank in ranks if rank.exitcode is None]:
        wait(alive, max(0, deadline - time.monotonic()))
        if any(rank.exitcode for rank in ranks):  # nobody waits long for one that has failed
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() >= deadline:
            break
    for rank in ranks:
        if rank.exitcode is None:
            print(f"{rank.name} was still running")
            rank.kill()
        rank.join()
    return sum(rank.exitcode != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])))
