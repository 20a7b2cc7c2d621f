"""Reads a model's config.json, with the user's changes to it, and refuses what cannot run."""

import os
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from nanovllm.errors import ArgumentError, cut, nearest, shown, shown_error
from nanovllm.model_files import is_file, list_directory, read_json_object
from nanovllm.models.config_defaults import ATTRIBUTE_MAPS, DEFAULTS
from nanovllm.models.config_fields import check_fields
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.plain_config import plain_config
from nanovllm.models.quantization_config import with_quantization
from nanovllm.models.registry import check_supported, family_of, first_supported, head_kind
from nanovllm.models.rope_config import LAYER_TYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Older and newer names of the same, of which transformers reads one and ignores the rest.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# What config.json may hold beside the fields of the family's configuration.
OTHER_FIELDS = ("torch_dtype", "quantization_config")
# Multimodal architectures -> that of their text part, which is all that is run of them, and what
# `tie_word_embeddings` is by default.
TEXT_PARTS = {
    "Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", True),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5ForCausalLM", False),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3_5MoeForCausalLM", False),
}
# What stands beside the text part's configuration and holds for it as well.
SHARED_FIELDS = "dtype torch_dtype quantization_config compression_config eos_token_id"
PART_OF_NAME = r"[A-Za-z0-9][\w.-]*"
HUB_NAME = re.compile(f"{PART_OF_NAME}/{PART_OF_NAME}")
GGUF = (
    "GGUF files are not supported: give the directory of the model that they were made of, with "
    "config.json and *.safetensors"
)


@dataclass
class ModelSource:
    """A model's config.json as it was read and checked.

    Attributes:
        model_config: what the engine computes of it.
        model_type: of the configuration's class.
        fields: the arguments of that class; empty if it was needed at once.
        where: the file, for messages.
    """

    model_config: ModelConfig
    model_type: str
    fields: dict[str, Any]
    where: str
    _hf_config: "PretrainedConfig | None" = None

    @property
    def hf_config(self) -> "PretrainedConfig":
        """transformers' configuration, made when it is first asked for."""
        if self._hf_config is None:
            self._hf_config = _make(self.model_type, self.fields, self.where)
            self._hf_config.standardize_rope_params()
        return self._hf_config

    def stated(self, name: str) -> Any:
        """What config.json says in a field that the engine does not use; None: nothing."""
        if self._hf_config is None:
            return self.fields.get(name)
        return getattr(self._hf_config, name, None)


def read_model(model: str, overrides: Any = None, model_impl: str = "nanovllm") -> ModelSource:
    """The configuration of a model directory, without transformers where `plain_config` makes it.

    The arguments and errors are those of `read_hf_config`.
    """
    raw, where = _read_fields(model, overrides, model_impl)
    if not (callable(overrides) or uses_transformers(raw, model_impl)):
        fields = _check(raw, where, model_impl)
        model_config = _plain_model_config(raw["model_type"], fields)
        if model_config is not None:
            return ModelSource(model_config, raw["model_type"], fields, where)
    hf_config = _hf_config(raw, overrides, where, model_impl)
    if uses_transformers(hf_config.to_dict(), model_impl):
        model_config = ModelConfig.from_transformers(hf_config)
    else:
        model_config = _model_config(hf_config)
    return ModelSource(model_config, hf_config.model_type, {}, where, hf_config)


def read_hf_config(
    model: str, overrides: Any = None, model_impl: str = "nanovllm"
) -> "PretrainedConfig":
    """The configuration of a model directory, made of what was read of config.json and checked.

    Nothing reads the file a second time, and fields that nothing here uses are left out.

    Args:
        model: path of the directory.
        overrides: a dict, whose fields replace those of config.json before anything is checked or
            derived (a dict in it changes only the entries that it has, but rope parameters of
            another type, or null, leave only the base of the old ones); or a callable that gets
            the `PretrainedConfig` and returns it, or another.
        model_impl: of `LLM`. See `uses_transformers`.

    Raises:
        ArgumentError: no directory, no valid config.json, a model that is not supported, or
            overrides with a field that the model's configuration does not have, or with different
            values under two names of one field.
    """
    raw, where = _read_fields(model, overrides, model_impl)
    return _hf_config(raw, overrides, where, model_impl)


def _read_fields(model: str, overrides: Any, model_impl: str) -> tuple[dict[str, Any], str]:
    """What config.json says, with overrides that are a dict, and where it says so."""
    where, raw = _read_config_json(model)
    raw = with_quantization(raw, model)
    if model_impl != "transformers":
        raw = _text_part(raw)
    fields = overrides if isinstance(overrides, Mapping) else {}
    if fields:
        where += " with hf_overrides"
        _check_names(fields, raw)
        raw = _override(raw, fields)
    return raw, where


