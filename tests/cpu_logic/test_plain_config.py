"""config.json without transformers: what the engine computes of it is what its classes give."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from folder_mutations import VALUES
from tiny_models import FAMILIES, OLD_CONFIGS, TINY_SETTINGS
from transformers import CONFIG_MAPPING

import nanovllm
from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.models import config_fields
from nanovllm.models.config_defaults import ATTRIBUTE_MAPS, DEFAULTS
from nanovllm.models.hf_config import read_hf_config, read_model
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.plain_config import WHOLE_HEADS
from nanovllm.models.registry import ARCHITECTURES, family_of, head_kind

SHARED = Path(nanovllm.__file__).resolve().parents[2] / "shared"
ASSETS = Path(nanovllm.__file__).parent / "assets"
ARCHITECTURE_OF = {family.model_type: name for name, family in ARCHITECTURES.items()}
# Fields that config.json names alone, or that are read through another.
NO_DEFAULT = {"num_labels", "rope_scaling", "torch_dtype", *config_fields.TYPES}
ABSENT = object()


def fields_read() -> set[str]:
    """Every field of a configuration that the engine may read."""
    return (
        config_fields.FIELDS.keys()
        | config_fields.EXPERT_FIELDS.keys()
        | config_fields.FAMILY_FIELDS.keys()
        | config_fields.HEAD_FIELDS.keys()
        | {field.name for field in dataclasses.fields(ModelConfig)}
    ) - NO_DEFAULT


def tiny_config(name: str) -> dict:
    """The config.json of FAMILIES[name], without its weights."""
    settings = TINY_SETTINGS | {"architecture": "Qwen3ForCausalLM"} | FAMILIES[name]
    architecture = settings.pop("architecture")
    config_class = CONFIG_MAPPING[ARCHITECTURES[architecture].model_type]
    config = config_class(architectures=[architecture], **settings)
    config = json.loads(config.to_json_string()) | OLD_CONFIGS.get(name, {})
    return {key: value for key, value in config.items() if value is not None}


def shared_configs() -> list[Path]:
    paths = [*SHARED.glob("configs/*/config.json"), *SHARED.glob("qwen3-0.6b/config.json")]
    return [*sorted(paths), *ASSETS.glob("*/config.json")]


def write(folder: Path, raw: dict) -> str:
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


def by_transformers(path: str, overrides: dict | None = None) -> ModelConfig:
    hf_config = read_hf_config(path, overrides)
    family, kind = family_of(hf_config.architectures), head_kind(hf_config.architectures)
    return ModelConfig.from_hf(hf_config, family, kind)


def check_equal(path: str, overrides: dict | None = None) -> bool:
    """Whether config.json was read without transformers; equal, or refused alike, it must be."""
    try:
        source = read_model(path, overrides)
    except ArgumentError as error:
        with pytest.raises(ArgumentError) as refused:
            by_transformers(path, overrides)
        assert str(refused.value) == str(error)
        return False
    expected = by_transformers(path, overrides)
    assert repr(source.model_config) == repr(expected)
    assert repr(vars(source.hf_config)) == repr(vars(read_hf_config(path, overrides)))
    return bool(source.fields)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_the_class(model_type):
    config_class = CONFIG_MAPPING[model_type]
    assert config_class.attribute_map == ATTRIBUTE_MAPS.get(model_type, {})
    stored = config_class.attribute_map.get("num_experts", "num_experts")
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    if stored != "num_experts" and stored in defaults:
        defaults["num_experts"] = defaults.pop(stored)
    assert (model_type in WHOLE_HEADS) == ("validate_architecture" in vars(config_class))
    for name in fields_read():
        expected = defaults.get(name, ABSENT)
        found = DEFAULTS[model_type].get(name, ABSENT)
        assert (found, type(found)) == (expected, type(expected)), name


def test_every_family_has_defaults():
    assert DEFAULTS.keys() == {family.model_type for family in ARCHITECTURES.values()}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_is_left_out_is_as_in_the_class(model_type, tmp_path):
    """A config.json with a family's name alone, with few other fields, and with other heads."""
    raw = {"architectures": [ARCHITECTURE_OF[model_type]], "model_type": model_type}
    assert check_equal(write(tmp_path, raw)) == (model_type != "nemotron")
    few = {"num_hidden_layers": 8, "num_attention_heads": 4, "hidden_size": 64}
    assert check_equal(write(tmp_path, {**raw, **few, "num_key_value_heads": 2}))
    for ending in ("ForSequenceClassification", "ForTokenClassification", "Model"):
        name = raw["architectures"][0].removesuffix("ForCausalLM") + ending
        check_equal(write(tmp_path, {**raw, "architectures": [name], "num_labels": 3}))


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_families(name, tmp_path):
    assert check_equal(write(tmp_path, tiny_config(name)))


@pytest.mark.parametrize("path", shared_configs(), ids=lambda path: path.parent.name)
def test_real_configs(path):
    assert check_equal(str(path.parent))
    assert check_equal(str(path.parent), {"num_hidden_layers": 2, "rope_theta": 5e5})


def mutated(raw: dict, rng: random.Random) -> dict:
    """`raw` with one or two fields left out, changed, or of another family added."""
    raw = dict(raw)
    names = sorted(fields_read() | set(raw) | {"rope_theta", "rope_scaling", "torch_dtype"})
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(names if rng.random() < 0.4 else sorted(raw))
        kind = rng.random()
        if kind < 0.25:
            raw.pop(name, None)
        elif kind < 0.5:
            others = [other[name] for other in OTHERS if name in other]
            raw[name] = rng.choice(others or VALUES)
        elif kind < 0.6 and isinstance(raw.get(name), dict) and raw[name]:
            inner = dict(raw[name])
            key = rng.choice(sorted(inner))
            raw[name] = inner | {key: rng.choice(VALUES)}
            if rng.random() < 0.5:
                del raw[name][key]
        else:
            raw[name] = rng.choice([*VALUES, 1, 2, 4, 8, None, 2.0, 0.25])
    return raw


OTHERS = [tiny_config(name) for name in FAMILIES]


def count_equal(folder: Path, seeds: range) -> int:
    """How many of the mutations were read without transformers."""
    num_plain = 0
    for seed in seeds:
        rng = random.Random(seed)
        raw = mutated(rng.choice(OTHERS), rng)
        try:
            num_plain += check_equal(write(folder, raw))
        except Exception as error:
            raise AssertionError(f"case {seed}: {json.dumps(raw)[:2000]}") from error
    return num_plain


def test_changed_configs(tmp_path):
    assert count_equal(tmp_path, range(200)) > 40


def test_hf_config_is_the_same_object_each_time(tmp_path):
    config = Config(write(tmp_path, tiny_config("qwen3-moe")))
    assert config.hf_config is config.hf_config
    assert config.replace(max_num_seqs=3).hf_config is config.hf_config
