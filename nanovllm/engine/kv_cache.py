"""The memory of all layers' KV caches."""

from collections.abc import Sequence

import torch

from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.kernels.types import FP8_DTYPE, KVCache, KVCacheSpec


def block_bytes(specs: Sequence[KVCacheSpec], block_size: int) -> int:
    """Bytes of one block and its scales over all layers, on one rank."""

    def head_bytes(spec: KVCacheSpec) -> int:
        scale_bytes = torch.float32.itemsize if spec.dtype == FP8_DTYPE else 0
        return spec.head_dim * spec.dtype.itemsize + scale_bytes

    return sum(2 * block_size * spec.num_kv_heads * head_bytes(spec) for spec in specs)


def group_block_bytes(specs: Sequence[KVCacheSpec], config: Config) -> list[int]:
    """`block_bytes` of each cache group's layers."""
    return [
        block_bytes(
            [spec for spec in specs if config.cache_window(spec.window) == window],
            config.kvcache_block_size,
        )
        for window in config.cache_windows
    ]


def allocate(
    specs: Sequence[KVCacheSpec],
    num_blocks: Sequence[int],
    block_size: int,
    device: torch.device,
) -> tuple[list[KVCache], torch.Tensor, torch.Tensor | None]:
    """Each layer's cache, the memory of all of them, and that of their scales (None: not fp8).

    `num_blocks` are each layer's; those of a cache group are equal.

    Zeroed on the GPU, where a kernel may multiply what it masks. On the CPU untouched pages cost
    nothing, and the torch operations never read what was not written.
    """
    new = torch.zeros if device.type == "cuda" else torch.empty
    (dtype,) = {spec.dtype for spec in specs}
    layers = list(zip(specs, num_blocks, strict=True))
    num_heads = [2 * number * block_size * spec.num_kv_heads for spec, number in layers]
    sizes = [n * spec.head_dim for n, spec in zip(num_heads, specs, strict=True)]
    scales = None
    try:
        memory = new(sum(sizes), dtype=dtype, device=device)
        if dtype == FP8_DTYPE:
            scales = new(sum(num_heads), dtype=torch.float32, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        num_bytes = sum(number * block_bytes([spec], block_size) for spec, number in layers)
        raise ArgumentError(
            f"no memory for {max(num_blocks)} KV blocks, {num_bytes / 2**20:.1f} MiB; lower "
            "num_kvcache_blocks or kv_cache_memory_bytes"
        ) from error
    caches = [
        KVCache(*part.view(2, number, block_size, spec.num_kv_heads, spec.head_dim))
        for (spec, number), part in zip(layers, memory.split(sizes), strict=True)
    ]
    if scales is not None:
        parts = zip(caches, layers, scales.split(num_heads), strict=True)
        caches = [
            KVCache(*cache[:2], *part.view(2, number, spec.num_kv_heads, block_size))
            for cache, (spec, number), part in parts
        ]
    return caches, memory, scales
