"""One rank of test_peer_memory.py: python peer_memory_rank.py DIRECTORY RANK SIZE DTYPE

Its memory is a file that all ranks map. Every rank makes the same random calls at its own pace, and
knows all ranks' inputs, hence every result.
"""

import random
import sys
import time
from pathlib import Path

import torch

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import peer_memory
from nanovllm.kernels.triton.peer_memory import PeerMemory, clear_memory, num_memory_bytes
from nanovllm.kernels.types import PartialSums

WIDTH = 40
NUM_IDS = 11  # of the embedding's table, per rank
NUM_CALLS = 40
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3}


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


def main(directory: Path, rank: int, size: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    num_bytes = num_memory_bytes(size, WIDTH, dtype)
    own = map_memory(directory, rank, num_bytes)
    clear_memory(own, size, WIDTH, dtype)
    wait_for_all(directory, "cleared", rank, size)
    memories = [own if r == rank else map_memory(directory, r, num_bytes) for r in range(size)]
    addresses = [memory.data_ptr() for memory in memories]
    abort = torch.zeros(1, dtype=torch.int32)
    peers = PeerMemory(rank, addresses, own, WIDTH, dtype, abort)

    pace = random.Random(rank)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4]))
