"""Kernels compiled before they are launched: what a dry run would launch, in several processes.

They are forked copies of this one, which reads the kernels from Triton's cache on disk when they
are done. Where it cannot be copied, threads compile: Triton's passes, LLVM and the assembler leave
Python's lock to others. They load one kernel after the other, see `LOADING`.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import JITFunction, driver
from triton.runtime.cache import FileCacheManager

from nanovllm.kernels.triton.compiler_key import compiler_key
from nanovllm.kernels.triton.compiler_processes import MAX_TASKS, CompilerProcesses, may_fork
from nanovllm.kernels.triton.launcher import ALIGNMENT, DESCRIPTORS, LOADING, recording

GRID = (1,)  # of no launch
MAX_PROCESSES = 16  # each needs some 200 MiB while it compiles


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
    """Variants on their way through the compiler, in processes or threads of their own.

    What is in the cache on disk is loaded first. The others are compiled by copies of this process,
    if it can be copied; else, and where the copies leave something undone, in threads.

    Args:
        variants: what to compile; the largest kernels come first, as they take longest.
        capability: of the GPU that they are for.
        device: this GPU, on which the kernels are loaded as well; None: they are only compiled.

    Attributes:
        compiled_elsewhere: Triton's hashes of the kernels that other processes have compiled.
        files: of all kernels that were compiled or loaded, in Triton's cache.
    """

    def __init__(
        self,
        variants: Iterable[Variant],
        capability: tuple[int, int],
        device: torch.device | None = None,
    ) -> None:
        self._variants = sorted(variants, key=lambda variant: -source_size(variant.kernel))
        self._device = device
        self._errors: dict[int, BaseException | None] = {}  # of what has been tried
        self._pool: ThreadPoolExecutor | None = None
        self._tasks: dict[int, Future[None]] = {}
        self._processes: CompilerProcesses | None = None
        self.compiled_elsewhere: set[str] = set()
        self.files: set[str] = set()
        compiler_key()
        num_processes = min(num_cores(), MAX_PROCESSES)
        if num_processes < 2 or not may_fork():
            self._start_threads()
            return
        self._load_what_is_cached()
        left = self._left()
        if len(left) > 1 and len(left) <= MAX_TASKS:
            is_launched = device is not None
            self._in_processes = left
            self._processes = CompilerProcesses(
                [partial(compile_in_copy, self._variants[index], is_launched) for index in left],
                min(num_processes, len(left)),
                lambda: prepare_copy(capability),
            )
        else:
            self._start_threads()

    def _left(self) -> list[int]:
        return [index for index in range(len(self._variants)) if index not in self._errors]

    def _load_what_is_cached(self) -> None:
        """Load kernels until one is not in the cache; the others rarely are, then."""
        with suppress(NotCachedError), cached_alone():
            for index in range(len(self._variants)):
                if self._error_of(index) is None:
                    self._errors[index] = None

    def _start_threads(self) -> None:
        left = self._left()
        self._pool = ThreadPoolExecutor(max(1, min(num_cores(), len(left))), "nanovllm-compiler")
        self._tasks = {index: self._pool.submit(self._compile, index) for index in left}

    def _compile(self, index: int) -> Any:
        with nullcontext() if self._device is None else torch.cuda.device(self._device):
            compiled = self._variants[index].compile()
            if self._device is not None:
                with LOADING:
                    compiled.run  # noqa: B018 (reading it makes the launcher and loads the kernel)
        self.files.update(compiled.metadata_group.values())
        return compiled

    def wait(self) -> list[BaseException]:
        """Wait for the end; why kernels could not be compiled or loaded.

        Whoever launches such a kernel gets the error.
        """
        try:
            if self._processes is not None:
                for number, was_compiled in self._processes.done():
                    index = self._in_processes[number]
                    self._errors[index] = self._error_of(index)
                    if was_compiled:
                        self.compiled_elsewhere.add(self._compile(index).hash)
                self._processes.close()
                self._start_threads()
            # Python 3.11 counts the depth of syntax trees for all threads together. Where two make
            # one at a time it may fail (its issue 106905), and not when all is quiet.
            failed = [index for index, task in self._tasks.items() if task.exception()]
            self._errors |= dict.fromkeys(self._tasks) | {i: self._error_of(i) for i in failed}
            return [error for error in self._errors.values() if error is not None]
        finally:
            self.close()

    def _error_of(self, index: int) -> BaseException | None:
        try:
            self._compile(index)
        except NotCachedError:
            raise
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        """Compile no more than what threads have begun."""
        if self._processes is not None:
            self._processes.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def source_size(kernel: Any) -> int:
    """Characters of a kernel and of all functions that it calls, each once."""
    found: dict[int, Any] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        if id(function) not in found and isinstance(function, JITFunction):
            found[id(function)] = function
            names = function.fn.__code__.co_names
            waiting += [function.fn.__globals__.get(name) for name in names]
    return sum(len(function.src) for function in found.values())


@cache
def preparing() -> threading.Thread:
    """A thread that gets ready what a first compilation waits for.

    That is Triton's driver, of which a C compiler makes a part where the cache is empty, and its
    key. Most of the time this leaves Python's lock to others.
    """

    def prepare() -> None:
        with suppress(Exception):  # whoever needs it sees why there is none
            driver.default  # noqa: B018 (looking makes it)
            compiler_key()

    thread = threading.Thread(target=prepare, name="nanovllm-compiler", daemon=True)
    thread.start()
    return thread


class NotCachedError(Exception):
    """A kernel is not in the cache on disk."""


@contextmanager
def cached_alone() -> Iterator[None]:
    """Within it compiling what is not in Triton's cache on disk raises NotCachedError."""
    base = knobs.cache.manager_class or FileCacheManager

    class Manager(base):  # type: ignore[misc, valid-type]
        def get_group(self, filename: str) -> Any:
            group = super().get_group(filename)
            if not group:
                raise NotCachedError(filename)
            return group

    with knobs.cache.scope():
        knobs.cache.manager_class = Manager
        yield


def prepare_copy(capability: tuple[int, int]) -> None:
    """Let a forked copy of this process compile for a GPU of this capability without using it."""
    driver.set_active(AbsentGPU(capability))
    knobs.compilation.store_binary_only = True  # nobody reads the rest, which loads would


def compile_in_copy(variant: Variant, is_launched: bool) -> bool:
    """Compile a variant into the cache on disk, and what launches it; whether it was not there."""
    hits: list[bool] = []

    def note(*, cache_hit: bool, **other: Any) -> None:
        hits.append(cache_hit)

    with _listening(note):
        compiled = variant.compile()
    # Up to Triton 3.6 the C compiler makes a launcher for the types of a kernel's arguments.
    if is_launched and hasattr(nvidia_driver, "make_launcher"):
        nvidia_driver.CudaLauncher(compiled.src, compiled.metadata)
    return hits == [False]


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

    def note(*, metadata: Any, cache_hit: bool, **other: Any) -> None:
        found.setdefault(metadata["hash"], cache_hit)

    with (
        nullcontext() if device is not None else compiling_for(capability),
        _listening(note),
    ):
        compilation = Compilation(variants, capability, device)
        errors = compilation.wait()
    found |= dict.fromkeys(compilation.compiled_elsewhere, False)
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
