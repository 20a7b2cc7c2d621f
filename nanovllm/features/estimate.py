"""Whether a model fits a GPU: the engine's start as a dry run, without the GPU and the weights.

The model is built of its real layers on torch's device "meta", whose tensors have shapes and no
memory, and its largest steps run there. What is alive is counted, as torch's allocator on a GPU
counts it. The engine's own functions then decide the number of KV blocks.
"""

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.config import Config
from nanovllm.engine.backend import choose_ops
from nanovllm.engine.cache_groups import num_group_blocks
from nanovllm.engine.cuda_graphs import batch_sizes
from nanovllm.engine.dry_runner import META, DryRunner
from nanovllm.engine.kv_cache import group_block_bytes
from nanovllm.engine.prefill_graphs import (
    PaddedSize,
    captured_sizes,
    new_padded_inputs,
    run_padded,
)
from nanovllm.engine.startup import (
    cache_bytes,
    decide_num_blocks,
    engine_share,
    run_largest_decode,
    run_largest_prefill,
)
from nanovllm.errors import ArgumentError, shown
from nanovllm.kernels.device import limits_like, meta_stands_for

GIB = 1 << 30
MIB = 1 << 20
ALLOCATION = 512  # bytes: torch's allocator on a GPU rounds up to a multiple
UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
DEFAULT_CAPABILITY = (8, 9)  # of most cards of 8 to 24 GiB
# What a dry run cannot see, measured or as documented:
CONTEXT_BYTES = 500 * MIB  # of a process on a GPU: CUDA, before anything is computed
LIBRARY_BYTES = 200 * MIB  # kernels, once the largest steps have loaded theirs
WORKSPACE_BYTES = {True: 32 * MIB, False: 8320 * 1024}  # torch's of cuBLAS: on Hopper and later
GRAPH_LAYER_BYTES = 64 * 1024  # of the driver, for each layer of each captured graph
NCCL_BYTES = 300 * MIB  # of each rank, where there are several
# bench.py's requests: 100 to 1024 tokens in and as many out.
BENCH_TOKENS = 2 * (100 + 1024) // 2
FORMATS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """What an engine would take of each rank's GPU. All sizes are bytes.

    `print` shows it as a table.

    Attributes:
        model: the model's directory.
        gpu_memory: of the GPU.
        share: what the engine may take of it, by `gpu_memory_utilization`.
        capability: compute capability of the GPU.
        weights: by format: "bf16", "fp16", "fp8", "fp32" (scales and some norms), or "packed" of
            4 and 8 bits.
        tables: rotary tables, the row table, a decode step's logits.
        states: recurrent states of `max_num_seqs` sequences.
        prefill_activations: the most that a prefill step of `max_num_batched_tokens` tokens holds.
        decode_activations: the same of a decode step of `max_num_seqs` sequences.
        graphs: CUDA graphs of decode steps and of small prefill steps.
        context: CUDA itself, and what libraries hold: kernels and workspaces.
        num_kvcache_blocks: KV blocks of the first cache group; 0: not one fits.
        block_size: tokens of a block.
        kv_cache: bytes of the blocks of all cache groups.
        max_model_len: the longest sequence that the engine takes.
        max_positions: the longest sequence that the model takes.
        max_num_seqs: sequences in flight at most.
        problem: why the engine would not start; None: it would.
        advice: what else could be asked for, and what that brings; the best first.
    """

    model: str
    gpu_memory: int
    share: int
    capability: tuple[int, int]
    weights: Mapping[str, int]
    tables: int
    states: int
    prefill_activations: int
    decode_activations: int
    graphs: int
    context: int
    num_kvcache_blocks: int
    block_size: int
    kv_cache: int
    max_model_len: int
    max_positions: int
    max_num_seqs: int
    problem: str | None = None
    advice: tuple[str, ...] = field(default=(), compare=False)

    @property
    def fits(self) -> bool:
        """Whether the engine would start, with a KV block at least."""
        return self.problem is None

    @property
    def weight_bytes(self) -> int:
        """Of all formats."""
        return sum(self.weights.values())

    @property
    def activations(self) -> int:
        """Of the step that takes more; the memory of both is the same."""
        return max(self.prefill_activations, self.decode_activations)

    @property
    def total(self) -> int:
        """What the engine would take of the GPU in its largest steps."""
        parts = self.weight_bytes, self.tables, self.states, self.activations
        return sum(parts) + self.graphs + self.context + self.kv_cache

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_kvcache_blocks * self.block_size

    @property
    def longest_context(self) -> int:
        """Tokens of the longest sequence that fits, prompt and completion, if it runs alone.

        It may be longer than `max_model_len`, which can be raised to it with
        `enable_chunked_prefill=True`.
        """
        return min(self.kv_tokens, self.max_positions)

    def largest_batch(self, num_tokens: int) -> int:
        """How many sequences of so many tokens each, prompt and completion, run side by side."""
        if num_tokens < 1:
            raise ArgumentError(f"num_tokens must be >= 1, got {shown(num_tokens)}")
        blocks = -(-num_tokens // self.block_size)
        return min(self.num_kvcache_blocks // blocks, self.max_num_seqs)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def estimate(
    model: str,
    gpu_memory: int | str | None = None,
    *,
    compute_capability: str | tuple[int, int] | None = None,
    **kwargs: Any,
) -> MemoryEstimate:
    """What `LLM(model, **kwargs)` would take of a GPU, without a GPU and without the weights.

    Only config.json is read, and of a model by name downloaded. The largest steps are computed on
    shapes alone, by the code that runs on the GPU, so Triton must be installed. The memory of
    CUDA's context, libraries and graphs is assumed: it depends on the driver.

    Args:
        model: see `LLM`; the directory needs no weights.
        gpu_memory: bytes of the GPU, or a string like "8GiB" or "24 GB". None: the GPU's here.
        compute_capability: of the GPU, such as "8.9" or (8, 9): it decides whether fp8 weights stay
            fp8. None: the GPU's here, else 8.9.
        kwargs: of `LLM`.

    Raises:
        ArgumentError: a value is wrong; or the model runs on transformers' own module, without
            Triton's kernels or with `cpu_offload_gb`, which only a real start measures.
        TypeError: an unknown keyword.
    """
    num_bytes = _gpu_bytes(gpu_memory)
    capability = _capability(compute_capability)
    kwargs |= {"load_format": "dummy", "skip_tokenizer_init": True}  # nothing else is fetched
    config = Config.from_kwargs(model, kwargs)
    if config.device == "cpu":
        raise ArgumentError("device='cpu' takes no GPU memory, which is all that is estimated")
    result = dry_run(config, num_bytes, capability)
    advice = _advice(result, config, kwargs)
    return replace(result, advice=tuple(advice))


def parse_bytes(value: int | str) -> int:
    """Bytes of a number, or of a string like "8GiB", "8 G" (both 2^33) or "8GB" (8 * 10^9).

    Raises:
        ArgumentError: it is neither, or not above 0.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]{0,3})\s*", value.lower())
        if match and match[2] in UNITS:
            value = int(float(match[1]) * UNITS[match[2]])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
        raise ArgumentError(
            f'gpu_memory must be a number of bytes > 0, or a string like "8GiB", got {shown(value)}'
        )
    return value


def _gpu_bytes(value: int | str | None) -> int:
    if value is not None:
        return parse_bytes(value)
    if not torch.cuda.is_available():
        raise ArgumentError('there is no GPU here: say gpu_memory, for instance "8GiB"')
    return torch.cuda.get_device_properties(0).total_memory


def _capability(value: str | tuple[int, int] | None) -> tuple[int, int]:
    if value is not None:
        return parse_capability(value)
    return torch.cuda.get_device_capability(0) if torch.cuda.is_available() else DEFAULT_CAPABILITY


def parse_capability(value: str | tuple[int, int]) -> tuple[int, int]:
    """The pair of a compute capability like "8.9" or (8, 9).

    Raises:
        ArgumentError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,2})\.(\d)", value) if isinstance(value, str) else None
    pair = match.groups() if match else value
    try:
        major, minor = map(int, pair)
    except (TypeError, ValueError):
        raise ArgumentError(
            f'compute_capability must be like "8.9" or (8, 9), got {shown(value)}'
        ) from None
    return major, minor


