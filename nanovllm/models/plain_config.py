"""The configuration of a known family made of config.json alone, without transformers.

It has the attributes that `ModelConfig.from_hf` reads, equal to those of transformers' class. What
that class might refuse, warn of or change in a way that is not repeated here makes none: then the
class itself is asked.
"""

from collections.abc import Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from nanovllm.models.config_defaults import (
    DEFAULTS,
    FULL_ATTENTION_INTERVALS,
    GLM_EOS_TOKEN_IDS,
    GPT_OSS_ROPE,
    PARTIAL_ROTARY_FACTORS,
    ROPE_THETAS,
)

FLOATS = frozenset(
    """attn_logit_softcapping final_logit_softcapping initializer_range layer_norm_eps logit_scale
    norm_eps norm_epsilon rms_norm_eps swiglu_alpha swiglu_limit""".split()
)
NUMBERS = frozenset(  # an integer is taken as well
    "attention_multiplier embedding_multiplier logits_scaling residual_multiplier".split()
)
STRINGS = frozenset("dtype hidden_act hidden_activation problem_type".split())
LISTS = frozenset("architectures layer_types mlp_only_layers no_rope_layers".split())
# Beside fields whose default is null.
MAY_BE_NULL = frozenset(
    "attn_logit_softcapping eos_token_id final_logit_softcapping sliding_window".split()
)
WHOLE_HEADS = ("arcee", "gemma2", "gemma3_text", "llama")  # hidden_size is a multiple of them
HYBRIDS = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")  # with gated delta nets
PLAIN_ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
ORIGINAL = "original_max_position_embeddings"
SCALED_ROPE_TYPES = ("llama3", "longrope", "yarn")  # of a training length


class _NotPlain(Exception):
    """Only transformers knows what comes of this config.json."""


def plain_config(model_type: str, fields: Mapping[str, Any]) -> SimpleNamespace | None:
    """The configuration of checked fields, or None.

    Args:
        model_type: of a family in the registry.
        fields: as `config_fields.check_fields` gives them; they are not changed.
    """
    config = DEFAULTS[model_type] | deepcopy(dict(fields))
    try:
        for name in fields.keys() & DEFAULTS[model_type].keys():
            _check_type(model_type, name, fields[name])
        _derive(model_type, config)
        _derive_head(config)
        if model_type in ("gemma3_text", "olmo3"):
            config["rope_parameters"] = _rope_by_layer_type(model_type, config)
        else:
            config["rope_parameters"] = _rope(model_type, config)
    except _NotPlain:
        return None
    return SimpleNamespace(**config)


def _require(condition: bool) -> None:
    if not condition:
        raise _NotPlain


def _check_type(model_type: str, name: str, value: Any) -> None:
    """Whether the class, whose types are strict, takes a value of the field."""
    default = DEFAULTS[model_type][name]
    if value is None:
        return _require(default is None or name in MAY_BE_NULL)
    kinds: tuple[type, ...] = (int,)
    if name in FLOATS:
        kinds = (float,)
    elif name in NUMBERS:
        kinds = (float, int)
    elif name in STRINGS:
        kinds = (str,)
    elif name in LISTS:
        kinds = (list,)
    elif type(default) is bool:
        kinds = (bool,)
    elif name in ("id2label", "rope_parameters"):
        kinds = (dict,)
    elif name == "eos_token_id":
        kinds = (int, list)
    _require(type(value) in kinds)
    if type(value) is list:
        kind = str if name in ("architectures", "layer_types") else int
        _require(all(type(entry) is kind for entry in value))


def _derive(model_type: str, config: dict[str, Any]) -> None:
    """Fields that follow from others, and what the class asks of their values."""
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    _require(hidden_size % num_heads == 0 or model_type not in WHOLE_HEADS)
    _require(0 <= config["initializer_range"] <= 1)
    if config.get("head_dim") is None:
        config["head_dim"] = hidden_size // num_heads
    _require(config["head_dim"] % 2 == 0)
    if config["num_key_value_heads"] is None:
        _require(model_type != "nemotron")
        config["num_key_value_heads"] = num_heads
    if config["dtype"] is None:
        config["dtype"] = config.get("torch_dtype")
    if config["eos_token_id"] is None and model_type in ("glm", "glm4"):
        config["eos_token_id"] = GLM_EOS_TOKEN_IDS
    if model_type == "gemma" and config["hidden_act"] == "gelu":
        config["hidden_act"] = "gelu_pytorch_tanh"
    has_switch = "use_sliding_window" in DEFAULTS[model_type] and model_type != "smollm3"
    if has_switch and not config["use_sliding_window"]:
        config["sliding_window"] = 0 if model_type == "qwen2_moe" else None
    if "mlp_only_layers" in DEFAULTS[model_type] and config["mlp_only_layers"] is None:
        config["mlp_only_layers"] = []
    layers = range(config["num_hidden_layers"])
    if model_type == "smollm3" and config["no_rope_layers"] is None:
        interval = config["no_rope_layer_interval"]
        config["no_rope_layers"] = [int((i + 1) % interval != 0) for i in layers]
    if config.get("layer_types") is None and "layer_types" in DEFAULTS[model_type]:
        config["layer_types"] = _layer_types(model_type, config)
    layer_types = config.get("layer_types")
    if layer_types is not None:
        _require(type(layer_types) is list and len(layer_types) == len(layers))


