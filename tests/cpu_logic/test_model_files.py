"""A model directory may hold anything: what is no file, no JSON or no number is refused by name."""

import json
import math
import os
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.inputs.tokenizer_check import read_fields
from nanovllm.inputs.tokenizer_files import copy_files
from nanovllm.model_files import (
    MAX_DEPTH,
    MAX_TEMPLATE_BYTES,
    is_file,
    read_bytes,
    read_chat_template,
    read_json_object,
    read_text,
)
from nanovllm.models.registry import ARCHITECTURES

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def write_config(directory: Path, architecture: str = "Qwen3MoeForCausalLM", **changes) -> str:
    family = ARCHITECTURES[architecture]
    raw = {"architectures": [architecture], "model_type": family.model_type, **SIZES, **MOE}
    if "linear_num_key_heads" in family.fields:
        raw["full_attention_interval"] = 2  # the last layer's is full
    (directory / "config.json").write_text(json.dumps(raw | changes))
    return str(directory)


def refused(message: str):
    return pytest.raises(ArgumentError, match=message)


# Files


def test_a_regular_file_is_read_also_through_links(tmp_path):
    (tmp_path / "blob").write_text('{"a": [1]}')
    (tmp_path / "link").symlink_to("blob")
    assert is_file(str(tmp_path / "link")) and not is_file(str(tmp_path / "none"))
    assert not is_file(str(tmp_path / "blob" / "none"))
    assert read_json_object(str(tmp_path / "link")) == {"a": [1]}


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: os.mkfifo(path), "it is a FIFO, not a file"),
        (lambda path: path.mkdir(), "it is a directory, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links|symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
    ],
    ids=["fifo", "directory", "device", "loop", "dangling"],
)
def test_what_is_no_file_is_refused_before_it_is_opened(make, kind, tmp_path):
    make(tmp_path / "config.json")
    with refused(f"cannot read .*config.json: .*({kind})"):
        read_bytes(str(tmp_path / "config.json"))
    with refused(f"cannot read .*config.json: .*({kind})"):
        Config(str(tmp_path))


def test_a_file_that_has_nothing_to_read_yet_is_not_waited_for(tmp_path, monkeypatch):
    """Such as a FIFO that has taken its place, or /proc/kmsg, which is called a regular file."""
    path = str(tmp_path / "config.json")
    os.mkfifo(path)
    monkeypatch.setattr("nanovllm.model_files.is_file", lambda path: True)
    writer = os.open(path, os.O_RDWR)
    try:
        with refused("nothing yet"):
            read_json_object(path)
    finally:
        os.close(writer)


