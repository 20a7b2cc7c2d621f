"""The engine's parameters, each declared once, and the configuration that is made of them."""

import logging
import math
import os
from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nanovllm.compat import (
    ATTENTION_BACKEND_ALIASES,
    CHECKPOINT_METHODS,
    DTYPE_ALIASES,
    KV_CACHE_DTYPE_ALIASES,
    LOAD_FORMAT_ALIASES,
    MODEL_IMPL_ALIASES,
    TOKENIZER_MODE_ALIASES,
    engine_arguments,
    profiler_folder,
    reasoning_strings,
    transfer_backend,
)
from nanovllm.compat import AttentionConfig as AttentionConfig  # where vLLM's scripts import them
from nanovllm.compat import CompilationConfig as CompilationConfig
from nanovllm.compat import ProfilerConfig as ProfilerConfig
from nanovllm.compat import ReasoningConfig as ReasoningConfig
from nanovllm.compat import StructuredOutputsConfig as StructuredOutputsConfig
from nanovllm.compat import WeightTransferConfig as WeightTransferConfig
from nanovllm.errors import ArgumentError, shown
from nanovllm.kernels import row_state
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.model_files import read_chat_template
from nanovllm.models.hf_config import ModelSource, read_model
from nanovllm.models.hub import Repository, directory_of, downloads, is_name
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.pooling_config import check_pooler_config
from nanovllm.parameters import (
    Check,
    at_least,
    boolean,
    check_values,
    choice,
    clamped,
    finite,
    integer,
    number,
    optional,
    parameter,
    parameters,
    readable,
    text,
    unchecked,
)
from nanovllm.pooling_params import PoolerConfig, as_pooler_config
from nanovllm.sampling_params import SAMPLING_FIELDS
from nanovllm.validation import MAX_INT32, check_at_least, check_class_name, check_output_path

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PretrainedConfig

logger = logging.getLogger("nanovllm")

DEFAULT_MAX_NUM_BATCHED_TOKENS = 16384
PACKED_BITS = {"int4": 4, "int8": 8}  # by values of `quantization`
PACKED_GROUP_SIZE = 128  # columns that share a scale there


