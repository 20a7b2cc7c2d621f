"""Names of other libraries: what they are called here, or that there is nothing like them.

vLLM's options with values that change nothing are taken. Other names are errors that say what to
write instead.
"""

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from nanovllm.errors import ArgumentError, nearest, shown

Function = TypeVar("Function", bound=Callable[..., Any])
logger = logging.getLogger("nanovllm")

# ---- LLM(...) ---------------------------------------------------------------------------------

# vLLM's names and values that are taken in place of ours.
ALIASES = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
KV_CACHE_DTYPE_ALIASES = {"fp8_e4m3": "fp8"}

LOAD_FORMAT_ALIASES = {"safetensors": "auto", "hf": "auto"}
MODEL_IMPL_ALIASES = {"vllm": "nanovllm"}
TOKENIZER_MODE_ALIASES = {"hf": "auto"}
# vLLM's values of `quantization` that name a checkpoint's own kind -> its `quant_method`.
CHECKPOINT_METHODS = {
    "awq": "awq",
    "awq_marlin": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "modelopt",
    "mxfp4": "mxfp4",
}
ATTENTION_BACKEND_ALIASES = {
    "FLASH_ATTN": "flash-attn",
    "TRITON_ATTN": "triton",
    "TORCH_SDPA": "torch",
}
# vLLM's block sizes, which are rounded up to ours: a block's size changes no result.
SMALL_BLOCKS = (1, 8, 16, 32, 64, 128)
BLOCK_SIZE = 256
# Parameters where None is a value of its own; of all others it is vLLM's "the default".
NONE_HAS_A_MEANING = frozenset({"max_model_len", "enable_chunked_prefill"})


class Absent(NamedTuple):
    """A constructor parameter of vLLM that is not here.

    Attributes:
        values: what is taken, beside None, False, 0 and what is empty; None: every value.
        why: what it would be for, and what to do instead.
    """

    values: tuple[Any, ...] | None
    why: str


def _absent(*groups: tuple[str, tuple[Any, ...] | None, str]) -> dict[str, Absent]:
    return {name: Absent(values, why) for names, values, why in groups for name in names.split()}


