"""Which rotary embeddings a config.json may ask for, and up to which length they are defined.

transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`. Of families
whose rotation differs by layer type, `rope_parameters` has one of each type, and older versions
write `rope_local_base_freq` beside. `layers.rotary` and `layers.rope_scaling` compute them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm.errors import ArgumentError, cut, shown
from nanovllm.models.config_fields import MAX_POSITIONS
from nanovllm.models.family import Family
from nanovllm.parameters import Check, at_least, boolean, number
from nanovllm.validation import check_integer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nanovllm.layers.rope_scaling import RopeParameters


class RopeLimit(NamedTuple):
    """Tokens of the longest sequence whose rotation does not depend on others of its batch."""

    num_tokens: int
    field: str  # that says so
    beyond: str  # what happens with longer ones


def _check_factors(name: str, value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ArgumentError(f"{name} must be a list of numbers, got {shown(value)}")
    for factor in value:
        SCALE.run(name, factor)
    return value


# Beyond these, numbers overflow on the way to an angle.
BASE = number("> 1 and <= 1e30", lambda x: 1 < x <= 1e30)
FACTOR = number("between 1 and 1e9", lambda x: 1 <= x <= 1e9)
SCALE = number("between 1e-9 and 1e9", lambda x: 1e-9 <= x <= 1e9)
FACTORS = Check("", _check_factors)
PART = number("> 0 and <= 1", lambda x: 0 < x <= 1)
LAYER_TYPES = ("full_attention", "sliding_attention")
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
    "longrope": (
        {"short_factor": FACTORS, "long_factor": FACTORS},
        {
            "original_max_position_embeddings": at_least(2, MAX_POSITIONS),
            "factor": FACTOR,
            "attention_factor": SCALE,
        },
    ),
    "dynamic": ({"factor": FACTOR}, {}),
    "proportional": ({}, {"factor": FACTOR}),
}
# "finetuned" tells how a checkpoint came about, and nothing of how to compute.
COMMON_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


# Where a token of an image is. A token of a text has the same position in all three dimensions,
# and is rotated as without them.
MROPE_FIELDS = {"mrope_section", "mrope_interleaved"}


def check_rope(raw_config: Mapping[str, Any], path: str, family: Family) -> None:
    """ArgumentError, beginning with `path`, for rotary embeddings that are not supported."""
    is_partial = "partial_rotary_factor" in family.fields
    _check_common(raw_config, path, is_partial)
    if "rope_local_base_freq" in family.fields and "rope_local_base_freq" in raw_config:
        BASE.run(f"{path}: rope_local_base_freq", raw_config["rope_local_base_freq"])
    name = "original_max_position_embeddings"
    for key in ("rope_parameters", "rope_scaling"):
        for where, rope in _parts(raw_config.get(key), f"{path}: {key}", key, family):
            is_proportional = "proportional" in (rope.get("rope_type"), rope.get("type"))
            _check_common(rope, where, is_partial or is_proportional)
            rope_type = _check_type(rope, where, family)
            if family.has_rope_by_layer_type and rope.get("truncate") is False:
                # transformers looks for it beside the layer types.
                raise ArgumentError(f"{where}: truncate False is not supported")
            if name in ROPE_TYPES[rope_type][1]:  # null is not its default
                for fields, place in ((raw_config, path), (rope, where)):
                    check_integer(f"{place}: {name}", fields.get(name, 2), minimum=1)


def _parts(rope: Any, where: str, key: str, family: Family) -> list[tuple[str, Mapping[str, Any]]]:
    """The rope parameters in config.json's field `key`, and where: one, or one of a layer type."""
    if rope is None:
        return []
    if not isinstance(rope, Mapping):
        raise ArgumentError(f"{where} must be an object, got {shown(rope)}")
    if not family.has_rope_by_layer_type or key == "rope_scaling":
        return [(where, rope)]
    parts = []
    for layer_type, part in rope.items():
        if layer_type not in LAYER_TYPES:
            raise ArgumentError(
                f"{where}: {cut(str(layer_type))} is not supported; supported: "
                f"{', '.join(LAYER_TYPES)}"
            )
        parts += _parts(part, f"{where}: {layer_type}", "rope_scaling", family)
    return parts


