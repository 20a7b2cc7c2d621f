"""Finds what waits for the device in a step: a CUDA graph cannot capture it."""

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.errors import shown_error

OWN, TORCH = Path(__file__).parents[1], Path(torch.__file__).parent
BY_MASK = ("aten::index.Tensor", "aten::index_put", "aten::index_put_")  # which may be a mask
COPIES = ("aten::_to_copy", "aten::copy_")


class HostReads(TorchDispatchMode):
    """While it is entered, notes the first operation whose result the host must wait for.

    That is where a value of the device decides on the host, or on a shape. Operations of this
    package are left out: its backends that take part in CUDA graphs have none. It works on any
    device.

    Attributes:
        found: the operation and the function that called it; None: there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run `func`, by the operations that it is made of."""
        if _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        if self.found is None and _may_wait(func) and _waits(func, args, result):
            caller = _caller()
            if caller is not None:
                self.found = f"{func.name()} in {caller}"
        return result


@cache
def _is_made_of_others(func: OpOverload) -> bool:
    """Whether `func.decompose` computes it."""
    return func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


@cache
def _may_wait(func: OpOverload) -> bool:
    """Whether there are arguments with which it waits, as most operations never do."""
    return func.name() in (*BY_MASK, *COPIES) or _reads(func)


def _reads(func: OpOverload) -> bool:
    tags = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
    return any(tag in func.tags for tag in tags)


def _waits(func: OpOverload, args: Sequence[object], result: object) -> bool:
    name = func.name()
    if name in BY_MASK:
        indices = args[1]
        assert isinstance(indices, (list, tuple))
        is_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        fills = len(args) > 2 and isinstance(args[2], torch.Tensor) and args[2].numel() == 1
        return is_mask and not fills
    if name in COPIES:
        devices = {x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)}
        return len(devices) > 1
    return _reads(func)


@contextmanager
def errors_on_waits() -> Iterator[None]:
    """RuntimeError where the host waits for a CUDA device, also in the midst of an operation.

    It is torch's own detection, for all threads of the process while it lasts.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def described(error: BaseException) -> str:
    """An error in one line, with the function of a module that it came from."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = _place(reversed(frames))
    return f"{shown_error(error)} in {place}" if place else shown_error(error)


def _caller() -> str | None:
    return _place(frame for frame, _ in traceback.walk_stack(None))


def _place(frames: Iterable[FrameType]) -> str | None:
    """The function of the first frame outside torch; None if it is this package's own."""
    for frame in frames:
        path = Path(frame.f_code.co_filename)
        if path == Path(__file__) or TORCH in path.parents:
            continue
        if OWN in path.parents:
            return None
        return f"{frame.f_code.co_name} ({path.name}:{frame.f_lineno})"
    return None