def _layer_types(model_type: str, config: Mapping[str, Any]) -> list[str]:
    """Of each layer the type, where config.json does not name them."""
    layers = range(config["num_hidden_layers"])
    interval = FULL_ATTENTION_INTERVALS.get(model_type)
    if interval is not None:
        other = "linear_attention" if model_type in HYBRIDS else "sliding_attention"
        if model_type in HYBRIDS:
            interval = config.get("full_attention_interval", interval)
        elif model_type in ("cohere2", "exaone4", "gemma3_text"):
            interval = config.get("sliding_window_pattern", interval)
        _require(type(interval) is int and interval > 0)
        _require(model_type != "exaone4" or config["sliding_window"] is not None)
        return [other if (i + 1) % interval else "full_attention" for i in layers]
    window = config["sliding_window"]
    if model_type == "smollm3":
        no_rope = config["no_rope_layers"]
        _require(len(no_rope) >= len(layers))
        has_window = bool(config["use_sliding_window"]) and window is not None
        windowed = [has_window and not no_rope[i] for i in layers]
    elif model_type == "ministral":
        windowed = [window is not None for _ in layers]
    elif model_type == "qwen2_moe":
        most = config["max_window_layers"] if config["use_sliding_window"] else 0
        windowed = [i % 2 == 0 and i < most for i in layers]
    else:
        first = config["max_window_layers"]
        windowed = [window is not None and i >= first for i in layers]
    return ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]


def _derive_head(config: dict[str, Any]) -> None:
    """The labels of a classification head, which every class has."""
    labels = config["id2label"]
    if labels is None:
        number = config.get("num_labels", 2)
        _require(type(number) is int)
        labels = {index: f"LABEL_{index}" for index in range(number)}
    config["id2label"] = {int(index): label for index, label in labels.items()}
    _require(config["problem_type"] != "single_label_classification" or len(labels) > 1)


def _rope(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters of a family whose layers all rotate alike."""
    stated = config["rope_parameters"]
    if stated is None and model_type == "gpt_oss":
        stated = dict(GPT_OSS_ROPE)
    rope: dict[str, Any] = config.get("rope_scaling") or stated or {}
    rope.setdefault("rope_theta", config.get("rope_theta", ROPE_THETAS.get(model_type, 10000.0)))
    partial = PARTIAL_ROTARY_FACTORS.get(model_type, 1.0 if model_type == "phi3" else None)
    partial = config.get("partial_rotary_factor", partial)
    _require(partial is not None or model_type != "phi3")
    if partial is not None:
        rope.setdefault("partial_rotary_factor", partial)
    _complete(rope, config)
    if rope["rope_type"] in SCALED_ROPE_TYPES and ORIGINAL in config:
        rope[ORIGINAL] = config[ORIGINAL]  # the field beside wins
    if model_type == "phi3":
        _check_phi3(rope, config)
    return rope


def _complete(rope: dict[str, Any], config: Mapping[str, Any]) -> None:
    rope.setdefault("rope_type", rope.get("type", "default"))
    _require(rope["rope_type"] in PLAIN_ROPE_TYPES)
    if rope["rope_type"] in SCALED_ROPE_TYPES:
        rope.setdefault(ORIGINAL, config["max_position_embeddings"])


def _check_phi3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    _require(rope["rope_type"] in ("default", "longrope"))
    size = config["hidden_size"] // config["num_attention_heads"]
    num_pairs = int(size * rope["partial_rotary_factor"]) // 2
    for name in ("short_factor", "long_factor"):
        if name in rope:
            _require(type(rope[name]) is list and len(rope[name]) == num_pairs)


def _rope_by_layer_type(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters of each layer type.

    As in transformers, an older config.json's `rope_theta` is that of full attention alone.
    """
    _require("partial_rotary_factor" not in config)
    rope: dict[str, Any] = config["rope_parameters"]
    if rope is None:
        rope = {name: {"rope_type": "default"} for name in ("sliding_attention", "full_attention")}
    if config.get("rope_scaling") is not None:
        _require(isinstance(rope.get("full_attention"), dict))
        rope["full_attention"].update(config["rope_scaling"])
    theta = ROPE_THETAS[model_type]
    local_theta = theta
    if model_type == "gemma3_text":
        local_theta = config.get("rope_local_base_freq", 10000.0)
    bases = {
        "full_attention": config.get("rope_theta", theta),
        "sliding_attention": local_theta,
    }
    for name, base in bases.items():
        if rope.get(name) is None:
            rope[name] = {"rope_type": "default"}
        rope[name].setdefault("rope_theta", base)
        if name in config["layer_types"]:
            _complete(rope[name], config)
    return rope
