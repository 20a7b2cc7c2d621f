"""The table of angles against transformers' own formulas, and which rope fields are refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.layers.rope_scaling import rope_frequencies
from nanovllm.layers.rotary import cos_sin_table
from nanovllm.models.extras import rotary_tables
from nanovllm.models.family import Family
from nanovllm.models.hf_config import read_hf_config
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.registry import ARCHITECTURES
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
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "proportional"},
    {"rope_type": "proportional", "factor": 8.0},
]
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
PLAIN = Family("", "")
PARTIAL = Family("", "", ("partial_rotary_factor",))


def check_table(head_dim: int, rope: dict, num_positions: int, reference) -> None:
    """Against transformers' (frequencies, magnitude): of pairs beyond them the angle is 0."""
    inverse_frequencies, magnitude = reference
    frequencies, scale = rope_frequencies(head_dim, rope, num_positions)
    inverse_frequencies, unrotated = inverse_frequencies.tensor_split([len(frequencies)])
    assert not unrotated.any()
    torch.testing.assert_close(frequencies, inverse_frequencies, rtol=1e-6, atol=0)
    assert scale == pytest.approx(magnitude, rel=1e-12)
    angles = torch.arange(300.0).outer(inverse_frequencies)
    table = torch.zeros(300, head_dim)
    table[:, : head_dim // 2] = 1
    table[:, : len(frequencies)] = angles.cos() * magnitude
    table[:, head_dim // 2 : head_dim // 2 + len(frequencies)] = angles.sin() * magnitude
    torch.testing.assert_close(cos_sin_table(head_dim, num_positions, rope, CPU)[:300], table)


@pytest.mark.parametrize("rope", SCALED)
@pytest.mark.parametrize("part", [1.0, 0.5, 0.375])
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 1e4), (128, 1e6), (16, 5e5)])
def test_scaled_tables_are_those_of_transformers(rope, part, head_dim, theta):
    rope = {"rope_theta": theta, "partial_rotary_factor": part, **rope}
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=dict(rope)
    )
    reference = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, CPU)
    check_table(head_dim, rope, 300, reference)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("part", [1.0, 0.75, 0.3125])
@pytest.mark.parametrize("length", [300, 4096, 4097])
@pytest.mark.parametrize(
    "more", [{}, {"factor": 16.0}, {"factor": 1.0}, {"attention_factor": 1.19}]
)
def test_longrope_is_that_of_transformers_at_each_length(more, length, part):
    num_pairs = int(64 * part) // 2
    rope = LONGROPE | {
        "partial_rotary_factor": part,
        "short_factor": [1 + 0.01 * i for i in range(num_pairs)],
        "long_factor": [1 + 0.5 * i for i in range(num_pairs)],
    }
    config = Phi3Config(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=rope | more,
    )
    reference = ROPE_INIT_FUNCTIONS["longrope"](config, CPU, seq_len=length)
    complete = ModelConfig.from_hf(config, Family("", "")).rope_parameters
    assert complete["factor"] == more.get("factor", 32)
    check_table(64, complete, length, reference)


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


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 3}, LONGROPE | FACTORS])
def test_a_users_default_dtype_changes_nothing(rope):
    rope = rope and {"rope_theta": 1e4, "factor": 2.0, **rope}
    expected = cos_sin_table(32, 50, rope, CPU)
    torch.set_default_dtype(torch.float64)
    try:
        table = cos_sin_table(32, 50, rope, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.dtype == torch.float32 and torch.equal(table, expected)


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
        ({"rope_type": "dynamic", "factor": 2.0}, 81920),
        ({"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 4096}, 40960),
        (YARN, 131072),
        ({"rope_type": "yarn", "factor": 1.5}, 61440),  # the original is the stated maximum
    ],
)
def test_max_positions(rope, expected):
    config = LlamaConfig(
        max_position_embeddings=40960, head_dim=32, rope_parameters={"rope_theta": 1e6, **rope}
    )
    assert ModelConfig.from_hf(config, Family("", "")).max_positions == expected


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_theta": 10000, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4, "finetuned": True}},
        {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1}},
        {"rope_parameters": {}},
        {"rope_parameters": LONGROPE | FACTORS},
        {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}},
        *({"rope_parameters": rope} for rope in SCALED),
    ],
)
def test_supported_fields(raw):
    check_rope(json.loads(json.dumps(raw)), "here", PLAIN)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1, None])
