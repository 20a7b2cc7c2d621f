"""Kernels are compiled while the weights are loaded, all that any request may need."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from nanovllm.config import Config
from nanovllm.kernels.device import device_limits
from nanovllm.kernels.ops import Ops
from nanovllm.parallel.tensor_parallel import TensorParallel

logger = logging.getLogger("nanovllm")


@contextmanager
def compiling_ahead(
    config: Config, device: torch.device, tp: TensorParallel, ops: Ops
) -> Iterator[None]:
    """Within it this rank's kernels are compiled by others; when it ends, all are loaded.

    Nothing happens where kernels are not Triton's. Those for a model that runs on transformers' own
    module are compiled as its first steps launch them.
    """
    if device.type != "cuda" or not ops.supports_cuda_graphs:
        yield
        return
    if config.model_config.uses_transformers:
        yield
        return
    from nanovllm.engine.kernel_variants import record_variants
    from nanovllm.kernels.triton.compilation import Compilation, Variant

    variants: Iterable[Variant] = ()
    limits = device_limits(device)
    try:
        variants = record_variants(config, limits, tp.rank, tp.peers is not None)
    except Exception as error:  # a model that cannot be run dry can be run
        logger.warning("kernels are compiled as they are launched: %s", error)
    compilation = Compilation(variants, limits.capability, device)
    try:
        yield
        # Who launches such a kernel gets the error as well.
        for problem in compilation.wait():
            logger.warning("a kernel was not compiled ahead: %s", problem)
    finally:
        compilation.close()
