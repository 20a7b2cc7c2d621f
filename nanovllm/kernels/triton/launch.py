"""Overlap of kernel launches on Hopper and later (programmatic dependent launch).

A kernel launched with `overlap_options` may start before the one ahead of it on the stream has
ended. Every program of every kernel calls `await_previous`, which returns when that kernel has
completed and its memory is visible. Until then a program may only read what no kernel writes
(weights). The kernel ahead has completed only if it, too, has waited for the one before it, so all
earlier kernels are done. Hence `release_next` may come at any time, even before the own wait: the
next kernel's programs wait for this one's completion, whenever they come.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from nanovllm.kernels.device import INTERPRETER, device_limits
from nanovllm.kernels.triton.launcher import Launcher

OVERLAP_LAUNCHES = True  # off for an ablation


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, with fused multiply-adds whatever this version's default is.

    Without them the last bits of results would change with the version.
    """
    if function is None:
        return partial(jit, **options)
    return with_dry_runs(triton.jit(function, **options))


def with_dry_runs(kernel: Any) -> Any:
    """A kernel of Triton or Gluon, with what `jit` adds."""
    kernel.run = Launcher(kernel)
    return kernel


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up; Triton's own takes the host 20 times as long."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


@jit
def release_next(OVERLAP: tl.constexpr):
    """Let the next kernel's programs come, once all of this kernel's have; they wait for its end.

    Calling it again has no effect.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def await_previous(OVERLAP: tl.constexpr):
    """Let the next kernel's programs come, then wait for the previous kernel and its memory."""
    release_next(OVERLAP)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@jit
def await_previous_alone(OVERLAP: tl.constexpr):
    """Wait for the previous kernel, but let the next one come only when this one has ended.

    All kernels from here on may then read, even before they wait, what this kernel and those ahead
    of it have written; past their multiprocessor's cache (".cg"), which may remember older values.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


def has_bulk_copies(device: torch.device) -> bool:
    """Whether tensor descriptors load by Hopper's bulk tensor copies, 64-row products included."""
    return not is_gpu(device) or is_hopper(device)


def is_gpu(device: torch.device) -> bool:
    """Whether kernels on it may have a GPU's instructions, which the interpreter has not."""
    return device_limits(device) is not INTERPRETER


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9.x."""
    return device_limits(device).capability[0] == 9


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for Triton's interpreter."""
    return device_limits(device).num_sms


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch on `device` of a kernel with a constexpr OVERLAP."""
    if OVERLAP_LAUNCHES and device_limits(device).capability >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
