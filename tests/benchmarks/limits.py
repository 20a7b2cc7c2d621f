"""The physical limit of a workload: bytes and operations counted, rates measured on the device."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks.workloads import Workload
from nanovllm.config import Config
from nanovllm.kernels.ops import FP8_DTYPE

# ---- counted from the workload ------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCost:
    """What one token costs a model; norms and biases are left out."""

    layer_params: int  # weights of all layers' matrix products
    head_params: int
    pair_flops: int  # attention of all layers: one query token on one key token
    kv_bytes: int  # K and V of one token in all layers
    weight_bytes: int  # read by every decode step; of the embedding only a few rows are

    @classmethod
    def of(
        cls,
        hf_config: PretrainedConfig,
        itemsize: int,
        kv_itemsize: int | None = None,
        kv_scale_bytes: int = 0,
        tp_size: int = 1,
    ) -> "ModelCost":
        """Of a Qwen3 config, summed over the ranks.

        Args:
            itemsize: bytes of a weight's element.
            kv_itemsize: bytes of the KV cache's element; None: `itemsize`.
            kv_scale_bytes: bytes that are kept besides for each token's K, and V, of one head.
            tp_size: ranks; each holds a KV head, should there be fewer heads than ranks.
        """
        hidden, num_layers = hf_config.hidden_size, hf_config.num_hidden_layers
        num_kv_heads = max(hf_config.num_key_value_heads, tp_size)
        head_dim = hf_config.head_dim
        q_size, kv_size = hf_config.num_attention_heads * head_dim, num_kv_heads * head_dim
        attention = hidden * (q_size + 2 * kv_size) + q_size * hidden
        mlp = 3 * hidden * hf_config.intermediate_size
        layer_params = num_layers * (attention + mlp)
        head_params = hidden * hf_config.vocab_size  # tied to the embedding or not
        kv_head_bytes = head_dim * (kv_itemsize or itemsize) + kv_scale_bytes
        return cls(
            layer_params=layer_params,
            head_params=head_params,
            pair_flops=num_layers * 4 * q_size,  # q k and p v, a multiplication and an addition
            kv_bytes=num_layers * 2 * num_kv_heads * kv_head_bytes,
            weight_bytes=(layer_params + head_params) * itemsize,
        )

    @classmethod
    def of_engine(cls, config: Config) -> "ModelCost":
        """Of an engine's model, with its dtypes and its number of ranks."""
        kv_dtype = config.resolve_kv_cache_dtype()
        return cls.of(
            config.hf_config,
            config.resolve_dtype().itemsize,
            kv_dtype.itemsize,
            kv_scale_bytes=torch.float32.itemsize if kv_dtype == FP8_DTYPE else 0,
            tp_size=config.tensor_parallel_size,
        )


def sum_of_range(first: int, last: int) -> int:
    """first + ... + last, both included; 0 if there is nothing in between."""
    return (first + last) * max(0, last - first + 1) // 2


def count_decode_contexts(workload: Workload) -> int:
    """Tokens whose K/V the decode steps attend to, summed over steps and sequences.

    The first output token comes from the prefill; the step of output token k + 1 attends to the
    prompt and k tokens more, itself included. Each row counts on its own, shared prefix or not. A
    preemption turns one such step into a second prefill, which is not counted.
    """
    return sum(
        sum_of_range(len(prompt) + 1, len(prompt) + output_len - 1)
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True)
    )


def count_distinct_contexts(workload: Workload, num_decode_steps: int) -> int:
    """`count_decode_contexts`, but a decode step reads the shared prefix only once."""
    num_decode_tokens = workload.num_output_tokens - len(workload.prompts)
    repeated_reads = num_decode_tokens - num_decode_steps
    return count_decode_contexts(workload) - workload.shared_prefix_len * repeated_reads


def count_prefill_flops(workload: Workload, cost: ModelCost) -> int:
    """2 per weight and token, causal attention, the LM head for last tokens; the prefix once."""
    prefix_len = workload.shared_prefix_len
    num_prompts = len(workload.prompts)
    num_tokens = workload.num_prompt_tokens - prefix_len * (num_prompts - 1)
    num_pairs = sum_of_range(1, prefix_len) + sum(
        sum_of_range(prefix_len + 1, len(prompt)) for prompt in workload.prompts
    )
    linear = 2 * cost.layer_params * num_tokens + 2 * cost.head_params * num_prompts
    return linear + cost.pair_flops * num_pairs


@dataclass(frozen=True)
class Hardware:
    """What one device reached in this run, and how many devices share the work."""

    bandwidth: float  # bytes/s
    matrix_rate: float  # bf16 FLOP/s
    num_devices: int = 1


def limit_seconds(
    workload: Workload, cost: ModelCost, hardware: Hardware, num_decode_steps: int
) -> float:
    """The time of the reads and products alone, one after the other, everything else free.

    KV and weights that the decode steps read (as many steps as the engine made) at the measured
    bandwidth, then the prefill's operations at the measured matrix rate. A shared prefix is
    computed once and read once a step. Decode arithmetic could hide behind the reads: not counted.
    """
    kv_bytes = cost.kv_bytes * count_distinct_contexts(workload, num_decode_steps)
    read_bytes = kv_bytes + cost.weight_bytes * num_decode_steps
    read_seconds = read_bytes / hardware.bandwidth
    prefill_seconds = count_prefill_flops(workload, cost) / hardware.matrix_rate
    return (read_seconds + prefill_seconds) / hardware.num_devices


# ---- the device's own limits --------------------------------------------------------------------


def best_seconds(call: Callable[[], Any], device: torch.device, num_calls: int) -> float:
    """Mean time of back-to-back calls, in the best of five series."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def time_series() -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        synchronize()
        return (time.perf_counter() - start) / num_calls

    call()
    return min(time_series() for _ in range(5))


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over 8 GiB reads (64 MiB on the CPU)."""
    num_bytes = 2**26
    if device.type == "cuda":
        num_bytes = min(2**33, torch.cuda.mem_get_info(device)[0] // 4)
    data = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    return data.nbytes / best_seconds(data.sum, device, num_calls=10)


def measure_matrix_rate(device: torch.device) -> float:
    """FLOP per second of an 8192^3 bf16 product (256^3 on the CPU), random values."""
    size, num_calls = (8192, 10) if device.type == "cuda" else (256, 2)
    left, right = torch.empty(2, size, size, dtype=torch.bfloat16, device=device).normal_()
    out = torch.empty_like(left)
    seconds = best_seconds(lambda: torch.matmul(left, right, out=out), device, num_calls)
    return 2 * size**3 / seconds


def measure_hardware(device: torch.device, tensor_parallel_size: int) -> Hardware:
    """Measured on rank 0's device, whose memory is given back; CPU ranks share one device."""
    num_devices = tensor_parallel_size if device.type == "cuda" else 1
    hardware = Hardware(measure_bandwidth(device), measure_matrix_rate(device), num_devices)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return hardware
