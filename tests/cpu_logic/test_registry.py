"""Which config.json files are taken, and that everything else is refused by name and value."""

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.models.families import model_class
from nanovllm.models.registry import ARCHITECTURES, check_supported

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}


def raw_config(architecture: str, **changes) -> dict:
    """The fields of a config.json; None removes one."""
    raw = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture][0],
        "torch_dtype": "bfloat16",
        **SIZES,
        # Of gated delta nets and attention, which is last.
        **({"num_hidden_layers": 4} if architecture.startswith(("Qwen3_5", "Qwen3Next")) else {}),
        **changes,
    }
    return {name: value for name, value in raw.items() if value is not None}


def config_of(directory: Path, raw: dict, **kwargs) -> Config:
    (directory / "config.json").write_text(json.dumps(raw))
    return Config(str(directory), **kwargs)


def refused(message: str):
    return pytest.raises(ArgumentError, match=message)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_has_its_class_and_a_short_file(architecture):
    family = model_class(("SomethingElse", architecture))
    assert family.__name__ == architecture
    path = Path(__import__(family.__module__, fromlist=["x"]).__file__)
    assert len(path.read_text().splitlines()) < 100


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_dim_is_derived_where_the_file_lacks_it(architecture, tmp_path):
    of_transformers = CONFIG_MAPPING[ARCHITECTURES[architecture][0]](**SIZES)
    expected = getattr(of_transformers, "head_dim", None) or 64 // 4  # Qwen3's default is 128
    assert config_of(tmp_path, raw_config(architecture)).model_config.head_dim == expected
    given = config_of(tmp_path, raw_config(architecture, head_dim=24))
    assert given.model_config.head_dim == 24


@pytest.mark.parametrize("head_dim", [0, "x", 1.5, [16]])
def test_a_head_dim_that_is_no_size_is_refused(head_dim, tmp_path):
    with refused("head_dim must be|refused by transformers"):
        config_of(tmp_path, raw_config("Qwen2ForCausalLM", head_dim=head_dim))


REFUSED = [
    ({"architectures": "LlamaForCausalLM"}, "architectures LlamaForCausalLM is not supported"),
    ({"architectures": {"a": 1}}, "architectures {'a': 1} is not supported"),
    ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
    ({"architectures": ["NoSuchForCausalLM"]}, r"\['NoSuchForCausalLM'\] is not supported"),
    ({"model_type": "nosuch"}, "with model_type 'nosuch' is not supported; the model_type of"),
    ({"model_type": None}, "with model_type None is not supported"),
    ({"model_type": ["llama"]}, r"with model_type \['llama'\] is not supported"),
    ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "type 'mrope' is not supported"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 is not supported"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
    ({"attention_logit_softcapping": 50.0}, "attention_logit_softcapping=50.0 is not"),
    ({"logits_soft_cap": 30}, "logits_soft_cap=30 is not supported"),
    ({"logit_scale": 0.0625}, "logit_scale=0.0625 is not supported"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not supported"),
    ({"is_causal": False}, "is_causal=false is not supported"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention=true is not supported"),
    ({"use_mrope": True}, "use_mrope=true is not supported"),
    ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    ({"dual_chunk_attention_config": {"chunk_size": 8}}, "local_size must be an integer betw"),
    (
        {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}},
        "local_size must be between 1 and 7, got 8",
    ),
    ({"dual_chunk_attention_config": 8192}, "dual_chunk_attention_config must be an object"),
    ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'.* is not"),
    ({"layer_types": "sliding_attention"}, "layer_types 'sliding_attention' is not supported"),
    ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config 'hqq' is not"),
    ({"quantization_config": {"quant_method": "awq", "bits": 3}}, "config 'awq' with bits 3 is"),
    ({"quantization_config": {"quant_method": "fp8"}}, "with activation_scheme None is not"),
    ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, r"size \[64, 64\] is not"),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "scheme 'static' is not"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt 'e5m2' is not supported"),
    ({"compression_config": FP8}, "compression_config 'fp8' is not supported"),
    ({"quantization_config": ["fp8"]}, "quantization_config 'unnamed' is not"),
    ({"compression_config": {"format": "int8"}}, "compression_config 'unnamed' is not"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: (silu|relu2)"),
    ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\] is not supported"),
]


