"""Kernels compiled before they are launched: what a dry run would launch, in several threads.

Triton's passes, LLVM, the assembler and, up to Triton 3.6, the C compiler of a kernel's launcher
leave Python's lock to others. Compiled kernels are in Triton's cache on disk, and in that of this
process.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nanovllm.kernels.triton.launcher import ALIGNMENT, DESCRIPTORS, recording

GRID = (1,)  # of no launch


class Pointer:
    """A tensor without memory as Triton takes it, at its place in memory that begins at 0."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self._address = int(tensor.storage_offset()) * tensor.itemsize

    def data_ptr(self) -> int:
        """The address."""
        return self._address


class Variant(NamedTuple):
    """A kernel, and the arguments of a launch that it is compiled for."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self) -> Any:
        """Triton's compiled kernel, from its cache or new."""
        return self.kernel.run(*self.args, grid=GRID, warmup=True, **self.options)


class Variants:
    """What the launches of dry runs need, each once."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], Variant] = {}

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it launches of dry runs are taken in."""
        with recording(self._add):
            yield

    def _add(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = {name: options[name] for name in options if name not in ("grid", "warmup")}
        traits = tuple(map(_trait, args, kernel.params))
        key = (kernel, traits, *options.items())
        if key not in self._found:
            self._found[key] = Variant(kernel, tuple(map(as_argument, args)), options)


def as_argument(value: Any) -> Any:
    """A launch's argument as Triton takes it, tensors without their memory."""
    if isinstance(value, torch.Tensor):
        return Pointer(value)
    if isinstance(value, DESCRIPTORS):
        return replace(value, base=Pointer(value.base))
    return value


def _trait(value: Any, param: Any) -> object:
    """What a kernel is compiled for of an argument, or more than that."""
    if isinstance(value, torch.Tensor):
        is_aligned = value.storage_offset() * value.itemsize % ALIGNMENT == 0
        return value.dtype, is_aligned or param.do_not_specialize_on_alignment
    if isinstance(value, DESCRIPTORS):
        return value.base.dtype, tuple(value.block_shape), repr(getattr(value, "layout", None))
    if isinstance(value, int) and not isinstance(value, bool):
        is_wide = value.bit_length() > 31
        if param.do_not_specialize:
            return int, is_wide
        return int, is_wide, value == 1, value % ALIGNMENT == 0
    return type(value) if isinstance(value, float) else value


class Compilation:
    """Variants on their way through the compiler, in threads of their own.

    Args:
        variants: what to compile; the largest kernels come first, as they take longest.
        device: the GPU, on which the kernels are loaded as well; None: they are only compiled.
    """

    def __init__(self, variants: Iterable[Variant], device: torch.device | None = None) -> None:
        self._variants = sorted(variants, key=lambda variant: -len(variant.kernel.src))
        self._device = device
        self._pool = ThreadPoolExecutor(
            max(1, min(num_cores(), len(self._variants))), "nanovllm-compiler", self._begin
        )
        self._tasks: list[Future[None]] = [
            self._pool.submit(self._compile, variant) for variant in self._variants
        ]

    def _begin(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def _compile(self, variant: Variant) -> None:
        compiled = variant.compile()
        if self._device is not None:
            compiled.run  # noqa: B018 (reading it makes the launcher and loads the kernel)

    def wait(self) -> list[BaseException]:
        """Wait for the end; why kernels could not be compiled or loaded.

        Whoever launches such a kernel gets the error.
        """
        try:
            errors = [task.exception() for task in self._tasks]
            for index, error in enumerate(errors):
                # Python 3.11 counts the depth of syntax trees for all threads together. Where two
                # make one at a time it may fail (its issue 106905), and not when all is quiet.
                if isinstance(error, SystemError):
                    errors[index] = self._error_of(self._variants[index])
            return [error for error in errors if error is not None]
        finally:
            self.close()

    def _error_of(self, variant: Variant) -> BaseException | None:
        try:
            self._compile(variant)
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        """Compile no more than what has begun."""
        self._pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class AbsentGPU:
    """A driver for Triton of a GPU that is not there: enough to compile for it.

    Its device's number is made of the capability, as Triton remembers kernels by it.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        self._number = 10 * capability[0] + capability[1]

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        """A number."""
        return self._number

    def get_current_stream(self, device: int) -> int:
        """A number."""
        return 0


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Within it Triton compiles for a GPU of this compute capability, which need not be there."""
    driver.set_active(AbsentGPU(capability))
    try:
        yield
    finally:
        driver.set_active(None)  # the next use finds the GPU that is there, if any


@dataclass(frozen=True)
class CompiledAll:
    """What `compile_all` has done."""

    cache: str  # the folder of Triton's cache
    num_kernels: int
    num_compiled: int  # of them: the others were in the cache
    errors: list[BaseException]


def compile_all(
    variants: Iterable[Variant], capability: tuple[int, int], device: torch.device | None
) -> CompiledAll:
    """Compile variants for a GPU of this capability, which is `device` or, if None, not there."""
    found: dict[str, bool] = {}  # by Triton's hash: whether it was in the cache

    def note(*, metadata_group: Any, cache_hit: bool, **other: Any) -> None:
        found.setdefault(str(sorted(metadata_group.values())), cache_hit)

    with (
        nullcontext() if device is not None else compiling_for(capability),
        _listening(note),
    ):
        errors = Compilation(variants, device).wait()
    hits = list(found.values())
    return CompiledAll(knobs.cache.dir, len(hits), hits.count(False), errors)


@contextmanager
def _listening(note: Callable[..., None]) -> Iterator[None]:
    """Within it `note` is called for each kernel that comes out of the compiler or the cache."""
    before = knobs.compilation.listener
    knobs.compilation.listener = note
    try:
        yield
    finally:
        knobs.compilation.listener = before