# ---- the dry run --------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """While it is entered, counts the bytes of the tensors on the device "meta" that are alive.

    Memory that views share counts once, in multiples of ALLOCATION.

    Attributes:
        bytes: of those alive now.
        peak: the most since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run `func` and count what it returns."""
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        num_bytes = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self._known.add(storage)
        weakref.finalize(storage, self._forget, num_bytes)
        self.bytes += num_bytes
        self.peak = max(self.peak, self.bytes)

    def _forget(self, num_bytes: int) -> None:
        self.bytes -= num_bytes


def new_dry_runner(config: Config, capability: tuple[int, int]) -> DryRunner:
    """Rank 0's runner of the engine with `config` on a GPU of this compute capability.

    Raises:
        ArgumentError: see `estimate`.
    """
    if config.model_config.uses_transformers:
        raise ArgumentError(
            f"{config.model_config.architectures[0]} runs on transformers' own module, whose "
            "memory only a real start tells"
        )
    if config.cpu_offload_bytes:
        raise ArgumentError(
            f"cpu_offload_gb ({config.cpu_offload_gb:g}) is not estimated; without it the estimate "
            "says how much is missing"
        )
    backend = config.attention_backend
    if backend == "flash-attn":  # which takes the memory that Triton's kernels take
        config = config.replace(attention_backend="triton")
    ops = choose_ops(config, META, capability)
    if not ops.supports_cuda_graphs:
        raise ArgumentError(
            f"attention_backend {backend!r} would compute without Triton's kernels here: the "
            "memory of that only a real start tells"
        )
    return DryRunner(config, ops)


def dry_run(config: Config, gpu_memory: int, capability: tuple[int, int]) -> MemoryEstimate:
    """`estimate` of a checked configuration, for one GPU, without advice.

    Kernels differ in what they take: those of this compute capability run.
    """
    with meta_stands_for(limits_like(capability)), LiveMemory() as live:
        runner = new_dry_runner(config, capability)
        built = live.bytes
        weights = _weights(runner.model)
        states = sum(state.nbytes for state in runner.states)
        runner.allocate_kv_cache(num_blocks=1)
        held = live.bytes
        peaks = []
        sizes = [] if config.enforce_eager else captured_sizes(runner)
        for run in (run_largest_prefill, run_largest_decode, partial(_run_padded, sizes[-1:])):
            live.peak = live.bytes
            run(runner)
            peaks.append(live.peak - held)
        specs = [attention.cache_spec for attention in runner.attentions]
    prefill, decode, padded = peaks
    workspace = WORKSPACE_BYTES[capability >= (9, 0)]
    libraries = LIBRARY_BYTES + workspace
    if config.tensor_parallel_size > 1:
        libraries += NCCL_BYTES
    graphs = 0
    if not config.enforce_eager:
        number, layers = (
            len(batch_sizes(config.max_num_seqs)),
            config.model_config.num_hidden_layers,
        )
        graphs = decode + padded + workspace + (number + len(sizes)) * layers * GRAPH_LAYER_BYTES
    utilization, free = config.gpu_memory_utilization, gpu_memory - CONTEXT_BYTES
    left = cache_bytes(gpu_memory, utilization, free, held + libraries, max(peaks) + workspace)
    per_block = group_block_bytes(specs, config)
    num_blocks, problem = 0, None
    try:
        num_blocks = decide_num_blocks(config, per_block, left)
    except ArgumentError as error:
        problem = str(error)
    blocks = num_group_blocks(config, num_blocks)
    result = MemoryEstimate(
        model=config.model,
        gpu_memory=gpu_memory,
        share=engine_share(gpu_memory, utilization, free),
        capability=capability,
        weights=weights,
        tables=built - sum(weights.values()) - states,
        states=states,
        prefill_activations=prefill,
        decode_activations=decode,
        graphs=graphs,
        context=CONTEXT_BYTES + libraries,
        num_kvcache_blocks=num_blocks,
        block_size=config.kvcache_block_size,
        kv_cache=sum(n * size for n, size in zip(blocks, per_block, strict=True)),
        max_model_len=config.max_model_len,
        max_positions=config.model_config.max_positions,
        max_num_seqs=config.max_num_seqs,
        problem=problem,
    )
    if problem is None and result.total > gpu_memory:  # blocks that were asked for
        over = (result.total - gpu_memory) / GIB
        problem = f"it would take {over:.2f} GiB more than there are"
        result = replace(result, problem=problem)
    return result


@torch.inference_mode()
def _run_padded(sizes: Sequence[PaddedSize], runner: DryRunner) -> None:
    """The prefill steps of CUDA graphs of these sizes."""
    for size in sizes:
        inputs = new_padded_inputs(runner, size).inputs
        run_padded(size, inputs, runner.prefill, runner.sample_last_tokens)


def _weights(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the parameters by format; tied ones count once."""
    found: Counter[str] = Counter()
    for parameter in model.parameters():
        found[FORMATS.get(parameter.dtype, "packed")] += parameter.nbytes
    return dict(found.most_common())