# Rows of the table in docs/migrating.md.
VLLM_ABSENT = _absent(
    # Taken with every value: results do not depend on them.
    (
        """code_revision ignore_patterns safetensors_load_strategy max_parallel_loading_workers
        pt_load_map_location use_tqdm_on_load""",
        None,
        "the engine chooses the files, and reads weights from the model's directory",
    ),
    (
        """served_model_name enable_log_requests disable_log_requests aggregate_engine_logging
        show_hidden_metrics_for_version collect_detailed_traces kv_cache_metrics
        kv_cache_metrics_sample cudagraph_metrics enable_mfu_metrics enable_mm_processor_stats
        enable_logging_iteration_details enable_layerwise_nvtx_tracing shutdown_timeout
        disable_frontend_multiprocessing fail_on_environ_validation""",
        None,
        "there is no server; `get_metrics` and `record` tell of a run",
    ),
    (
        """compilation_config cudagraph_capture_sizes max_cudagraph_capture_size cuda_graph_sizes
        max_seq_len_to_capture optimization_level performance_mode kernel_config
        enable_flashinfer_autotune disable_cascade_attn""",
        None,
        "the engine chooses kernels and CUDA graphs; `enforce_eager=True` runs without graphs",
    ),
    (
        """swap_space preemption_mode scheduler_delay_factor num_scheduler_steps
        multi_step_stream_outputs use_v2_block_manager disable_async_output_proc
        num_lookahead_slots max_num_partial_prefills max_long_partial_prefills
        long_prefill_token_threshold prefix_caching_hash_algo disable_hybrid_kv_cache_manager
        tokenizer_pool_size tokenizer_pool_type tokenizer_pool_extra_config""",
        None,
        "the scheduler has rules of its own; preempted requests are computed anew",
    ),
    (
        "lora_extra_vocab_size",
        None,
        "adapters that add tokens are refused by their tensors",
    ),
    (
        """allowed_local_media_path allowed_media_domains limit_mm_per_prompt mm_processor_kwargs
        mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb
        mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend media_io_kwargs
        interleave_mm_strings skip_mm_profiling video_pruning_rate language_model_only
        disable_chunked_mm_input disable_mm_preprocessor_cache enable_mm_embeds""",
        None,
        "models read text alone, and prompts with images or audio are refused",
    ),
    (
        """enable_expert_parallel expert_placement_strategy all2all_backend eplb_config ubatch_size
        dbo_decode_token_threshold dbo_prefill_token_threshold dcp_kv_cache_interleave_size
        cp_kv_cache_interleave_size disable_nccl_for_dp_synchronization master_addr master_port
        data_parallel_address data_parallel_rpc_port data_parallel_backend data_parallel_size_local
        ray_workers_use_nsight allow_deprecated_quantization guided_decoding_disable_fallback
        kv_offloading_backend""",
        None,
        "they matter only with options that are not there; tensor_parallel_size shares experts too",
    ),
    # Taken with the values that change nothing.
    (
        "task",
        ("auto", "generate", "embed", "embedding", "classify", "reward", "score"),
        "call generate, embed, classify, reward, score or encode: the model says what it answers",
    ),
    (
        "guided_decoding_backend",
        ("auto", "guidance", "xgrammar", "outlines", "lm-format-enforcer"),
        "llguidance compiles structured outputs, whatever is named",
    ),
    (
        "structured_outputs_config",
        (),
        "of its entries `backend`, `disable_fallback` and `disable_any_whitespace` are taken",
    ),
    (
        """guided_decoding_disable_additional_properties reasoning_parser
        reasoning_parser_plugin""",
        (),
        "a grammar counts from the first token, and a schema says what it does not allow",
    ),
    ("guided_decoding_disable_any_whitespace", (), "write disable_any_whitespace"),
    ("attention_config", (), "of its entries `backend` is taken, as `attention_backend`"),
    ("convert", ("auto", "none"), "`architectures` of config.json name the head"),
    (
        "override_pooler_config",
        (),
        "write pooler_config",
    ),
    ("logprobs_mode", ("raw_logprobs",), "log probabilities are the model's own"),
    ("config_format", ("auto", "hf"), "config.json is read in Hugging Face's form alone"),
    ("hf_config_path model_loader_extra_config", (), "the model's directory has all files"),
    (
        """pipeline_parallel_size decode_context_parallel_size prefill_context_parallel_size
        nnodes""",
        (1,),
        "tensor_parallel_size alone shares a model, and all ranks are on one host",
    ),
    (
        """data_parallel_rank data_parallel_start_rank data_parallel_hybrid_lb
        data_parallel_external_lb enable_eplb enable_dbo node_rank""",
        (),
        "tensor_parallel_size alone shares a model, and data_parallel_size starts all replicas",
    ),
    (
        "distributed_executor_backend",
        ("mp", "uni"),
        "the ranks are processes of this host that the engine starts",
    ),
    (
        "worker_cls",
        ("auto",),
        "worker_extension_cls adds methods, and collective_rpc calls them on the ranks",
    ),
    ("scheduler_cls", (), "scheduling_policy says who is admitted first"),
    (
        "default_mm_loras enable_lora_bias long_lora_scaling_factors lora_target_modules",
        (),
        "adapters are taken whole, by requests, and without biases",
    ),
    (
        """speculative_config spec_method spec_model spec_tokens speculative_model
        num_speculative_tokens""",
        (),
        "there is no speculative decoding",
    ),
    (
        "logits_processor_pattern",
        (),
        "there is no server, whose requests would name functions; write logits_processors",
    ),
    (
        "cpu_offload_params offload_group_size offload_params kv_offloading_size",
        (),
        "cpu_offload_gb keeps weights in host memory, and chooses which",
    ),
    (
        "offload_num_in_group offload_prefetch_step",
        (1,),
        "cpu_offload_gb copies a layer ahead",
    ),
    ("offload_backend", ("auto",), "cpu_offload_gb has one way of its own"),
    (
        "kv_transfer_config kv_events_config ec_transfer_config",
        (),
        "the KV cache is this engine's alone",
    ),
    (
        "quantization_config",
        (),
        'quantization="fp8" quantises on load; else it is as config.json says',
    ),
    ("rope_scaling rope_theta", (), "write hf_overrides={'rope_parameters': {...}}"),
    (
        """enable_prompt_embeds enable_return_routed_experts disable_sliding_window
        calculate_kv_scales kv_sharing_fast_prefill override_attention_dtype additional_config
        io_processor_plugin otlp_traces_endpoint""",
        (),
        "nothing here does it",
    ),
    (
        "mamba_cache_dtype mamba_ssm_cache_dtype mamba_cache_mode mamba_block_size",
        ("auto", "none"),
        "recurrent states have the model's dtypes, and are not cached",
    ),
    ("stream_interval", (1,), "generate_stream gives what each step brought"),
)
# What vLLM's scripts override to score with Qwen3-Reranker, which `score` does without.
RERANKER_OVERRIDES = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}
# Entries of vLLM's configuration objects, with the values that are taken; None: every value.
STRUCTURED_ENTRIES: dict[str, tuple[Any, ...] | None] = {
    "backend": VLLM_ABSENT["guided_decoding_backend"].values,
    "disable_fallback": None,
    "disable_any_whitespace": (False, True),
    "disable_additional_properties": (False,),
    "reasoning_parser": ("",),
    "reasoning_parser_plugin": ("",),
    "enable_in_reasoning": (False,),
}
ATTENTION_ENTRIES: dict[str, tuple[Any, ...] | None] = {
    "backend": None,
    "flash_attn_version": (),
    "use_prefill_decode_attention": (False,),
    "disable_flashinfer_prefill": None,
    "disable_flashinfer_q_quantization": None,
    "use_trtllm_attention": (False,),
    "use_cudnn_prefill": (False,),
    "use_trtllm_ragged_deepseek_prefill": (False,),
    "flash_attn_max_num_splits_for_cuda_graph": None,
}
PROFILER_ENTRIES: dict[str, tuple[Any, ...] | None] = {
    "profiler": ("torch",),
    "torch_profiler_dir": None,
    "torch_profiler_with_stack": None,
    "torch_profiler_with_flops": None,
    "torch_profiler_with_memory": None,
    "torch_profiler_record_shapes": None,
    "torch_profiler_use_gzip": None,
    "torch_profiler_dump_cuda_time_total": None,
    "ignore_frontend": None,
    "delay_iterations": (0,),
    "max_iterations": (0,),
}
REASONING_ENTRIES: dict[str, tuple[Any, ...] | None] = {
    "reasoning_parser": ("", "deepseek_r1", "qwen3"),
    "reasoning_start_str": None,
    "reasoning_end_str": None,
}
TRANSFER_ENTRIES: dict[str, tuple[Any, ...] | None] = {"backend": ("nccl",)}
# Of transformers, llama.cpp, SGLang, TensorRT-LLM and others: another name of a parameter here.
LLM_NAMES = {
    **dict.fromkeys(
        """model_path model_name model_id model_dir model_name_or_path path
        pretrained_model_name_or_path repo_id""".split(),
        "model",
    ),
    **dict.fromkeys("dp dp_size data_parallel num_replicas replicas".split(), "data_parallel_size"),
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
    "cache_dir": "download_dir",
    **dict.fromkeys("token use_auth_token".split(), "hf_token"),
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
        """draft_model speculative_algorithm assistant_model
        speculative_draft_model_path""".split(),
        "nanovllm has no speculative decoding",
    ),
    **dict.fromkeys(
        "pp pp_size pipeline_parallel ep ep_size".split(),
        "a model is shared over GPUs by tensor_parallel_size alone",
    ),
    **dict.fromkeys(
        "device_ids device_id gpu_id gpu_ids cuda_visible_devices".split(),
        "set CUDA_VISIBLE_DEVICES in the environment",
    ),
    **dict.fromkeys(
        "rope_freq_base rope_parameters".split(),
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
        "is_embedding embedding".split(),
        "the model says what it answers: call llm.generate, llm.embed, llm.classify or llm.encode",
    ),
    **dict.fromkeys(
        "verbose log_level".split(),
        'logging.getLogger("nanovllm") says how much is told',
    ),
    "n_threads": "call torch.set_num_threads(...)",
    "num_threads": "call torch.set_num_threads(...)",
    "local_files_only": "nothing is downloaded without download=True; HF_HUB_OFFLINE=1 uses the "
    "cache alone",
    "force_download": "'hf download' renews what is in the cache",
    **dict.fromkeys(
        "lora_path lora_paths lora_modules adapter adapters adapter_path peft_model_id".split(),
        "write enable_lora=True, and llm.generate(..., lora_request=LoRARequest(name, 1, path))",
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
    **dict.fromkeys("thinking_budget reasoning_budget".split(), "thinking_token_budget"),
    "logits_processor": "logits_processors",
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
        "beam search is a call of its own, LLM.beam_search(prompts, BeamSearchParams(...)); n=... "
        "draws several completions",
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
    "lora_request": "it goes to generate(..., lora_request=...)",
    "echo": "the prompt is in the output: output.prompt",
    "return_full_text": "the prompt is in the output: output.prompt",
    "skip_special": "write skip_special_tokens",
    "use_tqdm": "it goes to generate(..., use_tqdm=...)",
    "priority": "it goes to generate(..., priority=[...])",
    "routed_experts_prompt_start": "nanovllm does not return routed experts",
    "skip_clone": "nanovllm copies parameters always",
    "stream_interval": "llm.generate_stream gives what each step brought",
}


