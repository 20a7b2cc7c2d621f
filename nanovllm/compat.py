"""Names of other libraries: what they are called here, or that there is nothing like them.

vLLM's options with values that change nothing are taken. Other names are errors that say what to
write instead.
"""

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, TypeVar

from nanovllm.errors import nearest, shown

Function = TypeVar("Function", bound=Callable[..., Any])

# ---- LLM(...) ---------------------------------------------------------------------------------

# vLLM's names and values that are taken in place of ours.
ALIASES = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
KV_CACHE_DTYPE_ALIASES = {"fp8_e4m3": "fp8"}

# vLLM's constructor parameters that this library does not have: named as such in the error, unless
# their value is false ("off").
VLLM_ONLY = frozenset(
    """allowed_local_media_path allowed_media_domains quantization_config offload_group_size
    offload_num_in_group offload_prefetch_step offload_params enable_return_routed_experts
    mm_processor_kwargs limit_mm_per_prompt structured_outputs_config profiler_config
    attention_config logits_processors kv_transfer_config speculative_config spec_method spec_model
    spec_tokens enable_prompt_embeds long_prefill_token_threshold cudagraph_capture_sizes
    disable_sliding_window calculate_kv_scales kv_sharing_fast_prefill""".split()
)
# Those that scripts pass all the same, with the values that change nothing here; None: all do.
VLLM_IGNORED: dict[str, tuple[Any, ...] | None] = {
    "revision": None,
    "tokenizer_revision": None,
    "hf_token": None,
    "download_dir": None,
    "served_model_name": None,
    "enable_log_requests": None,
    "swap_space": None,
    "compilation_config": None,
    "max_loras": None,
    "max_lora_rank": None,
    "convert": ("auto", "none"),
    "logprobs_mode": ("raw_logprobs",),
    "expert_placement_strategy": ("linear",),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "config_format": ("auto", "hf"),
    "distributed_executor_backend": (None, "mp"),
    "worker_cls": (None, "auto"),
    "enable_expert_parallel": (False,),
    "enable_lora": (False,),
}
# Of transformers, llama.cpp, SGLang, TensorRT-LLM and others: another name of a parameter here.
LLM_NAMES = {
    **dict.fromkeys(
        """model_path model_name model_id model_dir model_name_or_path path
        pretrained_model_name_or_path repo_id""".split(),
        "model",
    ),
    **dict.fromkeys(
        """tp tp_size tensor_parallel num_gpus n_gpus n_gpu gpus world_size
        tensor_parallelism""".split(),
        "tensor_parallel_size",
    ),
    **dict.fromkeys(
        """mem_fraction_static gpu_memory_fraction free_gpu_memory_fraction gpu_mem_utilization
        kv_cache_free_gpu_memory_fraction cache_max_entry_count gpu_utilization gpu_memory
        mem_fraction""".split(),
        "gpu_memory_utilization",
    ),
    **dict.fromkeys(
        """n_ctx num_ctx ctx_size context_length context_size max_context_len max_context_length
        max_seq_len max_seq_length max_sequence_length session_len max_model_length
        max_position_embeddings model_max_length seq_len context_len context_window""".split(),
        "max_model_len",
    ),
    **dict.fromkeys(
        "max_batch_size batch_size max_running_requests max_seqs max_num_sequences".split(),
        "max_num_seqs",
    ),
    **dict.fromkeys(
        "n_batch max_num_tokens max_prefill_tokens chunked_prefill_size".split(),
        "max_num_batched_tokens",
    ),
    **dict.fromkeys("torch_dtype precision compute_dtype".split(), "dtype"),
    **dict.fromkeys("page_size tokens_per_block".split(), "kvcache_block_size"),
    **dict.fromkeys("num_kv_blocks num_blocks num_gpu_blocks".split(), "num_kvcache_blocks"),
    **dict.fromkeys("kv_cache_size kv_cache_bytes".split(), "kv_cache_memory_bytes"),
    **dict.fromkeys("quant quant_method quantization_method".split(), "quantization"),
    **dict.fromkeys("trust_remote trust_code".split(), "trust_remote_code"),
    "chat_template_path": "chat_template",
    **dict.fromkeys("attn_implementation attn_backend".split(), "attention_backend"),
    **dict.fromkeys("random_seed rng_seed".split(), "seed"),
    **dict.fromkeys("tokenizer_path tokenizer_name tokenizer_dir".split(), "tokenizer"),
    **dict.fromkeys("kv_dtype cache_dtype kv_cache_type".split(), "kv_cache_dtype"),
    **dict.fromkeys("disable_cuda_graph eager eager_mode".split(), "enforce_eager"),
    "device_map": "device",
    "schedule_policy": "scheduling_policy",
}
# What to do instead, where a name alone does not say it.
LLM_HINTS = {
    "load_in_8bit": 'write quantization="int8" or quantization="fp8"',
    "load_in_4bit": 'write quantization="int4"',
    "n_gpu_layers": 'all layers run on one device: device="cuda" or device="cpu"',
    **dict.fromkeys(
        "load_in_low_bit bnb_4bit bnb_4bit_compute_dtype gguf_file".split(),
        "nanovllm reads safetensors, also of AWQ, GPTQ, compressed-tensors and bitsandbytes; "
        'quantization="int4" or "int8" rounds other weights on load',
    ),
    "gpu_layers": 'all layers run on one device: device="cuda" or device="cpu"',
    "disable_radix_cache": "write enable_prefix_caching=False",
    **dict.fromkeys(
        "enable_prefix_cache prefix_caching prefix_cache use_prefix_cache".split(),
        "write enable_prefix_caching",
    ),
    "chunked_prefill": "write enable_chunked_prefill",
    "chunk_size": "write enable_chunked_prefill=True and max_num_batched_tokens=...",
    **dict.fromkeys(
        "use_cuda_graph cuda_graph use_cuda_graphs cuda_graphs enable_cuda_graph".split(),
        "CUDA graphs are used unless enforce_eager=True",
    ),
    **dict.fromkeys(
        "compile torch_compile use_compile enable_torch_compile".split(),
        "kernels and CUDA graphs are used without it; enforce_eager=True turns the graphs off",
    ),
    **dict.fromkeys(
        "use_flash_attention use_flash_attn use_flash_attention_2 use_flash_attn_2".split(),
        'write attention_backend="flash-attn", or leave it to "auto"',
    ),
    **dict.fromkeys(
        """speculative_model draft_model num_speculative_tokens speculative_algorithm
        assistant_model speculative_draft_model_path""".split(),
        "nanovllm has no speculative decoding",
    ),
    **dict.fromkeys(
        "pp pp_size pipeline_parallel dp dp_size data_parallel ep ep_size".split(),
        "a model is shared over GPUs by tensor_parallel_size alone",
    ),
    **dict.fromkeys(
        "device_ids device_id gpu_id gpu_ids cuda_visible_devices".split(),
        "set CUDA_VISIBLE_DEVICES in the environment",
    ),
    **dict.fromkeys(
        "rope_scaling rope_theta rope_freq_base rope_parameters".split(),
        "write hf_overrides={'rope_parameters': {...}}",
    ),
    **dict.fromkeys(
        "system_prompt system".split(), "it is the first message of llm.chat(messages)"
    ),
    **dict.fromkeys(
        "host port api_key base_url ssl_keyfile uvicorn_log_level".split(),
        "nanovllm is a library and no server",
    ),
    **dict.fromkeys(
        "task is_embedding embedding".split(),
        "the model says what it answers: call llm.generate, llm.embed, llm.classify or llm.encode",
    ),
    **dict.fromkeys(
        "verbose log_level disable_log_requests".split(),
        'logging.getLogger("nanovllm") says how much is told',
    ),
    "guided_decoding_backend": "llguidance compiles structured outputs, there is no other",
    "n_threads": "call torch.set_num_threads(...)",
    "num_threads": "call torch.set_num_threads(...)",
    **dict.fromkeys(
        "cache_dir local_files_only token use_auth_token force_download".split(),
        "nothing is downloaded, model is the path of a local directory",
    ),
    **dict.fromkeys(
        "lora_path lora_paths lora_modules adapter adapters adapter_path peft_model_id".split(),
        "nanovllm has no adapters",
    ),
}