# ---- what could be changed ----------------------------------------------------------------------


def _changes(config: Config) -> Iterable[dict[str, Any]]:
    """Other values of parameters that take less memory."""
    if config.quantization is None:
        yield from ({"quantization": kind} for kind in ("fp8", "int8", "int4"))
    if config.kv_cache_dtype == "auto":
        yield {"kv_cache_dtype": "fp8"}
    if config.resolve_dtype() == torch.float32:
        yield {"dtype": "bfloat16"}
    budget = max(2048, config.max_num_batched_tokens // 4)
    if budget < config.max_num_batched_tokens:
        change: dict[str, Any] = {"max_num_batched_tokens": budget}
        if budget < config.max_model_len:
            change["enable_chunked_prefill"] = True
        yield change
    if config.max_num_seqs > 64:
        yield {"max_num_seqs": 64}
    if config.gpu_memory_utilization < 0.95:
        yield {"gpu_memory_utilization": 0.95}
    if config.tensor_parallel_size < 8:
        yield {"tensor_parallel_size": 2 * config.tensor_parallel_size}


def _advice(base: MemoryEstimate, config: Config, kwargs: Mapping[str, Any]) -> list[str]:
    """What each of `_changes` brings; those that bring little are left out.

    The most tokens come first, and what takes another GPU comes last. Where no change is enough,
    as many together as are needed are at the top.
    """

    def changed(change: dict[str, Any]) -> MemoryEstimate | None:
        """None if it is refused: a GPU, a checkpoint or a number of heads does not go with it."""
        try:
            other = Config.from_kwargs(config.model, {**kwargs, **change})
            return dry_run(other, base.gpu_memory, base.capability)
        except ArgumentError:
            return None

    found = [(change, other) for change in _changes(config) if (other := changed(change))]
    found = [(change, other) for change, other in found if _gain(base, other)]
    found.sort(
        key=lambda item: (
            "tensor_parallel_size" in item[0],
            -item[1].kv_tokens,
            _fixed_bytes(item[1]),
        )
    )
    if not any(e.fits for e in (base, *(other for _, other in found))):
        together: dict[str, Any] = {}
        for change, _ in found:
            together = change | together  # of several values of one parameter the first
            other = changed(together)
            if other is not None and other.fits:
                found.insert(0, (together, other))
                break
    return [
        f"{', '.join(f'{name}={_written(value)}' for name, value in change.items())} "
        + _gain(base, other)
        for change, other in found
    ]


def _fixed_bytes(e: MemoryEstimate) -> int:
    """What the KV cache has no part of, and parameters change."""
    return e.weight_bytes + e.tables + e.states + e.activations


def _gain(base: MemoryEstimate, other: MemoryEstimate) -> str:
    """What `other` has that `base` has not, in words; "" if it is little."""
    if base.fits and not other.fits:
        return ""
    freed = _fixed_bytes(base) - _fixed_bytes(other)
    if freed > base.gpu_memory // 100:
        room = f"{other.kv_tokens:,} tokens of KV cache" if other.fits else "still not enough"
        return f"frees {freed / GIB:.2f} GiB: {room}"
    if other.kv_tokens > 1.02 * base.kv_tokens:
        return f"makes room for {other.kv_tokens:,} tokens of KV cache"
    return ""


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


# ---- how it is shown ----------------------------------------------------------------------------


def _lines(e: MemoryEstimate) -> Iterable[str]:
    yield f"{e.model} on a GPU of {e.gpu_memory / GIB:.1f} GiB, compute capability " + ".".join(
        map(str, e.capability)
    )
    rows = [(f"weights, {name}", size) for name, size in e.weights.items()]
    rows += [
        ("tables", e.tables),
        ("recurrent states", e.states),
        ("activations, prefill", e.prefill_activations),
        ("activations, decode (in the same memory)", e.decode_activations),
        ("CUDA graphs", e.graphs),
        ("CUDA context and libraries (assumed)", e.context),
        (f"KV cache, {e.num_kvcache_blocks:,} blocks of {e.block_size} tokens", e.kv_cache),
        ("total", e.total),
    ]
    yield from (f"{name:<44}{size / GIB:8.2f} GiB" for name, size in rows if size)
    yield ""
    if e.problem is None:
        yield f"It fits: {e.kv_tokens:,} tokens of KV cache."
        longest = f"The longest sequence: {e.longest_context:,} tokens"
        yield f"{longest}; max_model_len is {e.max_model_len:,}."
        lengths = dict.fromkeys((BENCH_TOKENS, min(e.max_model_len, e.max_positions)))
        yield "Side by side: " + ", ".join(
            f"{e.largest_batch(n):,} sequences of {n:,} tokens" for n in lengths
        )
    else:
        yield f"It does not fit: {e.problem}"
    if e.advice:
        yield "What would change that:" if e.problem else "More room:"
        yield from (f"  {text}" for text in e.advice)