def computes(architecture: str, changes: dict) -> bool:
    """Whether the family computes what other families refuse."""
    family = ARCHITECTURES[architecture]
    [(name, value)] = changes.items()
    if name == "hidden_act":
        return "hidden_activation" in family.fields or value in family.activations
    return name in family.fields


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [(a, *case) for case in REFUSED for a in ARCHITECTURES if not computes(a, case[0])],
)
def test_what_a_family_does_not_compute_is_refused_by_name(architecture, changes, message):
    if "quantization_config" in changes and "fp8" not in ARCHITECTURES[architecture].quantization:
        message = "quantization_config '(fp8|awq|hqq|unnamed)' is not supported"
    with refused(message) as raised:
        check_supported(raw_config(architecture, **changes), "the/config.json")
    assert str(raised.value).startswith("the/config.json: ")


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if ARCHITECTURES[a].fields])
def test_what_only_some_families_compute_is_checked(architecture, tmp_path):
    in_rope_parameters = {"mrope_section"}
    for name in {*ARCHITECTURES[architecture].fields} - in_rope_parameters:
        with refused(f"{name}.* (must be|is not supported)"):
            config_of(tmp_path, raw_config(architecture, **{name: {"not": "a value"}}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mxfp4_is_read_for_the_families_that_have_it(architecture):
    raw = raw_config(architecture, quantization_config={"quant_method": "mxfp4"})
    if "mxfp4" in ARCHITECTURES[architecture].quantization:
        check_supported(raw, "here")
    else:
        with refused("quantization_config 'mxfp4' is not supported"):
            check_supported(raw, "here")


def test_a_family_cannot_be_run_as_another():
    with refused("model_type of LlamaForCausalLM is 'llama'"):
        check_supported(raw_config("LlamaForCausalLM", model_type="qwen3"), "here")


def test_a_sliding_window_that_transformers_ignores_is_a_limit(tmp_path):
    raw = raw_config("LlamaForCausalLM", sliding_window=4096)
    assert config_of(tmp_path, raw).max_model_len == 4096
    for length in (4097, None):
        with refused(rf"max_model_len \({length or 8192}\) must be <= .*sliding_window \(4096\)"):
            config_of(tmp_path, raw, max_model_len=length)
    without = raw_config("LlamaForCausalLM") | {"sliding_window": None}
    assert config_of(tmp_path, without, max_model_len=None).max_model_len == 8192


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 512}, [512, 512, 512]),
        ("MistralForCausalLM", {}, [4096] * 3),
        ("MinistralForCausalLM", {"layer_types": [FULL, SLIDING, FULL]}, [None, 4096, None]),
        ("Qwen2ForCausalLM", {"max_window_layers": 1}, [None] * 3),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            [None, 9, 9],
        ),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True, "sliding_window": 9}, [9, 9, 9]),
        ("Gemma2ForCausalLM", {}, [4096, None, 4096]),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 2}, [4096, None, 4096]),
    ],
)
def test_each_layer_has_the_window_that_transformers_gives_it(
    architecture, changes, windows, tmp_path
):
    raw = raw_config(architecture, num_hidden_layers=3, **changes)
    config = config_of(tmp_path, raw, max_model_len=None)
    assert config.model_config.layer_windows == tuple(windows)
    assert config.max_model_len == 8192


def test_layer_types_that_do_not_fit_are_refused(tmp_path):
    for changes, message in (
        ({"layer_types": [SLIDING]}, "layer_types"),
        ({"layer_types": [SLIDING, FULL], "sliding_window": 0}, "sliding_window must be"),
    ):
        with refused(message):
            config_of(tmp_path, raw_config("Gemma2ForCausalLM", **changes))
    raw = raw_config("Gemma2ForCausalLM", layer_types=[SLIDING, FULL]) | {"sliding_window": None}
    with refused("sliding_window must be set"):
        config_of(tmp_path, raw)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_that_change_nothing_are_accepted(architecture):
    neutral = {
        "is_causal": True,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 0.0,
        "logit_scale": 1.0,
        "use_mrope": False,
        "rope_interleaved": False,
        "use_qk_norm": True,
    }
    check_supported(raw_config(architecture, **neutral), "here")


