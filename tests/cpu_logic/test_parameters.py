"""What is made of the declarations: documentation, and configurations that nothing changes."""

import inspect
from dataclasses import FrozenInstanceError, fields

import migrating_page
import pytest
from parameters_page import PATH, page
from test_config import write_model

from nanovllm import LLM, ArgumentError, PoolerConfig, PoolingParams, SamplingParams
from nanovllm.config import Config
from nanovllm.parameters import (
    at_least,
    boolean,
    choice,
    clamped,
    integer,
    number,
    optional,
    parameters,
)

CLASSES = (Config, SamplingParams, PoolingParams, PoolerConfig)


def test_the_page_of_parameters_is_up_to_date():
    assert PATH.read_text() == page(), "run: python tests/parameters_page.py"


def test_the_page_on_migrating_has_the_tables_of_vllms_names():
    text = migrating_page.PATH.read_text("utf-8")
    assert text == migrating_page.page(text), "run: python tests/migrating_page.py"


@pytest.mark.parametrize(
    ("documented", "declared"),
    [(LLM, Config), (SamplingParams,) * 2, (PoolingParams,) * 2, (PoolerConfig,) * 2],
)
def test_the_docstring_has_every_parameter_with_its_default(documented, declared):
    text = " ".join(inspect.getdoc(documented).split())
    for p in parameters(declared):
        assert f"{p.name}: {p.help}" in text or f"{p.name} ({p.aliases[0]}): {p.help}" in text
        assert p.name == "model" or f"default {p.shown_default}." in text.partition(p.help)[2]
    assert "{" not in text and "Raises: ArgumentError" in text
    assert max(map(len, documented.__doc__.splitlines())) <= 96


def test_every_parameter_has_a_sentence_of_help():
    for p in (p for cls in CLASSES for p in parameters(cls)):
        assert p.help.endswith(".") and "|" not in p.help and len(p.help.split()) > 2, p.name


def test_nothing_sets_a_field_of_a_configuration(tmp_path):
    config = Config(write_model(tmp_path))
    for frozen in (config, config.model_config):
        for field in fields(frozen):
            with pytest.raises(FrozenInstanceError):
                setattr(frozen, field.name, None)
    other = config.replace(num_kvcache_blocks=7, eos_token_ids=frozenset({1}))
    assert (other.num_kvcache_blocks, other.eos_token_ids) == (7, {1})
    assert (config.num_kvcache_blocks, config.eos_token_ids) == (None, frozenset())
    assert other.model_config is config.model_config


def test_the_models_configuration_is_that_of_the_file(tmp_path):
    model = Config(write_model(tmp_path, eos_token_id=[1, 2])).model_config
    assert model.architectures == ("Qwen3ForCausalLM",)
    assert (model.dtype, model.vocab_size, model.hidden_size) == ("bfloat16", 384, 64)
    assert (model.num_hidden_layers, model.intermediate_size) == (2, 96)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (8, 4, 16)
    assert model.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert (model.max_positions, model.full_attention_limit) == (8192, None)
    assert (model.tie_word_embeddings, model.attention_bias, model.mlp_bias) == (True, False, False)
    assert (model.eos_token_id, model.quantization) == ([1, 2], None)
    assert not any(map(model.is_sparse, range(2)))


@pytest.mark.parametrize(
    ("check", "limits", "kept", "refused"),
    [
        (integer(1, 8), "integer from 1 to 8", {1: 1, 8: 8}, [0, 9, 1.0, True, None]),
        (at_least(1, 100), "integer >= 1", {1: 1, 100: 100}, [0, 101]),
        (clamped(0), "integer >= 0", {0: 0, 2**31: 2**31 - 1}, [-1]),
        (number("< 1", lambda x: x < 1), "< 1", {0: 0.0}, [1, "0"]),
        (choice("a", "b", aliases={"c": "a"}), '"a" or "b"', {"b": "b", "c": "a"}, ["d", 1]),
        (optional(boolean), "True or False or None", {None: None, True: True}, [0]),
    ],
)
def test_checks_keep_or_refuse(check, limits, kept, refused):
    assert check.limits == limits
    for value, expected in kept.items():
        result = check.run("name", value)
        assert result == expected and type(result) is type(expected)
    for value in refused:
        with pytest.raises(ArgumentError, match="^name must be "):
            check.run("name", value)
