"""The supported model families, keyed on `architectures`; all else is refused by name."""

import importlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.errors import MAX_SHOWN, ArgumentError, cut, shown
from nanovllm.models.attention_config import check_attention
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
# What changes a model's results and no family here implements: `is_causal` if it is false; fields,
# also those with a word in their names, unless they are false, null, 0 or empty; factors beside 1.
UNSUPPORTED_FIELDS = (
    "use_sliding_window",
    "use_mrope",
    "rope_interleaved",
    "alibi",
    "per_layer_config",
)
UNSUPPORTED_WORDS = ("softcap", "soft_cap")
FACTORS = (
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
)


def check_supported(raw_config: Mapping[str, Any], path: str) -> None:
    """ArgumentError if config.json asks for a family or a feature that this library lacks.

    Args:
        raw_config: config.json as parsed, before any library fills in defaults.
        path: the file's path, for the message.
    """
    _check_family(raw_config, path)
    check_rope(raw_config, path)
    for name, value in raw_config.items():
        if _is_unsupported(name, value):
            raise ArgumentError(f"{path}: {cut(name)}={_as_json(value)} is not supported")
    check_attention(raw_config, path)
    check_quantization(raw_config, path)
    hidden_act = raw_config.get("hidden_act", "silu")
    if hidden_act != "silu":
        raise ArgumentError(
            f"{path}: hidden_act {shown(hidden_act)} is not supported; supported: silu"
        )


def _as_json(value: Any) -> str:
    return cut(json.dumps(value, default=repr))


def _is_unsupported(name: str, value: Any) -> bool:
    if name == "is_causal":  # false: every token attends to all of the prompt
        return value is False
    if name in FACTORS:
        return value is not None and value != 1
    return bool(value) and (
        name in UNSUPPORTED_FIELDS or any(word in name for word in UNSUPPORTED_WORDS)
    )


def _check_family(raw_config: Mapping[str, Any], path: str) -> None:
    architectures = raw_config.get("architectures") or []
    name = _first_supported(architectures)
    if name is None:
        raise ArgumentError(
            f"{path}: architectures {_shown_names(architectures)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    model_type, expected = raw_config.get("model_type"), ARCHITECTURES[name][0]
    if model_type != expected:
        raise ArgumentError(
            f"{path}: architectures {_shown_names(architectures)} with model_type "
            f"{shown(model_type)} is not "
            f"supported; the model_type of {name} is {expected!r}"
        )


def _shown_names(architectures: Any) -> str:
    is_short = isinstance(architectures, str) and len(architectures) <= MAX_SHOWN
    return architectures if is_short else shown(architectures)


def _first_supported(architectures: Any) -> str | None:
    if not isinstance(architectures, list):
        return None
    return next((a for a in architectures if isinstance(a, str) and a in ARCHITECTURES), None)


def model_class(architectures: Iterable[str]) -> "type[CausalLM]":
    """The class that runs the first supported name of `architectures`."""
    name = _first_supported([*architectures])
    assert name is not None, architectures
    return getattr(importlib.import_module(ARCHITECTURES[name][1]), name)