def test_a_partial_rotation_is_for_families_that_have_it(factor):
    for raw in (
        {"partial_rotary_factor": factor},
        {"rope_parameters": {"partial_rotary_factor": factor}},
    ):
        check_rope(raw, "here", PARTIAL)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "axial", "factor": 2.0}, "of type 'axial' is not supported; supported:"),
        ({"type": "su", **FACTORS}, "of type 'su' is not supported"),
        ({"type": "longrope", **FACTORS, "long_factor": None}, "'longrope' lacks long_factor"),
        (LONGROPE | FACTORS | {"long_factor": 1.0}, "long_factor must be a list of numbers, got 1"),
        (LONGROPE | FACTORS | {"short_factor": [0, 1]}, "short_factor must be between 1e-9 and"),
        (
            LONGROPE | FACTORS | {"original_max_position_embeddings": 1},
            "original_max_position_embeddings must be >= 2, got 1",
        ),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 3}, "alpha is not supported"),
        ({"rope_type": "proportional", "partial_rotary_factor": 1.1}, "must be > 0 and <= 1"),
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
        check_rope({key: rope}, "here", PLAIN)
    assert f"here: {key}" in str(raised.value)


@pytest.mark.parametrize("factor", [0, -0.5, 1.5, "half", math.nan, True])
def test_a_part_that_is_none_is_refused(factor):
    with pytest.raises(ArgumentError, match="partial_rotary_factor must be > 0 and <= 1, got"):
        check_rope({"partial_rotary_factor": factor}, "here", PARTIAL)


@pytest.mark.parametrize("raw", [{"partial_rotary_factor": 0.25}, {"rope_theta": 0}])
def test_fields_outside_are_checked_too(raw):
    with pytest.raises(ArgumentError, match=f"here: {next(iter(raw))}"):
        check_rope(raw, "here", PLAIN)


# ---- lengths that are ambiguous -----------------------------------------------------------------


def config_of(directory: Path, rope: dict, family: str = "Phi3ForCausalLM", **kwargs) -> Config:
    fields = {
        "architectures": [family],
        "model_type": ARCHITECTURES[family].model_type,
        "vocab_size": 384,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "rope_theta": 1e4,
        **rope,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return Config(str(directory), **{"max_num_batched_tokens": 16384, **kwargs})


@pytest.mark.parametrize(
    ("rope_type", "inside"), [("longrope", True), ("longrope", False), ("su", True)]
)
def test_longrope_beyond_its_original_positions_must_be_asked_for(tmp_path, inside, rope_type):
    original = {"original_max_position_embeddings": 2048}
    scaling = {"type": rope_type, **FACTORS} | (original if inside else {})
    rope = {"rope_scaling": scaling, **original}
    config = config_of(tmp_path, rope, max_model_len=2048)
    assert config.model_config.rope_parameters["factor"] == 8
    for length in (2049, None):
        with pytest.raises(
            ArgumentError,
            match=rf"max_model_len \({length or 16384}\) must be <= the model's "
            r"original_max_position_embeddings \(2048\): beyond it, 'longrope' rotates all",
        ):
            config_of(tmp_path, rope, max_model_len=length)
    alike = {"rope_parameters": {"short_factor": FACTORS["long_factor"]}}
    asked = config_of(tmp_path, rope, max_model_len=None, hf_overrides=alike)
    assert asked.max_model_len == 16384
    frequencies, _ = rope_frequencies(32, asked.model_config.rope_parameters, 16384)
    assert frequencies[0] == 0.5


def test_dynamic_beyond_the_positions_of_the_training_is_refused(tmp_path):
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    for family in ("LlamaForCausalLM", "Glm4ForCausalLM"):
        assert config_of(tmp_path, rope, family, max_model_len=16384).max_model_len == 16384
        for length in (16385, None):
            with pytest.raises(
                ArgumentError,
                match=rf"max_model_len \({length or 32768}\) must be <= the model's "
                r"max_position_embeddings \(16384\): beyond it, 'dynamic' rotates by the longest",
            ):
                config_of(
                    tmp_path, rope, family, max_model_len=length, max_num_batched_tokens=10**6
                )


def test_longrope_has_a_factor_for_each_pair(tmp_path):
    rope = {"rope_scaling": {"type": "longrope", **FACTORS}, "head_dim": 64}
    with pytest.raises(ArgumentError, match="short_factor must have 32 entries, .* got 16"):
        config_of(tmp_path, rope, "LlamaForCausalLM")


# ---- rotary embeddings that differ by layer -----------------------------------------------------

BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
SPELLINGS = [
    {"rope_parameters": BY_TYPE},
    {
        "rope_theta": 1e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
]


OLMO3 = {"rope_theta": 1e6, "rope_scaling": YARN | {"original_max_position_embeddings": 8192}}


@pytest.fixture
def by_layer(tmp_path):
    """Reads the config.json of a family whose rotation differs by layer type."""

    def read(rope: dict, family: str = "Gemma3ForCausalLM", **kwargs) -> Config:
        layers = ["sliding_attention", "full_attention"]
        fields = {"head_dim": 32, "layer_types": layers, "sliding_window": 512}
        return config_of(tmp_path, {"rope_theta": 1e6} | fields | rope, family, **kwargs)

    return read


@pytest.mark.parametrize("rope", SPELLINGS)
def test_each_layer_type_rotates_as_in_gemma3(by_layer, rope, tmp_path):
    config = by_layer(rope).model_config
    reference = Gemma3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    for index, name in enumerate(("sliding_attention", "full_attention")):
        expected = getattr(reference, f"{name}_inv_freq"), 1.0
        check_table(32, config.rope_of(index), 300, expected)
    assert config.rope_of(0)["rope_theta"] == 5e3
    assert config.max_positions == 8 * 16384
    sliding, full = rotary_tables(config, 300, CPU)
    assert not torch.equal(sliding, full)


@pytest.mark.parametrize("rope", [OLMO3, {"rope_theta": 5e5}])
def test_each_layer_type_rotates_as_in_olmo3(by_layer, rope, tmp_path):
    config = by_layer(rope, "Olmo3ForCausalLM").model_config
    reference = Olmo3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    for index, name in enumerate(("sliding_attention", "full_attention")):
        parts = (getattr(reference, f"{name}_{part}") for part in ("inv_freq", "attention_scaling"))
        check_table(32, config.rope_of(index), 300, tuple(parts))


@pytest.mark.parametrize("rope", SPELLINGS)
def test_one_layer_type_is_overridden_alone(by_layer, rope):
    linear = {"full_attention": {"factor": 2.0}}
    if "rope_scaling" in rope:  # an older config.json, whose scaling has no layer type
        linear["full_attention"]["rope_type"] = "linear"
    config = by_layer(rope, hf_overrides={"rope_parameters": linear}).model_config
    assert config.rope_of(0) == BY_TYPE["sliding_attention"]
    assert config.rope_of(1) == BY_TYPE["full_attention"] | {"factor": 2.0}
    plain = {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 7.0}}}
    config = by_layer(rope, hf_overrides=plain).model_config
    assert config.rope_of(0) == {"rope_type": "default", "rope_theta": 7.0}
    assert config.rope_of(1) == {"rope_type": "default", "rope_theta": 1e6}
    for override in ({"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default"}}):
        with pytest.raises(ArgumentError, match="with entries 'full_attention' and 'sliding_at"):
            by_layer(rope, hf_overrides=override)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters: rope_type is not suppor"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "axial"}}},
            "rope_parameters: full_attention of type 'axial' is not supported",
        ),
        ({"rope_parameters": {"full_attention": 1}}, "full_attention must be an object, got 1"),
        ({"rope_local_base_freq": 0}, "rope_local_base_freq must be > 1 and <= 1e30, got 0"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate False is not supported"),
        ({"rope_scaling": BY_TYPE}, "rope_scaling of type 'default': full_attention is not supp"),
    ],
)
def test_what_no_layer_type_computes_is_refused(by_layer, rope, message):
    with pytest.raises(ArgumentError, match=message):
        by_layer(rope)