# ---- SamplingParams(...) ----------------------------------------------------------------------

SAMPLING_NAMES = {
    **dict.fromkeys(
        """max_new_tokens max_length max_len max_completion_tokens max_output_tokens num_predict
        n_predict max_gen_len max_tokens_to_sample max_generated_tokens max_gen_toks
        max_decode_tokens output_len""".split(),
        "max_tokens",
    ),
    **dict.fromkeys("min_new_tokens min_length min_len min_output_tokens".split(), "min_tokens"),
    **dict.fromkeys("temp t sampling_temperature".split(), "temperature"),
    **dict.fromkeys("nucleus nucleus_p p top_p_value".split(), "top_p"),
    **dict.fromkeys("k top_k_value".split(), "top_k"),
    **dict.fromkeys(
        """stop_words stop_word stop_strings stop_string stop_sequences stop_sequence stop_texts
        stop_str stop_strs stop_token
        stop_tokens stop_words_list until antiprompt end_strings""".split(),
        "stop",
    ),
    **dict.fromkeys(
        """eos_token_id eos_token_ids eos_id eos_ids end_token_id end_token_ids stop_ids stop_id
        stop_token_id end_id terminators""".split(),
        "stop_token_ids",
    ),
    **dict.fromkeys(
        "repeat_penalty repetition_penality rep_penalty rep_pen".split(), "repetition_penalty"
    ),
    **dict.fromkeys("freq_penalty frequency_pen alpha_frequency".split(), "frequency_penalty"),
    **dict.fromkeys("pres_penalty presence_pen alpha_presence".split(), "presence_penalty"),
    **dict.fromkeys(
        """num_return_sequences num_completions num_samples n_samples num_generations
        num_outputs""".split(),
        "n",
    ),
    **dict.fromkeys("random_seed sampling_seed rng_seed".split(), "seed"),
    **dict.fromkeys(
        """top_logprobs num_logprobs return_logprob return_log_probs top_logprobs_num n_probs
        top_k_logprobs""".split(),
        "logprobs",
    ),
    **dict.fromkeys(
        "bad_words_ids bad_words_list banned_strings suppress_strings".split(), "bad_words"
    ),
    **dict.fromkeys("ignore_eos_token ban_eos_token".split(), "ignore_eos"),
    **dict.fromkeys("include_stop_str no_stop_trim".split(), "include_stop_str_in_output"),
    "decode": "detokenize",
}
SAMPLING_HINTS = {
    "do_sample": "write temperature=0 for greedy decoding (do_sample=False), else a temperature",
    "greedy": "write temperature=0",
    **{
        name: f"write structured_outputs=StructuredOutputsParams({kind}=...)"
        for kind, names in {
            "json": "guided_json json json_schema response_format schema response_schema",
            "regex": "guided_regex regex pattern",
            "choice": "guided_choice choice choices",
            "grammar": "guided_grammar grammar ebnf",
        }.items()
        for name in names.split()
    },
    **dict.fromkeys(
        "guided_decoding guided_options".split(),
        "write structured_outputs=StructuredOutputsParams(json=..., regex=..., or another)",
    ),
    "json_object": "write structured_outputs=StructuredOutputsParams(json_object=True)",
    **dict.fromkeys(
        """best_of use_beam_search beam_search num_beams beam_size beam_width num_beam_groups
        length_penalty early_stopping early_stop diversity_penalty""".split(),
        "nanovllm has no beam search; n=... draws several completions",
    ),
    **dict.fromkeys(
        "logits_processors logits_processor".split(),
        "nanovllm has no logits processors; logit_bias, allowed_token_ids, bad_words and "
        "structured_outputs steer the tokens",
    ),
    **dict.fromkeys(
        """typical_p typical tfs top_a epsilon_cutoff eta_cutoff mirostat mirostat_mode mirostat_tau
        mirostat_eta dry_multiplier xtc_probability no_repeat_ngram_size penalty_alpha
        dynamic_temperature smoothing_factor tfs_z xtc_threshold top_n_sigma nsigma dynatemp_range
        dynatemp_exponent dry_base repeat_last_n penalize_nl guidance_scale""".split(),
        "nanovllm does not have it; temperature, top_p, top_k, min_p and the penalties shape the "
        "sampling",
    ),
    **dict.fromkeys(
        "stream streaming".split(), "call llm.generate_stream(prompts, sampling_params)"
    ),
    **dict.fromkeys(
        "streamer stream_options".split(), "call llm.generate_stream(prompts, sampling_params)"
    ),
    **dict.fromkeys(
        "stopping_criteria stop_regex max_time".split(),
        "stop, stop_token_ids, max_tokens and structured_outputs end a completion; "
        "llm.generate_stream lets you end it yourself",
    ),
    **dict.fromkeys(
        "output_scores output_logits return_dict_in_generate".split(),
        "write logprobs=...; the outputs have token_ids and logprobs",
    ),
    **dict.fromkeys("force_words_ids force_words".split(), "write structured_outputs, or a prompt"),
    "sequence_bias": "write logit_bias={token id: bias}, or bad_words",
    **dict.fromkeys(
        "tools messages system add_generation_prompt".split(),
        "it goes to llm.chat(messages, sampling_params, tools=...)",
    ),
    "enable_thinking": "it goes to llm.chat(..., chat_template_kwargs={'enable_thinking': ...})",
    **dict.fromkeys(
        "prompt prompts input_ids".split(), "call llm.generate(prompts, sampling_params)"
    ),
    "num_ctx": "it goes to LLM(model, max_model_len=...)",
    **dict.fromkeys("use_cache pad_token_id bos_token_id".split(), "not needed: leave it out"),
    **dict.fromkeys(
        """user store metadata service_tier request_id tool_choice parallel_tool_calls modalities
        reasoning_effort keep_alive""".split(),
        "nanovllm is no server and does not have it: leave it out",
    ),
    "lora_request": "nanovllm has no adapters",
    "echo": "the prompt is in the output: output.prompt",
    "return_full_text": "the prompt is in the output: output.prompt",
    "skip_special": "write skip_special_tokens",
    "use_tqdm": "it goes to generate(..., use_tqdm=...)",
    "priority": "it goes to generate(..., priority=[...])",
    "truncate_prompt_tokens": "it goes to generate(..., tokenization_kwargs={'truncation': True, "
    "'max_length': ...})",
    "output_kind": "nanovllm does not have it; llm.generate_stream gives text as it comes",
}
# vLLM's sampling parameters that are not there, with the values that change nothing.
SAMPLING_OFF: dict[str, tuple[Any, ...]] = {
    "best_of": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
    "logits_processors": (None, []),
    "guided_decoding": (None,),
    "truncate_prompt_tokens": (None,),
    "output_kind": (None,),
    "extra_args": (None, {}),
    "flat_logprobs": (None, False),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "logprob_token_ids": (None,),
}
STRUCTURED_NAMES = {
    **dict.fromkeys("json_schema schema guided_json response_format".split(), "json"),
    **dict.fromkeys("pattern guided_regex".split(), "regex"),
    **dict.fromkeys("guided_choice options enum".split(), "choice"),
    **dict.fromkeys("ebnf gbnf lark guided_grammar".split(), "grammar"),
}
POOLING_NAMES = {
    **dict.fromkeys("normalize normalise normalize_embeddings softmax".split(), "use_activation"),
    **dict.fromkeys("dim dims size truncate_dim embedding_size".split(), "dimensions"),
}

