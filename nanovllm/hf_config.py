"""Reads a model's config.json, with the user's changes to it, and refuses what cannot run."""

import difflib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError
from nanovllm.models.registry import check_supported

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Older and newer names of the same, of which transformers reads one and ignores the rest.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# What config.json may hold beside the fields of the family's configuration.
OTHER_FIELDS = ("torch_dtype", "quantization_config")


def read_hf_config(model: str, overrides: Any = None) -> "PretrainedConfig":
    """The configuration of a model directory.

    Args:
        model: path of the directory.
        overrides: a dict, whose fields replace those of config.json before anything is checked or
            derived (a dict in it changes only the entries that it has, but rope parameters of
            another type, or null, leave only the base of the old ones); or a callable that gets
            the `PretrainedConfig` and returns it, or another.

    Raises:
        ArgumentError: no directory, no valid config.json, a model that is not supported, or
            overrides of another type, with a field that the model's configuration does not have,
            or with different values under two names of one field.
    """
    if not (overrides is None or callable(overrides) or isinstance(overrides, Mapping)):
        raise ArgumentError(f"hf_overrides must be a dict or a callable, got {overrides!r}")
    where, raw = _read_config_json(model)
    fields = overrides if isinstance(overrides, Mapping) else {}
    if fields:
        where += " with hf_overrides"
        _check_fields(fields, raw)
        raw = _override(raw, fields)
    check_supported(raw, where)
    from transformers import AutoConfig, PretrainedConfig

    try:
        hf_config = AutoConfig.for_model(**raw) if fields else AutoConfig.from_pretrained(model)
    except Exception as error:  # its validators raise many types
        raise ArgumentError(f"{where} is refused by transformers: {error}") from error
    if callable(overrides):
        hf_config = overrides(hf_config)
        if not isinstance(hf_config, PretrainedConfig):
            raise ArgumentError(f"hf_overrides must return a PretrainedConfig, got {hf_config!r}")
        if not isinstance(hf_config.rope_parameters, dict):
            raise ArgumentError(
                "hf_overrides must leave rope_parameters a dict (no scaling: rope_type 'default' "
                f"and rope_theta), got {hf_config.rope_parameters!r}"
            )
    # As transformers' models do: an entry beside the rope parameters may replace one of them.
    hf_config.standardize_rope_params()
    if callable(overrides):
        check_supported(hf_config.to_dict(), f"{where} with hf_overrides")
    return hf_config


def _read_config_json(model: str) -> tuple[str, dict[str, Any]]:
    """The path of the file and what it holds."""
    if not os.path.isdir(model):
        raise ArgumentError(
            f"model must be an existing local directory, got {model!r} (nothing is downloaded, and "
            "'~' is not expanded: use os.path.expanduser)"
        )
    path = os.path.join(model, "config.json")
    if not os.path.isfile(path):
        raise ArgumentError(f"model directory {model!r} holds no config.json")
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except ValueError as error:
        raise ArgumentError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ArgumentError(f"{path} must hold a JSON object, got {raw!r}")
    return path, raw


def _config_class(raw: Mapping[str, Any]) -> "type[PretrainedConfig] | None":
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    return None


def _check_fields(fields: Mapping[str, Any], raw: dict[str, Any]) -> None:
    """ArgumentError for a field that is in neither config.json nor the family's configuration."""
    config_class = _config_class({**raw, **fields})
    default = config_class() if config_class else None
    for name in fields:
        if name in raw or name in (*ROPE_FIELDS, *OTHER_FIELDS) or hasattr(default, name):
            continue
        known = sorted({*raw, *(default.to_dict() if default else {})})
        [nearest] = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        raise ArgumentError(
            f"hf_overrides: the model's configuration has no field {name!r}; the nearest is "
            f"{nearest!r}"
        )


def _override(raw: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `fields` in it, as if they were written there, and there alone."""
    config_class = _config_class({**raw, **fields})
    aliases = {"torch_dtype": "dtype", **(config_class.attribute_map if config_class else {})}
    given: dict[str, str] = {}  # the field -> its name in `fields`
    for name in fields:
        _check_same(fields, given.setdefault(aliases.get(name, name), name), name)
    merged = {name: raw[name] for name in raw if aliases.get(name, name) not in given}
    for field, name in given.items():
        old, value = raw.get(name), fields[name]
        if isinstance(old, dict) and isinstance(value, Mapping):
            value = {**old, **value}
        merged[field] = value
    if not set(ROPE_FIELDS).isdisjoint(fields):
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
            f"values: {fields[name]!r} and {fields[other_name]!r}"
        )


def _override_rope(raw: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters of config.json changed by `fields`; another type replaces the scaling."""
    if fields.get("rope_scaling") and fields.get("rope_parameters"):
        _check_same(fields, "rope_scaling", "rope_parameters")
    old, new = _rope_parameters(raw, "config.json"), _rope_parameters(fields, "hf_overrides")
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
            raise ArgumentError(f"{where}: {key} must be an object, got {fields[key]!r}")
    given = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    if "type" in given:
        older = given.pop("type")
        given.setdefault("rope_type", older)
    return {**rope, **given}
