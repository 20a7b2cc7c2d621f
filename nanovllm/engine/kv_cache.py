"""The memory of all layers' KV caches."""

from collections.abc import Sequence

import torch

from nanovllm.errors import ArgumentError
from nanovllm.kernels.types import FP8_DTYPE, KVCache, KVCacheSpec


def block_bytes(specs: Sequence[KVCacheSpec], block_size: int) -> int:
    """Bytes of one block and its scales over all layers, on one rank."""

    def head_bytes(spec: KVCacheSpec) -> int:
        scale_bytes = torch.float32.itemsize if spec.dtype == FP8_DTYPE else 0
        return spec.head_dim * spec.dtype.itemsize + scale_bytes

    return sum(2 * block_size * spec.num_kv_heads * head_bytes(spec) for spec in specs)


def allocate(
    specs: Sequence[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device
) -> tuple[list[KVCache], torch.Tensor, torch.Tensor | None]:
    """Each layer's cache, the memory of all of them, and that of their scales (None: not fp8).

    Zeroed on the GPU, where a kernel may multiply what it masks. On the CPU untouched pages cost
    nothing, and the torch operations never read what was not written.
    """
    new = torch.zeros if device.type == "cuda" else torch.empty
    (dtype,) = {spec.dtype for spec in specs}
    num_heads = [2 * num_blocks * block_size * spec.num_kv_heads for spec in specs]
    sizes = [n * spec.head_dim for n, spec in zip(num_heads, specs, strict=True)]
    scales = None
    try:
        memory = new(sum(sizes), dtype=dtype, device=device)
        if dtype == FP8_DTYPE:
            scales = new(sum(num_heads), dtype=torch.float32, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise ArgumentError(
            f"no memory for {num_blocks} KV blocks of "
            f"{block_bytes(specs, block_size) / 2**20:.1f} MiB; lower num_kvcache_blocks or "
            "kv_cache_memory_bytes"
        ) from error
    caches = [
        KVCache(*part.view(2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim))
        for spec, part in zip(specs, memory.split(sizes), strict=True)
    ]
    if scales is not None:
        parts = zip(caches, specs, scales.split(num_heads), strict=True)
        caches = [
            KVCache(*cache[:2], *part.view(2, num_blocks, spec.num_kv_heads, block_size))
            for cache, spec, part in parts
        ]
    return caches, memory, scales
