"""The table of angles against transformers' own formulas, and which rope fields are refused."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanovllm import ArgumentError
from nanovllm.layers.rope_scaling import rope_frequencies
from nanovllm.layers.rotary import cos_sin_table
from nanovllm.models.family import Family
from nanovllm.models.hf_config import read_hf_config
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.rope_config import check_rope

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALED = [
    {"rope_type": "linear", "factor": 3},
    LLAMA3,
    LLAMA3 | {"factor": 32.0, "low_freq_factor": 2, "high_freq_factor": 2.5},
    YARN,
    YARN | {"factor": 1.0},
    YARN | {"beta_fast": 16, "beta_slow": 2.5, "truncate": False},
    YARN | {"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707},
    YARN | {"original_max_position_embeddings": 20, "attention_factor": None},
]


@pytest.mark.parametrize("rope", SCALED)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 1e4), (128, 1e6), (16, 5e5)])
def test_scaled_tables_are_those_of_transformers(rope, head_dim, theta):
    rope = {"rope_theta": theta, **rope}
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=dict(rope)
    )
    inverse_frequencies, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, CPU)
    frequencies, scale = rope_frequencies(head_dim, rope, 300)
    torch.testing.assert_close(frequencies, inverse_frequencies, rtol=1e-6, atol=0)
    assert scale == pytest.approx(magnitude, rel=1e-12)
    angles = torch.arange(300.0).outer(inverse_frequencies)
    expected = torch.cat([angles.cos(), angles.sin()], -1) * magnitude
    torch.testing.assert_close(cos_sin_table(head_dim, 300, rope, CPU), expected)


@pytest.mark.parametrize("rope", [LLAMA3, YARN, YARN | {"original_max_position_embeddings": None}])
def test_original_positions_beside_the_rope_parameters_win(rope, tmp_path):
    """As in transformers' models; a configuration alone does not show it."""
    fields = LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=64).to_dict()
    fields |= {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 1e4, **{k: v for k, v in rope.items() if v}},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    hf_config = read_hf_config(str(tmp_path))
    reference = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    frequencies, scale = rope_frequencies(16, hf_config.rope_parameters, 300)
    torch.testing.assert_close(frequencies, reference.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(reference.attention_scaling, rel=1e-12)
    model_config = ModelConfig.from_hf(hf_config, Family("", ""))
    assert model_config.rope_parameters == hf_config.rope_parameters
    assert model_config.max_positions == (4096 if rope is LLAMA3 else 4 * 64)
    override = {"rope_scaling": {"original_max_position_embeddings": 512}}
    overridden = read_hf_config(str(tmp_path), override)
    assert overridden.rope_parameters["original_max_position_embeddings"] == 512


def test_unscaled_angles_are_the_definition():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    table = cos_sin_table(8, 50, rope, CPU).double()
    for position in (0, 1, 49):
        for pair in range(4):
            angle = position * 1e4 ** (-2 * pair / 8)
            assert table[position, pair] == pytest.approx(math.cos(angle), abs=2e-6)
            assert table[position, pair + 4] == pytest.approx(math.sin(angle), abs=2e-6)


def test_every_part_of_a_scaling_is_tested():
    """Some pairs are left, some divided, some between: or the comparisons above show little."""
    plain, _ = rope_frequencies(128, {"rope_type": "default", "rope_theta": 1e6}, 1)
    for rope in (LLAMA3, YARN):
        scaled, _ = rope_frequencies(128, {"rope_theta": 1e6, **rope}, 1)
        ratio = plain / scaled
        assert ratio.min() == 1
        assert ratio.max() == pytest.approx(rope["factor"])
        assert ((ratio > 1.01) & (ratio < 0.99 * rope["factor"])).sum() >= 3


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 40960),
        (LLAMA3, 40960),
        ({"rope_type": "linear", "factor": 2.0}, 81920),
        (YARN, 131072),
        ({"rope_type": "yarn", "factor": 1.5}, 61440),  # the original is the stated maximum
    ],
)
def test_max_positions(rope, expected):
    config = LlamaConfig(max_position_embeddings=40960, rope_parameters={"rope_theta": 1e6, **rope})
    assert ModelConfig.from_hf(config, Family("", "")).max_positions == expected


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_theta": 10000, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4, "finetuned": True}},
        {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1}},
        {"rope_parameters": {}},
        *({"rope_parameters": rope} for rope in SCALED),
    ],
)
def test_supported_fields(raw):
    check_rope(json.loads(json.dumps(raw)), "here")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "of type 'dynamic' is not supported; supported:"),
        ({"type": "longrope"}, "of type 'longrope' is not supported"),
        ({"type": "mrope", "mrope_section": [1, 2]}, "of type 'mrope' is not supported"),
        ({"rope_type": ["yarn"]}, r"of type \['yarn'\] is not supported"),
        ({"rope_type": None}, "of type None is not supported"),
        ([1], r"must be an object, got \[1\]"),
        ("yarn", "must be an object, got 'yarn'"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention is not supported"),
        ({"rope_type": "default", "mrope_section": [8]}, "mrope_section is not supported"),
        ({"rope_type": "yarn"}, "of type 'yarn' lacks factor"),
        ({"rope_type": "linear", "factor": None}, "of type 'linear' lacks factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be between 1 and 1e9, got 0.5"),
        ({"rope_type": "linear", "factor": "2"}, "factor must be between 1 and 1e9, got '2'"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks high_freq_factor"),
        (LLAMA3 | {"high_freq_factor": 1.0}, r"low_freq_factor \(1.0\) must be < high_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": 0.5}, "must be an integer >= 1, got 0.5"),
        (YARN | {"beta_fast": {"a": 1}}, "beta_fast must be between 1e-9 and 1e9, got"),
        (YARN | {"attention_factor": -1}, "attention_factor must be between 1e-9 and 1e9, got -1"),
        (YARN | {"truncate": 1}, "truncate must be True or False, got 1"),
        (YARN | {"low_freq_factor": 1.0}, "low_freq_factor is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_theta": "big"}, "rope_theta must be > 1 and <= 1e30, got 'big'"),
        ({"rope_theta": None}, "rope_theta must be > 1 and <= 1e30, got None"),
    ],
)
def test_other_fields_are_refused_by_name(key, rope, message):
    with pytest.raises(ArgumentError, match=message) as raised:
        check_rope({key: rope}, "here")
    assert f"here: {key}" in str(raised.value)


@pytest.mark.parametrize("raw", [{"partial_rotary_factor": 0.25}, {"rope_theta": 0}])
def test_fields_outside_are_checked_too(raw):
    with pytest.raises(ArgumentError, match=f"here: {next(iter(raw))}"):
        check_rope(raw, "here")
