"""Which rotary embeddings a config.json may ask for, and how many positions they reach.

transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`.
`layers.rotary` computes them.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError, check_bool, check_integer, check_number, cut, shown
from nanovllm.models.config_fields import MAX_POSITIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# rope_type -> the fields that it must have, and those that it may have.
ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor"},
        {"original_max_position_embeddings"},
    ),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}
# Beyond these, numbers overflow on the way to an angle.
MAX_BASE = 1e30
SMALLEST, LARGEST = 1e-9, 1e9
# "finetuned" tells how a checkpoint came about, and nothing of how to compute.
COMMON_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def check_rope(raw_config: Mapping[str, Any], path: str) -> None:
    """ArgumentError, beginning with `path`, for rotary embeddings that are not supported."""
    _check_common(raw_config, path)
    name = "original_max_position_embeddings"
    if raw_config.get(name) is not None:
        check_integer(f"{path}: {name}", raw_config[name], minimum=1)
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw_config.get(key)
        if rope is not None:
            if not isinstance(rope, Mapping):
                raise ArgumentError(f"{path}: {key} must be an object, got {shown(rope)}")
            _check_common(rope, f"{path}: {key}")
            rope_type = _check_type(rope, f"{path}: {key}")
            if name in ROPE_TYPES[rope_type][1]:  # null is not its default
                for fields, where in ((raw_config, path), (rope, f"{path}: {key}")):
                    check_integer(f"{where}: {name}", fields.get(name, 1), minimum=1)


def _check_common(fields: Mapping[str, Any], where: str) -> None:
    if "rope_theta" in fields:
        named, limit = f"{where}: rope_theta", "finite and > 1"
        check_number(named, fields["rope_theta"], limit, lambda x: 1 < x < math.inf)
        check_number(named, fields["rope_theta"], f"<= {MAX_BASE}", lambda x: x <= MAX_BASE)
    rotary_factor = fields.get("partial_rotary_factor")
    if rotary_factor is not None and rotary_factor != 1:
        raise ArgumentError(
            f"{where}: partial_rotary_factor {shown(rotary_factor)} is not supported"
        )


def _check_type(rope: Mapping[str, Any], where: str) -> str:
    """The rope type, once its fields are checked."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ArgumentError(
            f"{where} of type {shown(rope_type)} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )
    where = f"{where} of type {shown(rope_type)}"
    required, optional = ROPE_TYPES[rope_type]
    given = {name: value for name, value in rope.items() if value is not None}
    for name in sorted(required - given.keys()):
        raise ArgumentError(f"{where} lacks {name}")
    for name, value in given.items():
        if name in COMMON_FIELDS:
            continue
        if name not in required | optional:
            raise ArgumentError(f"{where}: {cut(name)} is not supported")
        named = f"{where}: {name}"
        if name == "truncate":
            check_bool(named, value)
        elif name == "original_max_position_embeddings":
            check_integer(named, value, minimum=1)
            check_integer(named, value, 1, MAX_POSITIONS)
        elif name == "factor":
            check_number(named, value, "finite and >= 1", lambda x: 1 <= x < math.inf)
        else:
            check_number(named, value, "finite and > 0", lambda x: 0 < x < math.inf)
        if name not in ("truncate", "original_max_position_embeddings"):
            limit = f"between {SMALLEST} and {LARGEST}"
            check_number(named, value, limit, lambda x: SMALLEST <= x <= LARGEST)
    if rope_type == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ArgumentError(
            f"{where}: low_freq_factor ({given['low_freq_factor']}) must be < high_freq_factor "
            f"({given['high_freq_factor']})"
        )
    return rope_type


def max_positions(hf_config: "PretrainedConfig") -> int:
    """Tokens of the longest sequence that the model's rotary embeddings are meant for.

    That is `max_position_embeddings`, which already counts llama3's scaling. It need not count that
    of yarn, whose limit is `factor * original_max_position_embeddings`, and does not count linear's
    `factor`. The same rules as vLLM's.
    """
    rope, stated = hf_config.rope_parameters, hf_config.max_position_embeddings
    if rope["rope_type"] == "yarn":
        return int(rope["factor"] * rope["original_max_position_embeddings"])
    if rope["rope_type"] == "linear":
        return int(rope["factor"] * stated)
    return stated