POOLER_NAMES = {
    **dict.fromkeys("pooling pooling_mode pooling_method type".split(), "pooling_type"),
    **dict.fromkeys("normalise normalize_embeddings".split(), "normalize"),
    **dict.fromkeys("dim dims size truncate_dim embedding_size".split(), "dimensions"),
    "logit_bias": "logit_mean",
    "logit_scale": "logit_sigma",
}
# vLLM's entries of a pooler's configuration that are not there, with what changes nothing.
POOLER_OFF: dict[str, tuple[Any, ...]] = {
    "task": (None,),
    "enable_chunked_processing": (None, False),
    "max_embed_len": (None,),
    "logit_bias": (None,),
    "logit_scale": (None,),
}

# ---- methods of LLM ---------------------------------------------------------------------------

METHOD_NAMES = {
    **dict.fromkeys("prompt inputs input text texts input_text".split(), "prompts"),
    **dict.fromkeys(
        "params sampling_parameters sampling generation_config gen_config config".split(),
        "sampling_params",
    ),
    **dict.fromkeys("conversation conversations dialogue chat".split(), "messages"),
    **dict.fromkeys("progress progress_bar show_progress verbose".split(), "use_tqdm"),
    **dict.fromkeys("template".split(), "chat_template"),
}
METHOD_HINTS = {
    "messages": "call llm.chat(messages, sampling_params)",
    "prompts": "call llm.generate(prompts, sampling_params)",
    "stream": "call llm.generate_stream(prompts, sampling_params)",
    "prompt_token_ids": "token ids are prompts: generate([[1, 2, 3]], sampling_params)",
    "input_ids": "token ids are prompts: generate([[1, 2, 3]], sampling_params)",
    "enable_thinking": "write chat_template_kwargs={'enable_thinking': ...}",
}


