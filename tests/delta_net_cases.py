"""Steps of a gated delta net, for tests of its operations on any backend and device.

Sequences of several lengths are computed in chunks and then token by token; what a backend gives
is compared with what it gives for each whole sequence, or with another backend.
"""

from typing import NamedTuple

import torch

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import (
    AttentionMetadata,
    DecodeMetadata,
    LinearOutput,
    PartialSums,
    PrefillMetadata,
    RecurrentState,
    split_columns,
)

NUM_ROWS = 8  # of the row table, the padding row included


class Sizes(NamedTuple):
    """Of one layer: Hk, Hv, Dk, Dv, K."""

    num_key_heads: int = 2
    num_heads: int = 4
    key_dim: int = 16
    value_dim: int = 8
    kernel_size: int = 4

    @property
    def num_channels(self) -> int:
        """C."""
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim


class Weights(NamedTuple):
    """Of one layer."""

    conv: torch.Tensor
    decay_rate: torch.Tensor
    decay_bias: torch.Tensor
    norm: torch.Tensor


def random_weights(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Weights:
    """Decays between a slow and a fast one."""
    heads = sizes.num_heads
    conv = torch.randn(sizes.num_channels, sizes.kernel_size, device=device) / 2
    rate = torch.empty(heads, device=device).uniform_(0.01, 4).log()
    bias = torch.randn(heads, device=device)
    norm = torch.rand(sizes.value_dim, device=device) + 0.5
    return Weights(conv.to(dtype), rate, bias, norm.to(dtype))


def new_state(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> RecurrentState:
    """NaN: what is read must have been written."""
    conv = torch.full((NUM_ROWS, sizes.num_channels, sizes.kernel_size - 1), torch.nan)
    recurrent = torch.full((NUM_ROWS, sizes.num_heads, sizes.key_dim, sizes.value_dim), torch.nan)
    return RecurrentState(conv.to(device, dtype), recurrent.to(device))


def prefill_metadata(
    rows: list[int], starts: list[int], lengths: list[int], device: torch.device
) -> PrefillMetadata:
    """A step that computes `lengths` tokens of each sequence after its first `starts`."""

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    nothing = ints([])
    return PrefillMetadata(
        slot_mapping=nothing,
        block_tables=nothing,
        cu_seqlens_q=ints([sum(lengths[:i]) for i in range(len(rows) + 1)]),
        cu_seqlens_k=ints([sum(ends[:i]) for i in range(len(rows) + 1)]),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(ends),
        rows=ints(rows),
    )


def decode_metadata(rows: list[int], lengths: list[int], device: torch.device) -> DecodeMetadata:
    """A decode step; lengths as of `context_lens`."""
    row_tensor = torch.tensor(rows, dtype=torch.int32, device=device)
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return DecodeMetadata(row_tensor, row_tensor, context_lens, rows=row_tensor)


def in_parts(x: torch.Tensor) -> PartialSums:
    """x as a sum of two."""
    first = torch.randn_like(x, dtype=torch.float32)
    return PartialSums(torch.stack([first, x.float() - first]), x.dtype)


def run_step(
    ops: Ops,
    sizes: Sizes,
    weights: Weights,
    projected: LinearOutput,
    state: RecurrentState,
    metadata: AttentionMetadata,
) -> torch.Tensor:
    """What a layer does between its two products: projected [T, C + Hv Dv + 2 Hv]."""
    heads, value_size = sizes.num_heads, sizes.num_heads * sizes.value_dim
    columns = sizes.num_channels, value_size, heads, heads
    qkv, z, beta, decay = split_columns(projected, columns)
    mixed = ops.causal_conv1d(qkv, weights.conv, state.conv, metadata)
    out = ops.gated_delta_rule(
        mixed, beta, decay, weights.decay_rate, weights.decay_bias, state.recurrent, metadata
    )
    return ops.gated_rms_norm(out, z, weights.norm, 1e-6)


def random_inputs(
    sizes: Sizes, lengths: list[int], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """The projected tokens of sequences of these lengths."""
    width = sizes.num_channels + sizes.num_heads * (sizes.value_dim + 2)
    return [torch.randn(length, width, device=device).to(dtype) for length in lengths]


def run_in_steps(
    ops: Ops,
    sizes: Sizes,
    weights: Weights,
    inputs: list[torch.Tensor],
    num_decoded: int,
    chunk: int,
    sums: bool = False,
) -> tuple[list[torch.Tensor], RecurrentState]:
    """Each sequence's outputs, and the state after: prefill in chunks, then `num_decoded` tokens.

    sums: projections come as sums of parts.
    """
    device, dtype = inputs[0].device, inputs[0].dtype
    state = new_state(sizes, dtype, device)
    rows = [(3 * i + 1) % (NUM_ROWS - 1) for i in range(len(inputs))]
    parts: list[list[torch.Tensor]] = [[] for _ in inputs]
    prompts = [len(x) - num_decoded for x in inputs]
    for start in range(0, max(prompts), chunk):
        live = [i for i, length in enumerate(prompts) if start < length]
        lengths = [min(chunk, prompts[i] - start) for i in live]
        metadata = prefill_metadata([rows[i] for i in live], [start] * len(live), lengths, device)
        x = torch.cat([inputs[i][start : start + n] for i, n in zip(live, lengths, strict=True)])
        out = run_step(ops, sizes, weights, in_parts(x) if sums else x, state, metadata)
        for i, part in zip(live, out.split(lengths), strict=True):
            parts[i].append(part)
    padding = [NUM_ROWS - 1] * 2
    for step in range(num_decoded):
        lengths = [n + step + 1 for n in prompts] + [0, 0]
        metadata = decode_metadata(rows + padding, lengths, device)
        tokens = [x[n + step] for x, n in zip(inputs, prompts, strict=True)]
        x = torch.stack([*tokens, tokens[0], tokens[0]])
        out = run_step(ops, sizes, weights, in_parts(x) if sums else x, state, metadata)
        assert out.isfinite().all()
        for i, part in enumerate(out[: len(inputs)]):
            parts[i].append(part.unsqueeze(0))
    return [torch.cat(p) for p in parts], RecurrentState(*(s[rows] for s in state))
