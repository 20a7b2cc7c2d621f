"""The engine's configuration: the constructor parameters of `LLM`, checked before other work."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from nanovllm.compat import VLLM_IGNORED, VLLM_ONLY, is_one_of, unknown_option
from nanovllm.errors import (
    MAX_INT32,
    ArgumentError,
    check_bool,
    check_choice,
    check_int32,
    check_integer,
    check_number,
    check_output_path,
    clamp_int32,
    shown,
)
from nanovllm.kernels import row_state
from nanovllm.models.attention_config import full_attention_limit
from nanovllm.models.config_fields import MAX_POSITIONS
from nanovllm.models.hf_config import read_hf_config
from nanovllm.models.moe_config import check_experts
from nanovllm.models.quantization_config import has_block_scales
from nanovllm.models.rope_config import max_positions
from nanovllm.sampling_params import SAMPLING_FIELDS

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
QUANTIZATIONS = ("fp8",)
DEFAULT_MAX_NUM_BATCHED_TOKENS = 16384
MAX_BYTES = 2**63 - 1
ALIASES = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}


@dataclass
class Config:
    """Constructor parameters of `LLM`; the class docstring of `LLMEngine` describes each.

    Raises:
        ArgumentError: a value is of the wrong type or outside its range.
    """

    model: str
    max_num_batched_tokens: int = None  # type: ignore[assignment]  # resolved by _check_lengths
    max_num_seqs: int = 512
    max_model_len: int = 4096  # None until _check_lengths: the model's maximum
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    disable_custom_all_reduce: bool = False
    worker_timeout: float = 8.0
    enforce_eager: bool = False
    kvcache_block_size: int = 256
    num_kvcache_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    watermark: float = 0.25
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = False
    async_scheduling: bool = True
    attention_backend: str = "auto"
    dtype: "str | torch.dtype" = "auto"  # a string after the checks
    quantization: str | None = None
    device: str = "auto"
    seed: int = 0
    load_format: str = "auto"
    hf_overrides: "dict[str, Any] | Callable[[PretrainedConfig], PretrainedConfig] | None" = None
    tokenizer: Any = None  # the path of its directory, or the object; None: the model's
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    chat_template: str | None = None
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] | None = None
    max_logprobs: int = 20
    structured_outputs_timeout: float = 10.0
    scheduling_policy: str = "fcfs"
    runner: str = "auto"
    enable_sleep_mode: bool = False
    disable_log_stats: bool = True
    record: str | None = None  # absolute after the checks
    hf_config: "PretrainedConfig" = field(init=False, repr=False)
    eos_token_ids: frozenset[int] = field(init=False, default=frozenset())

    @classmethod
    def from_kwargs(cls, model: str | None, kwargs: dict[str, Any]) -> "Config":
        """Config from the keywords of `LLM(...)`; TypeError for one that does not exist."""
        known = {f.name for f in fields(cls) if f.init} | ALIASES.keys()
        arguments: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in VLLM_IGNORED:
                _check_ignored(name, value)
                continue
            if name in VLLM_ONLY and _is_false(value):
                continue
            if name not in known:
                raise TypeError(unknown_option(name, known, SAMPLING_FIELDS))
            target = ALIASES.get(name, name)
            if target in arguments:
                alias = next(a for a, t in ALIASES.items() if t == target)
                raise TypeError(f"LLM() got {target!r} twice: {alias!r} is another name for it")
            arguments[target] = value
        return cls(model, **arguments)  # type: ignore[arg-type]  # None is refused by name

    def __post_init__(self) -> None:
        self._check_ranges()
        self.hf_config = read_hf_config(self.model, self.hf_overrides)
        self.model = os.path.abspath(self.model)  # `os.chdir` does not move it
        self._check_lengths()
        self._check_tensor_parallel()

    def _check_ranges(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)):
            raise ArgumentError(
                f"model must be the path of a directory, got {shown(self.model)}; to get one: "
                "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"
            )
        self.model = os.fsdecode(self.model)
        self.max_num_seqs = check_int32("max_num_seqs", self.max_num_seqs, minimum=1)
        self.tensor_parallel_size = check_integer(
            "tensor_parallel_size", self.tensor_parallel_size, minimum=1, maximum=8
        )
        self.kvcache_block_size = check_int32(
            "kvcache_block_size", self.kvcache_block_size, minimum=1
        )
        if self.kvcache_block_size % 256 != 0:
            raise ArgumentError(
                f"kvcache_block_size must be a multiple of 256, got {self.kvcache_block_size}"
            )
        # A sequence is a prompt of one token and a completion of one at least.
        minima = {"max_num_batched_tokens": 1, "max_model_len": 2, "kv_cache_memory_bytes": 1}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, check_integer(name, value, minimum))
        if (self.kv_cache_memory_bytes or 0) > MAX_BYTES:
            raise ArgumentError(
                f"kv_cache_memory_bytes must be <= {MAX_BYTES}, "
                f"got {shown(self.kv_cache_memory_bytes)}"
            )
        is_integer = isinstance(self.num_kvcache_blocks, Integral)
        if is_integer and self.num_kvcache_blocks == -1:  # nano-vLLM's "let the engine decide"
            self.num_kvcache_blocks = None
        if self.num_kvcache_blocks is not None:
            self.num_kvcache_blocks = check_integer(
                "num_kvcache_blocks", self.num_kvcache_blocks, minimum=1
            )
            if self.num_kvcache_blocks > MAX_INT32:
                raise ArgumentError(
                    f"num_kvcache_blocks must be <= {MAX_INT32}, got "
                    f"{shown(self.num_kvcache_blocks)}; lower num_kvcache_blocks, or leave it out: "
                    "as memory allows"
                )
        self.seed = check_integer("seed", self.seed, minimum=-(2**63), maximum=2**63 - 1)
        self.max_logprobs = clamp_int32("max_logprobs", self.max_logprobs, minimum=-1)
        for name in (
            "disable_custom_all_reduce",
            "enforce_eager",
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "async_scheduling",
            "skip_tokenizer_init",
            "trust_remote_code",
            "enable_sleep_mode",
            "disable_log_stats",
        ):
            check_bool(name, getattr(self, name))
        self.gpu_memory_utilization = check_number(
            "gpu_memory_utilization",
            self.gpu_memory_utilization,
            "in (0, 1]",
            lambda share: 0 < share <= 1,
        )
        watermark = check_number(
            "watermark", self.watermark, "finite and >= 0", lambda n: 0 <= n < math.inf
        )
        self.watermark = min(watermark, float(MAX_INT32))  # more blocks than there are
        self.worker_timeout = check_number(
            "worker_timeout",
            self.worker_timeout,
            "seconds between 1 and 86400",
            lambda seconds: 1 <= seconds <= 86400,
        )
        self.structured_outputs_timeout = check_number(
            "structured_outputs_timeout",
            self.structured_outputs_timeout,
            "seconds, > 0 and <= 86400",
            lambda seconds: 0 < seconds <= 86400,
        )
        if self.record is not None:
            self.record = check_output_path("record", self.record)
        if not isinstance(self.dtype, str):  # a torch.dtype
            self.dtype = shown(self.dtype).removeprefix("torch.")
        self.dtype = DTYPE_ALIASES.get(self.dtype, self.dtype)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_choice("device", self.device, ("auto", "cuda", "cpu"))
        check_choice("load_format", self.load_format, ("auto", "dummy"))
        check_choice("tokenizer_mode", self.tokenizer_mode, ("auto",))
        check_choice("runner", self.runner, ("auto", "generate", "pooling"))
        check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        check_choice(
            "attention_backend", self.attention_backend, ("auto", "torch", "triton", "flash-attn")
        )

    def _check_lengths(self) -> None:
        longest = max_positions(self.hf_config)
        check_integer("the model's longest sequence", longest, 1, MAX_POSITIONS)
        budget_follows = self.max_num_batched_tokens is None and self.max_model_len is None
        self.max_model_len = min(self.max_model_len or longest, longest)
        limit = full_attention_limit(self.hf_config)
        if limit is not None and self.max_model_len > limit[0]:
            raise ArgumentError(
                f"max_model_len ({self.max_model_len}) must be <= the model's {limit[1]} "
                f"({limit[0]}): only full attention is supported"
            )
        if self.max_num_batched_tokens is None:
            self.max_num_batched_tokens = DEFAULT_MAX_NUM_BATCHED_TOKENS
        if budget_follows and not self.enable_chunked_prefill:
            self.max_num_batched_tokens = max(self.max_num_batched_tokens, self.max_model_len)
        if self.max_num_batched_tokens < self.max_model_len and not self.enable_chunked_prefill:
            raise ArgumentError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be >= max_model_len "
                f"({self.max_model_len}) unless enable_chunked_prefill=True; its default is "
                f"{DEFAULT_MAX_NUM_BATCHED_TOKENS}"
            )
        self._check_tables()

    def _check_tables(self) -> None:
        """Whether positions and places in the row table fit in 32 bits."""
        if self.max_model_len >= MAX_INT32:
            raise ArgumentError(f"max_model_len must be < {MAX_INT32}, got {self.max_model_len}")
        most = (MAX_INT32 - row_state.BLOCK_TABLE) // self.row_width - 1
        if self.max_num_seqs > most:
            raise ArgumentError(
                f"max_num_seqs must be <= {most} with sequences of max_model_len "
                f"({self.max_model_len}) tokens, got {self.max_num_seqs}"
            )
        # All sequences in full are the most that a step computes.
        most = max(self.max_num_seqs * self.max_model_len, DEFAULT_MAX_NUM_BATCHED_TOKENS)
        self.max_num_batched_tokens = min(self.max_num_batched_tokens, most, MAX_INT32)

    def _check_tensor_parallel(self) -> None:
        size, hf_config = self.tensor_parallel_size, self.hf_config
        if getattr(hf_config, "head_dim", None) is None:
            hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
        check_integer("the model's head_dim", hf_config.head_dim, minimum=1)
        if hf_config.head_dim % 2 != 0:
            raise ArgumentError(f"the model's head_dim must be even, got {hf_config.head_dim}")
        num_kv_heads = hf_config.num_key_value_heads
        if hf_config.num_attention_heads % num_kv_heads != 0:
            raise ArgumentError(
                f"the model's num_attention_heads ({hf_config.num_attention_heads}) must be a "
                f"multiple of its num_key_value_heads ({num_kv_heads})"
            )
        for name in ("num_attention_heads", "intermediate_size"):
            value = getattr(hf_config, name)
            if value % size != 0:
                raise ArgumentError(
                    f"tensor_parallel_size ({size}) must divide the model's {name} ({value})"
                )
        if num_kv_heads % size != 0 and size % num_kv_heads != 0:
            raise ArgumentError(
                f"tensor_parallel_size ({size}) must divide, or be a multiple of, the model's "
                f"num_key_value_heads ({num_kv_heads})"
            )
        check_experts(hf_config, size)

    @property
    def max_blocks_per_seq(self) -> int:
        """Width of a block table: blocks of a sequence of `max_model_len` tokens."""
        return -(-self.max_model_len // self.kvcache_block_size)

    @property
    def row_width(self) -> int:
        """Width of a row of the row table."""
        return row_state.BLOCK_TABLE + self.max_blocks_per_seq

    def resolve_device(self) -> "torch.device":
        """The device of rank 0 (rank r has GPU r); ArgumentError if there are too few GPUs."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            count = torch.cuda.device_count()
            if count < self.tensor_parallel_size:
                raise ArgumentError(
                    f"tensor_parallel_size ({self.tensor_parallel_size}) needs that many visible "
                    f"GPUs, found {count}"
                    if count
                    else "device='cuda' needs a visible GPU, found none; device='cpu' runs without"
                )
        return torch.device(name, 0) if name == "cuda" else torch.device(name)

    def resolve_dtype(self) -> "torch.dtype":
        """The dtype of weights and activations; "auto" is the model's, else bfloat16."""
        import torch

        assert isinstance(self.dtype, str)
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        dtype = self.hf_config.dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        return dtype or torch.bfloat16

    @property
    def fp8_scales(self) -> 'Literal["rows", "blocks"] | None':
        """What has a scale of its own in the linear layers' fp8 weights; None: they are not fp8."""
        if has_block_scales(self.hf_config):
            return "blocks"
        return "rows" if self.quantization == "fp8" else None

    def resolve_kv_cache_dtype(self) -> "torch.dtype":
        """The dtype of the KV cache: that of the activations, or fp8."""
        from nanovllm.kernels.ops import FP8_DTYPE

        return self.resolve_dtype() if self.kv_cache_dtype == "auto" else FP8_DTYPE


def _is_false(value: Any) -> bool:
    try:
        return not value
    except Exception:  # an array is neither
        return False


def _check_ignored(name: str, value: Any) -> None:
    if name == "swap_space":
        message = "swap_space changes nothing: preempted requests are computed anew"
        warnings.warn(message, DeprecationWarning, stacklevel=4)
    allowed = VLLM_IGNORED[name]
    if allowed is not None and not is_one_of(value, allowed):
        raise TypeError(
            f"LLM() got {name}={shown(value)}, an option of vLLM that nanovllm does not have; it "
            f"takes {' or '.join(map(repr, allowed))} alone"
        )
