"""Every rule on the parameters of LLM(...), and which model directories are refused."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from nanovllm import ArgumentError
from nanovllm.compat import (
    LLM_HINTS,
    LLM_NAMES,
    RERANKER_OVERRIDES,
    VLLM_ABSENT,
    engine_arguments,
)
from nanovllm.config import Config, ProfilerConfig, StructuredOutputsConfig
from nanovllm.parameters import parameters

RAW_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}


def write_model(directory: Path, **changes) -> str:
    """A directory with a config.json; None removes a field."""
    raw = {k: v for k, v in (RAW_CONFIG | changes).items() if v is not None}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def refused(message: str):
    return pytest.raises(ArgumentError, match=message)


# The model directory


@pytest.mark.parametrize("caught", [AssertionError, ValueError])
def test_hub_name_is_no_directory(caught):
    with pytest.raises(caught, match="model must be an existing local directory, got 'Qwen/"):
        Config("Qwen/Qwen3-0.6B")


def test_missing_directory_file_and_tilde_are_refused_by_name(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (str(tmp_path / "nowhere"), str(file), "~", ""):
        with refused("model must be an existing local directory") as raised:
            Config(path)
        assert repr(path) in str(raised.value)


def test_directory_without_config_is_refused(tmp_path):
    with refused("holds no config.json") as raised:
        Config(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "\ud800".encode("utf-16", "surrogatepass")])
def test_config_that_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused("config.json is not valid JSON: "):
        Config(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "null", '"Qwen3ForCausalLM"', "3"])
def test_config_that_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with refused("config.json"):
        Config(str(tmp_path))


def test_path_object_is_accepted(model):
    assert Config(Path(model)).model == model


@pytest.mark.parametrize("value", [None, 5, ["a"]])
def test_model_of_another_type_is_refused(value):
    with refused("model must be the path of a directory, got"):
        Config(value)


def test_checks_survive_optimised_python_and_come_before_any_device_work(tmp_path):
    code = f"from nanovllm.config import Config; Config({str(tmp_path / 'nowhere')!r})"
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "ArgumentError: model must be an existing local directory" in result.stderr


def test_wrong_value_is_refused_before_the_directory_is_read():
    with refused("max_num_seqs must be >= 1, got 0"):
        Config("nowhere", max_num_seqs=0)


# Keywords


def test_defaults(model):
    config = Config.from_kwargs(model, {})
    assert config.max_num_batched_tokens == 16384
    assert config.max_num_seqs == 1024
    assert config.max_model_len == 4096
    assert config.gpu_memory_utilization == 0.9
    assert config.tensor_parallel_size == 1
    assert config.enforce_eager is False
    assert config.kvcache_block_size == 256
    assert config.num_kvcache_blocks is None
    assert config.kv_cache_memory_bytes is None
    assert config.enable_prefix_caching is True
    assert config.enable_chunked_prefill is False
    assert config.async_scheduling is True
    assert (config.dtype, config.device, config.attention_backend) == ("auto",) * 3
    assert config.kv_cache_dtype == "auto"
    assert (config.seed, config.load_format) == (0, "auto")
    assert config.max_blocks_per_seq == 16


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("block_size", "kvcache_block_size", 512),
        ("num_gpu_blocks_override", "num_kvcache_blocks", 7),
    ],
)
def test_aliases(alias, name, value, model):
    assert getattr(Config.from_kwargs(model, {alias: value}), name) == value
    for twice in ({alias: value, name: value}, {name: value, alias: value}):
        with pytest.raises(TypeError, match=f"{name!r} twice"):
            Config.from_kwargs(model, twice)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("max_model_length", "max_model_len"),
        ("enforce_eagre", "enforce_eager"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("enable_chunk_prefill", "enable_chunked_prefill"),
        ("num_kv_cache_blocks", "num_kvcache_blocks"),
    ],
)
def test_unknown_keyword_is_refused_with_the_nearest_one(name, nearest, model):
    message = f"unexpected keyword argument {name!r}; the nearest known is {nearest!r}"
    with pytest.raises(TypeError, match=message):
        Config.from_kwargs(model, {name: 1})


@pytest.mark.parametrize("name", ["hf_config", "eos", "foo", "zzz", "x", ""])
def test_names_of_internals_and_nonsense_are_unknown_keywords(name, model):
    with pytest.raises(TypeError, match=f"unexpected keyword argument {name!r}; help") as raised:
        Config.from_kwargs(model, {name: 1})
    assert "nearest" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(LLM_NAMES))
def test_another_librarys_name_is_translated(name, model):
    message = f"unexpected keyword argument {name!r}; the nearest known is {LLM_NAMES[name]!r}"
    with pytest.raises(TypeError, match=message):
        Config.from_kwargs(model, {name: 1})
    with pytest.raises(TypeError, match=message):  # also where the model is what was meant
        Config.from_kwargs(None, {name: 1})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokens", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("top_k", "top_k"),
        ("temperature", "temperature"),
        ("stop_words", "stop"),
        ("eos_token_ids", "stop_token_ids"),
    ],
)
def test_a_sampling_parameter_in_the_wrong_place_is_sent_to_the_right_one(name, meant, model):
    with pytest.raises(TypeError, match=rf"{name!r}, .* into SamplingParams\({meant}=\.\.\.\)"):
        Config.from_kwargs(model, {name: 1})


@pytest.mark.parametrize("name", sorted(LLM_HINTS))
def test_what_other_libraries_have_and_this_one_does_not_is_said(name, model):
    with pytest.raises(TypeError) as raised:
        Config.from_kwargs(model, {name: 1})
    assert str(raised.value).endswith(f"{name!r}: {LLM_HINTS[name]}")


def test_options_of_vllm_are_taken_with_the_values_that_change_nothing(model):
    for name, (values, _) in VLLM_ABSENT.items():
        for value in ["anything"] if values is None else [*values, None, False, 0, "", [], {}]:
            if name != "swap_space":
                assert engine_arguments({name: value}, ["seed"], ()) == {}
    with pytest.warns(DeprecationWarning, match="swap_space changes nothing"):
        Config.from_kwargs(model, {"swap_space": 4})


def test_other_values_are_refused_with_what_to_do_instead():
    for name, (values, why) in VLLM_ABSENT.items():
        if values is not None:
            taken = f"; it takes {' or '.join(map(repr, values))} alone" if values else ""
            message = f"{name}=7, an option of vLLM that nanovllm does not have{taken}: {why}"
            if name.endswith("_config") and name.startswith(("structured", "attention")):
                message = f"{name} must be a dict, got 7"
            with pytest.raises((TypeError, ArgumentError), match=re.escape(message)):
                engine_arguments({name: 7}, ["seed"], ())


@pytest.mark.parametrize(
    "given",
    [
        {"block_size": 16},
        {"block_size": 32},
        {"load_format": "safetensors"},
        {"load_format": "hf"},
        {"distributed_executor_backend": "uni"},
        {"structured_outputs_config": {"backend": "auto", "disable_any_whitespace": False}},
        {"structured_outputs_config": StructuredOutputsConfig(backend="xgrammar")},
        {"attention_config": {"backend": None}},
        {"enable_chunked_prefill": None},  # the budget reaches max_model_len
        {"tokenizer_mode": "hf"},
        {"hf_overrides": RERANKER_OVERRIDES},
        {p.name: None for p in parameters(Config) if p.name not in ("model", "max_model_len")},
    ],
)
def test_vllms_own_values_are_taken(given, model):
    config, expected = Config.from_kwargs(model, given), Config(model)
    assert config.replace(hf_overrides=None) == expected


def test_vllms_values_that_mean_something_here(model, tmp_path):
    def made(**given):
        return Config.from_kwargs(model, given)

    assert made(max_model_len=-1) == made(max_model_len="auto") == made(max_model_len=None)
    assert made(max_model_len="1k").max_model_len == 1000
    assert made(max_model_len="1.5K").max_model_len == 1536
    assert made(max_num_batched_tokens="32K").max_num_batched_tokens == 32768
    with refused(r"max_model_len must be an integer >= 2, got '1x'"):
        made(max_model_len="1x")
    chunked = made(max_num_batched_tokens=16, enable_chunked_prefill=None)
    assert chunked == made(max_num_batched_tokens=16, enable_chunked_prefill=True)
    assert chunked.enable_chunked_prefill is True
    assert made(attention_backend="TRITON_ATTN").attention_backend == "triton"
    assert made(attention_config={"backend": "TORCH_SDPA"}).attention_backend == "torch"
    assert made(hf_overrides={"max_model_len": 512}).max_model_len == 512
    for profiler in (dict, ProfilerConfig):
        config = made(profiler_config=profiler(profiler="torch", torch_profiler_dir=str(tmp_path)))
        assert config.profiler_config == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": 100}, "kvcache_block_size must be a multiple of 256, got 100"),
        ({"load_format": "gguf"}, "load_format must be one of auto, dummy, got 'gguf'"),
        ({"attention_backend": "FLASHINFER"}, "attention_backend must be one of"),
        (
            {"attention_backend": "torch", "attention_config": {"backend": "TRITON_ATTN"}},
            "attention_backend='torch' and attention_config with backend 'TRITON_ATTN' are names",
        ),
        ({"attention_config": {"flash_attn_version": 3}}, "flash_attn_version=3 is not supported"),
        (
            {"structured_outputs_config": {"disable_additional_properties": True}},
            "disable_additional_properties=True is not supported; it takes None or False",
        ),
        ({"profiler_config": {"profiler": "cuda"}}, "profiler='cuda' is not supported; it takes"),
        ({"profiler_config": {"profile": 1}}, "profiler_config: 'profile' is not supported"),
        ({"hf_overrides": {"classifier_from_token": ["no", "yes"]}}, "leave hf_overrides out"),
    ],
)
def test_vllms_values_that_would_change_results_are_refused(given, message, model):
    with refused(message):
        Config.from_kwargs(model, given)


def test_what_changes_nothing_is_named_once_for_debugging(model, caplog, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V1", "1")
    monkeypatch.setenv("VLLM_DP_SIZE", "1")  # it is read
    with caplog.at_level("DEBUG", "nanovllm"):
        Config.from_kwargs(model, {"revision": "main", "block_size": 16, "max_loras": None})
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "these environment variables of vLLM change nothing: VLLM_USE_V1",
        "LLM: these change nothing: block_size=16 (blocks have 256 tokens)",
        "LLM: these change nothing of a directory: revision",
    ]
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    with refused("VLLM_DP_RANK in the environment must be an integer from 0 to 1"):
        Config.from_kwargs(model, {})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("half", torch.float16),
        ("float", torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_other_names_of_dtypes(dtype, expected, model):
    assert Config(model, dtype=dtype).resolve_dtype() == expected
    for wrong in (torch.int8, torch.float64, 16):
        with pytest.raises(ArgumentError, match="dtype"):
            Config(model, dtype=wrong)


@pytest.mark.parametrize("name", ["spec_model", "offload_params", "default_mm_loras"])
@pytest.mark.parametrize(
    "value", [np.array([1, 2]), 10**5000, "x" * 10**6], ids=["array", "int", "str"]
)
def test_values_of_any_kind_are_refused_for_options_of_vllm(name, value, model):
    with pytest.raises(TypeError, match="an option of vLLM that nanovllm does not have") as raised:
        Config.from_kwargs(model, {name: value})
    assert len(str(raised.value)) < 500


def test_no_known_keyword_is_listed_as_vllm_only():
    foreign = VLLM_ABSENT.keys() | LLM_NAMES.keys() | LLM_HINTS.keys()
    known = {field.name for field in fields(Config)}
    assert not foreign & known and set(LLM_NAMES.values()) <= known


# Numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be >= 1, got 0"),
        ({"max_num_seqs": -3}, "max_num_seqs must be >= 1, got -3"),
        ({"max_num_seqs": 1.5}, "max_num_seqs must be an integer >= 1, got 1.5"),
        ({"max_num_seqs": None}, "max_num_seqs must be an integer >= 1, got None"),
        ({"max_model_len": 0}, "max_model_len must be >= 2, got 0"),
        ({"max_model_len": "4096"}, "max_model_len must be an integer >= 2, got '4096'"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be >= 1, got 0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be between 1 and 8, got 0"),
        ({"tensor_parallel_size": 9}, "tensor_parallel_size must be between 1 and 8, got 9"),
        ({"tensor_parallel_size": -1}, "tensor_parallel_size must be between 1 and 8, got -1"),
        ({"kvcache_block_size": 0}, "kvcache_block_size must be >= 1, got 0"),
        ({"kvcache_block_size": -256}, "kvcache_block_size must be >= 1, got -256"),
        ({"kvcache_block_size": 100}, "kvcache_block_size must be a multiple of 256, got 100"),
        ({"kvcache_block_size": 257}, "kvcache_block_size must be a multiple of 256, got 257"),
        ({"num_kvcache_blocks": 0}, "num_kvcache_blocks must be >= 1, got 0"),
        ({"num_kvcache_blocks": -2}, "num_kvcache_blocks must be >= 1, got -2"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be >= 1, got 0"),
        ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization must be in \(0, 1\], got 0"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
        ({"gpu_memory_utilization": -0.1}, r"gpu_memory_utilization must be in .* got -0.1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be in .* got nan"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization must be in .* got '0.9'"),
        (
            {"structured_outputs_timeout": 0},
            "structured_outputs_timeout must be seconds, > 0",
        ),
        (
            {"structured_outputs_timeout": -1.0},
            "structured_outputs_timeout must be seconds, > 0",
        ),
        (
            {"structured_outputs_timeout": float("inf")},
            "structured_outputs_timeout must be seconds, > 0",
        ),
        (
            {"structured_outputs_timeout": float("nan")},
            "structured_outputs_timeout must be seconds, > 0",
        ),
        (
            {"structured_outputs_timeout": None},
            "structured_outputs_timeout must be seconds, > 0",
        ),
        ({"watermark": -0.1}, "watermark must be finite and >= 0, got -0.1"),
        ({"watermark": float("nan")}, "watermark must be finite and >= 0, got nan"),
        ({"watermark": float("inf")}, "watermark must be finite and >= 0, got inf"),
        ({"watermark": None}, "watermark must be finite and >= 0, got None"),
        ({"seed": 2**63}, "seed must be between -9223372036854775808 and 9223372036854775807"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, float16, float32, got 'int8'"),
        ({"dtype": torch.int8}, "dtype must be one of .* got 'int8'"),
        (
            {"kv_cache_dtype": "int8"},
            "kv_cache_dtype must be one of auto, fp8, fp8_e4m3, got 'int8'",
        ),
        (
            {"kv_cache_dtype": torch.float8_e4m3fn},
            "kv_cache_dtype must be .* got torch.float8_e4m3",
        ),
        ({"kv_cache_dtype": None}, "kv_cache_dtype must be one of .* got None"),
        ({"device": "tpu"}, "device must be one of auto, cuda, cpu, got 'tpu'"),
        ({"load_format": "pt"}, "load_format must be one of auto, dummy, got 'pt'"),
        ({"attention_backend": "xformers"}, "attention_backend must be one of .* got 'xformers'"),
        ({"enforce_eager": 1}, "enforce_eager must be True or False, got 1"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False, got 1"),
        ({"enable_chunked_prefill": "no"}, "enable_chunked_prefill must be True or False"),
        ({"async_scheduling": 0}, "async_scheduling must be True or False, got 0"),
    ],
)
def test_value_out_of_range_is_refused_with_value_and_limit(arguments, message, model):
    with refused(message) as raised:
        Config(model, **arguments)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, AssertionError)


@pytest.mark.parametrize(
    "name",
    [
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_model_len",
        "tensor_parallel_size",
        "kvcache_block_size",
        "num_kvcache_blocks",
        "kv_cache_memory_bytes",
        "seed",
        "gpu_memory_utilization",
        "watermark",
    ],
)
def test_bool_is_no_number(name, model):
    with refused(f"{name} must be .*, got True"):
        Config(model, **{name: True})


def test_numpy_numbers_are_accepted(model):
    config = Config(
        model,
        max_num_seqs=np.int64(8),
        kvcache_block_size=np.int32(512),
        gpu_memory_utilization=np.float32(0.5),
        seed=np.int64(-5),
    )
    assert (config.max_num_seqs, config.kvcache_block_size, config.seed) == (8, 512, -5)
    assert {type(config.max_num_seqs), type(config.kvcache_block_size)} == {int}


@pytest.mark.parametrize("value", [0.01, 1, 1.0])
def test_utilization_bounds(value, model):
    assert Config(model, gpu_memory_utilization=value).gpu_memory_utilization == value


def test_minus_one_blocks_leave_the_number_to_the_engine(model):
    assert Config(model, num_kvcache_blocks=-1).num_kvcache_blocks is None


# Lengths


@pytest.mark.parametrize(
    ("max_model_len", "expected"), [(100, 100), (8192, 8192), (100000, 8192), (None, 8192)]
)
def test_max_model_len_is_capped_by_the_model(max_model_len, expected, model):
    config = Config(model, max_model_len=max_model_len)
    assert config.max_model_len == expected
    assert config.max_blocks_per_seq == -(-expected // 256)


def test_budget_must_reach_max_model_len(model):
    message = r"max_num_batched_tokens \(4095\) must be >= max_model_len \(4096\)"
    with refused(message):
        Config(model, max_num_batched_tokens=4095)
    assert Config(model, max_num_batched_tokens=4096).max_num_batched_tokens == 4096


def test_budget_is_compared_with_the_capped_length(model):
    config = Config(model, max_num_batched_tokens=8192, max_model_len=100000)
    assert (config.max_num_batched_tokens, config.max_model_len) == (8192, 8192)


def test_chunked_prefill_lifts_the_rule(model):
    config = Config(model, max_num_batched_tokens=16, enable_chunked_prefill=True)
    assert (config.max_num_batched_tokens, config.max_model_len) == (16, 4096)


def test_budget_follows_when_the_models_maximum_is_asked_for(tmp_path):
    long = write_model(tmp_path, max_position_embeddings=40960)
    assert Config(long, max_model_len=None).max_num_batched_tokens == 40960
    chunked = Config(long, max_model_len=None, enable_chunked_prefill=True)
    assert (chunked.max_num_batched_tokens, chunked.max_model_len) == (16384, 40960)
    with refused(r"max_num_batched_tokens \(20000\) must be >= max_model_len \(40960\)"):
        Config(long, max_model_len=None, max_num_batched_tokens=20000)


# Tensor parallelism


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_sizes_that_divide_the_heads_are_accepted(size, model):
    assert Config(model, tensor_parallel_size=size).tensor_parallel_size == size


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {}, r"\(3\) must divide the model's num_attention_heads \(8\)"),
        (5, {}, r"\(5\) must divide the model's num_attention_heads \(8\)"),
        (4, {"intermediate_size": 98}, r"\(4\) must divide the model's intermediate_size \(98\)"),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            r"\(4\) must divide, or be a multiple of, the model's num_key_value_heads \(6\)",
        ),
    ],
)
def test_size_that_does_not_divide_the_model_is_refused(size, changes, message, tmp_path):
    with refused(f"tensor_parallel_size {message}"):
        Config(write_model(tmp_path, **changes), tensor_parallel_size=size)


def test_missing_gpus_are_named(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Config(model).resolve_device() == torch.device("cuda", 0)
    assert Config(model, device="cpu", tensor_parallel_size=2).resolve_device().type == "cpu"
    with refused(r"tensor_parallel_size \(2\) needs that many visible GPUs, found 1"):
        Config(model, tensor_parallel_size=2).resolve_device()


def test_cuda_without_a_gpu_is_refused(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Config(model).resolve_device() == torch.device("cpu")
    with refused("device='cuda' needs a visible GPU, found none"):
        Config(model, device="cuda").resolve_device()


# What the model's config.json may ask for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["NoneForCausalLM"]},
            r"architectures \['NoneForCausalLM'\] is not supported; supported: .*Qwen3ForCausalLM",
        ),
        ({"architectures": ["Qwen3NoneForCausalLM"]}, r"'Qwen3NoneForCausalLM'\] is not supported"),
        ({"architectures": []}, r"architectures \[\] is not supported"),
        ({"architectures": None}, r"architectures \[\] is not supported"),
        (
            {"rope_scaling": {"type": "mrope", "factor": 4.0}},
            "rope_scaling of type 'mrope' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}},
            "rope_parameters of type 'longrope' lacks long_factor",
        ),
        ({"use_mrope": True}, "use_mrope=true is not supported"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 3}},
            "quantization_config 'awq' with bits 3 is not supported; supported: 4",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config 'unnamed' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
    ],
)
def test_unsupported_feature_is_refused_by_name(changes, message, tmp_path):
    with refused(message) as raised:
        Config(write_model(tmp_path, **changes))
    assert "config.json" in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1000000.0},
        {"rope_theta": 1000000.0, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    ],
    ids=["old", "old with default scaling", "new"],
)
def test_old_and_new_ways_to_write_the_rope_base_agree(changes, tmp_path):
    hf_config = Config(write_model(tmp_path, **changes)).hf_config
    assert hf_config.rope_parameters["rope_theta"] == 1000000.0
    assert hf_config.rope_parameters["rope_type"] == "default"


def test_sliding_window_that_is_switched_off_is_accepted(tmp_path):
    path = write_model(
        tmp_path, use_sliding_window=False, sliding_window=4096, max_window_layers=28
    )
    assert Config(path).hf_config.vocab_size == 384


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_auto_dtype_is_the_models(key, name, tmp_path):
    path = write_model(tmp_path, **{"torch_dtype": None, key: name})
    assert Config(path).resolve_dtype() is getattr(torch, name)


def test_auto_dtype_of_a_model_without_one_is_bfloat16(tmp_path):
    assert Config(write_model(tmp_path, torch_dtype=None)).resolve_dtype() is torch.bfloat16


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_given_dtype_overrides_the_models(name, model):
    assert Config(model, dtype=name).resolve_dtype() is getattr(torch, name)


def test_max_model_len_leaves_room_for_a_prompt_and_a_token(model):
    assert Config(model, max_model_len=2).max_model_len == 2
    with refused("max_model_len must be >= 2, got 1"):
        Config(model, max_model_len=1)


@pytest.mark.parametrize("name", ["num_key_value_heads", "num_attention_heads"])
def test_model_without_heads_is_refused(tmp_path, name):
    with refused(f"{name} must be >= 1, got 0|refused by transformers"):
        Config(write_model(tmp_path / "m", **{name: 0}))


def test_model_without_layers_is_refused(tmp_path):
    with refused("the model's num_hidden_layers must be >= 1, got 0"):
        Config(write_model(tmp_path, num_hidden_layers=0))


@pytest.mark.parametrize("order", [1, -1])
def test_a_parameter_given_under_both_names_is_refused(model, order):
    names = ["block_size", "kvcache_block_size"][::order]
    with pytest.raises(TypeError, match="'kvcache_block_size' twice: 'block_size' is another"):
        Config.from_kwargs(model, dict.fromkeys(names, 256))


# hf_overrides


def test_a_dict_replaces_fields_before_anything_is_derived_or_checked(tmp_path):
    layer_types = ["full_attention"] * 2
    path = write_model(tmp_path, layer_types=layer_types, use_mrope=True)
    overrides = {
        "num_hidden_layers": 5,
        "use_mrope": False,
        "max_position_embeddings": 512,
        "torch_dtype": "float16",
    }
    config = Config(path, hf_overrides=overrides)
    assert config.hf_config.num_hidden_layers == 5
    assert config.hf_config.layer_types == ["full_attention"] * 5
    assert config.max_model_len == 512
    assert config.resolve_dtype() is torch.float16
    with refused("use_mrope=true is not supported"):
        Config(path)


def test_no_change_gives_the_configuration_of_the_file(model):
    plain = Config(model).hf_config.to_dict() | {"_name_or_path": ""}
    for overrides in ({}, {"vocab_size": 384}, lambda hf_config: hf_config):
        hf_config = Config(model, hf_overrides=overrides).hf_config
        assert hf_config.to_dict() | {"_name_or_path": ""} == plain


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1000000.0},
        {"rope_theta": 1000000.0, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    ],
    ids=["old", "old with scaling", "new"],
)
@pytest.mark.parametrize(
    ("overrides", "theta"),
    [
        ({"rope_theta": 5000.0}, 5000.0),
        ({"rope_parameters": {"rope_theta": 5000.0}}, 5000.0),
        ({"rope_scaling": {"rope_type": "default"}}, 1000000.0),
        ({"rope_parameters": {"rope_type": "default"}}, 1000000.0),
    ],
)
def test_rope_is_overridden_however_either_is_written(rope, overrides, theta, tmp_path):
    given = json.loads(json.dumps(overrides))
    hf_config = Config(write_model(tmp_path, **rope), hf_overrides=overrides).hf_config
    assert hf_config.rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert overrides == given


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0, "rope_scaling": YARN},
        {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, **YARN}},
        {"rope_theta": 500.0, "rope_parameters": {"factor": 8.0}, "rope_scaling": YARN},
    ],
    ids=["old", "older", "new", "both"],
)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rope_scaling": None}, {"rope_type": "default"}),
        ({"rope_parameters": None}, {"rope_type": "default"}),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_theta": 7.0}},
            {"rope_type": "default", "rope_theta": 7.0},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({"rope_parameters": {"rope_type": "default"}}, {"rope_type": "default"}),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, YARN | {"factor": 8.0}),
        ({"rope_parameters": {"factor": 8.0}}, YARN | {"factor": 8.0}),
        ({"rope_theta": 7.0}, YARN | {"rope_theta": 7.0}),
        ({"rope_scaling": {}}, YARN),
    ],
)
def test_another_rope_type_replaces_the_scaling_and_keeps_the_base(
    rope, overrides, expected, tmp_path
):
    hf_config = Config(write_model(tmp_path, **rope), hf_overrides=overrides).hf_config
    assert hf_config.rope_parameters == {"rope_theta": 500.0, **expected}


@pytest.mark.parametrize("stored", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("given", ["num_experts", "num_local_experts"])
def test_an_override_wins_under_either_name_of_a_field(stored, given, tmp_path):
    moe = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    path = write_model(tmp_path, **moe, **{stored: 16})
    assert Config(path, hf_overrides={given: 9}).hf_config.num_experts == 9


@pytest.mark.parametrize("stored", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("given", ["dtype", "torch_dtype"])
def test_a_dtype_is_overridden_under_either_name(stored, given, tmp_path):
    path = write_model(tmp_path, **{"torch_dtype": None, stored: "float32"})
    config = Config(path, hf_overrides={given: "float16"})
    assert config.resolve_dtype() is torch.float16
    both = {"dtype": "float16", "torch_dtype": "float16"}
    assert Config(path, hf_overrides=both).resolve_dtype() is torch.float16


def without_rope_parameters(hf_config):
    hf_config.rope_parameters = None
    return hf_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu"}, "with hf_overrides: hidden_act 'gelu' is not supported"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures \['LlamaForCausalLM'\]"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "of type 'mrope' is not supported"),
        (
            {"num_hiden_layers": 2},
            "no field 'num_hiden_layers'; the nearest is 'num_hidden_layers'",
        ),
        ({"vocab_size": "many"}, "with hf_overrides: the model's vocab_size must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads must be >= 1, got 0|refused by transf"),
        ({"num_hidden_layers": 0}, "the model's num_hidden_layers must be >= 1, got 0"),
        ({"model_type": ["qwen3"]}, r"with model_type \['qwen3'\] is not supported"),
        ({"rope_scaling": "yarn"}, "hf_overrides: rope_scaling must be an object, got 'yarn'"),
        ({"rope_theta": None}, "rope_theta must be > 1 and <= 1e30, got None"),
        (
            {"dtype": "float16", "torch_dtype": "float32"},
            "hf_overrides: 'dtype' and 'torch_dtype' are names of one field, with different values",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {"factor": 2.0}},
            "'rope_scaling' and 'rope_parameters' are names of one field, with different values",
        ),
        ([("vocab_size", 1)], "hf_overrides must be a dict or a callable, got"),
        (lambda hf_config: None, "hf_overrides must return a PretrainedConfig, got None"),
        (without_rope_parameters, r"must leave rope_parameters a dict .*, got None"),
    ],
)
def test_wrong_overrides_are_refused_by_name(overrides, message, model):
    with refused(message):
        Config(model, hf_overrides=overrides)


def test_a_callable_changes_the_configuration(model):
    def fewer_layers(hf_config):
        hf_config.num_hidden_layers = 1
        return hf_config

    assert Config(model, hf_overrides=fewer_layers).hf_config.num_hidden_layers == 1

    def gelu(hf_config):
        hf_config.hidden_act = "gelu"
        return hf_config

    with refused("with hf_overrides: hidden_act 'gelu' is not supported"):
        Config(model, hf_overrides=gelu)


def test_tokenizer_mode_is_auto_alone(model):
    assert Config(model, tokenizer_mode="auto").tokenizer_mode == "auto"
    with refused("tokenizer_mode must be one of auto, got 'slow'"):
        Config(model, tokenizer_mode="slow")
