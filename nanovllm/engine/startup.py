"""What happens once: the backend is chosen, a rank's model loaded, its KV blocks counted.

The count is of what is left of the engine's share of the GPU when the largest steps have run.
"""

import gc
import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

import numpy as np
import torch

from nanovllm.compat import local_rank
from nanovllm.config import Config
from nanovllm.engine.adapter_runner import AdapterRunner
from nanovllm.engine.backend import choose_ops
from nanovllm.engine.cache_groups import most_blocks
from nanovllm.engine.compile_ahead import compiling_ahead, prepare_compiler
from nanovllm.engine.cuda_start import starting_cuda
from nanovllm.engine.kv_cache import group_block_bytes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.state_cache import row_bytes
from nanovllm.engine.step_plan import StepPlan
from nanovllm.errors import ArgumentError
from nanovllm.guards.versions import check_transformers
from nanovllm.guards.visible_gpus import take_gpus
from nanovllm.inputs.generation_config import default_sampling_params, eos_token_ids
from nanovllm.inputs.tokenizer import Tokenizer, load_tokenizer
from nanovllm.models.decoder import kv_cache_spec
from nanovllm.models.hybrid import state_specs
from nanovllm.models.size import check_size, device_memory
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.sampling.engine_processors import load_processors
from nanovllm.sampling_params import SamplingParams

MAX_CPU_CACHE_BYTES = 4 << 30
# GPU memory kept for what no profile shows: CUDA's context and libraries, captured graphs,
# fragmentation.
RESERVED_GPU_BYTES = 1 << 30


def prepare(
    model: str | Config | None, kwargs: dict[str, object]
) -> tuple[Config, torch.device, Tokenizer | None, SamplingParams]:
    """What an engine is made of, checked before any process is started or GPU memory taken.

    CUDA starts meanwhile, and takes what it needs of the first GPU.

    Args:
        model: see `LLM`; or a checked configuration, of a replica.
        kwargs: of `LLM`.

    Returns:
        The configuration, rank 0's device, the tokenizer, and the parameters of requests that have
        none of their own.
    """
    check_transformers()
    if isinstance(model, Config):
        config = model
    else:
        config = Config.from_kwargs(model, kwargs)
        if (rank := local_rank()) is not None:
            if config.data_parallel_size > 1:
                raise ArgumentError(
                    f"data_parallel_size ({config.data_parallel_size}) and VLLM_DP_SIZE in the "
                    "environment are two ways to the same: use one of them"
                )
            take_gpus(rank, config.tensor_parallel_size)
    dtype = config.resolve_dtype() if config.data_parallel_size == 1 else None
    with nullcontext(False) if config.device == "cpu" else starting_cuda(dtype) as has_driver:
        if has_driver and config.attention_backend in ("auto", "triton"):
            with suppress(ImportError, OSError):  # whoever needs it sees why it is not there
                importlib.import_module("nanovllm.kernels.triton.ops")
        device = config.resolve_device()
        prepare_compiler(device, choose_ops(config, device))
        tokenizer = load_tokenizer(config)
    fallback = config.model_config.eos_token_id
    ids = eos_token_ids(config.model, tokenizer, config.generation_config, fallback=fallback)
    # A tokenizer may name one that the model does not have: it is never sampled.
    vocab_size = config.model_config.vocab_size
    config = config.replace(eos_token_ids=frozenset(i for i in ids if 0 <= i < vocab_size))
    default_params = default_sampling_params(
        config.model, config.generation_config, config.override_generation_config
    )
    check_size(config, device)
    check_fits(config, device)
    if (processors := load_processors(config, device)) is not None:
        # Of a batch that is computed step after step: nothing could be prepared meanwhile.
        is_async = config.async_scheduling and not processors.is_batched
        config = config.replace(engine_processors=processors, async_scheduling=is_async)
    return config, device, tokenizer, default_params


def start_model_runner(
    config: Config, device: torch.device, tp: TensorParallel, agree: Callable[[int], int] = int
) -> ModelRunner:
    """A rank's runner, ready for plans.

    Args:
        config: the engine's configuration, the same on every rank.
        device: this rank's device.
        tp: this rank's place among the ranks.
        agree: exchanges this rank's number of KV blocks for the smallest of all ranks.
    """
    is_cuda = device.type == "cuda"
    free_at_start = free_gpu_bytes(device) if is_cuda else 0
    ops = choose_ops(config, device)
    new_runner = AdapterRunner if config.enable_lora else ModelRunner
    with compiling_ahead(config, device, tp, ops):
        runner = new_runner(config, device, tp, ops)
    with runner.on_device():
        gpu_bytes = None
        if is_cuda:
            gpu_bytes = available_gpu_bytes(
                device, config.gpu_memory_utilization, free_at_start, _warm_up(runner)
            )
        specs = [attention.cache_spec for attention in runner.attentions]
        per_block = group_block_bytes(specs, config)
        runner.allocate_kv_cache(agree(decide_num_blocks(config, per_block, gpu_bytes)))
        runner.capture_graphs()
    return runner


