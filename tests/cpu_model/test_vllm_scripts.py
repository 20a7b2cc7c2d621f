"""Scripts in the shape of vLLM's offline examples, with its import paths, on one tiny engine."""

import os
from dataclasses import asdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from engine_checks import greedy, random_prompts
from nanovllm.utils.argparse_utils import FlexibleArgumentParser
from nanovllm.v1.metrics.reader import Counter, Gauge, Histogram
from vllm_ports import EXAMPLES, OTHERWISE, RUNS

import nanovllm
from nanovllm import (
    LLM,
    ArgumentError,
    EngineArgs,
    LLMEngine,
    RequestOutput,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from nanovllm.config import Config
from nanovllm.sampling_params import RequestOutputKind

PROMPTS = random_prompts([5, 300, 40], seed=3)
# What the examples import, by the module: it is there, and is what it is elsewhere.
IMPORTS = """
beam_search: BeamSearchOutput BeamSearchSequence
config: AttentionConfig CompilationConfig PoolerConfig ProfilerConfig StructuredOutputsConfig
config: ReasoningConfig VllmConfig
config: WeightTransferConfig
distributed: cleanup_dist_env_and_memory
distributed.device_communicators.pynccl: PyNcclCommunicator
distributed.parallel_state: cleanup_dist_env_and_memory
distributed.utils: StatelessProcessGroup
distributed.weight_transfer.base: WeightTransferInitRequest WeightTransferUpdateRequest
distributed.weight_transfer.nccl_engine: NCCLTrainerSendWeightsArgs NCCLWeightTransferEngine
engine.arg_utils: AsyncEngineArgs EngineArgs
engine.async_llm_engine: AsyncLLMEngine
engine.llm_engine: LLMEngine
entrypoints.chat_utils: resolve_hf_chat_template
entrypoints.llm: LLM
exceptions: ProfilerAlreadyActiveError VLLMValidationError
inputs: PromptType TextPrompt TokensInput TokensPrompt
inputs.data: TokensPrompt
logger: init_logger
logits_process: LogitsProcessor
logprobs: FlatLogprobs Logprob PromptLogprobs SampleLogprobs
lora.request: LoRARequest
outputs: CompletionOutput EmbeddingRequestOutput PoolingRequestOutput RequestOutput
pooling_params: PoolingParams
platforms: current_platform
renderers.hf: resolve_chat_template
renderers.inputs.preprocess: parse_model_prompt
tasks: GenerationTask PoolingTask SupportedTask
tokenizers: get_tokenizer
transformers_utils.tokenizer: get_tokenizer
sampling_params: BeamSearchParams RepetitionDetectionParams RequestOutputKind SamplingParams
utils: FlexibleArgumentParser get_open_port
utils.argparse_utils: FlexibleArgumentParser
utils.network_utils: get_ip get_open_port
utils.print_utils: print_embeddings
utils.torch_utils: async_tensor_h2d
v1.engine.async_llm: AsyncLLM
v1.engine.exceptions: EngineDeadError
v1.engine.llm_engine: LLMEngine
v1.metrics.reader: Counter Gauge Histogram Metric Vector
v1.sample.logits_processor: AdapterLogitsProcessor BatchUpdate LogitsProcessor MoveDirectionality
v1.sample.logits_processor: LOGITSPROCS_GROUP RequestLogitsProcessor process_dict_updates
v1.sample.logits_processor.builtin: process_dict_updates
v1.sample.logits_processor.interface: AddedRequest BatchUpdate LogitsProcessor MoveDirectionality
"""


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return str(tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module")
def engine(tiny_dir, traces):
    """Made of a command line, whose budget is below max_model_len."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description="a script"))
    parser.set_defaults(model=str(tiny_dir), max_model_len=1024)
    parser.add_argument("--max-tokens", type=int)
    words = ["--max_num_batched_tokens=64", "--block-size", "16", "--device", "cpu"]
    words += ["--num-gpu-blocks-override=64", "--no-disable-log-stats", "--revision=main"]
    args = parser.parse_args([*words, "--max-num-seqs", "8"])
    engine_args = EngineArgs.from_cli_args(args)
    engine_args.profiler_config = {"profiler": "torch", "torch_profiler_dir": traces}
    engine = LLMEngine.from_engine_args(engine_args)
    yield engine
    engine.shutdown()


@pytest.fixture
def llm(engine):
    return engine.llm


def test_every_ported_example_has_a_test():
    assert len({example.path for example in EXAMPLES}) == len(EXAMPLES)
    for example in EXAMPLES:
        file, _, name = example.tests.partition("::")
        assert bool(file) == (example.outcome == RUNS) or example.outcome == OTHERWISE
        if file:
            assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text("utf-8")


@pytest.mark.parametrize("line", IMPORTS.strip().splitlines())
def test_names_are_where_vllm_has_them(line):
    module, _, names = line.partition(": ")
    for name in names.split():
        found = getattr(import_module(f"nanovllm.{module}"), name)
        assert eval(f"nanovllm.{module}.{name}") is found
        assert getattr(nanovllm, name, found) is found or module == "engine.llm_engine"
    with pytest.raises(AttributeError, match="nothing"):
        import_module(f"nanovllm.{module}").nothing  # noqa: B018


def test_every_public_name_is_there():
    assert all(getattr(nanovllm, name) is not None for name in nanovllm.__all__)


def test_engine_args_go_into_llm_in_every_form(engine, tiny_dir):
    assert engine.config.enable_chunked_prefill and engine.config.kvcache_block_size == 256
    assert engine.model_config.max_model_len == 1024
    args = EngineArgs(model=str(tiny_dir), max_num_batched_tokens=64, max_model_len="1k")
    expected = Config(str(tiny_dir), max_num_batched_tokens=64, max_model_len=1000,
                      enable_chunked_prefill=True)  # fmt: skip
    for form in (vars(args), asdict(args)):
        form = dict(form)
        assert Config.from_kwargs(form.pop("model"), form) == expected
    assert "max_num_batched_tokens=64, max_model_len='1k'" in repr(args)
    with pytest.raises(TypeError, match="'max_num_seq'; the nearest known is 'max_num_seqs'"):
        EngineArgs(max_num_seq=3)
    with pytest.raises(ArgumentError, match=r"max_num_batched_tokens \(64\) must be >= max_model"):
        LLM(str(tiny_dir), max_num_batched_tokens=64, max_model_len=1024)


def test_defaults_of_a_parser_may_have_either_name(tiny_dir):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.set_defaults(model=str(tiny_dir), num_gpu_blocks_override=7, block_size=16)
    args = parser.parse_args([])
    for given in (dict(vars(args)), dict(vars(EngineArgs.from_cli_args(args)))):
        config = Config.from_kwargs(given.pop("model"), given)
        assert (config.num_kvcache_blocks, config.kvcache_block_size) == (7, 256)
    args = parser.parse_args(["--num-gpu-blocks-override", "9"])
    assert EngineArgs.from_cli_args(args).num_gpu_blocks_override == 9


def test_the_engine_loop_gives_outputs_as_they_grow(engine, llm):
    expected = llm.generate(PROMPTS, greedy(6), use_tqdm=False)
    waiting = [(f"request {i}", prompt) for i, prompt in enumerate(PROMPTS)]
    seen: dict[str, list[RequestOutput]] = {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            name, prompt = waiting.pop(0)
            assert engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), greedy(6))
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    for i, output in enumerate(expected):
        outputs = seen[f"request {i}"]
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1] == output and len(outputs) > 1
        for earlier, later in pairwise(outputs):
            assert len(earlier.outputs[0].token_ids) < len(later.outputs[0].token_ids)
            assert later.outputs[0].text.startswith(earlier.outputs[0].text)
    assert engine.step() == [] and engine.get_num_unfinished_requests() == 0


def check_same(rows, expected):
    """Equal token ids, and log probabilities as near as another batch lets them be."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        values = {i: each.logprob for i, each in other.items()}
        assert {i: each.logprob for i, each in row.items()} == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_outputs_have_what_their_kind_says(engine, llm, n):
    values = {"max_tokens": 9, "ignore_eos": True, "n": n, "seed": 5, "logprobs": 1}
    values |= {"prompt_logprobs": 1, "flat_logprobs": n == 2}
    [whole] = llm.generate(["hello, my name is"], SamplingParams(**values), use_tqdm=False)
    for kind in RequestOutputKind:
        engine.add_request(kind.name, whole.prompt, SamplingParams(**values, output_kind=kind))
    seen: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    assert seen["FINAL_ONLY"] == [whole] and seen["CUMULATIVE"][-1] == whole
    deltas = seen["DELTA"]
    assert len(deltas) == len(seen["CUMULATIVE"]) > 3
    check_same(deltas[0].prompt_logprobs[1:], whole.prompt_logprobs[1:])
    assert {str(delta.prompt_logprobs) for delta in deltas[1:]} == {"None"}
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    for completion in whole.outputs:
        parts = [o for delta in deltas for o in delta.outputs if o.index == completion.index]
        assert "".join(part.text for part in parts) == completion.text
        assert [i for part in parts for i in part.token_ids] == completion.token_ids
        rows = [each for part in parts for each in part.logprobs]
        check_same(rows, completion.logprobs)
        assert parts[-1].finish_reason == "length"
        assert {part.finish_reason for part in parts[:-1]} == {None}
    with pytest.raises(ArgumentError, match="output_kind must be one of RequestOutputKind.CUM"):
        SamplingParams(output_kind="DELTA")


def test_requests_of_the_loop_are_ended_and_refused_by_name(engine, llm):
    engine.add_request("a", "hello", greedy(50))
    engine.add_request("b", TextPrompt(prompt="hello"), SamplingParams(n=2, max_tokens=3))
    with pytest.raises(ArgumentError, match="an unfinished request 'a' already"):
        engine.add_request("a", "hello")
    with pytest.raises(ArgumentError, match="request_id must be a string, got 5"):
        engine.add_request(5, "hello")
    with pytest.raises(ArgumentError, match="lora_request must be a LoRARequest"):
        engine.add_request("c", "hello", lora_request=1)
    engine.step()
    engine.abort_request(["a", "unknown"])
    ended = [output for _ in range(9) for output in engine.step() if output.finished]
    assert [(output.request_id, len(output.outputs)) for output in ended] == [("b", 2)]
    assert llm.is_finished() and not engine.is_sleeping()
    engine.add_request("a", "hello", greedy(1))  # an id may be used again
    engine.abort_request("a")
    assert not engine.has_unfinished_requests()


def generate_texts(llm, engine, traces):
    prompts = ["Hello, my name is", "The capital of France is"]
    params = llm.get_default_sampling_params()
    params.temperature, params.seed, params.max_tokens = 0.8, 7, 3
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        [completion] = output.outputs
        assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    assert llm.generate(prompts[::-1], params, use_tqdm=False) == outputs[::-1]


def answer_with_priorities(llm, engine, traces):
    conversation = [{"role": "user", "content": "hello"}]
    expected = llm.chat(conversation, greedy(3), use_tqdm=False)
    assert llm.chat(conversation, greedy(3), use_tqdm=False, priority=1) == expected
    both = llm.chat([conversation] * 2, greedy(3), use_tqdm=False, priority=[0, 1])
    assert both == expected * 2
    with pytest.raises(ArgumentError, match="priority"):
        llm.chat([conversation] * 2, greedy(3), priority=[0])
    assert llm.llm_engine.get_num_unfinished_requests() == 0
    assert llm.supported_tasks == ("generate", "embed", "token_embed")


def choose_by_the_platform(llm, engine, traces):
    from nanovllm.platforms import current_platform
    from nanovllm.tasks import PoolingTask
    from nanovllm.utils.torch_utils import async_tensor_h2d

    assert current_platform.is_cpu() != current_platform.is_cuda_alike()
    moved = async_tensor_h2d([1.5, 2.5], "cpu", torch.float64)
    assert moved.tolist() == [1.5, 2.5] and moved.dtype == torch.float64
    assert not current_platform.is_rocm() and "embed" in get_args(PoolingTask)


def extend_the_context(llm, engine, traces):
    yarn = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 2048}
    overrides = {"rope_parameters": yarn | {"rope_theta": 1e6}, "max_model_len": 40_000}
    arguments = {"hf_overrides": overrides, "enable_expert_parallel": True}
    config = Config.from_kwargs(llm.config.model, arguments)
    assert config.max_model_len == 40_000 > config.max_num_batched_tokens
    assert config.enable_chunked_prefill is True


def reset_the_cache_in_a_loop(llm, engine, traces):
    engine.add_request("0", "to be or not", SamplingParams(temperature=0, logprobs=1, max_tokens=8))
    number, last = 0, None
    while engine.has_unfinished_requests():
        if number == 4:
            assert engine.reset_prefix_cache(reset_running_requests=True)
        last = [*engine.step(), last][0]
        number += 1
    assert last.finished and len(last.outputs[0].logprobs) == len(last.outputs[0].token_ids)


def chat_with_parsed_options(llm, engine, traces):
    params = llm.get_default_sampling_params()
    params.max_tokens = 4
    messages = [{"role": "user", "content": "hello"}]
    assert llm.chat(messages, params, use_tqdm=False) and len(llm.chat([messages] * 3, params)) == 3


def share_prefixes_then_clean_up(llm, engine, traces):
    from nanovllm.distributed import cleanup_dist_env_and_memory

    llm.generate(PROMPTS[1], greedy(2), use_tqdm=False)
    [again] = llm.generate(PROMPTS[1], greedy(2), use_tqdm=False)
    assert again.num_cached_tokens == 256
    cleanup_dist_env_and_memory()


def read_metrics(llm, engine, traces):
    llm.generate(PROMPTS[:2], greedy(3), use_tqdm=False)
    kinds = {Counter: 0, Gauge: 0, Histogram: 0}
    for metric in llm.get_metrics():
        kinds[type(metric)] += 1
        if isinstance(metric, Histogram):
            assert metric.buckets["+Inf"] == metric.count >= 2 and metric.sum > 0
    assert all(kinds.values())


def profile_a_batch(llm, engine, traces):
    params = SamplingParams(max_tokens=2, min_tokens=2, ignore_eos=True)
    llm.start_profile()
    assert len(llm.generate(["hello, my name is"] * 2, params, use_tqdm=False)) == 2
    llm.stop_profile()
    assert os.listdir(traces)


def print_what_is_embedded(llm, engine, traces):
    from nanovllm.utils.print_utils import print_embeddings

    for output in llm.embed(["hello", "you"], use_tqdm=False):
        print_embeddings(output.outputs.embedding)
        assert output.outputs.hidden_size == 64 == llm.model_config.embedding_size
    print_embeddings([[0.5], [0.25]], prefix="Reward")  # of tokens


def search_beams(llm, engine, traces):
    from nanovllm.sampling_params import BeamSearchParams

    [output] = llm.beam_search([{"prompt": "hello"}], BeamSearchParams(beam_width=2, max_tokens=2))
    assert len(output.sequences) == 2 and output.sequences[0].text.startswith("hello")


def evaluate_by_prompt_logprobs(llm, engine, traces):
    """The calls of lm-evaluation-harness."""
    from nanovllm.lora.request import LoRARequest
    from nanovllm.renderers.hf import resolve_chat_template
    from nanovllm.tokenizers import get_tokenizer

    model = llm.config.model
    names = "revision tokenizer tokenizer_revision max_model_len max_num_seqs quantization"
    given = dict.fromkeys(names.split()) | {"dtype": "auto", "tokenizer_mode": "auto", "seed": 1234}
    given |= {"trust_remote_code": False, "enable_lora": False, "max_lora_rank": 16}
    given |= {"tensor_parallel_size": 1, "swap_space": 4}
    with pytest.warns(DeprecationWarning, match="swap_space"):
        assert Config.from_kwargs(model, given).seed == 1234
    tokenizer = get_tokenizer(model, tokenizer_mode="auto", trust_remote_code=False, revision=None)
    config = llm.llm_engine.model_config
    assert resolve_chat_template(tokenizer, None, None, model_config=config)
    params = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    ids = tokenizer("hello, my name").input_ids
    [output] = llm.generate([TokensPrompt(prompt_token_ids=ids)], [params], use_tqdm=False)
    assert output.prompt_logprobs[0] is None
    for token_id, logprobs in zip(ids[1:], output.prompt_logprobs[1:], strict=True):
        assert logprobs[token_id].logprob <= max(each.logprob for each in logprobs.values()) <= 0
    adapter = LoRARequest("finetuned", 1, "path")
    with pytest.raises(ArgumentError, match="needs LLM.*enable_lora=True"):
        llm.generate("hello", params, use_tqdm=False, lora_request=adapter)


def queue_and_wait(llm, engine, traces):
    llm.enqueue(["hello"], greedy(2), None, None, False)
    outputs = llm.wait_for_completion(output_type=RequestOutput, use_tqdm=False)
    assert [output.lora_request for output in outputs] == [None]


def render_prompts_by_hand(llm, engine, traces):
    from nanovllm.renderers.inputs.preprocess import parse_model_prompt

    parsed = parse_model_prompt(llm.llm_engine.model_config, "hello, my name is")
    tok_params = llm.renderer.default_cmpl_tok_params.with_kwargs()
    (engine_input,) = llm.renderer.render_cmpl([parsed], tok_params)
    by_hand = llm.generate(engine_input, greedy(4), use_tqdm=False)
    assert by_hand == llm.generate("hello, my name is", greedy(4), use_tqdm=False)
    cut = llm.renderer.default_cmpl_tok_params.with_kwargs(truncation=True, max_length=3)
    [short] = llm.renderer.render_cmpl([{"prompt": "hello, my name is"}], cut)
    assert len(short["prompt_token_ids"]) == 3
    assert llm.renderer.render_cmpl([[1, 2]]) == [{"type": "token", "prompt_token_ids": [1, 2]}]


def read_the_configuration(llm, engine, traces):
    config = engine.vllm_config
    assert config.model_config.max_model_len == config.scheduler_config.max_model_len == 1024
    assert config.cache_config.num_gpu_blocks == 64 == llm.config.num_kvcache_blocks
    assert config.scheduler_config.enable_chunked_prefill is True
    assert config.parallel_config.world_size == llm.get_world_size()
    with pytest.raises(AttributeError, match="no 'lora_config' here, but model_config"):
        config.lora_config  # noqa: B018


def truncate_prompts(llm, engine, traces):
    params = [greedy(1).clone() for _ in range(3)]
    params[0].truncate_prompt_tokens, params[1].truncate_prompt_tokens = 7, -1
    outputs = llm.generate([PROMPTS[1], PROMPTS[1] * 5, PROMPTS[1]], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [
        PROMPTS[1][-7:], (PROMPTS[1] * 5)[-1023:], PROMPTS[1]
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match="truncate_prompt_tokens must be >= 1, got 0"):
        SamplingParams(truncate_prompt_tokens=0)


@pytest.mark.parametrize(
    "script",
    [
        render_prompts_by_hand,
        read_the_configuration,
        truncate_prompts,
        generate_texts,
        answer_with_priorities,
        choose_by_the_platform,
        extend_the_context,
        reset_the_cache_in_a_loop,
        chat_with_parsed_options,
        share_prefixes_then_clean_up,
        read_metrics,
        profile_a_batch,
        print_what_is_embedded,
        search_beams,
        evaluate_by_prompt_logprobs,
        queue_and_wait,
    ],
)
def test_scripts_run(script, llm, engine, traces):
    script(llm, engine, traces)
    assert llm.is_finished() and not engine.has_unfinished_requests()
