"""How many KV blocks fit, and their tensors."""

import gc
import math

import torch

from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.kernels.ops import FP8_DTYPE
from nanovllm.models.size import device_memory

MAX_CPU_CACHE_BYTES = 4 << 30
# GPU memory kept for what no profile shows: CUDA context, captured graphs, fragmentation.
RESERVED_GPU_BYTES = 1 << 30


def cache_shape(config: Config, tp_size: int, num_blocks: int) -> tuple[int, ...]:
    """[K and V, layers, num_blocks, block_size, KV heads of a rank, head_dim]."""
    model = config.model_config
    # With more ranks than KV heads, every rank holds one.
    num_kv_heads = max(model.num_key_value_heads // tp_size, 1)
    num_layers = model.num_hidden_layers
    block_size = config.kvcache_block_size
    return (2, num_layers, num_blocks, block_size, num_kv_heads, model.head_dim)


def scales_shape(config: Config, tp_size: int, num_blocks: int) -> tuple[int, ...] | None:
    """[K and V, layers, num_blocks, KV heads of a rank, block_size] with fp8, else None."""
    if config.resolve_kv_cache_dtype() != FP8_DTYPE:
        return None
    *outer, block_size, num_kv_heads, _ = cache_shape(config, tp_size, num_blocks)
    return (*outer, num_kv_heads, block_size)


def block_bytes(config: Config, tp_size: int) -> int:
    """Bytes of one block and its scales over all layers, on one rank."""
    num_elements = math.prod(cache_shape(config, tp_size, num_blocks=1))
    scales = scales_shape(config, tp_size, num_blocks=1)
    scale_bytes = math.prod(scales) * torch.float32.itemsize if scales else 0
    return num_elements * config.resolve_kv_cache_dtype().itemsize + scale_bytes


def allocate(
    config: Config, tp_size: int, num_blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cache of one rank, of `cache_shape`, and its float32 scales, of `scales_shape`.

    Zeroed on the GPU, where a kernel may multiply what it masks. On the CPU untouched pages cost
    nothing, and the torch operations never read what was not written.
    """
    new = torch.zeros if device.type == "cuda" else torch.empty
    shape = cache_shape(config, tp_size, num_blocks)
    scales = scales_shape(config, tp_size, num_blocks)
    try:
        return (
            new(shape, dtype=config.resolve_kv_cache_dtype(), device=device),
            new(scales, dtype=torch.float32, device=device) if scales else None,
        )
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise ArgumentError(
            f"no memory for {num_blocks} KV blocks of "
            f"{block_bytes(config, tp_size) / 2**20:.1f} MiB; lower num_kvcache_blocks or "
            "kv_cache_memory_bytes"
        ) from error


def decide_num_blocks(config: Config, tp_size: int, gpu_bytes: int | None) -> int:
    """The number of KV blocks of one rank.

    In order of precedence: `num_kvcache_blocks`; `kv_cache_memory_bytes`; on the GPU `gpu_bytes`,
    what the utilization share leaves; on the CPU enough for `max_num_seqs` sequences of
    `max_model_len` tokens, 4 GiB at most.

    Raises:
        ArgumentError: not one block fits; the message names the parameter to raise.
    """
    if config.num_kvcache_blocks is not None:
        return config.num_kvcache_blocks
    per_block = block_bytes(config, tp_size)
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
    per_block = block_bytes(config, config.tensor_parallel_size)
    # A row of the row table, and one of logits.
    per_seq = 4 * config.row_width + (
        config.resolve_dtype().itemsize
        * -(-config.model_config.vocab_size // config.tensor_parallel_size)
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
        decide_num_blocks(config, config.tensor_parallel_size, None)


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