def is_one_of(value: Any, values: Collection[Any]) -> bool:
    """`value in values`, False for what cannot be compared, such as an array."""
    try:
        return any(value is other or bool(value == other) for other in values)
    except Exception:
        return False


def unexpected(
    owner: str,
    name: str,
    known: Collection[str],
    names: Mapping[str, str],
    hints: Mapping[str, str],
) -> str:
    """The message of a TypeError for a keyword that does not exist.

    Args:
        owner: what was called.
        name: the keyword.
        known: those that exist.
        names: other libraries' names of those.
        hints: what to do instead of others.
    """
    message = f"{owner}() got an unexpected keyword argument {shown(name)}"
    plain = name.lower().replace("-", "_")
    guess = names.get(plain)
    if (guess not in known or plain in known) and plain not in hints:
        guess = plain if plain in known else nearest(plain, known)
    if guess in known:
        return f"{message}; the nearest known is {guess!r}"
    if plain in hints:
        return f"{message}: {hints[plain]}"
    return f"{message}; help(nanovllm.{owner}) names those there are"


def engine_arguments(
    given: Mapping[str, Any], known: Collection[str], sampling: Collection[str]
) -> dict[str, Any]:
    """Keywords of `LLM` by our names, without those of vLLM that change nothing here.

    Args:
        given: the keywords.
        known: the names of the engine's parameters.
        sampling: those of sampling parameters.

    Raises:
        TypeError: a keyword that does not exist, or one that is given under two names.
    """
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name in VLLM_IGNORED:
            _check_ignored(name, value)
            continue
        if name in VLLM_ONLY and _is_false(value):
            continue
        target = ALIASES.get(name, name)
        if target not in known:
            raise TypeError(_unknown_option(name, [*known, *ALIASES], sampling))
        if target in arguments:
            alias = next(a for a, t in ALIASES.items() if t == target)
            raise TypeError(f"LLM() got {target!r} twice: {alias!r} is another name for it")
        arguments[target] = value
    return arguments