class RequestOutputKind(Enum):
    """vLLM's values of `output_kind`: outputs with all there is by now, news, or the last alone."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


# vLLM's sampling parameters that are not there, with the values that change nothing.
SAMPLING_OFF: dict[str, tuple[Any, ...]] = {
    "best_of": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
    "guided_decoding": (None,),
    "stream_interval": (None, 1),
    "skip_clone": (None, False, True),
    "routed_experts_prompt_start": (None, 0),
}
# Those of structured outputs, with what to do instead.
STRUCTURED_OFF: dict[str, tuple[Any, ...]] = {
    "disable_additional_properties": (None, False),
    "disable_fallback": (None, False, True),
    "whitespace_pattern": (None,),
    "backend": (None, *(VLLM_ABSENT["guided_decoding_backend"].values or ())),
}
STRUCTURED_HINTS = {
    "whitespace_pattern": "write disable_any_whitespace=True, or 'x-guidance' into the schema",
    "disable_additional_properties": "write 'additionalProperties': False into the schema",
    "disable_fallback": "there is one compiler, llguidance",
    "backend": "there is one compiler, llguidance",
}
# Those of pooling.
POOLING_OFF: dict[str, tuple[Any, ...]] = {
    "late_interaction_params": (None,),
    "extra_kwargs": (None, {}),
    "output_kind": (None, RequestOutputKind.FINAL_ONLY),
    "requires_token_ids": (None, False),
    "normalize": (None,),
    "softmax": (None,),
    "activation": (None,),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
}
POOLING_HINTS = {
    "truncation_side": "the tokenizer's own counts: llm.get_tokenizer().truncation_side",
    "truncate_prompt_tokens": "it goes to embed(..., truncate_prompt_tokens=...)",
    "extra_kwargs": "nanovllm does not have it; pooler_config says how hidden states are pooled",
    "late_interaction_params": "encode(pooling_task='token_embed') gives the embeddings of all "
    "tokens",
    "output_kind": "nanovllm does not have it: outputs are whole",
    "requires_token_ids": "nanovllm does not have it: outputs have prompt_token_ids",
}
STRUCTURED_NAMES = {
    **dict.fromkeys("json_schema schema guided_json response_format".split(), "json"),
    **dict.fromkeys("pattern guided_regex".split(), "regex"),
    **dict.fromkeys("guided_choice options enum".split(), "choice"),
    **dict.fromkeys("ebnf gbnf lark guided_grammar".split(), "grammar"),
}
BEAM_NAMES = {
    **dict.fromkeys("num_beams beam_size width best_of n".split(), "beam_width"),
    **dict.fromkeys("max_new_tokens max_length".split(), "max_tokens"),
}
POOLING_NAMES = {
    **dict.fromkeys(
        "normalize normalise normalize_embeddings softmax activation".split(), "use_activation"
    ),
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

    One debug line of the logger "nanovllm" names what was left out.

    Args:
        given: the keywords.
        known: the names of the engine's parameters.
        sampling: those of sampling parameters.

    Raises:
        TypeError: a keyword that does not exist, or one that is given under two names.
        ArgumentError: an entry of a configuration object is not there, or one of vLLM's
            environment variables for ranks is wrong.
    """
    _check_environment()
    arguments: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in _without_objects(given).items():
        if name in VLLM_ABSENT:
            _check_absent(name, value)
            if not _is_false(value):
                left_out.append(f"{name}={shown(value)}")
            continue
        target = ALIASES.get(name, name)
        if target not in known:
            raise TypeError(_unknown_option(name, [*known, *ALIASES], sampling))
        if name == "block_size" and is_one_of(value, SMALL_BLOCKS):
            left_out.append(f"block_size={value} (blocks have {BLOCK_SIZE} tokens)")
            value = BLOCK_SIZE
        if value is None and target in arguments:
            continue  # of a parser's defaults, one under each name
        if arguments.get(target) is not None:
            alias = next(a for a, t in ALIASES.items() if t == target)
            raise TypeError(f"LLM() got {target!r} twice: {alias!r} is another name for it")
        arguments[target] = value
    if left_out:
        logger.debug("LLM: these change nothing: %s", ", ".join(left_out))
    return {
        name: value
        for name, value in arguments.items()
        if value is not None or name in NONE_HAS_A_MEANING
    }


