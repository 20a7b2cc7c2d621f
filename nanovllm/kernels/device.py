"""What a GPU offers to a kernel: all that choices of tiles and of instructions depend on."""

import sys
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


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; those of Triton's interpreter for any other."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor - RESERVED_SHARED_MEMORY,
    )