def _is_false(value: Any) -> bool:
    try:
        return not value
    except Exception:  # an array is neither
        return False


def _check_ignored(name: str, value: Any) -> None:
    if name == "swap_space":
        message = "swap_space changes nothing: preempted requests are computed anew"
        warnings.warn(message, DeprecationWarning, stacklevel=5)
    allowed = VLLM_IGNORED[name]
    if allowed is not None and not is_one_of(value, allowed):
        raise TypeError(
            f"LLM() got {name}={shown(value)}, an option of vLLM that nanovllm does not have; it "
            f"takes {' or '.join(map(repr, allowed))} alone"
        )


def _unknown_option(name: str, known: Collection[str], sampling: Collection[str]) -> str:
    """`unexpected` for a keyword of `LLM`, with the `known` ones and those of SamplingParams."""
    if name in VLLM_ONLY:
        return f"LLM() got {name!r}, an option of vLLM that nanovllm does not have"
    is_ours = name in LLM_NAMES or name in LLM_HINTS or nearest(name, known)
    hint = _sampling_hint(name, sampling)
    if hint and (name in sampling or not is_ours):
        return f"LLM() got an unexpected keyword argument {shown(name)}{hint}"
    return unexpected("LLM", name, known, LLM_NAMES, LLM_HINTS)


