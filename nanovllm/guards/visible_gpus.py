"""Which GPUs a process of several may use: CUDA_VISIBLE_DEVICES, set before CUDA starts."""

import os

from nanovllm.errors import ArgumentError

VARIABLE = "CUDA_VISIBLE_DEVICES"
_taken: dict[str, str | None] = {}  # what `take_gpus` has set -> the value before


def gpus_of(index: int, num_each: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of one of several processes with `num_each` GPUs each.

    visible: the variable as it is; None: all GPUs are visible.

    Raises:
        ArgumentError: there are too few.
    """
    places = range(index * num_each, (index + 1) * num_each)
    if visible is None:
        return ",".join(map(str, places))
    names = [name for name in visible.split(",") if name]
    if len(names) < places.stop:
        raise ArgumentError(
            f"process {index} of several with {num_each} GPUs each needs {places.stop} visible "
            f"GPUs, {VARIABLE} ({visible!r}) has {len(names)}"
        )
    return ",".join(names[place] for place in places)


def take_gpus(index: int, num_each: int) -> None:
    """Let this process see only its own GPUs, of those that are visible; errors as of `gpus_of`.

    It may be called again: the GPUs that were visible at first count.

    Raises:
        ArgumentError: CUDA has started already, with other GPUs.
    """
    import torch

    now = os.environ.get(VARIABLE)
    before = _taken.get(now, now) if now is not None else None
    own = gpus_of(index, num_each, before)
    if own == now:
        return
    if torch.cuda.is_initialized():
        raise ArgumentError(
            f"process {index} of several needs {VARIABLE}={own!r}, but CUDA has started with "
            f"{now!r}: make the engine before anything uses the GPU"
        )
    os.environ[VARIABLE] = own
    _taken[own] = before
