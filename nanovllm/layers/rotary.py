"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): the table of angles."""

import torch


def cos_sin_table(
    head_dim: int, max_positions: int, base: float, device: torch.device
) -> torch.Tensor:
    """[max_positions, head_dim] float32: cos of each position's angles, then their sin.

    The angle of pair i (features i and i + head_dim / 2) at position p is
    p * base ** (-2i / head_dim). Computed on the CPU, so that every device has the same values.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, 1.0 / base**exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
