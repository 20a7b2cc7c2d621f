"""Overlap of kernel launches on Hopper and later (programmatic dependent launch).

A kernel launched with `overlap_options` may start before the one ahead of it on the stream has
ended. It calls `await_previous` before anything else, in every program, so it touches memory only
when that one, and with it all earlier ones, is done: only the launch itself overlaps.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

OVERLAP_LAUNCHES = True  # off for an ablation


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Wait for the previous kernel's memory, and let the next kernel's programs come and wait."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@lru_cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch on `device` of a kernel with a constexpr OVERLAP."""
    if OVERLAP_LAUNCHES and _can_overlap(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
