"""Kernels are compiled while the weights are loaded, all that any request may need."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch

from nanovllm.config import Config
from nanovllm.kernels.device import DeviceLimits, device_limits
from nanovllm.kernels.ops import Ops
from nanovllm.parallel.tensor_parallel import TensorParallel

logger = logging.getLogger("nanovllm")
# Of a configuration, what no kernel depends on but through its `model_config`.
WITHOUT_KERNELS = """model source seed hf_token hf_overrides tokenizer chat_template eos_token_ids
replica logits_processors engine_processors gpu_memory_utilization num_kvcache_blocks
kv_cache_memory_bytes""".split()


def prepare_compiler(device: torch.device, ops: Ops) -> None:
    """Let a thread get the compiler ready; nothing happens where kernels are not Triton's."""
    if device.type == "cuda" and ops.supports_cuda_graphs:
        from nanovllm.kernels.triton.compilation import preparing

        preparing()


@contextmanager
def compiling_ahead(
    config: Config, device: torch.device, tp: TensorParallel, ops: Ops
) -> Iterator[None]:
    """Within it this rank's kernels are compiled by others; when it ends, all are in the cache.

    Those that were not there before are loaded as well, the others when they are first launched.

    Nothing happens where kernels are not Triton's. Those for a model that runs on transformers' own
    module are compiled as its first steps launch them.
    """
    if device.type != "cuda" or not ops.supports_cuda_graphs:
        yield
        return
    if config.model_config.uses_transformers:
        yield
        return
    from nanovllm.kernels.triton.compilation import Compilation, preparing
    from nanovllm.kernels.triton.kernel_index import KernelIndex

    limits, shares_memory = device_limits(device), tp.peers is not None
    preparing().join()
    index = KernelIndex(traits_of(config, limits, tp.rank, shares_memory), limits.capability)
    if index.is_complete():
        yield
        return
    from nanovllm.engine.kernel_variants import record_variants

    try:
        variants = record_variants(config, limits, tp.rank, shares_memory)
    except Exception as error:  # a model that cannot be run dry can be run
        logger.warning("kernels are compiled as they are launched: %s", error)
        yield
        return
    compilation = Compilation(variants, limits.capability, device)
    try:
        yield
        # Who launches such a kernel gets the error as well.
        problems = compilation.wait()
    finally:
        compilation.close()
    for problem in problems:
        logger.warning("a kernel was not compiled ahead: %s", problem)
    if not problems:
        index.write(compilation.files)


def traits_of(config: Config, limits: DeviceLimits, rank: int, shares_memory: bool) -> str:
    """What a rank's kernels follow from, in words."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    kept = {name: value for name, value in values.items() if name not in WITHOUT_KERNELS}
    return repr((kept, limits, rank, shares_memory, torch.__version__))
