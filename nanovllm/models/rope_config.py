"""Which rotary embeddings a config.json may ask for.

transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`.
`layers.rotary` and `layers.rope_scaling` compute them.
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ArgumentError, cut, shown
from nanovllm.models.config_fields import MAX_POSITIONS
from nanovllm.parameters import Check, at_least, boolean, number
from nanovllm.validation import check_integer

# Beyond these, numbers overflow on the way to an angle.
BASE = number("> 1 and <= 1e30", lambda x: 1 < x <= 1e30)
FACTOR = number("between 1 and 1e9", lambda x: 1 <= x <= 1e9)
SCALE = number("between 1e-9 and 1e9", lambda x: 1e-9 <= x <= 1e9)
ORIGINAL = {"original_max_position_embeddings": at_least(1, MAX_POSITIONS)}
# rope_type -> the fields that it must have, and those that it may have.
ROPE_TYPES: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "default": ({}, {}),
    "linear": ({"factor": FACTOR}, {}),
    "llama3": ({"factor": FACTOR, "low_freq_factor": SCALE, "high_freq_factor": SCALE}, ORIGINAL),
    "yarn": (
        {"factor": FACTOR},
        {
            **ORIGINAL,
            **dict.fromkeys(
                "attention_factor beta_fast beta_slow mscale mscale_all_dim".split(), SCALE
            ),
            "truncate": boolean,
        },
    ),
}
# "finetuned" tells how a checkpoint came about, and nothing of how to compute.
COMMON_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def check_rope(raw_config: Mapping[str, Any], path: str) -> None:
    """ArgumentError, beginning with `path`, for rotary embeddings that are not supported."""
    _check_common(raw_config, path)
    name = "original_max_position_embeddings"
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
        BASE.run(f"{where}: rope_theta", fields["rope_theta"])
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
    for name in sorted(required.keys() - given.keys()):
        raise ArgumentError(f"{where} lacks {name}")
    for name in (name for name in given if name not in COMMON_FIELDS):
        check = required.get(name) or optional.get(name)
        if check is None:
            raise ArgumentError(f"{where}: {cut(name)} is not supported")
        check.run(f"{where}: {name}", given[name])
    if rope_type == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ArgumentError(
            f"{where}: low_freq_factor ({given['low_freq_factor']}) must be < high_freq_factor "
            f"({given['high_freq_factor']})"
        )
    return rope_type
