"""Compiles the Triton kernels for GPUs that are not there, by the library's own launches.

A stand-in for Triton's driver names the GPU, tensors are fake, and a launch ends when the kernel is
compiled. So the tiles and options are those that the library would choose on that GPU.
"""

import hashlib
import importlib
import inspect
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import JITFunction

import nanovllm.kernels.triton
from nanovllm.kernels.device import KNOWN_GPUS, RESERVED_SHARED_MEMORY, limits_of_gpu
from nanovllm.kernels.triton.compilation import AbsentGPU, as_argument

CUDA = torch.device("cuda", 0)
Capability = tuple[int, int]
# Bytes that a program may ask for.
SHARED_MEMORY = {capability: limits.shared_memory for capability, limits in KNOWN_GPUS.items()}
TENSOR_MEMORY = 512  # columns that a program may have where there is tensor memory (10.0)
CAPABILITIES = [capability for capability in SHARED_MEMORY if capability >= (8, 0)]


def kernels() -> dict[str, JITFunction]:
    """Every kernel, and every function that kernels call, by module and name."""
    found = {}
    for module_info in pkgutil.iter_modules(nanovllm.kernels.triton.__path__):
        module = importlib.import_module(f"nanovllm.kernels.triton.{module_info.name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                found[f"{module_info.name}.{name}"] = value
    return found


def shown(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def uncovered(names: set[str]) -> set[str]:
    """The kernels and functions that the kernels of these names do not call, nor are."""
    found = kernels()
    reached, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            words = set(re.findall(r"\w+", inspect.getsource(found[name].fn)))
            values = (found[name].fn.__globals__.get(word) for word in words)
            waiting += [name_of(value) for value in values if isinstance(value, JITFunction)]
    return found.keys() - reached


@dataclass
class Compiled:
    """A kernel as it was compiled for a launch."""

    kernel: str
    capability: Capability
    constants: dict[str, Any]
    num_warps: int
    shared: int  # bytes
    tensor_memory: int  # columns
    ptx: str = ""  # its hash
    registers: int | None = None  # of a thread
    spilled: int | None = None  # bytes that a thread stores for want of registers
    seconds: float = 0.0

    def problem(self) -> str | None:
        """Why no launch of it could succeed, by name."""
        what = f"{self.kernel} on {shown(self.capability)} ({self.constants})"
        most = SHARED_MEMORY[self.capability]
        if self.shared > most:
            return f"{what}: {self.shared:,} bytes of shared memory, there are {most:,}"
        if self.tensor_memory > TENSOR_MEMORY:
            return f"{what}: {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}"
        return None


@dataclass
class Launches:
    """What was compiled, and what could not be."""

    compiled: list[Compiled] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        return self.failures + [text for one in self.compiled if (text := one.problem())]


class Views(TorchFunctionMode):
    """What a build of torch without CUDA lacks for fake tensors: slices, and tensors of lists."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor:
            return torch.empty(len(args[0]), **(kwargs or {}))
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, indices = args
        dim = 0
        for index in indices if isinstance(indices, tuple) else (indices,):
            if isinstance(index, int):
                x = x.select(dim, index)
            else:
                begin, end, step = index.indices(x.shape[dim])
                assert step == 1
                x = x.narrow(dim, begin, end - begin)
                dim += 1
        return x


class AllocatedError(Exception):
    """Ends a compilation where memory is allocated, before barriers are placed, and LLVM."""


def allocated(backend, stages, options, language, capability) -> None:
    """A hook of Triton: stages up to the layout of tensors and of shared memory, the cheapest."""
    lower = stages["llir"]

    def allocate(module: Any, metadata: dict[str, Any]) -> str:
        def end(passes_so_far: Any, *args: Any) -> None:
            passes_so_far.run(module, "allocate")
            raise AllocatedError

        # The first pass after those that allocate.
        later = mock.patch.object(nvidia.nvidia.passes.ttnvgpuir, "add_proxy_fence_insertion", end)
        with later, suppress(AllocatedError):
            lower(module, metadata)
        metadata["shared"] = module.get_int_attr("ttg.shared")
        metadata["tmem_size"] = module.get_int_attr("ttg.tensor_memory_size")
        metadata["name"] = ""
        return ""

    stages["llir"] = allocate
    stages["ptx"] = lambda module, metadata: ""
    stages["cubin"] = lambda module, metadata: b""


def to_ptx(backend, stages, options, language, capability) -> None:
    """A hook of Triton: all stages but the assembler."""
    stages["cubin"] = lambda ptx, metadata: b""


def assembled(backend, stages, options, language, capability) -> None:
    """A hook of Triton: all stages, with what the assembler says of registers."""
    assemble = stages["cubin"]

    def assemble_and_listen(ptx: str, metadata: dict[str, Any]) -> bytes:
        with (
            redirect_stdout(StringIO()) as output,
            mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
        ):
            cubin = assemble(ptx, metadata)
        metadata["registers"] = int(re.search(r"Used (\d+) registers", output.getvalue())[1])
        metadata["spilled"] = int(re.search(r"(\d+) bytes spill stores", output.getvalue())[1])
        return cubin

    stages["cubin"] = assemble_and_listen


@contextmanager
def compiling_for(
    capability: Capability, cache: Path, stages: Callable[..., None] = allocated
) -> Iterator[Launches]:
    """Let launches on CUDA devices end in compilation for `capability`, as far as `stages` says.

    Fake tensors on "cuda" can be made inside. `cache` is a folder for Triton's files.
    """
    launches = Launches()
    properties = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=KNOWN_GPUS[capability].num_sms,
        shared_memory_per_multiprocessor=SHARED_MEMORY[capability] + RESERVED_SHARED_MEMORY,
    )

    def hook(*args: Any) -> tuple[str, str] | None:
        return stages(*args) if args else (stages.__name__, stages.__name__)

    def compile_only(kernel: JITFunction) -> Callable[..., None]:
        run = kernel.run

        def compile_it(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            begin = time.process_time()
            try:
                result = run(*map(as_argument, args), grid=grid, warmup=True, **kwargs)
            except Exception as error:
                launches.failures.append(f"{name_of(kernel)} on {shown(capability)}: {error}")
                return
            metadata = result.metadata
            ptx = result.asm["ptx"]
            launches.compiled.append(
                Compiled(
                    name_of(kernel),
                    capability,
                    {key: kwargs[key] for key in kwargs if key.isupper()}
                    | {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages},
                    metadata.num_warps,
                    metadata.shared,
                    metadata.tmem_size or 0,
                    hashlib.sha256(ptx.encode()).hexdigest()[:16] if ptx else "",
                    getattr(metadata, "registers", None),
                    getattr(metadata, "spilled", None),
                    time.process_time() - begin,
                )
            )

        return compile_it

    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(torch.cuda, "get_device_properties", lambda device: properties))
        limits_of_gpu.cache_clear()
        stack.callback(limits_of_gpu.cache_clear)
        stack.enter_context(patch(triton.runtime.driver, "_active", AbsentGPU(capability)))
        stack.enter_context(patch(knobs.cache, "dir", str(cache)))
        stack.enter_context(patch(knobs.runtime, "add_stages_inspection_hook", hook))
        for kernel in kernels().values():
            stack.enter_context(patch(kernel, "run", compile_only(kernel)))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Views())
        yield launches
