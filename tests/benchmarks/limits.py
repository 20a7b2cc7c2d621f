"""The physical limit of a workload: bytes and operations counted, rates measured on the device."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from workloads import Workload

from nanovllm import LLM
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import FP8_DTYPE
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.moe import ExpertWeights, Router
from nanovllm.models.base import CausalLM
from nanovllm.models.model_config import ModelConfig

# ---- counted from the model ---------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCost:
    """What tokens and steps cost a model, summed over the ranks; norms and biases are left out.

    So are the recurrent states of gated delta nets.

    What several ranks hold, such as a router, counts for each of them; so does padding.
    """

    layer_params: int  # in all layers' products of one token: of the experts only its own
    head_params: int
    pair_flops: int  # attention of all layers: one query token on one key token
    kv_bytes: int  # K and V of one token in all layers
    weight_bytes: int  # read by every decode step; of the embedding only a few rows are
    fp8_params: int = 0  # those of layer_params that are fp8
    expert_bytes: int = 0  # of all experts, which weight_bytes leaves out
    expert_share: float = 0.0  # of a layer's experts: those of one token

    @classmethod
    def of(
        cls, model: CausalLM, config: ModelConfig, kv_dtype: torch.dtype, tp_size: int = 1
    ) -> "ModelCost":
        """Of rank 0's `model`, whose parameters are those of every rank in shape and dtype.

        fp8 weights and an fp8 cache count with their scales.

        Args:
            kv_dtype: of the KV cache.
            tp_size: ranks; each holds a KV head, should there be fewer heads than ranks.
        """
        linear_types = (ColumnParallelLinear, RowParallelLinear, Router)
        linears = [m for m in model.modules() if isinstance(m, linear_types)]
        experts = [m for m in model.modules() if isinstance(m, ExpertWeights)]
        share = Fraction(0)
        if experts:
            share = Fraction(config.num_experts_per_tok, config.num_experts)
        fp8_linears, fp8_experts = (
            [m for m in modules if getattr(m.weight, "dtype", None) == FP8_DTYPE]
            for modules in (linears, experts)
        )
        layers = range(config.num_hidden_layers)
        head_dim, num_layers = config.head_dim, sum(not config.is_delta_net(i) for i in layers)
        num_kv_heads = max(config.num_key_value_heads, tp_size)
        scale_bytes = torch.float32.itemsize if kv_dtype == FP8_DTYPE else 0
        head = model.lm_head.weight  # tied to the embedding or not
        return cls(
            layer_params=tp_size * int(count_params(linears) + share * count_params(experts)),
            head_params=tp_size * head.numel(),
            # q k and p v, a multiplication and an addition
            pair_flops=num_layers * 4 * config.num_attention_heads * head_dim,
            kv_bytes=num_layers * 2 * num_kv_heads * (head_dim * kv_dtype.itemsize + scale_bytes),
            weight_bytes=tp_size * (count_bytes(linears) + head.nbytes),
            fp8_params=tp_size * int(count_params(fp8_linears) + share * count_params(fp8_experts)),
            expert_bytes=tp_size * count_bytes(experts),
            expert_share=float(share),
        )

    @classmethod
    def of_engine(cls, llm: LLM) -> "ModelCost":
        """Of an engine's model, as it is loaded."""
        config = llm.config
        kv_dtype, tp_size = config.resolve_kv_cache_dtype(), config.tensor_parallel_size
        return cls.of(llm.model_runner.model, config.model_config, kv_dtype, tp_size)

    def decode_weight_bytes(self, batch_size: int) -> float:
        """What a decode step of `batch_size` rows reads of the weights.

        An expert that no row asks for is not read: with even routing, where each row picks k of E
        experts at random, E (1 - (1 - k/E)^batch_size) of a layer are expected to be. Where some
        experts are more popular than others, fewer are.
        """
        return self.weight_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** batch_size)


def count_params(modules: Sequence[Any]) -> int:
    """Elements of the modules' weights."""
    return sum(math.prod(m.weight.shape) for m in modules)


def count_bytes(modules: Sequence[Any]) -> int:
    """Bytes of the modules' weights, with scales and zeros if they have any; without biases."""
    named = [item for m in modules for item in m.named_parameters(recurse=False)]
    return sum(parameter.nbytes for name, parameter in named if name != "bias")


