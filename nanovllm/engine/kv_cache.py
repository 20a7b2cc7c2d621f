"""How many KV blocks fit, and the memory of all layers' caches."""

import gc
from collections.abc import Sequence

import torch

from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.kernels.types import FP8_DTYPE, KVCache, KVCacheSpec
from nanovllm.models.decoder import kv_cache_spec
from nanovllm.models.size import device_memory

MAX_CPU_CACHE_BYTES = 4 << 30
# GPU memory kept for what no profile shows: CUDA context, captured graphs, fragmentation.
RESERVED_GPU_BYTES = 1 << 30


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


def decide_num_blocks(config: Config, per_block: int, gpu_bytes: int | None) -> int:
    """The number of KV blocks of one rank, of `per_block` bytes each.

    In order of precedence: `num_kvcache_blocks`; `kv_cache_memory_bytes`; on the GPU `gpu_bytes`,
    what the utilization share leaves; on the CPU enough for `max_num_seqs` sequences of
    `max_model_len` tokens, 4 GiB at most.

    Raises:
        ArgumentError: not one block fits; the message names the parameter to raise.
    """
    if config.num_kvcache_blocks is not None:
        return config.num_kvcache_blocks
    if config.kv_cache_memory_bytes is not None:
        available, knob = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif gpu_bytes is not None:
        available, knob = gpu_bytes, "gpu_memory_utilization"
    else:
        most = config.max_num_seqs * config.max_blocks_per_seq * per_block
        available, knob = min(MAX_CPU_CACHE_BYTES, most), "kv_cache_memory_bytes"
    if available < per_block:
        raise ArgumentError(
            f"no room for the KV cache: {available / 2**20:.0f} MiB are left for it, one block "
            f"takes {per_block / 2**20:.1f} MiB; raise {knob}"
        )
    return available // per_block


def check_fits(config: Config, device: torch.device) -> None:
    """ArgumentError for a cache or tables larger than all memory of `device`, in use or not."""
    total = device_memory(device)
    spec = kv_cache_spec(
        config.hf_config, config.tensor_parallel_size, config.resolve_kv_cache_dtype()
    )
    specs = [spec] * config.hf_config.num_hidden_layers
    per_block = block_bytes(specs, config.kvcache_block_size)
    # A row of the row table, and one of logits.
    per_seq = 4 * config.row_width + (
        config.resolve_dtype().itemsize
        * -(-config.hf_config.vocab_size // config.tensor_parallel_size)
    )
    for name, unit in (
        ("kvcache_block_size", per_block // config.kvcache_block_size),
        ("num_kvcache_blocks", per_block),
        ("kv_cache_memory_bytes", 1),
        ("max_num_seqs", per_seq),
    ):
        value = getattr(config, name) or 0
        if value * unit > total:
            raise ArgumentError(
                f"{name} must be <= {total // unit}, which takes all {total / 2**30:.0f} GiB of "
                f"{device.type} memory, got {value}; lower {name}"
            )
    if config.kv_cache_memory_bytes is not None:
        decide_num_blocks(config, per_block, None)


def available_gpu_bytes(
    device: torch.device, utilization: float, free_at_start: int, peak_activation_bytes: int
) -> int:
    """What is left for the cache of the engine's share of `device`, once the weights are loaded.

    The share is `utilization` of the device's memory, and no more than was free before the weights
    (`free_at_start`), so what other processes hold counts against the device, not against us.
    """
    total = torch.cuda.mem_get_info(device)[1]
    share = min(int(total * utilization), free_at_start)
    gc.collect()
    torch.cuda.empty_cache()
    held = free_at_start - torch.cuda.mem_get_info(device)[0]
    return share - held - peak_activation_bytes - RESERVED_GPU_BYTES
