"""Launches of Triton's kernels, most of them without the bindings and look-ups of Triton's own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.experimental.gluon.nvidia import hopper
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes of a pointer, and what an integer is a multiple of: Triton compiles for both
DESCRIPTORS = (TensorDescriptor, hopper.TensorDescriptor)
FUSED = {"enable_fp_fusion": True}
# Held by whoever loads a kernel. Up to Triton 3.6 what launches it is a Python module, and all have
# one name: of two threads that load at once, one may get the launcher of the other's kernel.
LOADING = threading.Lock()
# Takes a kernel, its arguments and its options.
Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_recorder: ContextVar[Recorder | None] = ContextVar("recorder of dry launches", default=None)


class Launcher:
    """What `kernel[grid](...)` calls: Triton's `run`, which launches of a known kind go around.

    Triton binds the arguments, finds the compiled kernel by a text of all its options and checks
    every pointer. That takes the host longer than many a kernel takes the GPU. Launches are of one
    kind if Triton compiles the same for them: same device, constants and options, and for each
    argument the same type, and of a tensor the same alignment, of an integer whether it is 1 and
    whether it is a multiple of ALIGNMENT. The first one of a kind is Triton's own, the others call
    the compiled kernel. In a dry run nothing is launched.

    Constants come by name and nothing else does.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.run = kernel, kernel.run
        self.prepares = isinstance(kernel, JITFunction)  # not the interpreter's
        self._prepared: dict[tuple[object, ...], _Prepared] = {}  # by their kind

    def __call__(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        """As Triton's `run`."""
        if getattr(args[0], "is_meta", False):
            if record := _recorder.get():
                record(self.kernel, args, {"grid": grid, "warmup": warmup, **options})
            return None
        if warmup or not self.prepares or _has_hooks():
            return self.run(*args, grid=grid, warmup=warmup, **options, **FUSED)
        device = driver.active.get_current_device()
        kind, values = [device, *options, *options.values()], list(args)
        for index, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                values[index] = pointer = arg.data_ptr()
                kind += arg.dtype, pointer % ALIGNMENT == 0
            elif type(arg) is int:
                width = (not -(2**31) <= arg < 2**31) + (arg >= 2**63)
                kind.append((arg == 1) + 2 * (arg % ALIGNMENT == 0) + 4 * width)
            elif isinstance(arg, DESCRIPTORS):  # whose layout follows from the same
                kind += type(arg), arg.base.dtype, *arg.block_shape
            else:  # nothing, or what is compiled for its value
                kind += type(arg), None if type(arg) is float else arg
        key = tuple(kind)
        prepared = self._prepared.get(key)
        if prepared is None:
            with LOADING:
                compiled = self.run(*args, grid=grid, warmup=False, **options, **FUSED)
                call = compiled.run
            assert all((i >= len(args)) == p.is_constexpr for i, p in enumerate(self.kernel.params))
            constants = [options[param.name] for param in self.kernel.params[len(args) :]]
            self._prepared[key] = _Prepared(
                call, compiled.function, compiled.packed_metadata, constants
            )
            return compiled
        run, function, metadata, constants = prepared
        stream = driver.active.get_current_stream(device)
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream, function, metadata, None, None, None, *values, *constants)
        return None


class _Prepared(NamedTuple):
    """What a launch needs, as the end of Triton's own `run` has it."""

    run: Callable[..., None]
    function: int
    metadata: object
    constants: list[object]


def _has_hooks() -> bool:
    """Whether somebody listens to launches, as Triton's profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@contextmanager
def recording(record: Recorder) -> Iterator[None]:
    """Within it `record` is called for each launch of a dry run."""
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)