def _check_model(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(
            f"{name} must be the path of a directory, got {shown(value)}; to get one: "
            "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"
        )
    return os.fsdecode(value)


def _check_token(name: str, value: Any) -> str | bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value:
        raise ArgumentError(  # which does not show it
            f"{name} must be a token, True or False, got another {type(value).__name__}"
        )
    return value


def _check_directory(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ArgumentError(f"{name} must be the path of a directory, got {shown(value)}")
    return os.path.abspath(os.fsdecode(value))


def _check_extension(name: str, value: Any) -> str | None:
    return None if value == "" else check_class_name(name, value)  # "" is vLLM's default


def _check_block_size(name: str, value: Any) -> int:
    block_size = check_at_least(name, value, minimum=1)
    if block_size % 256 != 0:
        raise ArgumentError(f"{name} must be a multiple of 256, got {block_size}")
    return block_size


def _check_max_model_len(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, (str, Integral)) and value in ("auto", -1)):
        return None
    return readable(clamped(2)).run(name, value)  # a prompt of one token and a completion of one


def _check_num_blocks(name: str, value: Any) -> int | None:
    if isinstance(value, Integral) and value == -1:  # nano-vLLM's "let the engine decide"
        return None
    return check_at_least(name, value, minimum=1)


def _check_dtype(name: str, value: Any) -> str:
    if not isinstance(value, str):  # a torch.dtype
        value = shown(value).removeprefix("torch.")
    return DTYPE.run(name, value)


def _check_processors(name: str, value: Any) -> list[str | type] | None:
    processors = [value] if isinstance(value, (str, type)) else value
    if not isinstance(processors, (list, tuple)):
        raise ArgumentError(f"{name} must be a list of classes, got {shown(value)}")
    for processor in processors:
        if not isinstance(processor, (str, type)):
            raise ArgumentError(
                f'{name} of an engine must be classes or "module:Class", got {shown(processor)}; '
                f"a function goes into SamplingParams({name}=[...])"
            )
    return list(processors) or None


def _check_overrides(name: str, value: Any) -> Any:
    if not (callable(value) or isinstance(value, Mapping)):
        raise ArgumentError(f"{name} must be a dict or a callable, got {shown(value)}")
    return value


DTYPE = choice("auto", "bfloat16", "float16", "float32", aliases=DTYPE_ALIASES)
SHARE = number("in (0, 1]", lambda share: 0 < share <= 1)
# A larger watermark is more blocks than there are.
BLOCKS = number("finite and >= 0", lambda n: 0 <= n < math.inf)


@dataclass(frozen=True)
class Config:
    """The checked parameters of `LLM`, and the model's configuration.

    Nothing changes it; `replace` makes another one.

    Attributes:
        source: the model's config.json, of which `hf_config` is made.
        model_config: what is computed of it.
        eos_token_ids: ids that end a completion; the engine reads them with the tokenizer.
        engine_processors: `sampling.engine_processors` of `logits_processors`, on rank 0.
        replica: which one of an engine with several this is; None: of none.

    Raises:
        ArgumentError: a value is of the wrong type or outside its range.
    """

    model: str = parameter(
        MISSING,
        Check("path of a directory", _check_model),
        'a local model directory: config.json, tokenizer and `*.safetensors`. "~" is not '
        "expanded. With `download`, the name of a model on the hub as well.",
    )
    max_num_batched_tokens: int = parameter(
        None,
        readable(clamped(1)),
        f"tokens that one step computes at most, None: {DEFAULT_MAX_NUM_BATCHED_TOKENS}. At least "
        "`max_model_len` unless chunked prefill is on; None follows a `max_model_len` of None.",
    )
    max_num_seqs: int = parameter(1024, at_least(1), "sequences in flight at most.")
    max_model_len: int = parameter(
        4096,
        Check("integer >= 2 or None", _check_max_model_len),
        "tokens of a sequence at most, prompt and completion. Capped to what the model's positions "
        'reach; None, -1 and "auto" are that maximum. "32k" is 32,000 and "32K" is 32,768.',
    )
    gpu_memory_utilization: float = parameter(
        0.9, SHARE, "share of the GPU's memory for weights, activations and KV cache together."
    )
    cpu_offload_gb: float = parameter(
        0.0,
        finite(0),
        "GiB of GPU memory per rank that weights leave to other things: those of as many decoder "
        "layers wait in pinned host memory, and each step copies them to the GPU, which makes it "
        "slower. 0: none. Needs CUDA.",
    )
    tensor_parallel_size: int = parameter(
        1, integer(1, 8), "ranks that share the model. Each has a process and a GPU."
    )
    data_parallel_size: int = parameter(
        1,
        integer(1, 64),
        "replicas: engines in processes of their own, each with `tensor_parallel_size` GPUs. "
        "Requests go to them by common prefixes and by load.",
    )
    replica_death_policy: str = parameter(
        "retry",
        choice("retry", "fail"),
        "what becomes of a dead replica's unfinished requests: others compute them, or they fail, "
        "and `generate` raises a RequestError when the rest has ended.",
    )
    disable_custom_all_reduce: bool = parameter(
        False,
        boolean,
        "sum over the ranks by NCCL alone instead of, for few rows, in memory that the GPUs share.",
    )
    worker_timeout: float = parameter(
        8.0,
        number("seconds between 1 and 86400", lambda seconds: 1 <= seconds <= 86400),
        "how long a rank may keep rank 0 waiting in a step before the engine gives it up. Both "
        "compute the same, so this is not the length of a step. Raise it where a CPU is so "
        "overloaded that one rank falls behind.",
    )
    enforce_eager: bool = parameter(
        False,
        boolean,
        'no CUDA graphs (and no torch.compile, which only `attention_backend="torch"` uses on '
        "CUDA).",
    )
    kvcache_block_size: int = parameter(
        256, Check("multiple of 256", _check_block_size), "tokens per KV block."
    )
    num_kvcache_blocks: int | None = parameter(
        None,
        Check("integer >= 1", _check_num_blocks),
        "KV blocks, None: as memory allows. Of a model with sliding windows, those of the layers "
        "that see most; the others' numbers follow.",
    )
    kv_cache_memory_bytes: int | None = parameter(
        None,
        at_least(1, 2**63 - 1),
        "bytes of KV cache per rank, instead of `gpu_memory_utilization`.",
    )
    kv_cache_dtype: str = parameter(
        "auto",
        choice("auto", "fp8", "fp8_e4m3", aliases=KV_CACHE_DTYPE_ALIASES),
        'the dtype of the KV cache: that of the activations, or fp8 (e4m3). "fp8" takes about half '
        "the bytes, with a scale for each token and KV head; it is slightly less exact, and needs "
        "compute capability 8.9 on CUDA.",
    )
    watermark: float = parameter(
        0.25,
        Check(BLOCKS.limits, lambda name, value: min(BLOCKS.run(name, value), float(MAX_INT32))),
        "KV blocks kept free for each running sequence when a waiting one is admitted. They spare "
        "preemptions when memory is short; 0 keeps none.",
    )
    enable_prefix_caching: bool = parameter(
        None,
        boolean,
        "share equal prefixes of whole KV blocks; without sliding windows, units of 8 tokens of "
        "the next block are copied as well. None: with every model but those with recurrent "
        "states, which cannot share them.",
    )
    enable_chunked_prefill: bool = parameter(
        False,
        optional(boolean),
        "split prompts that exceed what is left of a step. None, vLLM's default: only if "
        "`max_num_batched_tokens` is less than `max_model_len`.",
    )
    async_scheduling: bool = parameter(True, boolean, "prepare step n + 1 while n runs.")
    attention_backend: str = parameter(
        "auto",
        choice("auto", "torch", "triton", "flash-attn", aliases=ATTENTION_BACKEND_ALIASES),
        'what computes attention; "auto" is triton on CUDA from compute capability 8.0 on, torch '
        "elsewhere.",
    )
    dtype: str = parameter(
        "auto",
        Check(DTYPE.limits, _check_dtype),
        'the dtype of weights and activations; "auto" is the checkpoint\'s. vLLM\'s "half" and '
        '"float" and a torch.dtype are taken as well.',
    )
    quantization: str | None = parameter(
        None,
        choice("fp8", *PACKED_BITS, *CHECKPOINT_METHODS),
        "keep the weights of linear layers in fewer bits, rounded as they are loaded: fp8 (e4m3) "
        'with a scale for each row, or "int4" and "int8" with a scale for each 128 columns of a '
        "row. Embedding, LM head, routers and norms stay as they are. None: as in the checkpoint, "
        "which may be quantised itself; the other names say of which kind it must be then.",
    )
    device: str = parameter(
        "auto",
        choice("auto", "cuda", "cpu"),
        'where the model runs; "auto" is CUDA if there is a GPU.',
    )
    seed: int = parameter(
        0,
        integer(-(2**63), 2**63 - 1, "of 64 bits"),
        "keys the sampling of every request, with the request's number.",
    )
    load_format: str = parameter(
        "auto",
        choice("auto", "dummy", aliases=LOAD_FORMAT_ALIASES),
        'how weights are loaded; "dummy" makes random ones, and only config.json and the tokenizer '
        "are read.",
    )
    model_impl: str = parameter(
        "auto",
        choice("auto", "nanovllm", "transformers", aliases=MODEL_IMPL_ALIASES),
        "whose module computes the model: that of this library, or transformers' own, which takes "
        'more families and is slower. "auto" is ours where there is one.',
    )
    hf_overrides: "dict[str, Any] | Callable[[PretrainedConfig], PretrainedConfig] | None" = (
        parameter(
            None,
            Check("dict or callable", _check_overrides),
            "a dict of fields that replace those of config.json, or a callable that gets the "
            "`PretrainedConfig` and returns one.",
        )
    )
    download: bool | None = parameter(
        None,
        optional(boolean),
        "take a `model` and a `tokenizer` that are no directories for names on the hub, and "
        "download what is not in the cache. None: what the environment variable "
        "NANOVLLM_DOWNLOAD says (1 or 0), else names are refused.",
    )
    revision: str | None = parameter(
        None, text, 'branch, tag or commit of a `model` that is a name. None: "main".'
    )
    tokenizer_revision: str | None = parameter(
        None,
        text,
        "the same of `tokenizer`; without one, of the model's. None: `revision` for the model's "
        'tokenizer, "main" for another.',
    )
    hf_token: str | bool | None = parameter(
        None,
        Check("token, True or False", _check_token),
        "what the hub is asked with. True: the token that `hf auth login` stored; None: the same, "
        "if there is one; False: none. The engine does not keep it.",
    )
    download_dir: str | None = parameter(
        None,
        Check("path of a directory", _check_directory),
        "the cache of downloads. None: huggingface_hub's, which HF_HOME moves.",
    )
    tokenizer: Any = parameter(
        None,
        unchecked("path or object"),
        "path of another tokenizer's directory, or a tokenizer object. None: the model's.",
    )
    tokenizer_mode: str = parameter(
        "auto", choice("auto", aliases=TOKENIZER_MODE_ALIASES), "vLLM's, which changes nothing."
    )
    skip_tokenizer_init: bool = parameter(
        False, boolean, "load no tokenizer: prompts are token ids, texts are empty."
    )
    trust_remote_code: bool = parameter(
        False, boolean, "let the tokenizer's directory bring Python code of its own."
    )
    chat_template: str | None = parameter(
        None,
        Check("template or path", lambda name, value: read_chat_template(value)),
        "Jinja template of `chat`, or the path of a file with one. None: the tokenizer's.",
    )
    generation_config: str = parameter(
        "auto",
        unchecked('"auto", "vllm" or path'),
        'where default sampling parameters are read: "auto" (the model\'s directory), "vllm" '
        "(nowhere), or the path of another directory.",
    )
    override_generation_config: dict[str, Any] | None = parameter(
        None, unchecked("dict"), "keys of a generation_config.json that win over the file's."
    )
    max_logprobs: int = parameter(
        20,
        clamped(-1),
        "the most `logprobs` and `prompt_logprobs` that a request may ask for; -1 is no limit.",
    )
    disable_any_whitespace: bool = parameter(
        False,
        boolean,
        "as of `StructuredOutputsParams`, for all requests.",
    )
    structured_outputs_timeout: float = parameter(
        10.0,
        number("seconds, > 0 and <= 86400", lambda seconds: 0 < seconds <= 86400),
        "how long a schema, regex, choice list or grammar may take to compile. A request whose "
        "takes longer is refused.",
    )
    logits_processors: list[str | type] | None = parameter(
        None,
        Check('list of classes or "module:Class"', _check_processors),
        "subclasses of `LogitsProcessor`, which edit the logits of all requests, behind those of "
        "the entry points `nanovllm.logits_processors`.",
    )
    reasoning_config: ReasoningConfig | dict[str, Any] | tuple[str, str] | None = parameter(
        None,
        Check("dict or ReasoningConfig", reasoning_strings),
        "the texts around a model's reasoning, which `thinking_token_budget` needs: "
        "`reasoning_start_str` and `reasoning_end_str`.",
    )
    enable_lora: bool = parameter(
        False, boolean, "take requests with LoRA adapters, see `LoRARequest`."
    )
    max_loras: int = parameter(
        1, integer(1, 1024), "adapters that run at the same time. The others' requests wait."
    )
    max_lora_rank: int = parameter(
        16,
        integer(1, 256),
        "the largest rank of an adapter. The slots of all adapters have a power of two, and at "
        "least 16.",
    )
    max_cpu_loras: int | None = parameter(
        None,
        at_least(1),
        "adapters that are kept in host memory, at least `max_loras`. None: as many. What was used "
        "longest ago makes room, and is read again when it is wanted.",
    )
    lora_dtype: str = parameter(
        "auto",
        Check(DTYPE.limits, _check_dtype),
        "vLLM's, which changes nothing: adapters have the dtype of the activations, and others are "
        "refused.",
    )
    fully_sharded_loras: bool = parameter(
        False,
        boolean,
        "vLLM's, which changes nothing: each rank has its part of what follows from the split of "
        "the weights.",
    )
    scheduling_policy: str = parameter(
        "fcfs",
        choice("fcfs", "priority"),
        'who is admitted first: who came first, or with "priority" who has the lowest `priority`.',
    )
    runner: str = parameter(
        "auto",
        choice("auto", "generate", "pooling"),
        "vLLM's, which changes nothing: models generate and are pooled, unless they have no LM "
        "head.",
    )
    pooler_config: PoolerConfig | dict[str, Any] | None = parameter(
        None,
        Check("PoolerConfig or dict", as_pooler_config),
        "how hidden states are pooled: see `PoolerConfig`. None: as the model's files for "
        "sentence-transformers say, else the last token's.",
    )
    enable_sleep_mode: bool = parameter(
        False, boolean, "vLLM's, which changes nothing: every engine can sleep."
    )
    disable_log_stats: bool = parameter(
        True, boolean, "False adds histograms of requests to `get_metrics`."
    )
    profiler_config: str | ProfilerConfig | dict[str, Any] | None = parameter(
        None,
        Check("dict or ProfilerConfig", profiler_folder),
        'vLLM\'s, with `profiler` "torch" and `torch_profiler_dir`, the folder of the traces of '
        "`start_profile`. None: VLLM_TORCH_PROFILER_DIR, else the working directory.",
    )
    worker_extension_cls: str | None = parameter(
        None,
        Check("class or 'module.Class'", _check_extension),
        "a class whose methods `collective_rpc` calls by name on every rank; `self` is the worker. "
        "It must be at the top level of a module.",
    )
    weight_transfer_config: str | WeightTransferConfig | dict[str, Any] | None = parameter(
        None,
        Check("dict or WeightTransferConfig", transfer_backend),
        'vLLM\'s, with `backend` "nccl": a trainer in another process may send weights. On the CPU '
        "they go through gloo.",
    )
    record: str | None = parameter(
        None,
        Check("path of a file", check_output_path),
        "an HTML page with charts of the run, for a look at any time: refreshed every half minute "
        "and at `exit`. An older file there is replaced. None: no page.",
    )
    source: ModelSource = field(init=False, repr=False, compare=False)
    model_config: ModelConfig = field(init=False, repr=False)
    eos_token_ids: frozenset[int] = field(init=False, default=frozenset())
    engine_processors: Any = field(init=False, default=None, repr=False)
    replica: int | None = field(init=False, default=None)

    @classmethod
    def from_kwargs(cls, model: str | None, kwargs: dict[str, Any]) -> "Config":
        """Config from the keywords of `LLM(...)`; TypeError for one that does not exist."""
        known = [p.name for p in parameters(cls)]
        return cls(model, **engine_arguments(kwargs, known, SAMPLING_FIELDS))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        derive = vars(self).update  # the one place that sets fields
        check_values(vars(self), parameters(Config))
        derive(**self._directories(), hf_token=None)
        source = read_model(self.model, self.hf_overrides, self.model_impl)
        derive(source=source, model_config=source.model_config)
        if self.model_config.uses_transformers:
            self._check_transformers()
        self._check_adapters()
        derive(quantization=self._quantization_on_load())
        derive(enable_prefix_caching=self._caches_prefixes())
        if self.model_config.head is not None:
            derive(enforce_eager=True)  # it never decodes: graphs would be of no use
        if self.pooler_config is not None:
            check_pooler_config(self.pooling, self.model_config)
        derive(model=os.path.abspath(self.model))  # `os.chdir` does not move it
        budget = self.max_num_batched_tokens
        if budget is None:
            budget = DEFAULT_MAX_NUM_BATCHED_TOKENS
            if self.max_model_len is None and not self.enable_chunked_prefill:
                budget = max(budget, self.model_config.max_positions)
        derive(max_model_len=self._longest_sequence())
        if self.enable_chunked_prefill is None:
            derive(enable_chunked_prefill=budget < self.max_model_len)
        derive(max_num_batched_tokens=self._token_budget(budget))
        self.model_config.check_ranks(self.tensor_parallel_size)

    @property
    def hf_config(self) -> "PretrainedConfig":
        """transformers' configuration of the model, for users; made when first asked for."""
        return self.source.hf_config

    def replace(self, **values: Any) -> "Config":
        """A copy with other values, which are taken as they are."""
        config = copy(self)
        vars(config).update(values)
        return config

    def _directories(self) -> dict[str, str]:
        """`model` and `tokenizer` as directories, where they are names that may be downloaded."""
        given: dict[str, str] = {}
        is_on, wants_tokenizer = downloads(self.download), not self.skip_tokenizer_init
        is_split = self.tokenizer is None and self.tokenizer_revision not in (None, self.revision)
        repository = Repository(
            name=self.model,
            kind="model",
            revision=self.revision,
            token=self.hf_token,
            cache_dir=self.download_dir,
            code=self.trust_remote_code,
        )
        if is_on and is_name(self.model):
            has_tokenizer = wants_tokenizer and self.tokenizer is None and not is_split
            weights = self.load_format != "dummy"
            given["model"] = directory_of(
                replace(repository, weights=weights, tokenizer=has_tokenizer)
            )
        name = self.model if is_split else self.tokenizer
        if is_on and wants_tokenizer and is_name(name):
            name = os.fsdecode(name)
            revision = self.tokenizer_revision or (self.revision if name == self.model else None)
            given["tokenizer"] = directory_of(
                replace(repository, name=name, kind="tokenizer", revision=revision, tokenizer=True)
            )
        useless = [name for name in ("revision", "tokenizer_revision") if getattr(self, name)]
        if useless and not given:
            logger.debug("LLM: these change nothing of a directory: %s", ", ".join(useless))
        return given

    def _check_transformers(self) -> None:
        """ArgumentError for values that transformers' own module does not go with."""
        for name, taken in (
            ("quantization", (None,)),
            ("attention_backend", ("auto", "torch", "triton")),
            ("cpu_offload_gb", (0,)),
            ("enable_lora", (False,)),
        ):
            if getattr(self, name) not in taken:
                raise ArgumentError(
                    f"{name} {getattr(self, name)!r} is not supported for "
                    f"{self.model_config.architectures[0]}, which runs on transformers' own module"
                )

    def _quantization_on_load(self) -> str | None:
        """`quantization` without the name of what the checkpoint is already."""
        if self.quantization in CHECKPOINT_METHODS:
            fields = getattr(self.hf_config, "quantization_config", None) or {}
            found = fields.get("quant_method")
            if found == CHECKPOINT_METHODS[self.quantization]:
                return None
            raise ArgumentError(
                f"quantization {self.quantization!r} is for checkpoints of that kind, but this one "
                + (f"is {found!r}; leave it out" if found else "is not quantised; 'int4', 'int8' "
                   "and 'fp8' round weights on load")
            )  # fmt: skip
        if self.quantization is not None and self.model_config.weight_format is not None:
            bits = self.model_config.weight_format.bits
            raise ArgumentError(
                f"quantization {self.quantization!r} is not supported for a checkpoint that is "
                f"quantised to {bits} bits already; leave it out"
            )
        return self.quantization

    def _check_adapters(self) -> None:
        """ArgumentError for parameters of adapters that do not go together."""
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ArgumentError(
                f"max_cpu_loras ({self.max_cpu_loras}) must be >= max_loras ({self.max_loras})"
            )
        if self.enable_lora and self.data_parallel_size > 1:
            raise ArgumentError(
                f"enable_lora is not supported with data_parallel_size ({self.data_parallel_size}) "
                "> 1: replicas take no adapters"
            )
        own_dtype = (self.model_config.dtype or "bfloat16") if self.dtype == "auto" else self.dtype
        if self.lora_dtype not in ("auto", own_dtype):
            raise ArgumentError(
                f"lora_dtype {self.lora_dtype!r} is not supported with activations in {own_dtype}; "
                'write "auto"'
            )

    def _caches_prefixes(self) -> bool:
        """`enable_prefix_caching`; its default follows from the model."""
        is_recurrent = self.model_config.has_delta_nets
        if is_recurrent and self.enable_prefix_caching:
            raise ArgumentError(
                f"enable_prefix_caching=True is not supported for "
                f"{self.model_config.architectures[0]}: what its recurrent states hold of a prefix "
                "is not kept"
            )
        return (
            not is_recurrent if self.enable_prefix_caching is None else self.enable_prefix_caching
        )

    def _longest_sequence(self) -> int:
        """`max_model_len`, capped to the model's positions."""
        longest, limit = self.model_config.max_positions, self.model_config.full_attention_limit
        max_model_len = min(self.max_model_len or longest, longest)
        rope_limit = self.model_config.rope_limit
        if rope_limit is not None and max_model_len > rope_limit.num_tokens:
            raise ArgumentError(
                f"max_model_len ({max_model_len}) must be <= the model's {rope_limit.field} "
                f"({rope_limit.num_tokens}): beyond it, {rope_limit.beyond}"
            )
        if limit is not None and max_model_len > limit[0]:
            raise ArgumentError(
                f"max_model_len ({max_model_len}) must be <= the model's {limit[1]} "
                f"({limit[0]}): only full attention is supported"
            )
        return max_model_len

    def _token_budget(self, budget: int) -> int:
        """`max_num_batched_tokens`, capped to all sequences in full."""
        if budget < self.max_model_len and not self.enable_chunked_prefill:
            raise ArgumentError(
                f"max_num_batched_tokens ({budget}) must be >= max_model_len "
                f"({self.max_model_len}) unless enable_chunked_prefill=True; its default is "
                f"{DEFAULT_MAX_NUM_BATCHED_TOKENS}"
            )
        # Places in the row table have 32 bits.
        most = (MAX_INT32 - row_state.BLOCK_TABLE) // self.row_width - 1
        if self.max_num_seqs > most:
            raise ArgumentError(
                f"max_num_seqs must be <= {most} with sequences of max_model_len "
                f"({self.max_model_len}) tokens, got {self.max_num_seqs}"
            )
        all_tokens = max(self.max_num_seqs * self.max_model_len, DEFAULT_MAX_NUM_BATCHED_TOKENS)
        return min(budget, all_tokens, MAX_INT32)

    @property
    def pooling(self) -> PoolerConfig:
        """`pooler_config`; one that says nothing if there is none."""
        return as_pooler_config("pooler_config", self.pooler_config or {})

    @property
    def embedding_size(self) -> int:
        """Numbers of an embedding for which no `dimensions` are asked: vLLM's name."""
        return self.pooling.dimensions or self.model_config.hidden_size

    @property
    def cpu_offload_bytes(self) -> int:
        """`cpu_offload_gb` in bytes."""
        return int(min(self.cpu_offload_gb * 2**30, 2.0**62))

    @property
    def max_blocks_per_seq(self) -> int:
        """Width of a block table: blocks of a sequence of `max_model_len` tokens."""
        return -(-self.max_model_len // self.kvcache_block_size)

    @property
    def row_width(self) -> int:
        """Width of a row of the row table, which has a block table of each cache group."""
        return row_state.BLOCK_TABLE + len(self.cache_windows) * self.max_blocks_per_seq

    def cache_window(self, window: int | None) -> int | None:
        """The window of the cache group of layers with `window`; None: they see everything."""
        return window if window is not None and window < self.max_model_len else None

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        """The window of each cache group: None first, if there is one, then the largest first.

        A cache group is all attention layers with this window: see `engine.cache_groups`.
        """
        windows = {self.cache_window(window) for window in self.model_config.layer_windows}
        finite = sorted((w for w in windows if w is not None), reverse=True)
        return (None, *finite) if None in windows or not finite else tuple(finite)

    def get_vocab_size(self) -> int:
        """vLLM's name of the number of token ids."""
        return self.model_config.vocab_size

    def resolve_device(self) -> "torch.device":
        """The device of rank 0 (rank r has GPU r); ArgumentError if there are too few GPUs."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            count = torch.cuda.device_count()
            if count < self.tensor_parallel_size * self.data_parallel_size:
                replicas = f" * data_parallel_size ({self.data_parallel_size})"
                raise ArgumentError(
                    f"tensor_parallel_size ({self.tensor_parallel_size})"
                    f"{replicas if self.data_parallel_size > 1 else ''} needs that many visible "
                    f"GPUs, found {count}"
                    if count
                    else "device='cuda' needs a visible GPU, found none; device='cpu' runs without"
                )
        return torch.device(name, 0) if name == "cuda" else torch.device(name)

    def resolve_dtype(self) -> "torch.dtype":
        """The dtype of weights and activations; "auto" is the model's, else bfloat16."""
        import torch

        of_model = self.model_config.dtype or "bfloat16"
        return getattr(torch, of_model if self.dtype == "auto" else self.dtype)

    @property
    def fp8_scales(self) -> 'Literal["rows", "blocks", "channels"] | None':
        """What has a scale of its own in the linear layers' fp8 weights; None: they are not fp8.

        "rows" are quantised as they are loaded, "channels" are the rows of an fp8 checkpoint.
        """
        if self.weight_format is not None:
            return None
        quantization = self.model_config.quantization
        if quantization is not None and quantization.fp8_scales is not None:
            return quantization.fp8_scales
        return "rows" if self.quantization == "fp8" else None

    @property
    def weight_format(self) -> WeightFormat | None:
        """How the linear layers' weights are packed; None: they are not."""
        if self.quantization in PACKED_BITS:
            return WeightFormat(PACKED_BITS[self.quantization], PACKED_GROUP_SIZE, is_on_load=True)
        return self.model_config.weight_format

    def resolve_kv_cache_dtype(self) -> "torch.dtype":
        """The dtype of the KV cache: that of the activations, or fp8."""
        from nanovllm.kernels.types import FP8_DTYPE

        return self.resolve_dtype() if self.kv_cache_dtype == "auto" else FP8_DTYPE


class VllmConfig:
    """An engine's configuration by vLLM's names, which logits processors get.

    All its parts are the one `Config`, whose fields have vLLM's names: `max_num_seqs`, `hf_config`.
    """

    speculative_config: ClassVar[None] = None

    def __init__(self, config: Config) -> None:
        self.model_config = self.scheduler_config = self.cache_config = config
        self.parallel_config = config