def _warm_up(runner: ModelRunner) -> int:
    """Run the largest steps once; returns the activations' peak bytes."""
    device = runner.device
    runner.allocate_kv_cache(num_blocks=1)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_largest_prefill(runner)
    run_largest_decode(runner)
    torch.cuda.synchronize(device)
    runner.row_table.zero_()
    return torch.cuda.max_memory_allocated(device) - before


def run_largest_prefill(runner: ModelRunner) -> None:
    """A prefill step of `max_num_batched_tokens` tokens that samples for as many as may run."""
    config = runner.config
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    length = min(config.max_num_batched_tokens // num_seqs, config.max_model_len)
    # Every block table entry is 0, so all sequences read and write the one block there is.
    ones = np.ones(num_seqs, dtype=np.int32)
    runner.execute(
        StepPlan(
            is_prefill=True,
            rows=np.arange(num_seqs, dtype=np.int32),
            updates=np.empty((0, 2), dtype=np.int32),
            token_ids=np.zeros(num_seqs * length, dtype=np.int32),
            starts=0 * ones,
            lengths=length * ones,
            shared=length * ones,
            is_last=ones,
        )
    )


@torch.inference_mode()
def run_largest_decode(runner: ModelRunner) -> None:
    """Decode steps of `max_num_seqs` rows: without common tokens, then with them."""
    runner.decode(runner.decode_rows)
    if runner.reads_common_blocks_once:
        runner.decode(runner.decode_rows, has_common_blocks=True)


def decide_num_blocks(config: Config, per_block: Sequence[int], gpu_bytes: int | None) -> int:
    """The number of KV blocks of one rank's first cache group.

    `per_block` are the bytes of one block of each group. The others' numbers follow from it:
    `cache_groups.num_group_blocks`.

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
        most = config.max_num_seqs * config.max_blocks_per_seq * sum(per_block)
        available, knob = min(MAX_CPU_CACHE_BYTES, most), "kv_cache_memory_bytes"
    if available < sum(per_block):
        raise ArgumentError(
            f"no room for the KV cache: {available / 2**20:.0f} MiB are left for it, one block "
            f"takes {sum(per_block) / 2**20:.1f} MiB; raise {knob}"
        )
    return most_blocks(config, per_block, available)


def check_fits(config: Config, device: torch.device) -> None:
    """ArgumentError for a cache or tables larger than all memory of `device`, in use or not."""
    total = device_memory(device)
    model, ranks = config.model_config, config.tensor_parallel_size
    dtype, layers = config.resolve_kv_cache_dtype(), range(model.num_hidden_layers)
    specs = [
        kv_cache_spec(model, ranks, dtype, index)
        for index in layers
        if not model.is_delta_net(index)
    ]
    states = state_specs(model, ranks, config.resolve_dtype())
    per_block = group_block_bytes(specs, config)
    # A row of the row table, one of each recurrent state, and one of logits.
    per_seq = (
        4 * config.row_width
        + row_bytes(states)
        + (
            config.resolve_dtype().itemsize
            * -(-config.model_config.vocab_size // config.tensor_parallel_size)
        )
    )
    for name, most in (
        ("kvcache_block_size", total // (sum(per_block) // config.kvcache_block_size)),
        ("num_kvcache_blocks", most_blocks(config, per_block, total)),
        ("kv_cache_memory_bytes", total),
        ("max_num_seqs", total // per_seq),
    ):
        value = getattr(config, name) or 0
        if value > most:
            raise ArgumentError(
                f"{name} must be <= {most}, which takes all {total / 2**30:.0f} GiB of "
                f"{device.type} memory, got {value}; lower {name}"
            )
    if config.kv_cache_memory_bytes is not None:
        decide_num_blocks(config, per_block, None)


def free_gpu_bytes(device: torch.device) -> int:
    """What is free of `device`, once what this process has dropped is given back.

    An engine that is dropped may wait for the garbage collector. Its memory would come back while
    the next engine starts, which would take more than there is.
    """
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def available_gpu_bytes(
    device: torch.device, utilization: float, free_at_start: int, peak_activation_bytes: int
) -> int:
    """`cache_bytes` of `device`, once the weights are loaded and the largest steps have run.

    What other processes hold counts against the device, not against us.
    """
    total = torch.cuda.mem_get_info(device)[1]
    held = free_at_start - free_gpu_bytes(device)
    return cache_bytes(total, utilization, free_at_start, held, peak_activation_bytes)


def engine_share(total: int, utilization: float, free_at_start: int) -> int:
    """What the engine may take of a GPU's `total` bytes: no more than was free before it began."""
    return min(int(total * utilization), free_at_start)


def cache_bytes(
    total: int, utilization: float, free_at_start: int, held: int, peak_activation_bytes: int
) -> int:
    """What is left for the KV cache of the `engine_share` of a GPU.

    held: the bytes of weights, tables and libraries.
    """
    share = engine_share(total, utilization, free_at_start)
    return share - held - peak_activation_bytes - RESERVED_GPU_BYTES
