"""The thread that starts CUDA: it has ended when its block has, whatever happened in either."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from nanovllm.engine import cuda_start

NAME = "nanovllm-cuda"


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Arguments of the driver's start, which takes a while here."""
    found: list[int] = []

    def start(flags: int) -> None:
        time.sleep(0.05)
        found.append(flags)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=start))
    return found


def is_running() -> bool:
    return NAME in {thread.name for thread in threading.enumerate()}


def test_the_driver_starts_meanwhile(calls):
    with cuda_start.starting_cuda(None) as has_driver:
        assert has_driver and is_running()
    assert calls == [0] and not is_running()


def test_an_error_of_the_block_waits_for_the_thread(calls):
    with pytest.raises(ValueError, match="mine"), cuda_start.starting_cuda(None):
        raise ValueError("mine")
    assert calls == [0] and not is_running()


def test_an_error_of_the_thread_is_left_to_who_needs_cuda(calls, monkeypatch):
    computed = []

    def fail(dtype: torch.dtype) -> None:
        computed.append(dtype)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(cuda_start, "_compute", fail)
    monkeypatch.setattr(threading, "excepthook", lambda args: computed.append(args))
    with cuda_start.starting_cuda(torch.bfloat16):
        pass
    assert computed == [torch.bfloat16] and not is_running()


def test_nothing_happens_without_a_driver(monkeypatch):
    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", fail)
    with cuda_start.starting_cuda(torch.bfloat16) as has_driver:
        assert not has_driver and not is_running()
