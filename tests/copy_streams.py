"""Copy streams without a GPU, at both ends of what `CopyStream` allows, and engines on them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nanovllm.models import size, weight_offload


class EarlyCopies:
    """Each copy is done when it is started: one that starts too early destroys weights in use."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.log: list[str] = []
        self.num_started = 0

    def follow_compute(self) -> None:
        self.log.append("follow")

    def start(self, target: Tensor, source: Tensor) -> int:
        self.log.append(f"start {self.num_started}")
        self.num_started += 1
        target.copy_(source)
        return self.num_started

    def wait(self, copy: int) -> None:
        self.log.append(f"wait {copy - 1}")

    def finish(self) -> None:
        self.log.append("finish")


class LateCopies(EarlyCopies):
    """A copy is done when it is waited for: what is not has the weights of another layer."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.pending: list[tuple[Tensor, Tensor]] = []

    def start(self, target: Tensor, source: Tensor) -> int:
        self.pending.append((target, source))
        return super().start(target[:0], source[:0])

    def wait(self, copy: int) -> None:
        super().wait(copy)
        while self.num_started - len(self.pending) < copy:
            target, source = self.pending.pop(0)
            target.copy_(source)

    def finish(self) -> None:
        super().finish()
        self.wait(self.num_started)


@contextmanager
def offload_on_cpu(copies: type[EarlyCopies]) -> Iterator[None]:
    """Engines on the CPU take `cpu_offload_gb`; their copies are `copies`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size, "check_offload", lambda *args: 0)
        patch.setattr(weight_offload, "CudaCopyStream", copies)
        patch.setattr(weight_offload, "new_pinned", lambda n: torch.empty(n, dtype=torch.uint8))
        patch.setattr(weight_offload, "unpin", lambda memories: None)
        yield
