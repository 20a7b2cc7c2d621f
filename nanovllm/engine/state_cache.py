"""The memory of recurrent states: a layer has one for each row of the row table.

A sequence has the states of its row as long as it has the row. The first step that computes tokens
of a sequence starts from zero, whatever another one left there.
"""

from collections.abc import Sequence

import torch

from nanovllm.errors import ArgumentError
from nanovllm.kernels.types import RecurrentState, StateSpec


def row_bytes(specs: Sequence[StateSpec]) -> int:
    """Bytes of one sequence's states over all layers, on one rank."""
    return sum(
        spec.num_channels * (spec.kernel_size - 1) * spec.dtype.itemsize
        + spec.num_heads * spec.key_dim * spec.value_dim * torch.float32.itemsize
        for spec in specs
    )


def allocate(
    specs: Sequence[StateSpec], max_num_seqs: int, device: torch.device
) -> list[RecurrentState]:
    """Each layer's states of `max_num_seqs` rows and the padding row; zeroed on the GPU.

    On the CPU untouched pages cost nothing, and nothing is read that was not written.

    Raises:
        ArgumentError: there is no memory for them.
    """
    new = torch.zeros if device.type == "cuda" else torch.empty
    num_rows = max_num_seqs + 1
    try:
        return [
            RecurrentState(
                new(
                    (num_rows, spec.num_channels, spec.kernel_size - 1),
                    dtype=spec.dtype,
                    device=device,
                ),
                new(
                    (num_rows, spec.num_heads, spec.key_dim, spec.value_dim),
                    dtype=torch.float32,
                    device=device,
                ),
            )
            for spec in specs
        ]
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise ArgumentError(
            f"no memory for the recurrent states of max_num_seqs ({max_num_seqs}) sequences, of "
            f"{row_bytes(specs) / 2**20:.1f} MiB each; lower max_num_seqs"
        ) from error
