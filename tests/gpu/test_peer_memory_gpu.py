"""Sums over GPUs through shared memory against float64, in graphs and out of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

SECONDS = 200
CHECKS = ("check_sums", "check_embedding_and_argmax", "check_graphs", "check_abort")


def run_ranks(check: str, size: int, folder: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, size + 1, is_master=True, wait_for_workers=False)
    script = str(Path(__file__).with_name("peer_memory_checks.py"))
    ranks, outputs = [], [folder / f"output-{rank}" for rank in range(size)]
    for rank, output in enumerate(outputs):
        with output.open("w") as file:
            command = [sys.executable, script, check, str(rank), str(size), str(store.port)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + SECONDS
    try:
        # A rank whose peer has failed would wait for ever.
        while not all(rank.poll() == 0 for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):
                time.sleep(2)
                break
            time.sleep(0.1)
    finally:
        codes = [rank.poll() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * size, "\n".join(output.read_text() for output in outputs)


@pytest.mark.two_gpus
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check, tmp_path):
    run_ranks(check, 2, tmp_path)


@pytest.mark.four_gpus
@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(check, tmp_path):
    run_ranks(check, 4, tmp_path)