def test_dual_chunk_attention_is_full_attention_in_its_first_chunk(tmp_path):
    chunks = {"chunk_size": 2048, "local_size": 512, "original_max_position_embeddings": 2048}
    raw = raw_config("Qwen2ForCausalLM", dual_chunk_attention_config=chunks)
    assert config_of(tmp_path, raw, max_model_len=1536).max_model_len == 1536
    with refused(r"max_model_len \(1537\) must be <= the model's first chunk of .* \(1536\)"):
        config_of(tmp_path, raw, max_model_len=1537)
    both = raw_config("LlamaForCausalLM", dual_chunk_attention_config=chunks, sliding_window=4096)
    with refused(r"the model's first chunk of .* \(1536\)"):
        config_of(tmp_path, both, max_model_len=1537)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_sliding_window_that_is_off_does_not_matter(architecture, tmp_path):
    raw = raw_config(
        architecture,
        use_sliding_window=False,
        sliding_window=128,
        max_window_layers=1,
        layer_types=["full_attention"] * 2,
    )
    assert config_of(tmp_path, raw, max_model_len=8192).max_model_len == 8192


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_max_model_len_reaches_what_yarn_reaches(key, tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    changes = {"rope_theta": 1e6, key: rope}
    if key == "rope_parameters":
        changes = {key: {"rope_theta": 1e6, **rope}}
    raw = raw_config("Qwen3ForCausalLM", max_position_embeddings=5120, **changes)
    config = config_of(tmp_path, raw, max_model_len=None)
    assert config.max_model_len == 16384
    assert config.hf_config.rope_parameters == {"rope_theta": 1e6, **rope}
    assert config_of(tmp_path, raw, max_model_len=10**6, max_num_batched_tokens=10**6)
    plain = raw_config("Qwen3ForCausalLM", max_position_embeddings=5120)
    overridden = config_of(
        tmp_path, plain, max_model_len=None, hf_overrides={key: {"rope_theta": 1e6, **rope}}
    )
    assert overridden.max_model_len == 16384


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL_NULL = {"original_max_position_embeddings": None}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "yarn", "factor": 4.0}])
@pytest.mark.parametrize("inside", [True, False])
def test_a_null_that_transformers_fails_on_is_refused_by_name(key, rope, inside):
    raw = raw_config("LlamaForCausalLM")
    raw |= {key: rope | ORIGINAL_NULL} if inside else {key: rope} | ORIGINAL_NULL
    with refused("original_max_position_embeddings must be an integer >= 1, got None"):
        check_supported(raw, "here")


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}])
def test_a_null_that_nothing_reads_is_accepted(rope, tmp_path):
    raw = raw_config("LlamaForCausalLM") | {"rope_scaling": rope} | ORIGINAL_NULL
    assert config_of(tmp_path, raw).max_model_len == 4096


@pytest.mark.parametrize("stray", [{"num_experts_per_tok": 2}, {"num_experts": 0}])
def test_experts_of_a_family_without_them_do_not_matter(stray, tmp_path):
    assert config_of(tmp_path, raw_config("LlamaForCausalLM", **stray)).max_model_len == 4096


def test_a_callable_may_replace_the_rope_parameters(tmp_path):
    def with_linear_scaling(hf_config):
        hf_config.rope_parameters = {"type": "linear", "factor": 2.0, "rope_theta": 1e4}
        return hf_config

    raw = raw_config("LlamaForCausalLM")
    config = config_of(tmp_path, raw, max_model_len=None, hf_overrides=with_linear_scaling)
    assert config.max_model_len == 16384
