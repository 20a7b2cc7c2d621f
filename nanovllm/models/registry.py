"""The supported model families, keyed on `architectures`; all else is refused by name."""

import importlib
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError

if TYPE_CHECKING:
    from nanovllm.models.base import CausalLM

# architecture -> (module, class); the module is imported when the model is built.
ARCHITECTURES = {"Qwen3ForCausalLM": ("nanovllm.models.qwen3", "Qwen3ForCausalLM")}


def check_supported(raw_config: dict[str, Any], path: str) -> None:
    """ArgumentError if config.json asks for a family or a feature that this library lacks.

    Args:
        raw_config: config.json as parsed, before any library fills in defaults.
        path: the file's path, for the message.
    """
    architectures = raw_config.get("architectures") or []
    if not any(name in ARCHITECTURES for name in architectures):
        raise ArgumentError(
            f"{path}: architectures {architectures} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling.
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw_config.get(key) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ArgumentError(
                f"{path}: {key} of type {rope_type!r} is not supported; supported: default"
            )
    if raw_config.get("use_sliding_window"):
        raise ArgumentError(f"{path}: use_sliding_window=true is not supported")
    if raw_config.get("quantization_config"):
        method = raw_config["quantization_config"].get("quant_method", "unnamed")
        raise ArgumentError(f"{path}: quantization_config {method!r} is not supported")
    hidden_act = raw_config.get("hidden_act", "silu")
    if hidden_act != "silu":
        raise ArgumentError(f"{path}: hidden_act {hidden_act!r} is not supported; supported: silu")


def model_class(architectures: list[str]) -> "type[CausalLM]":
    """The class that runs the first supported name of `architectures`."""
    module, name = next(ARCHITECTURES[a] for a in architectures if a in ARCHITECTURES)
    return getattr(importlib.import_module(module), name)