def _hf_config(
    raw: dict[str, Any], overrides: Any, where: str, model_impl: str
) -> "PretrainedConfig":
    if uses_transformers(raw, model_impl):
        return _any_config(raw, overrides, where)
    fields = _check(raw, where, model_impl)
    hf_config = _make(raw["model_type"], fields, where)
    if callable(overrides):
        hf_config = _overridden(hf_config, overrides)
        if not isinstance(hf_config.rope_parameters, dict):
            raise ArgumentError(
                "hf_overrides must leave rope_parameters a dict (no scaling: rope_type 'default' "
                f"and rope_theta), got {shown(hf_config.rope_parameters)}"
            )
    # As transformers' models do: an entry beside the rope parameters may replace one of them.
    hf_config.standardize_rope_params()
    if callable(overrides):
        _check(hf_config.to_dict(), f"{where} with hf_overrides", model_impl)
    return hf_config


def _make(model_type: str, fields: dict[str, Any], where: str) -> "PretrainedConfig":
    """The family's configuration of checked fields, which stay as they are."""
    config_class = _config_class({"model_type": model_type})
    assert config_class is not None  # it is in the registry
    try:
        return config_class(**deepcopy(fields))
    except Exception as error:  # its validators raise many types
        raise ArgumentError(f"{where} is refused by transformers: {shown_error(error)}") from error


def _model_config(hf_config: "PretrainedConfig") -> ModelConfig:
    family = family_of(hf_config.architectures or ())
    return ModelConfig.from_hf(hf_config, family, head_kind(hf_config.architectures))


def _plain_model_config(model_type: str, fields: dict[str, Any]) -> ModelConfig | None:
    """The same of checked fields without transformers; None: it has to be asked."""
    config = plain_config(model_type, fields)
    if config is None:
        return None
    try:
        return _model_config(cast("PretrainedConfig", config))
    except Exception:  # the configuration of transformers, made next, tells why
        return None


def uses_transformers(fields: Mapping[str, Any], model_impl: str) -> bool:
    """Whether transformers' own module runs the model.

    With "auto" it does if the first architecture has no file here, and transformers has it.
    """
    architectures = fields.get("architectures")
    if model_impl == "auto":
        return first_supported(architectures) is None and _causal_lm(fields) is not None
    return model_impl == "transformers"


def _causal_lm(fields: Mapping[str, Any]) -> str | None:
    """The class of transformers that a config.json asks for, if it is a causal language model."""
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not isinstance(fields.get("model_type"), str):
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(fields["model_type"])
    return name if name in architectures else None


def _any_config(raw: dict[str, Any], overrides: Any, where: str) -> "PretrainedConfig":
    """The configuration of a model that transformers runs; ArgumentError if it cannot."""
    if _causal_lm(raw) is None:
        raise ArgumentError(
            f"{where}: architectures {shown(raw.get('architectures'))} with model_type "
            f"{shown(raw.get('model_type'))} is no causal language model of transformers"
        )
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            raise ArgumentError(f"{where}: {name} is not supported with transformers' own module")
    config_class = _config_class(raw)
    assert config_class is not None  # transformers maps a class to it
    try:
        hf_config = config_class.from_dict(raw)
    except Exception as error:  # its validators raise many types
        raise ArgumentError(f"{where} is refused by transformers: {shown_error(error)}") from error
    return _overridden(hf_config, overrides) if callable(overrides) else hf_config


def _overridden(hf_config: "PretrainedConfig", overrides: Any) -> "PretrainedConfig":
    """What a callable of the user makes of a configuration."""
    from transformers import PretrainedConfig

    hf_config = overrides(hf_config)
    if not isinstance(hf_config, PretrainedConfig):
        raise ArgumentError(f"hf_overrides must return a PretrainedConfig, got {shown(hf_config)}")
    return hf_config


def _check(raw: dict[str, Any], where: str, model_impl: str) -> dict[str, Any]:
    """The fields for the family's configuration; ArgumentError if one of them is not supported."""
    try:
        check_supported(raw, where)
    except ArgumentError as error:
        quantized = raw.get("quantization_config") or raw.get("compression_config")
        if model_impl != "auto" or quantized or _causal_lm(raw) is None:
            raise
        raise ArgumentError(f"{error}; model_impl='transformers' may run it") from None
    fields = family_of(raw["architectures"]).fields
    newest = dict(raw)
    for name, stored in _attribute_map(raw).items():
        if stored in newest:  # of two names, the one that transformers stores wins
            newest[name] = newest.pop(stored)
        if name == "num_local_experts" and name in newest:  # OLMoE's older name
            newest["num_experts"] = newest.pop(name)
    is_off = "use_sliding_window" in fields and newest.get("use_sliding_window") is False
    if is_off and newest.get("sliding_window") == 0:
        del newest["sliding_window"]  # as transformers saves Qwen2-MoE's
    has_head = head_kind(raw["architectures"]) is not None
    return check_fields(newest, where, DEFAULTS[raw["model_type"]], fields, has_head)


