"""What of vLLM's own offline examples and tests runs here, as docs/migrating.md tells it.

The scripts were run with `vllm` replaced by `nanovllm` and small models in place of theirs.
"""

from typing import NamedTuple

VERSION = "0.33.0"
RUNS, OTHERWISE, REFUSED = "runs", "otherwise", "refused"


class Example(NamedTuple):
    """An example of vLLM.

    Attributes:
        path: below its folder "examples"; of `VERSION`, else as the note says.
        outcome: RUNS with import and model changed, OTHERWISE with one change more, or REFUSED.
        note: what is meant by that.
        tests: of tests/, as "file::function", which make the example's calls in words of ours.
    """

    path: str
    outcome: str
    note: str
    tests: str = ""


SCRIPTS = "cpu_model/test_vllm_scripts.py::"
HEADS = "cpu_model/test_heads.py::"
POOLING = "cpu_model/test_pooling.py::"
ASYNC = "cpu_model/test_async_llm.py::"
LOGITS = "cpu_model/test_custom_logits.py::"
EXAMPLES = [
    Example("basic/offline_inference/basic.py", RUNS, "", SCRIPTS + "generate_texts"),
    Example("basic/offline_inference/chat.py", RUNS, "", SCRIPTS + "chat_with_parsed_options"),
    Example(
        "basic/offline_inference/classify.py", RUNS, "", HEADS + "test_sequence_classification"
    ),
    Example("basic/offline_inference/embed.py", RUNS, "", SCRIPTS + "print_what_is_embedded"),
    Example(
        "basic/offline_inference/reward.py",
        RUNS,
        "of an older version",
        HEADS + "test_token_classification",
    ),
    Example("basic/offline_inference/score.py", RUNS, "", HEADS + "test_scores_of_a_cross_encoder"),
    Example(
        "basic/offline_inference/manual_prompt_rendering.py",
        RUNS,
        "of another version",
        SCRIPTS + "render_prompts_by_hand",
    ),
    Example(
        "features/automatic_prefix_caching/prefix_caching_offline.py",
        RUNS,
        "",
        SCRIPTS + "share_prefixes_then_clean_up",
    ),
    Example(
        "features/automatic_prefix_caching/automatic_prefix_caching_offline.py",
        RUNS,
        "",
        SCRIPTS + "share_prefixes_then_clean_up",
    ),
    Example(
        "features/context_extension/context_extension_offline.py",
        RUNS,
        "",
        SCRIPTS + "extend_the_context",
    ),
    Example(
        "features/data_parallel/data_parallel_offline.py",
        RUNS,
        "`enable_expert_parallel` changes nothing",
        "cpu_logic/test_rank_variables.py::test_an_engine_takes_the_gpus_of_its_rank",
    ),
    Example(
        "features/logits_processor/custom.py",
        RUNS,
        "",
        LOGITS + "test_vllms_example_runs_on_every_way_to_name_the_class",
    ),
    Example(
        "features/logits_processor/custom_req.py",
        RUNS,
        "",
        LOGITS + "test_processors_made_for_requests_leave_the_others_alone",
    ),
    Example(
        "rl/pause_resume/pause_resume_offline.py", RUNS, "", ASYNC + "test_a_pause_keeps_requests"
    ),
    Example(
        "features/profiling/simple_profiling_offline.py", RUNS, "", SCRIPTS + "profile_a_batch"
    ),
    Example("features/profiling/run_one_batch_offline.py", RUNS, "", SCRIPTS + "profile_a_batch"),
    Example(
        "features/prompt_embed/prompt_embed_offline.py",
        REFUSED,
        "`enable_prompt_embeds`: prompts are texts or ids",
    ),
    Example(
        "features/reset_kv/reset_kv_offline.py", RUNS, "", SCRIPTS + "reset_the_cache_in_a_loop"
    ),
    Example(
        "features/structured_outputs/structured_outputs_offline.py",
        RUNS,
        "",
        "cpu_model/test_sampling_features.py::test_structured_output_among_others",
    ),
    Example(
        "features/speculative_decoding/spec_decode_offline.py",
        REFUSED,
        "there is no speculative decoding",
    ),
    Example(
        "features/lora/multilora_offline.py", RUNS, "", "cpu_model/test_lora.py::test_vllm_engine"
    ),
    Example(
        "features/sharded_state/save_sharded_state_offline.py",
        REFUSED,
        "weights are read from whole checkpoints alone",
    ),
    Example(
        "features/speculative_decoding/extract_hidden_states_offline.py",
        REFUSED,
        'no KV connectors; `encode(pooling_task="token_embed")` gives the last hidden states',
    ),
    Example(
        "features/torchrun/torchrun_example_offline.py",
        REFUSED,
        "the engine starts its ranks itself",
    ),
    Example(
        "rl/rlhf_nccl.py",
        OTHERWISE,
        "of an older version; without Ray's placement, which needs three GPUs and was not run",
        "cpu_model/test_weight_transfer.py::test_a_loop_of_reinforcement_learning",
    ),
    Example("observability/metrics/offline.py", RUNS, "", SCRIPTS + "read_metrics"),
    Example(
        "tool_calling/chat_with_tools_offline.py",
        OTHERWISE,
        "without the three options that name Mistral's own file formats, and a model that calls "
        "tools",
    ),
    Example(
        "deployment/llm_engine_example.py",
        RUNS,
        "",
        SCRIPTS + "test_the_engine_loop_gives_outputs_as_they_grow",
    ),
    Example(
        "pooling/embed/embed_matryoshka_fy_offline.py",
        RUNS,
        "",
        POOLING + "test_dimensions_and_plain_states",
    ),
    Example(
        "pooling/score/qwen3_reranker_offline.py",
        RUNS,
        "",
        POOLING + "test_scores_are_those_of_transformers",
    ),
    Example(
        "pooling/token_embed/multi_vector_retrieval_offline.py",
        RUNS,
        "",
        HEADS + "test_late_interaction",
    ),
    Example(
        "offline_inference/basic_with_model_default_sampling.py",
        RUNS,
        "of an older version",
        SCRIPTS + "generate_texts",
    ),
    Example("rl/batch_invariance/reproducibility_offline.py", RUNS, "", SCRIPTS + "generate_texts"),
]


