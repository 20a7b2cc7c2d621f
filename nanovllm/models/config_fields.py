"""The fields of a config.json that are used, each checked: all others are left out.

So no value that nobody looked at reaches transformers' configuration classes, which take any name.
"""

import math
from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ArgumentError, check_bool, check_integer, check_number, shown

MAX_SIZE = 2**31 - 1  # of a dimension
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_POSITIONS = 2**24  # whose rotations are a table
# Smallest and largest value. Those of NULLABLE may be null, which is "derived" or "none".
INTEGERS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, MAX_SIZE),
    "hidden_size": (1, MAX_SIZE),
    "intermediate_size": (1, MAX_SIZE),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, MAX_SIZE),
    "num_key_value_heads": (1, MAX_SIZE),
    "head_dim": (1, MAX_SIZE),
    "max_position_embeddings": (1, MAX_POSITIONS),
    "original_max_position_embeddings": (1, MAX_POSITIONS),
    "sliding_window": (1, 2**63 - 1),
    "max_window_layers": (0, 2**63 - 1),
    "num_experts": (1, MAX_EXPERTS),
    "num_experts_per_tok": (1, MAX_EXPERTS),
    "moe_intermediate_size": (1, MAX_SIZE),
    "decoder_sparse_step": (1, MAX_SIZE),
}
NUMBERS = ("rms_norm_eps", "initializer_range")  # finite and >= 0
BOOLS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "norm_topk_prob",
    "use_sliding_window",
)
DTYPES = ("bfloat16", "float16", "float32", "float64")
DTYPE_FIELDS = ("dtype", "torch_dtype")
# Left out unless they are of this type: little depends on them.
KINDS = {
    "tokenizer_class": str,
    "transformers_version": str,
    "bos_token_id": int,
    "pad_token_id": int,
}
# What other modules check.
OTHERS = (
    "architectures",
    "dual_chunk_attention_config",
    "eos_token_id",
    "hidden_act",
    "layer_types",
    "mlp_only_layers",
    "partial_rotary_factor",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
NULLABLE = (
    "head_dim",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "sliding_window",
    "max_window_layers",
)
ONLY_EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "norm_topk_prob",
    "mlp_only_layers",
)


def check_fields(raw: Mapping[str, Any], path: str, has_experts: bool) -> dict[str, Any]:
    """The fields of config.json that are used, by their values.

    Args:
        raw: config.json as parsed, with no field under an older name (but for dtypes and rope).
        path: the file's path, for the message.
        has_experts: whether the family has experts: the fields of others are left out.

    Raises:
        ArgumentError: a field is of another type than it must be, or outside its range.
    """
    checked: dict[str, Any] = {}
    for name, value in raw.items():
        if name in ONLY_EXPERTS and not has_experts:
            continue
        where = f"{path}: the model's {name}"
        if value is None and name in NULLABLE:
            checked[name] = None
        elif name in INTEGERS:
            minimum, maximum = INTEGERS[name]
            check_integer(where, value, minimum)
            checked[name] = check_integer(where, value, minimum, maximum)
        elif name in NUMBERS:
            check_number(where, value, "finite and >= 0", _is_finite)
            checked[name] = value  # an integer may be refused by transformers
        elif name in BOOLS:
            checked[name] = check_bool(where, value)
        elif name in DTYPE_FIELDS:
            checked[name] = _check_dtype(where, value)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            checked[name] = {key: entry for key, entry in value.items() if entry is not None}
        elif name in OTHERS or type(value) is KINDS.get(name):
            checked[name] = value
    _check_layers(checked, path)
    return checked


def _is_finite(number: float) -> bool:
    return 0 <= number < math.inf


def _check_dtype(where: str, value: Any) -> str | None:
    """The dtype's name; a torch.dtype may be one of `hf_overrides`."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.") if len(shown(value)) < 32 else ""
    if name not in DTYPES:
        raise ArgumentError(f"{where} {shown(value)} is not supported; supported: {DTYPES}")
    return name


def _check_layers(checked: Mapping[str, Any], path: str) -> None:
    layers = checked.get("mlp_only_layers")
    if layers is None:
        return
    if not isinstance(layers, (list, tuple)):
        raise ArgumentError(f"{path}: mlp_only_layers must be a list, got {shown(layers)}")
    for layer in layers:
        check_integer(f"{path}: a layer of the model's mlp_only_layers", layer, 0, MAX_SIZE)