def _read_config_json(model: str) -> tuple[str, dict[str, Any]]:
    """The path of the file and what it holds."""
    if not os.path.isdir(model):
        raise ArgumentError(
            f"model must be an existing local directory, got {shown(model)} "
            f"({why_no_directory(model)})"
        )
    path = os.path.join(model, "config.json")
    if not is_file(path):
        raise ArgumentError(f"model directory {model!r} holds no config.json{_what_it_is(model)}")
    return path, read_json_object(path)


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a multimodal model's text part, if the family is here; else all as they are."""
    architectures, text = raw.get("architectures"), raw.get("text_config")
    if not isinstance(architectures, list) or not isinstance(text, dict):
        return raw
    found = [TEXT_PARTS[name] for name in TEXT_PARTS if name in architectures]
    if not found:
        return raw
    name, is_tied = found[0]
    shared = {"tie_word_embeddings": is_tied} | {
        name: raw[name] for name in (*SHARED_FIELDS.split(), "tie_word_embeddings") if name in raw
    }
    return {**text, **shared, "architectures": [name]}


def why_no_directory(model: str) -> str:
    """What a path that is no directory may be meant for, and what to give instead."""
    if model.lower().endswith(".gguf"):
        return GGUF
    if os.path.isfile(model):
        return f"it is a file: give its directory, {os.path.dirname(os.path.abspath(model))!r}"
    if HUB_NAME.fullmatch(model):
        return (
            f"to get it: hf download {model} --local-dir {model.rpartition('/')[2]}; or let "
            "download=True or NANOVLLM_DOWNLOAD=1 do it"
        )
    return "'~' is not expanded: use os.path.expanduser"


def what_it_is(names: Collection[str]) -> str:
    """What has files of these names and no config.json, and what to give instead."""
    if any(name.lower().endswith(".gguf") for name in names):
        return f": {GGUF}"
    if "adapter_config.json" in names:
        return ": it is an adapter (LoRA), which is not supported: merge it into its model first"
    return ""


def _what_it_is(model: str) -> str:
    """The same of a directory, which may also be the cache of a hub."""
    names = list_directory(model)
    if found := what_it_is(names):
        return found
    if os.path.isdir(os.path.join(model, "snapshots")):
        snapshots = _snapshots(model)
        where = " or ".join(map(repr, snapshots[:2])) or "one, but it has none: download it again"
        return f": it is the cache of a hub; give the directory of a snapshot: {where}"
    cached = [name for name in names if name.startswith("models--")]
    if cached:
        snapshots = [path for name in cached for path in _snapshots(os.path.join(model, name))]
        where = " or ".join(map(repr, snapshots[:2])) or "none is there"
        return f": it is the cache of a hub; give the directory of a model's snapshot: {where}"
    return ""


def _snapshots(cache: str) -> list[str]:
    """The snapshots of a model in a hub's cache, newest first."""
    folder = os.path.join(cache, "snapshots")
    paths = [os.path.join(folder, name) for name in list_directory(folder)]
    found = [path for path in paths if os.path.isfile(os.path.join(path, "config.json"))]
    return sorted(found, key=os.path.getmtime, reverse=True)


def _config_class(raw: Mapping[str, Any]) -> "type[PretrainedConfig] | None":
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    return None


def _attribute_map(fields: Mapping[str, Any]) -> Mapping[str, str]:
    """Other names of fields, and under which the class of `fields`' model_type stores them."""
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in DEFAULTS:
        return ATTRIBUTE_MAPS.get(model_type, {})
    config_class = _config_class(fields)
    return config_class.attribute_map if config_class else {}


def _check_names(fields: Mapping[str, Any], raw: dict[str, Any]) -> None:
    """ArgumentError for a field that is in neither config.json nor the family's configuration."""
    for name in fields:
        if not isinstance(name, str):
            raise ArgumentError(f"hf_overrides must have names of fields, got {shown(name)}")
    model_type = {**raw, **fields}.get("model_type")
    defaults = DEFAULTS.get(model_type, {}) if isinstance(model_type, str) else {}
    known_names = {*raw, *ROPE_FIELDS, *OTHER_FIELDS, *defaults}
    others = [name for name in fields if name not in known_names]
    config_class = _config_class({**raw, **fields}) if others else None
    default = config_class() if config_class else None
    for name in others:
        if hasattr(default, name):
            continue
        known = sorted({*raw, *(default.to_dict() if default else {})})
        guess = nearest(cut(name), known)
        raise ArgumentError(
            f"hf_overrides: the model's configuration has no field {shown(name)}"
            + (f"; the nearest is {guess!r}" if guess else "")
        )


