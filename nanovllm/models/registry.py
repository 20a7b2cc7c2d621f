"""The supported model families, keyed on `architectures`; all else is refused by name."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError, check_integer
from nanovllm.models.quantization_config import check_quantization
from nanovllm.models.rope_config import check_rope

if TYPE_CHECKING:
    from nanovllm.models.base import CausalLM

# architecture -> (model_type, module); the module's class of that name is imported when the model
# is built.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "nanovllm.models.llama"),
    "MistralForCausalLM": ("mistral", "nanovllm.models.mistral"),
    "Qwen2ForCausalLM": ("qwen2", "nanovllm.models.qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "nanovllm.models.qwen3"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "nanovllm.models.qwen3_moe"),
}
# Fields that change what a model computes, and that no family here implements.
UNSUPPORTED_FIELDS = ("attn_logit_softcapping", "final_logit_softcapping", "use_sliding_window")


def check_supported(raw_config: Mapping[str, Any], path: str) -> None:
    """ArgumentError if config.json asks for a family or a feature that this library lacks.

    Args:
        raw_config: config.json as parsed, before any library fills in defaults.
        path: the file's path, for the message.
    """
    _check_family(raw_config, path)
    check_rope(raw_config, path)
    for name in UNSUPPORTED_FIELDS:
        value = raw_config.get(name)
        if value:
            shown = "true" if value is True else repr(value)
            raise ArgumentError(f"{path}: {name}={shown} is not supported")
    if raw_config.get("sliding_window") is not None:  # `Config` compares it with max_model_len
        check_integer(f"{path}: sliding_window", raw_config["sliding_window"], minimum=1)
    layer_types = raw_config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
        raise ArgumentError(
            f"{path}: layer_types {layer_types!r} is not supported; supported: full_attention"
        )
    check_quantization(raw_config, path)
    hidden_act = raw_config.get("hidden_act", "silu")
    if hidden_act != "silu":
        raise ArgumentError(f"{path}: hidden_act {hidden_act!r} is not supported; supported: silu")


def _check_family(raw_config: Mapping[str, Any], path: str) -> None:
    architectures = raw_config.get("architectures") or []
    name = _first_supported(architectures)
    if name is None:
        raise ArgumentError(
            f"{path}: architectures {architectures} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    model_type, expected = raw_config.get("model_type"), ARCHITECTURES[name][0]
    if model_type != expected:
        raise ArgumentError(
            f"{path}: architectures {architectures} with model_type {model_type!r} is not "
            f"supported; the model_type of {name} is {expected!r}"
        )


def _first_supported(architectures: Any) -> str | None:
    if not isinstance(architectures, list):
        return None
    return next((a for a in architectures if isinstance(a, str) and a in ARCHITECTURES), None)


def model_class(architectures: list[str]) -> "type[CausalLM]":
    """The class that runs the first supported name of `architectures`."""
    name = _first_supported(architectures)
    assert name is not None, architectures
    return getattr(importlib.import_module(ARCHITECTURES[name][1]), name)