@pytest.mark.parametrize("place", ["argument", "chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_is_read_up_to_a_size(place, tmp_path):
    """One of 10 MB took 2 GiB: nothing bounds what is made of it."""
    template = "x" * (MAX_TEMPLATE_BYTES + 1)
    as_json = place.endswith(".json")
    path = tmp_path / place
    path.write_text(json.dumps({"chat_template": template}) if as_json else template)
    (tmp_path / "copies").mkdir()
    with refused(f"more than {MAX_TEMPLATE_BYTES} bytes"):
        if place == "argument":
            read_chat_template(path)
        copy_files(str(tmp_path), str(tmp_path / "copies"), {}, False)


def test_chat_templates_are_read_up_to_a_size_together(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (tmp_path / "copies").mkdir()
    for name in "abc":
        (folder / f"{name}.jinja").write_text("x" * (MAX_TEMPLATE_BYTES // 2))
    with refused("additional_chat_templates/c.jinja: it has more than"):
        copy_files(str(tmp_path), str(tmp_path / "copies"), {}, False)


def test_a_file_is_read_up_to_a_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_text(str(path), 10) == "x" * 10
    with refused("it has more than 9 bytes"):
        read_text(str(path), 9)
    with refused("there is no such file"):
        read_text(str(tmp_path / "none"))
    with refused("embedded null|null byte"):
        read_text("a\0b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than"),
        ('{"a":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH, "nested more than"),
        ("9" * 5000, "is not valid JSON"),
        ("\ud800", "is not valid JSON"),
        ('"' + "x" * 9000 + '"', "must hold a JSON object"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer.*lfs pull"),
    ],
)
def test_json_that_nothing_can_use_is_refused_in_few_words(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with refused(message) as raised:
        Config(str(tmp_path))
    assert len(str(raised.value)) < 400 + 3 * len(str(tmp_path))


def test_json_is_read_down_to_the_depth_that_is_stated(tmp_path):
    depth = MAX_DEPTH - 1
    (tmp_path / "x").write_text('{"a":' * depth + "{}" + "}" * depth)
    assert read_json_object(str(tmp_path / "x"))["a"]


# The fields of config.json


MAX_SIZE = 2**31 - 1
INTEGERS = {
    "vocab_size": (1, MAX_SIZE),
    "hidden_size": (1, MAX_SIZE),
    "intermediate_size": (1, MAX_SIZE),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, MAX_SIZE),
    "num_key_value_heads": (1, MAX_SIZE),
    "head_dim": (1, MAX_SIZE),
    "max_position_embeddings": (1, 2**24),
    "original_max_position_embeddings": (1, 2**24),
    "sliding_window": (1, 2**63 - 1),
    "max_window_layers": (0, 2**63 - 1),
    "num_experts": (1, 4096),
    "num_experts_per_tok": (1, 4096),
    "moe_intermediate_size": (1, MAX_SIZE),
    "decoder_sparse_step": (1, MAX_SIZE),
}
NULLABLE = (
    "head_dim",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "sliding_window",
    "max_window_layers",
)
NUMBERS = ("rms_norm_eps", "initializer_range")
SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "norm_topk_prob",
    "use_sliding_window",
)
NOT_NUMBERS = ["64", [64], {"a": 1}, True, "x" * 5000]


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_an_integer_field_is_bounded(name, tmp_path):
    minimum, maximum = INTEGERS[name]
    nothing = [] if name in NULLABLE else [None]
    for value in [minimum - 1, maximum + 1, 10**30, -1, 1.5, math.nan, *NOT_NUMBERS, *nothing]:
        with refused(name) as raised:
            Config(write_config(tmp_path, **{name: value}))
        assert len(str(raised.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_finite_and_not_negative(name, tmp_path):
    for value in [-1e-9, math.nan, math.inf, -math.inf, None, 10**400, *NOT_NUMBERS]:
        with refused(name):
            Config(write_config(tmp_path, **{name: value}))
    assert getattr(Config(write_config(tmp_path, **{name: 0.5})).hf_config, name) == 0.5


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false(name, tmp_path):
    for value in (0, 1, "true", None, []):
        with refused(name):
            Config(write_config(tmp_path, **{name: value}), hf_overrides={name: value})


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["linalg", "int8", "float8_e4m3fn", 5, ["float32"], "x" * 999])
def test_a_dtype_is_one_of_numbers(name, value, tmp_path):
    with refused(f"{name} .* is not supported; supported: "):
        Config(write_config(tmp_path, **{name: value}))


@pytest.mark.parametrize("value", [1e31, 1e308, 10**400])
def test_a_rope_base_that_overflows_is_refused(value, tmp_path):
    with refused("rope_theta must be"):
        Config(write_config(tmp_path, rope_theta=value))


@pytest.mark.parametrize("name", ["factor", "beta_fast", "beta_slow", "attention_factor", "mscale"])
@pytest.mark.parametrize("value", [1e-300, 1e300, 5e-324])
def test_a_rope_parameter_that_overflows_is_refused(name, value, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, name: value}
    with refused(f"{name} must be"):
        Config(write_config(tmp_path, rope_parameters=rope))


@pytest.mark.parametrize("value", [3, 0.5, "x", [[1]], [-1], [1.0], [2**40]])
def test_dense_layers_are_a_list_of_numbers(value, tmp_path):
    with refused("mlp_only_layers"):
        Config(write_config(tmp_path, mlp_only_layers=value))


def test_an_odd_head_dim_cannot_be_rotated(tmp_path):
    with refused("even"):
        Config(write_config(tmp_path, head_dim=15))


def test_experts_of_all_layers_are_bounded(tmp_path):
    changes = {"num_experts": 4096, "num_hidden_layers": 64}
    with refused("experts of all layers must be between"):
        Config(write_config(tmp_path, **changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_that_nothing_uses_do_not_reach_the_configuration(architecture, tmp_path):
    """Each of these would change, break or end what transformers makes of config.json."""
    hostile = {
        "num_labels": 10**12,
        "id2label": "x",
        "problem_type": "single_label_classification",
        "to_dict": 5,
        "standardize_rope_params": "x",
        "_attn_implementation": {"": 1},
        "attribute_map": {"hidden_size": "vocab_size"},
        "output_attentions": True,
        "configuration_files": ["config.4.0.0.json"],
        "auto_map": {"AutoConfig": "code.Trap"},
        "transformers_version": ["x"],
        "name_or_path": "elsewhere",
    }
    plain = Config(write_config(tmp_path, architecture)).hf_config.to_dict()
    (tmp_path / "config.4.0.0.json").write_text('{"model_type": "gpt2", "hidden_act": "gelu"}')
    (tmp_path / "code.py").write_text("raise SystemExit('code of the directory ran')")
    config = Config(write_config(tmp_path, architecture, **hostile))
    assert config.hf_config.to_dict() == plain
    assert type(config.hf_config) is CONFIG_MAPPING[ARCHITECTURES[architecture][0]]


def test_layers_that_differ_are_refused(tmp_path):
    """transformers would give each layer a configuration of its own."""
    with refused("per_layer_config=.* is not supported"):
        Config(write_config(tmp_path, per_layer_config=[{"hidden_size": 32}, {}]))


# What a newcomer gives instead of a model's directory


def test_a_gguf_file_is_named(tmp_path):
    with refused("GGUF files are not supported: give the directory of the model"):
        Config(str(tmp_path / "Qwen3-0.6B-Q4.gguf"))
    (tmp_path / "Qwen3-0.6B-Q4.gguf").write_bytes(b"GGUF")
    with refused("holds no config.json: GGUF files are not supported"):
        Config(str(tmp_path))


def test_the_cache_of_a_hub_is_answered_with_its_snapshot(tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_config(snapshot)
    for folder in (tmp_path, tmp_path / "models--Qwen--Qwen3-0.6B"):
        with refused("it is the cache of a hub; give the directory of a .*snapshot: ") as raised:
            Config(str(folder))
        assert repr(str(snapshot)) in str(raised.value)
    Config(str(snapshot))
    (snapshot / "config.json").unlink()
    with refused("it is the cache of a hub"):
        Config(str(tmp_path / "models--Qwen--Qwen3-0.6B"))


def test_an_adapter_and_a_file_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused("holds no config.json: it is an adapter"):
        Config(str(tmp_path))
    with refused(f"it is a file: give its directory, '{tmp_path}'"):
        Config(str(tmp_path / "adapter_config.json"))


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    write_config(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert Config("model").model == str(tmp_path / "model")


# tokenizer.json


def test_replacements_that_grow_a_text_without_end_are_refused():
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for name, inner in (("normalizer", "normalizers"), ("decoder", "decoders")):
        chain = {"type": "Sequence", inner: [double] * 40}
        text = json.dumps({name: chain, "pre_tokenizer": None, "model": {}})
        with refused("its replacements make a text 1099511627776 times as long"):
            read_fields(text, "tokenizer.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}" * 2, '{"a" 1}', '{"a": }', "[" * 100_000])
def test_a_tokenizer_json_that_is_none_is_refused(text):
    with refused("tokenizer.json"):
        read_fields(text, "tokenizer.json")


def test_a_long_path_is_quoted_in_short(tmp_path):
    with refused("File name too long") as raised:
        read_bytes("x" * 5000)
    assert len(str(raised.value)) < 300


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": [LONG]},
        {"architectures": LONG},
        {"model_type": LONG},
        {"hidden_act": LONG},
        {"layer_types": [LONG]},
        {f"{LONG}softcap": LONG},
        {"rope_scaling": {"rope_type": LONG}},
        {"rope_scaling": {"rope_type": "default", LONG: 1}},
        {"rope_scaling": LONG},
        {"partial_rotary_factor": LONG},
        {"quantization_config": {"quant_method": LONG}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": LONG}},
        {"dual_chunk_attention_config": LONG},
        {"eos_token_id": LONG},
        {"vocab_size": LONG},
        {"torch_dtype": LONG},
        {"logit_scale": LONG},
    ],
)
def test_long_values_are_quoted_in_short(changes, tmp_path):
    own_names = len(", ".join(ARCHITECTURES))  # which a message may list
    with refused("config.json") as raised:
        Config(write_config(tmp_path, **changes))
    assert len(str(raised.value)) < 600 + own_names
    with refused("hf_overrides|config.json") as raised:
        Config(write_config(tmp_path), hf_overrides=changes)
    assert len(str(raised.value)) < 600 + own_names


def test_names_in_overrides_are_strings(tmp_path):
    with refused("hf_overrides must have names of fields, got 5"):
        Config(write_config(tmp_path), hf_overrides={5: 1})
