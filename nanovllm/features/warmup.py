"""Triton's cache on disk filled with the kernels of an engine, before one is started."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.backend import choose_ops
from nanovllm.errors import ArgumentError
from nanovllm.features.estimate import parse_capability
from nanovllm.kernels.device import KNOWN_GPUS, DeviceLimits, device_limits


@dataclass(frozen=True)
class WarmUp:
    """What `warm_up` has done.

    Attributes:
        cache: the folder of Triton's cache.
        capability: compute capability of the GPU that the kernels are for.
        num_kernels: variants of kernels that the engine can launch.
        num_compiled: those of them that were not in the cache.
        seconds: what that took.
        errors: why some could not be compiled.
    """

    cache: str
    capability: tuple[int, int]
    num_kernels: int
    num_compiled: int
    seconds: float
    errors: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.num_kernels} kernels for compute capability "
            f"{'.'.join(map(str, self.capability))} in {self.seconds:.1f} s, "
            f"{self.num_compiled} of them compiled, in {self.cache}",
            *(f"not compiled: {error}" for error in self.errors),
        ]
        return "\n".join(lines)


def warm_up(
    model: str, *, compute_capability: str | tuple[int, int] | None = None, **kwargs: Any
) -> WarmUp:
    """Compile the kernels that `LLM(model, **kwargs)` can launch, all of them, in parallel.

    Of the model only config.json is read.

    Args:
        model: see `LLM`; the directory needs no weights.
        compute_capability: of the GPU, such as "8.9" or (8, 9), which need not be there. None: the
            GPU here.
        kwargs: of `LLM`.

    Raises:
        ArgumentError: a value is wrong; there is no GPU and no capability; or kernels are not
            Triton's or, on transformers' own module, known only as they are launched.
        TypeError: an unknown keyword.
    """
    config = Config.from_kwargs(model, kwargs)
    architecture = config.model_config.architectures[0]
    if config.model_config.uses_transformers:
        raise ArgumentError(
            f"{architecture} runs on transformers' own module: its kernels are compiled by a start"
        )
    limits, device = _gpu(compute_capability)
    ops = choose_ops(config, device or torch.device("meta"), limits.capability)
    if not ops.supports_cuda_graphs:
        raise ArgumentError(
            f"attention_backend {config.attention_backend!r} computes without Triton's kernels: "
            "there are none to compile"
        )
    from nanovllm.engine.kernel_variants import record_variants
    from nanovllm.kernels.triton.compilation import compile_all

    begin = time.perf_counter()
    variants = [
        variant
        for rank in range(config.tensor_parallel_size)
        for variant in record_variants(config, limits, rank)
    ]
    result = compile_all(variants, limits.capability, device)
    return WarmUp(
        cache=result.cache,
        capability=limits.capability,
        num_kernels=result.num_kernels,
        num_compiled=result.num_compiled,
        seconds=time.perf_counter() - begin,
        errors=tuple(map(str, result.errors)),
    )


def _gpu(value: str | tuple[int, int] | None) -> tuple[DeviceLimits, torch.device | None]:
    """What the kernels are for, and the device if it is here."""
    here = torch.device("cuda", 0) if torch.cuda.is_available() else None
    if value is None:
        if here is None:
            raise ArgumentError('there is no GPU here: say compute_capability, for instance "8.9"')
        return device_limits(here), here
    capability = parse_capability(value)
    if here is not None and device_limits(here).capability == capability:
        return device_limits(here), here
    if capability not in KNOWN_GPUS:
        known = ", ".join(".".join(map(str, known)) for known in KNOWN_GPUS)
        raise ArgumentError(
            f"compute_capability {'.'.join(map(str, capability))} is not one that kernels are "
            f"compiled for without the GPU: {known}"
        )
    return KNOWN_GPUS[capability], None