def _sampling_hint(name: str, sampling: Collection[str]) -> str | None:
    """Where a sampling parameter goes that is not given to SamplingParams, or what to do."""
    ours = name if name in sampling else SAMPLING_NAMES.get(name.lower())
    if ours is not None:
        return (
            f", a sampling parameter: it goes into SamplingParams({ours}=...), the second argument "
            "of generate and chat"
        )
    hint = SAMPLING_HINTS.get(name)
    if hint is not None and hint.startswith("write "):
        return f", a sampling parameter: {hint}; all go into SamplingParams(...)"
    return None if hint is None else f": {hint}"


def explain_fields(
    cls: type,
    names: Mapping[str, str],
    hints: Mapping[str, str],
    off: Mapping[str, tuple[Any, ...]] | None = None,
) -> None:
    """Let the constructor of a dataclass say what an unknown keyword is called here.

    off: keywords that do not exist, but are taken with these values.
    """
    construct = cls.__init__  # type: ignore[misc]
    known = [name for name in inspect.signature(construct).parameters if name != "self"]

    @wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except TypeError:
            unknown = [name for name in kwargs if name not in known]
            if not unknown:
                raise
            for name in unknown:
                if not is_one_of(kwargs[name], (off or {}).get(name, ())):
                    message = unexpected(cls.__name__, name, known, names, hints)
                    raise TypeError(message) from None
            construct(self, *args, **{name: kwargs[name] for name in kwargs if name in known})

    cls.__init__ = __init__  # type: ignore[misc]


def explain_keywords(sampling: Collection[str]) -> Callable[[Function], Function]:
    """A decorator: a method of LLM says what an unknown keyword is called here.

    sampling: the names of sampling parameters.
    """

    def decorate(method: Function) -> Function:
        known = inspect.signature(method).parameters

        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in known:
                    owner = method.__name__
                    is_ours = name in METHOD_NAMES or name in METHOD_HINTS
                    if not is_ours and (hint := _sampling_hint(name, sampling)):
                        raise TypeError(
                            f"{owner}() got an unexpected keyword argument {shown(name)}{hint}"
                        )
                    raise TypeError(
                        unexpected(owner, name, known, METHOD_NAMES, METHOD_HINTS).replace(
                            "nanovllm.", "nanovllm.LLM."
                        )
                    )
            return method(self, *args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
