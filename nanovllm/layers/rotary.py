"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): the table of angles.

The angle of pair i (features i and i + head_dim / 2) at position p is p * frequency i.
"""

import torch

from nanovllm.layers.rope_scaling import RopeParameters, scale_frequencies


def cos_sin_table(
    head_dim: int, num_positions: int, rope_parameters: RopeParameters, device: torch.device
) -> torch.Tensor:
    """[num_positions, head_dim] float32: cos of each position's angles, then their sin.

    Computed on the CPU, so that every device has the same values.

    Args:
        head_dim: features of a head, even.
        num_positions: the table's rows.
        rope_parameters: "rope_theta", "rope_type" and the fields of that type.
        device: where to put the table.
    """
    frequencies, magnitude = rope_frequencies(head_dim, rope_parameters)
    positions = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).mul_(magnitude).to(device)


def rope_frequencies(head_dim: int, rope_parameters: RopeParameters) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair [head_dim / 2] float32, and a factor for cos and sin.

    Frequency i is rope_theta ** (-2i / head_dim), and the factor 1, unless the type scales them.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / rope_parameters["rope_theta"] ** exponents
    return scale_frequencies(frequencies, rope_parameters)