def test_the_shortest_limit_of_the_layer_types_holds(by_layer):
    rope = BY_TYPE | {"sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ArgumentError, match=r"max_position_embeddings \(16384\): beyond it, 'dyn"):
        by_layer({"rope_parameters": rope}, max_model_len=16385, max_num_batched_tokens=10**6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 1, 1, 0, 1, 1, 1, 0]),
        ({"no_rope_layer_interval": 3}, [1, 1, 0, 1, 1, 0, 1, 1]),
        ({"no_rope_layers": [0, 1, 1, 1, 0, 1, 1, 1, 0, 0]}, [0, 1, 1, 1, 0, 1, 1, 1]),
    ],
)
def test_layers_without_rotation(tmp_path, fields, expected):
    fields = {"num_hidden_layers": 8, **fields}
    config = config_of(tmp_path, fields, "SmolLM3ForCausalLM").model_config
    assert [config.rope_of(index) is not None for index in range(8)] == [*map(bool, expected)]
    tables = rotary_tables(config, 20, CPU)
    assert len({*map(id, tables)}) == 2
    for rotates, table in zip(expected, tables, strict=True):
        assert torch.equal(table, cos_sin_table(32, 20, None, CPU)) == (not rotates)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_rope_layers": [1]}, "is refused by transformers: list index out of range"),
        (
            {"no_rope_layers": [1], "layer_types": ["full_attention"] * 2},
            "no_rope_layers must have 2 entries, one for each layer, got 1",
        ),
        ({"no_rope_layers": 4}, "no_rope_layers must be a list, got 4"),
        ({"no_rope_layers": [1, "x"]}, "no_rope_layers must be an integer between .*, got 'x'"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval must be an integer >= 1|>= 1, got"),
    ],
)
def test_wrong_lists_of_layers_are_refused(tmp_path, fields, message):
    with pytest.raises(ArgumentError, match=message):
        config_of(tmp_path, fields, "SmolLM3ForCausalLM")
