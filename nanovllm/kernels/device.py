"""What a GPU offers to a kernel: all that choices of tiles and of instructions depend on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch

# CUDA keeps so much of a multiprocessor's shared memory for each program (thread block) that it
# runs, from compute capability 8.0 on: NVIDIA Ampere GPU Architecture Tuning Guide, 1.4.3.2.
RESERVED_SHARED_MEMORY = 1024


@dataclass(frozen=True)
class DeviceLimits:
    """A device as the kernels see it."""

    capability: tuple[int, int]  # compute capability; (0, 0): Triton's interpreter
    num_sms: int  # streaming multiprocessors
    shared_memory: int  # bytes that a program may ask for

    @property
    def has_tensor_memory(self) -> bool:
        """Whether matrix instructions take operands from, and sum in, 512 columns of their own.

        That is compute capability 10.x: "Tensor Memory" in NVIDIA's PTX ISA.
        """
        return self.capability[0] == 10


INTERPRETER = DeviceLimits((0, 0), 1, sys.maxsize)
# A card of each kind: T4, A100, RTX 3090, RTX 4090, H200, B200, RTX 5090. Shared memory: "Compute
# Capabilities" in the CUDA Programming Guide, maximum amount of it per thread block.
KNOWN_GPUS = {
    limits.capability: limits
    for limits in (
        DeviceLimits((7, 5), 40, 64 << 10),
        DeviceLimits((8, 0), 108, 163 << 10),
        DeviceLimits((8, 6), 82, 99 << 10),
        DeviceLimits((8, 9), 128, 99 << 10),
        DeviceLimits((9, 0), 132, 227 << 10),
        DeviceLimits((10, 0), 148, 227 << 10),
        DeviceLimits((12, 0), 170, 99 << 10),
    )
}
_limits_of_meta: ContextVar[DeviceLimits] = ContextVar("limits of meta", default=INTERPRETER)


@contextmanager
def meta_stands_for(limits: DeviceLimits) -> Iterator[None]:
    """Within it the device "meta" has these limits: a dry run chooses what that GPU would get."""
    token = _limits_of_meta.set(limits)
    try:
        yield
    finally:
        _limits_of_meta.reset(token)


def limits_like(capability: tuple[int, int]) -> DeviceLimits:
    """Of the known GPU with this compute capability, or else with the next lower one."""
    lower = (known for known in KNOWN_GPUS if known <= capability)
    return KNOWN_GPUS[max(lower, default=min(KNOWN_GPUS))]


def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; of "meta" see `meta_stands_for`; else the interpreter's."""
    if device.type == "cuda":
        return limits_of_gpu(device)
    return _limits_of_meta.get() if device.type == "meta" else INTERPRETER


@lru_cache
def limits_of_gpu(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor - RESERVED_SHARED_MEMORY,
    )
