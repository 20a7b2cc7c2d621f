"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): the table of angles.

The angle of pair i (features i and i + head_dim / 2) at position p is p * frequency i. Of
checkpoints that pair other features `layers.rotary_order` brings the rows into this order.
"""

import torch
from torch.nn.functional import pad

from nanovllm.layers.rope_scaling import RopeParameters, rope_frequencies


def cos_sin_table(
    head_dim: int, num_positions: int, rope_parameters: RopeParameters | None, device: torch.device
) -> torch.Tensor:
    """[num_positions, head_dim] float32: cos of each position's angles, then their sin.

    Computed on the CPU, so that every device has the same values. A pair that is not rotated has
    the angle 0.

    Args:
        head_dim: features of a head, even.
        num_positions: the table's rows.
        rope_parameters: "rope_theta", "rope_type" and the fields of that type; None: no pair is
            rotated.
        device: where to put the table.
    """
    frequencies, magnitude = torch.empty(0, dtype=torch.float32, device="cpu"), 1.0
    if rope_parameters is not None:
        frequencies, magnitude = rope_frequencies(head_dim, rope_parameters, num_positions)
    positions = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies)
    unrotated = 0, head_dim // 2 - len(frequencies)
    cos = pad(angles.cos().mul_(magnitude), unrotated, value=1.0)
    sin = pad(angles.sin().mul_(magnitude), unrotated)
    return torch.cat([cos, sin], dim=-1).to(device)
