"""Rotary frequencies, also of models that were trained on short sequences and then extended."""

import math
from typing import TypedDict

from torch import Tensor, arange, float32, tensor


class RopeParameters(TypedDict, total=False):
    """The fields of a config of transformers 5; `models.rope_config` checks them."""

    rope_type: str  # one of `models.rope_config.ROPE_TYPES`
    rope_theta: float
    partial_rotary_factor: float  # of a head's features, the part that is rotated
    factor: float  # by how much the context grew
    original_max_position_embeddings: int
    short_factor: list[float]  # of "longrope", for each pair
    long_factor: list[float]
    low_freq_factor: float  # of "llama3"
    high_freq_factor: float
    beta_fast: float | None  # of "yarn", like all that follows
    beta_slow: float | None
    truncate: bool
    attention_factor: float | None  # of "longrope" too
    mscale: float | None
    mscale_all_dim: float | None


def num_rotated_features(head_dim: int, rope: RopeParameters) -> int:
    """How many of a head's features the rotation pairs: the first ones, an even number.

    With "proportional" all are paired, and the last pairs turn by the angle 0.
    """
    if rope["rope_type"] == "proportional":
        return head_dim
    return (_rotary_dim(head_dim, rope) + 1) // 2 * 2


def _rotary_dim(head_dim: int, rope: RopeParameters) -> int:
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def rope_frequencies(
    head_dim: int, rope: RopeParameters, num_positions: int
) -> tuple[Tensor, float]:
    """Radians per position of each pair that is rotated, float32, and a factor for cos and sin.

    Frequency i is rope_theta ** (-2i / d), d being the features that are rotated (of
    "proportional", where that is a part of the pairs, head_dim), unless the type scales it.

    Args:
        head_dim: features of a head.
        rope: the base, the type and its fields.
        num_positions: the longest sequence, by which "longrope" chooses its factors.
    """
    rotary_dim = _rotary_dim(head_dim, rope)
    is_proportional = rope["rope_type"] == "proportional"
    last = rotary_dim // 2 * 2 if is_proportional else rotary_dim
    exponents = arange(0, last, 2, dtype=float32, device="cpu")
    exponents = exponents / (head_dim if is_proportional else rotary_dim)
    return _scale(rope["rope_theta"] ** exponents, rope, num_positions)


def _scale(periods: Tensor, rope: RopeParameters, num_positions: int) -> tuple[Tensor, float]:
    """The frequencies 1 / periods [pairs] as the rope type scales them, and the factor.

    Position interpolation ("linear", Chen et al. 2023, arXiv 2306.15595) divides all by `factor`,
    and so does "proportional", if it has one. "dynamic" scales nothing within the positions of the
    training, beyond which `models.model_config` refuses it.
    """
    rope_type, frequencies = rope["rope_type"], 1.0 / periods
    if rope_type in ("default", "dynamic"):
        return frequencies, 1.0
    if rope_type in ("linear", "proportional"):
        return frequencies / rope.get("factor", 1.0), 1.0
    if rope_type == "llama3":
        return _llama3(frequencies, rope), 1.0
    if rope_type == "yarn":
        return _yarn(frequencies, rope), _yarn_magnitude(rope)
    if rope_type == "longrope":
        is_long = num_positions > rope["original_max_position_embeddings"]
        factors = rope["long_factor"] if is_long else rope["short_factor"]
        scaled = tensor(factors, dtype=float32, device="cpu") * periods
        return 1.0 / scaled, _longrope_magnitude(rope)
    raise ValueError(f"rope_type {rope_type!r} is unknown")


def _llama3(frequencies: Tensor, rope: RopeParameters) -> Tensor:
    """The scaling of Llama 3.1 (Meta 2024, `apply_scaling` of the released llama-models).

    r = rotations within the original context. A pair with r < low_freq_factor is divided by
    `factor`, one with r > high_freq_factor is left, and between the two the share that is left
    grows linearly with r.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    rotations = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def _yarn(frequencies: Tensor, rope: RopeParameters) -> Tensor:
    """YaRN's "NTK-by-parts" (Peng et al. 2023, arXiv 2309.00071, section 3.2).

    A pair that rotates `beta_fast` times or more within the original context is left, one that
    rotates `beta_slow` times or less is divided by `factor`; between the two the share that is left
    falls linearly with the pair's number, as in the authors' code (the paper: with the rotations).
    """
    num_pairs, base = len(frequencies), rope["rope_theta"]
    context = rope["original_max_position_embeddings"]

    def pair_that_rotates(times: float) -> float:
        return num_pairs * math.log(context / (times * 2 * math.pi)) / math.log(base)

    first = pair_that_rotates(rope.get("beta_fast") or 32)
    last = pair_that_rotates(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    pairs = arange(num_pairs, dtype=float32, device="cpu")
    divided = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return (1 - divided) * frequencies + divided * frequencies / rope["factor"]


def _yarn_magnitude(rope: RopeParameters) -> float:
    """What YaRN scales cos and sin by, so that the logits of attention grow by its square.

    `attention_factor` if given, else 0.1 * ln(factor) + 1 (section 3.4); with `mscale` and
    `mscale_all_dim` the ratio of 0.1 * m * ln(factor) + 1 of the two (DeepSeek-V2's released code).
    """
    if (attention_factor := rope.get("attention_factor")) is not None:
        return float(attention_factor)
    growth = 0.1 * math.log(rope["factor"])
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return (growth * mscale + 1) / (growth * mscale_all_dim + 1)
    return growth + 1


def _longrope_magnitude(rope: RopeParameters) -> float:
    """What LongRoPE scales cos and sin by (Ding et al. 2024, arXiv 2402.13753, and Phi-3's code).

    `attention_factor` if given, else sqrt(1 + ln(factor) / ln(original positions)).
    """
    if (attention_factor := rope.get("attention_factor")) is not None:
        return float(attention_factor)
    if rope["factor"] <= 1:
        return 1.0
    original = rope["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(rope["factor"]) / math.log(original))