# ---- counted from the workload ------------------------------------------------------------------


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
        sum_of_range(prompt_len + 1, prompt_len + output_len - 1)
        for prompt_len, output_len in zip(workload.prompt_lens, workload.output_lens, strict=True)
    )


def count_distinct_contexts(workload: Workload, num_decode_steps: int) -> int:
    """`count_decode_contexts`, but a decode step reads the shared prefix only once."""
    num_decode_tokens = workload.num_output_tokens - len(workload.output_lens)
    repeated_reads = num_decode_tokens - num_decode_steps
    return count_decode_contexts(workload) - workload.shared_prefix_len * repeated_reads


def count_prefill_tokens(workload: Workload) -> int:
    """Prompt tokens, but none that was computed before."""
    return workload.num_prompt_tokens - sum(workload.known_lens)


def count_prefill_flops(workload: Workload, cost: ModelCost) -> int:
    """2 per weight and token, causal attention, the LM head for last tokens; nothing twice."""
    lengths = zip(workload.known_lens, workload.prompt_lens, strict=True)
    num_pairs = sum(sum_of_range(known_len + 1, length) for known_len, length in lengths)
    layer_flops = 2 * cost.layer_params * count_prefill_tokens(workload)
    head_flops = 2 * cost.head_params * len(workload.output_lens)
    return layer_flops + head_flops + cost.pair_flops * num_pairs


@dataclass(frozen=True)
class Hardware:
    """What one device reached in this run, and how many devices share the work."""

    bandwidth: float  # bytes/s
    matrix_rate: float  # bf16 FLOP/s
    num_devices: int = 1
    fp8_matrix_rate: float | None = None  # FLOP/s; None where no product is in fp8


def limit_seconds(
    workload: Workload, cost: ModelCost, hardware: Hardware, decode_batches: Sequence[int]
) -> float:
    """The time of the reads and products alone, one after the other, everything else free.

    KV and weights that the decode steps read (of `decode_batches` rows each, as the engine made
    them) at the measured bandwidth, then the prefill's operations at the measured matrix rates: the
    linear layers with fp8 weights at that of fp8. A shared prefix is computed once and read once a
    step, earlier turns are not computed again. Decode arithmetic could hide behind the reads: not
    counted.
    """
    kv_bytes = cost.kv_bytes * count_distinct_contexts(workload, len(decode_batches))
    read_bytes = kv_bytes + sum(map(cost.decode_weight_bytes, decode_batches))
    fp8_flops = 2 * cost.fp8_params * count_prefill_tokens(workload)
    other_flops = count_prefill_flops(workload, cost) - fp8_flops
    seconds = read_bytes / hardware.bandwidth + other_flops / hardware.matrix_rate
    if fp8_flops:
        assert hardware.fp8_matrix_rate is not None
        seconds += fp8_flops / hardware.fp8_matrix_rate
    return seconds / hardware.num_devices


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


def measure_fp8_matrix_rate(device: torch.device) -> float | None:
    """FLOP per second of an 8192^3 fp8 product with scales of rows, random values.

    None on a device where the library has no fp8 products.
    """
    ops = select_ops("auto", device, torch.bfloat16, head_dim=128, compile_torch_ops=False)
    if not ops.has_fp8_products:
        return None
    size = 8192
    left, right = torch.empty(2, size, size, dtype=torch.bfloat16, device=device).normal_()
    left, right = left.to(FP8_DTYPE), right.to(FP8_DTYPE).t()
    ones = torch.ones(size, dtype=torch.float32, device=device)
    scales = {"scale_a": ones.unsqueeze(1), "scale_b": ones.unsqueeze(0)}

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(
            left, right, **scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * size**3 / best_seconds(multiply, device, num_calls=10)


def measure_hardware(device: torch.device, tensor_parallel_size: int) -> Hardware:
    """Measured on rank 0's device, whose memory is given back; CPU ranks share one device."""
    hardware = Hardware(
        bandwidth=measure_bandwidth(device),
        matrix_rate=measure_matrix_rate(device),
        num_devices=tensor_parallel_size if device.type == "cuda" else 1,
        fp8_matrix_rate=measure_fp8_matrix_rate(device),
    )
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return hardware