class Checks(NamedTuple):
    """Tests of vLLM for what `LLM` does, of one file.

    Attributes:
        path: below its folder "tests", of `VERSION`.
        passing: functions, or cases of one, that pass.
        others: those that do not, and why.
    """

    path: str
    passing: tuple[str, ...]
    others: tuple[tuple[str, str], ...] = ()


TESTS = [
    Checks(
        "entrypoints/llm/test_generate.py",
        ("test_multiple_sampling_params", "test_multiple_priority", "test_log_stats"),
    ),
    Checks(
        "entrypoints/llm/test_chat.py",
        ("test_chat", "test_multi_chat", "test_llm_chat_tokenization_no_double_bos"),
    ),
    Checks(
        "entrypoints/multimodal/llm/test_chat.py",
        (),
        (("test_chat_multi_image", "images"),),
    ),
    Checks("entrypoints/llm/test_collective_rpc.py", ("test_collective_rpc",)),
    Checks(
        "entrypoints/llm/test_prompt_validation.py",
        ("test_empty_prompt", "test_out_of_vocab_token"),
    ),
    Checks(
        "entrypoints/llm/test_prompt_logprobs.py",
        (),
        (("test_prompt_logprobs", "of 2024: `prompt_token_ids=` of `generate`"),),
    ),
    Checks(
        "entrypoints/llm/test_struct_output_generate.py",
        ("json", "json_object", "ebnf", "lark", "regex", "choice"),
    ),
    Checks(
        "entrypoints/llm/offline_mode/test_offline_mode.py",
        (),
        (("test_offline_mode", "was not run: it needs the hub"),),
    ),
    Checks(
        "entrypoints/pooling/embed/test_offline.py",
        (
            "test_str_prompts",
            "test_token_ids_prompts",
            "test_list_prompts",
            "test_pooling_params",
        ),
    ),
    Checks("entrypoints/pooling/basic/test_encode.py", ("test_multiple_pooling_params",)),
    Checks(
        "entrypoints/pooling/token_embed/test_offline.py",
        ("test_str_prompts",),
    ),
    Checks(
        "v1/sample/test_sampling_params_e2e.py",
        (
            "test_n_gt_1",
            "test_penalties",
            "test_stop",
            "test_detokenize_false",
            "test_bad_words",
            "test_allowed_token_ids",
            "test_seed",
        ),
    ),
    Checks(
        "v1/sample/test_logprobs.py",
        ("test_get_logprobs_and_prompt_logprobs", "test_max_logprobs"),
    ),
    Checks(
        "samplers/test_logprobs.py",
        ("test_ranks",),
    ),
    Checks("samplers/test_ignore_eos.py", ("test_ignore_eos",)),
    Checks(
        "samplers/test_beam_search.py",
        ("test_beam_search_with_concurrency_limit",),
        (
            (
                "test_beam_search_single_input",
                "not decided: the small model ends a beam at once, and transformers scores "
                "beams of different lengths otherwise than vLLM",
            ),
            ("test_beam_search_structured_output", "`structured_outputs` of beams"),
            ("test_beam_search_abort_...", "looks into vLLM's own classes"),
        ),
    ),
    Checks(
        "detokenizer",
        ("test_computed_prefix_blocks", "test_stop_reason"),
    ),
    Checks(
        "v1/e2e/general/test_min_tokens.py",
        (
            "test_min_tokens_comprehensive",
            "test_min_tokens_stop_strings_bug",
            "test_min_tokens_stop_strings_guaranteed_early_trigger",
            "test_min_tokens_eos_behavior",
            "test_min_tokens_validation",
        ),
        (
            (
                "test_min_tokens_with_terminal_structured_output",
                "a finished grammar ends without an EOS token",
            ),
        ),
    ),
    Checks(
        "v1/e2e/general/test_context_length.py",
        (),
        (
            (
                "test_auto_fit_max_model_len_rejects_oversized_input",
                "-1 is the model's length; a prompt that the cache cannot hold is refused",
            ),
        ),
    ),
    Checks(
        "basic_correctness/memory/sleep_mode/test_sleep_mode.py",
        ("test_end_to_end", "test_deep_sleep_lora", "test_deep_sleep_fp8_kvcache"),
    ),
    Checks("v1/core/test_reset_prefix_cache_e2e.py", ("test_reset_prefix_cache_e2e",)),
    Checks(
        "v1/engine/test_llm_engine.py",
        ("test_compatibility_with_skip_tokenizer_init",),
        (("test_engine_metrics", "it counts speculative tokens too"),),
    ),
    Checks(
        "v1/engine/test_wake_up_contract.py",
        (),
        (("test_dp_wake_up_requires_all_engines_awake", "a class of vLLM's server"),),
    ),
    Checks(
        "v1/logits_processors/test_custom_offline.py",
        ("test_custom_logitsprocs",),
    ),
]


def examples_table() -> str:
    """vLLM's examples."""
    rows = ["| example | here | |", "| --- | --- | --- |"]
    # In code these would be read as files of this repository.
    rows += [f"| {e.path} | {e.outcome} | {e.note} |" for e in EXAMPLES]
    num_run = sum(example.outcome == RUNS for example in EXAMPLES)
    return f"{num_run} of {len(EXAMPLES)} run:\n\n" + "\n".join(rows)


def tests_table() -> str:
    """vLLM's tests."""
    rows = ["| file | pass | do not |", "| --- | --- | --- |"]
    for file in TESTS:
        passing = ", ".join(f"`{name}`" for name in file.passing)
        others = "; ".join(f"`{name}`: {why}" for name, why in file.others)
        rows.append(f"| {file.path} | {passing} | {others} |")
    num_passing = sum(len(file.passing) for file in TESTS)
    num_tests = num_passing + sum(len(file.others) for file in TESTS)
    return f"{num_passing} of {num_tests} pass:\n\n" + "\n".join(rows)