def _check_common(fields: Mapping[str, Any], where: str, is_partial: bool) -> None:
    if "rope_theta" in fields:
        BASE.run(f"{where}: rope_theta", fields["rope_theta"])
    rotary_factor = fields.get("partial_rotary_factor")
    if rotary_factor is None:
        return
    if not is_partial and rotary_factor != 1:
        raise ArgumentError(
            f"{where}: partial_rotary_factor {shown(rotary_factor)} is not supported"
        )
    PART.run(f"{where}: partial_rotary_factor", rotary_factor)


def _check_type(rope: Mapping[str, Any], where: str, family: Family) -> str:
    """The rope type, once its fields are checked."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "su" and family.model_type == "phi3":  # its older name, which others lack
        rope_type = "longrope"
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ArgumentError(
            f"{where} of type {shown(rope_type)} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )
    where = f"{where} of type {shown(rope_type)}"
    required, optional = ROPE_TYPES[rope_type]
    given = {name: value for name, value in rope.items() if value is not None}
    if family.has_mrope:
        given = {name: given[name] for name in given if name not in MROPE_FIELDS}
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


# ---- of a configuration whose fields are checked ------------------------------------------------


def _by_layer_type(hf_config: "PretrainedConfig") -> list[dict[str, Any]]:
    """The rope parameters: of each layer type, or of all layers."""
    rope = hf_config.rope_parameters
    return [rope[name] for name in LAYER_TYPES if name in rope] or [rope]


def complete_rope(hf_config: "PretrainedConfig") -> dict[str, Any]:
    """A copy of its rope parameters, with longrope's factor, which may follow from the positions.

    ArgumentError if longrope has not a factor for each pair.
    """

    def complete(rope: dict[str, Any]) -> dict[str, Any]:
        if rope.get("rope_type") != "longrope":
            return dict(rope)
        original = rope["original_max_position_embeddings"]
        return {"factor": hf_config.max_position_embeddings / original, **rope}

    rope = hf_config.rope_parameters
    nested = {name: complete(rope[name]) for name in LAYER_TYPES if name in rope}
    return nested or complete(rope)


def check_pairs(rope: "RopeParameters", head_dim: int) -> None:
    """ArgumentError unless longrope has a factor for each pair that is rotated."""
    num_pairs = (int(head_dim * rope.get("partial_rotary_factor", 1.0)) + 1) // 2
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if isinstance(factors, (list, tuple)) and len(factors) != num_pairs:
            raise ArgumentError(
                f"the model's {name} must have {num_pairs} entries, one for each pair of features "
                f"that is rotated, got {len(factors)}"
            )


def max_positions(hf_config: "PretrainedConfig") -> int:
    """Tokens of the longest sequence that the model's rotary embeddings are meant for.

    That is `max_position_embeddings`, which already counts the scaling of llama3 and longrope. It
    need not count that of yarn, whose limit is `factor * original_max_position_embeddings`, and
    does not count the `factor` of linear and dynamic. The same rules as vLLM's.
    """
    rope, stated = _by_layer_type(hf_config)[0], hf_config.max_position_embeddings
    if rope["rope_type"] == "yarn":
        return int(rope["factor"] * rope["original_max_position_embeddings"])
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(rope["factor"] * stated)
    return stated


def rope_limit(hf_config: "PretrainedConfig") -> RopeLimit | None:
    """The longest sequence whose rotation is defined; None: any.

    Beyond it transformers rotates all sequences of a batch by the longest one, which keys that are
    cached, and shared by sequences, do not follow.
    """
    limits = []
    for rope in _by_layer_type(hf_config):
        if rope["rope_type"] == "dynamic":
            limits.append(
                RopeLimit(
                    hf_config.max_position_embeddings,
                    "max_position_embeddings",
                    "'dynamic' rotates by the longest sequence of a batch; hf_overrides can name "
                    "another rope_type",
                )
            )
        if rope["rope_type"] == "longrope" and rope["short_factor"] != rope["long_factor"]:
            limits.append(
                RopeLimit(
                    rope["original_max_position_embeddings"],
                    "original_max_position_embeddings",
                    "'longrope' rotates all of a batch by long_factor; with these numbers as its "
                    "short_factor, in hf_overrides, it does so at any length",
                )
            )
    return min(limits, default=None)