RANK_VARIABLES = ("VLLM_DP_SIZE", "VLLM_DP_RANK", "VLLM_DP_RANK_LOCAL")
# Read by nobody: ranks of dense models do not talk with each other.
MASTER_VARIABLES = ("VLLM_DP_MASTER_IP", "VLLM_DP_MASTER_PORT")


def local_rank() -> int | None:
    """Which of the processes of this host this is, as vLLM's variables say; None: one alone.

    VLLM_DP_SIZE processes have an engine each, with a VLLM_DP_RANK, and VLLM_DP_RANK_LOCAL where
    there are several hosts. A process that has been given its GPUs by CUDA_VISIBLE_DEVICES and no
    local rank, as by vLLM's older scripts, keeps them: None.

    Raises:
        ArgumentError: a value is no number, or the rank is not below the size.
    """
    size = _rank_variable("VLLM_DP_SIZE")
    if size is None or size < 2:
        return None
    rank = _rank_variable("VLLM_DP_RANK")
    if rank is None or rank >= size:
        raise ArgumentError(
            f"VLLM_DP_RANK in the environment must be an integer from 0 to {size - 1}, one below "
            f"VLLM_DP_SIZE, got {shown(os.environ.get('VLLM_DP_RANK'))}"
        )
    local = _rank_variable("VLLM_DP_RANK_LOCAL")
    if local is None:
        return None if "CUDA_VISIBLE_DEVICES" in os.environ else rank
    if local > rank:
        raise ArgumentError(
            f"VLLM_DP_RANK_LOCAL in the environment must be at most VLLM_DP_RANK ({rank}), got "
            f"{local}"
        )
    return local


