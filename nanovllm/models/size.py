"""Whether there is memory for a model, and whether its files hold what its config asks for."""

import os
import resource
from pathlib import Path

import torch

from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weight_offload import NUM_BUFFERS

SMALL = 2**26  # weights: what does not fit its files is named by the tensor then


def check_size(config: Config, device: torch.device) -> None:
    """ArgumentError if the model cannot be held, or is larger than its files.

    Raised before anything of the size that config.json asks for is allocated.
    """
    needed = num_weights(config.model_config)
    if config.load_format == "auto":
        found = SafetensorsCheckpoint(config.model).num_weights()
        if needed > max(found, SMALL):
            raise ArgumentError(
                f"model directory {config.model!r} does not fit its config, which asks for at "
                f"least {needed} weights: the *.safetensors files hold {found}"
            )
    weight_bits = 8 if config.fp8_scales else 8 * config.resolve_dtype().itemsize
    if config.weight_format is not None:
        weight_bits = config.weight_format.bits
    shape = config.model_config
    # The tables of rotations, and the angles of the last one.
    num_tables = 1 + len({repr(shape.rope_of(i)) for i in range(shape.num_hidden_layers)})
    tables = 4 * num_tables * config.max_model_len * shape.head_dim
    weight_bytes = needed * weight_bits // 8
    num_bytes = weight_bytes // config.tensor_parallel_size + tables
    num_bytes -= check_offload(config, device, weight_bytes)
    available = device_memory(device)
    if num_bytes > available:
        raise ArgumentError(
            f"no memory for the model: its config asks for {needed} weights and "
            f"{config.max_model_len} positions, {num_bytes / 2**30:.1f} GiB a rank; there are "
            f"{available / 2**30:.1f} GiB"
        )


def check_offload(config: Config, device: torch.device, weight_bytes: int) -> int:
    """The bytes of GPU memory that `cpu_offload_gb` saves each rank, at most.

    weight_bytes: of the whole model.

    Raises:
        ArgumentError: there is no GPU, or host memory for all ranks' weights is not available.
    """
    if not config.cpu_offload_bytes:
        return 0
    given = f"cpu_offload_gb ({config.cpu_offload_gb:g})"
    if device.type != "cuda":
        raise ArgumentError(
            f"{given} is for GPUs: with device={device.type!r} all weights are in host memory"
        )
    shape, ranks = config.model_config, config.tensor_parallel_size
    embedding = shape.vocab_size * shape.hidden_size
    of_layers = weight_bytes * (1 - embedding / num_weights(shape)) / ranks
    # What is saved, and what the buffers take of it.
    of_rank = config.cpu_offload_bytes + NUM_BUFFERS * of_layers / shape.num_hidden_layers
    num_ranks = ranks * config.data_parallel_size
    needed, available = num_ranks * min(of_rank, of_layers), available_host_memory()
    if needed > available:
        raise ArgumentError(
            f"{given} needs {needed / 2**30:.1f} GiB of host memory for {num_ranks} "
            f"rank{'s' if num_ranks > 1 else ''}; {available / 2**30:.1f} GiB are available"
        )
    return min(config.cpu_offload_bytes, int(of_layers))


def num_weights(config: ModelConfig) -> int:
    """The weights of the model's matrices; an LM head, biases and norms are left out."""
    hidden_size = config.hidden_size
    if config.uses_transformers:  # transformers alone knows its matrices
        return config.vocab_size * hidden_size
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    dense = (3 if config.has_gated_mlp else 2) * config.intermediate_size * hidden_size
    total = config.vocab_size * hidden_size
    key_size = config.linear_num_key_heads * config.linear_key_head_dim
    value_size = config.linear_num_value_heads * config.linear_value_head_dim
    for index in range(config.num_hidden_layers):
        if config.is_delta_net(index):
            total += (2 * key_size + 3 * value_size) * hidden_size
        else:
            total += heads * config.head_dim * hidden_size
        if config.is_sparse(index):
            expert_size = config.num_experts * config.moe_intermediate_size
            expert_size += config.shared_expert_intermediate_size
            total += 3 * expert_size * hidden_size
        else:
            total += dense
    if config.head is not None:
        total += config.head.num_weights(hidden_size)
    return total


def device_memory(device: torch.device) -> int:
    """Bytes that the device has, or that this process may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return installed if limit == resource.RLIM_INFINITY else min(installed, limit)


def available_host_memory() -> int:
    """Bytes of host memory that can be had without swapping, within the container's limit.

    Linux counts a container's page cache as used, though it is given up when memory is wanted.
    """
    available = _entries("/proc/meminfo").get("MemAvailable", 2**52) * 1024
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            numbers = [int(Path(folder, name).read_text()) for name in (limit, used)]
        except (OSError, ValueError):  # no such folder, or a limit of "max"
            continue
        stat = _entries(f"{folder}/memory.stat")
        cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)
        available = min(available, max(numbers[0] - numbers[1] + cached, 0))
    return available


def _entries(path: str) -> dict[str, int]:
    """Names and numbers of a file with one of each in a line; {} if there is no such file."""
    try:
        lines = [line.replace(":", " ").split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