def _override(raw: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `fields` in it, as if they were written there, and there alone."""
    aliases = {"torch_dtype": "dtype", **_attribute_map({**raw, **fields})}
    given: dict[str, str] = {}  # the field -> its name in `fields`
    for name in fields:
        _check_same(fields, given.setdefault(aliases.get(name, name), name), name)
    merged = {name: raw[name] for name in raw if aliases.get(name, name) not in given}
    for field, name in given.items():
        old, value = raw.get(name), fields[name]
        if isinstance(old, dict) and isinstance(value, Mapping):
            value = {**old, **value}
        merged[field] = value
    if _has_rope_by_layer_type(merged) and not set(ROPE_FIELDS).isdisjoint(fields):
        merged |= _override_rope_by_layer_type(raw, fields)
    elif not set(ROPE_FIELDS).isdisjoint(fields):
        merged = {name: merged[name] for name in merged if name not in ROPE_FIELDS}
        merged["rope_parameters"] = _override_rope(raw, fields)
        if "original_max_position_embeddings" in _rope_parameters(fields, "hf_overrides"):
            merged.pop("original_max_position_embeddings", None)  # which would win
    if "num_hidden_layers" in fields and "layer_types" not in fields:
        merged.pop("layer_types", None)  # one entry for each layer: derived anew
    return merged


def _check_same(fields: Mapping[str, Any], name: str, other_name: str) -> None:
    if fields[name] != fields[other_name]:
        raise ArgumentError(
            f"hf_overrides: {name!r} and {other_name!r} are names of one field, with different "
            f"values: {shown(fields[name])} and {shown(fields[other_name])}"
        )


def _override_rope(raw: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters of config.json changed by `fields`; another type replaces the scaling."""
    if fields.get("rope_scaling") and fields.get("rope_parameters"):
        _check_same(fields, "rope_scaling", "rope_parameters")
    return _changed_rope(
        _rope_parameters(raw, "config.json"), _rope_parameters(fields, "hf_overrides")
    )


def _has_rope_by_layer_type(fields: Mapping[str, Any]) -> bool:
    name = first_supported(fields.get("architectures"))
    return name is not None and family_of([name]).has_rope_by_layer_type


def _override_rope_by_layer_type(raw: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of rope parameters that differ by layer type, each changed by those in `fields`.

    Of an older config.json the base stays, which `rope_parameters` do not name.
    """
    given = fields.get("rope_parameters")
    by_type = isinstance(given, Mapping) and {*given} <= {*LAYER_TYPES}
    if not by_type or any(name in fields for name in ("rope_theta", "rope_scaling")):
        raise ArgumentError(
            "hf_overrides must give this model's rotary embeddings as rope_parameters with entries "
            f"{' and '.join(map(repr, LAYER_TYPES))}, got "
            f"{shown({name: fields[name] for name in ROPE_FIELDS if name in fields})}"
        )
    assert isinstance(given, Mapping)
    rope = dict(raw.get("rope_parameters") or {})
    for name in given:
        old, new = (
            _rope_parameters({"rope_parameters": part}, "hf_overrides")
            for part in (rope.get(name) or {}, given[name])
        )
        rope[name] = _changed_rope(old, new)
    changed: dict[str, Any] = {"rope_parameters": rope}
    if "full_attention" in given:
        changed["rope_scaling"] = None  # of an older config.json, which would win
    return changed


def _changed_rope(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    old_type = old.get("rope_type", "default")
    if new.get("rope_type", old_type) != old_type:
        kept = ("rope_theta", "partial_rotary_factor")  # no part of the scaling
        old = {name: old[name] for name in kept if name in old}
    return {**old, **new}


def _rope_parameters(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `fields` says of rotary embeddings, by the newest names; null says "no scaling".

    As in transformers, `rope_scaling` wins, and an entry of either wins over one beside it.
    """
    rope = {name: fields[name] for name in ("rope_theta",) if name in fields}
    for key in ("rope_scaling", "rope_parameters"):
        if fields.get(key, {}) is None:
            rope["rope_type"] = "default"
        elif not isinstance(fields.get(key, {}), Mapping):
            raise ArgumentError(f"{where}: {key} must be an object, got {shown(fields[key])}")
    given = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    if "type" in given:
        older = given.pop("type")
        given.setdefault("rope_type", older)
    return {**rope, **given}