def _rank_variable(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ArgumentError(f"{name} in the environment must be an integer >= 0, got {shown(text)}")
    return int(text) if text else None


def _check_environment() -> None:
    """Check vLLM's variables for ranks; name the others that are set."""
    local_rank()
    known = {"VLLM_TORCH_PROFILER_DIR", *RANK_VARIABLES, *MASTER_VARIABLES}
    ignored = sorted(name for name in os.environ if name.startswith("VLLM_") and name not in known)
    if ignored:
        logger.debug("these environment variables of vLLM change nothing: %s", ", ".join(ignored))


def _without_objects(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords, with what counts in vLLM's configuration objects as keywords of ours."""
    given = dict(given)
    if not _is_false(given.get("structured_outputs_config")):
        said = entries("structured_outputs_config", given.pop("structured_outputs_config"))
        if said.get("disable_any_whitespace"):
            given["disable_any_whitespace"] = True
    if not _is_false(given.get("attention_config")):
        backend = entries("attention_config", given.pop("attention_config")).get("backend")
        if backend is not None and given.setdefault("attention_backend", backend) != backend:
            raise ArgumentError(
                f"attention_backend={shown(given['attention_backend'])} and attention_config with "
                f"backend {shown(backend)} are names of one thing: give one"
            )
    overrides = given.get("hf_overrides")
    if isinstance(overrides, Mapping):
        given["hf_overrides"] = _without_foreign_fields(given, overrides)
    return given


def _without_foreign_fields(given: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`hf_overrides` without what vLLM's scripts have in it, and no model's configuration."""
    if "classifier_from_token" in overrides:
        if dict(overrides) != RERANKER_OVERRIDES:
            raise ArgumentError(
                "hf_overrides: classifier_from_token is not supported; leave hf_overrides out: "
                "llm.score(queries, documents) asks Qwen3-Reranker's own question"
            )
        return {}
    overrides = dict(overrides)
    if "max_model_len" in overrides:
        given.setdefault("max_model_len", overrides.pop("max_model_len"))
        given.setdefault("enable_chunked_prefill", None)  # vLLM's: it is longer than a step
    return overrides


ENTRIES = {
    "structured_outputs_config": STRUCTURED_ENTRIES,
    "attention_config": ATTENTION_ENTRIES,
    "profiler_config": PROFILER_ENTRIES,
    "reasoning_config": REASONING_ENTRIES,
    "weight_transfer_config": TRANSFER_ENTRIES,
}


def entries(name: str, value: Any) -> dict[str, Any]:
    """What one of vLLM's configuration objects says: a dict, or an object with attributes.

    Raises:
        ArgumentError: it is neither, or has an entry that is not there, or a value of one.
    """
    known = ENTRIES[name]
    if not isinstance(value, Mapping) and not hasattr(value, "__dict__"):
        raise ArgumentError(f"{name} must be a dict, got {shown(value)}")
    said = dict(value if isinstance(value, Mapping) else vars(value))
    for key, item in said.items():
        if key not in known:
            raise ArgumentError(
                f"{name}: {shown(key)} is not supported; supported: {', '.join(known)}"
            )
        taken = known[key]
        if item is not None and taken is not None and not is_one_of(item, taken):
            alone = " or ".join(map(repr, (None, *taken)))
            raise ArgumentError(f"{name}: {key}={shown(item)} is not supported; it takes {alone}")
    return said


class ConfigObject:
    """One of vLLM's configuration objects: its keywords become attributes, which `LLM` reads.

    `LLM` takes a dict of them as well.
    """

    parameter = ""  # of `LLM`, which takes it; "": every entry is taken, and changes nothing

    def __init__(self, **kwargs: Any) -> None:
        if self.parameter:
            entries(self.parameter, kwargs)
        vars(self).update(kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


class ProfilerConfig(ConfigObject):
    """`profiler="torch"` and `torch_profiler_dir`, the folder of traces."""

    parameter = "profiler_config"


class ReasoningConfig(ConfigObject):
    """`reasoning_start_str` and `reasoning_end_str`, the texts around a model's reasoning.

    `reasoning_parser` "qwen3" and "deepseek_r1" stand for "<think>" and "</think>".
    """

    parameter = "reasoning_config"


class StructuredOutputsConfig(ConfigObject):
    """`backend`: whatever is named, llguidance compiles."""

    parameter = "structured_outputs_config"


class AttentionConfig(ConfigObject):
    """`backend`: `attention_backend` of `LLM`."""

    parameter = "attention_config"


class WeightTransferConfig(ConfigObject):
    """`backend="nccl"`, which on the CPU is gloo."""

    parameter = "weight_transfer_config"


class CompilationConfig(ConfigObject):
    """It changes nothing."""


def profiler_folder(name: str, value: Any) -> str | None:
    """The folder of traces in a `profiler_config`; ArgumentError if it is wrong."""
    folder = entries(name, value).get("torch_profiler_dir")
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(f"{name}: torch_profiler_dir must be a path, got {shown(folder)}")
    return os.path.abspath(os.path.expanduser(os.fsdecode(folder))) if folder else None


def reasoning_strings(name: str, value: Any) -> tuple[str, str] | None:
    """The texts around reasoning in a `reasoning_config`; None: it names none.

    Raises:
        ArgumentError: it is wrong, or has one of them alone.
    """
    said = entries(name, value)
    known = ("<think>", "</think>") if said.get("reasoning_parser") else ("", "")
    start, end = (
        said.get(key) or text
        for key, text in zip(("reasoning_start_str", "reasoning_end_str"), known, strict=True)
    )
    if not (isinstance(start, str) and isinstance(end, str)) or bool(start) != bool(end):
        raise ArgumentError(
            f"{name} must have reasoning_start_str and reasoning_end_str, two strings, got "
            f"{shown(start)} and {shown(end)}"
        )
    if start and start == end:
        raise ArgumentError(f"{name}: reasoning begins and ends with {shown(start)}")
    return (start, end) if start else None


def transfer_backend(name: str, value: Any) -> str:
    """The backend in a `weight_transfer_config`; ArgumentError if it is wrong."""
    return str(entries(name, value).get("backend") or "nccl")


def _is_false(value: Any) -> bool:
    try:
        return not value
    except Exception:  # an array is neither
        return False


def _check_absent(name: str, value: Any) -> None:
    if name == "swap_space" and value is not None:
        message = "swap_space changes nothing: preempted requests are computed anew"
        warnings.warn(message, DeprecationWarning, stacklevel=5)
    values, why = VLLM_ABSENT[name]
    if values is None or _is_false(value) or is_one_of(value, values):
        return
    taken = f"; it takes {' or '.join(map(repr, values))} alone" if values else ""
    raise TypeError(
        f"LLM() got {name}={shown(value)}, an option of vLLM that nanovllm does not have{taken}: "
        f"{why}"
    )


def _unknown_option(name: str, known: Collection[str], sampling: Collection[str]) -> str:
    """`unexpected` for a keyword of `LLM`, with the `known` ones and those of SamplingParams."""
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
