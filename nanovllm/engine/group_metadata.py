"""What the attention of each cache group is told of a step, where a model has sliding windows.

The tables of all groups stand side by side in a row, and so they do in what is read of it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import DecodeInputs, DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention import Attention


def prefill_metadata(
    metadata: PrefillMetadata, slot_mappings: Sequence[torch.Tensor]
) -> PrefillMetadata:
    """The first group's metadata, with those of the others in `further_groups`.

    Args:
        metadata: of the step, with the block tables of all groups.
        slot_mappings: each group's.
    """
    num_columns = metadata.block_tables.shape[1] // len(slot_mappings)
    tables = metadata.block_tables.split(num_columns, 1)
    last_tokens = metadata.last_tokens
    if last_tokens is not None:
        last_tables = last_tokens.block_tables.split(num_columns, 1)
        last, *further_last = [
            replace(last_tokens, slot_mapping=slots, block_tables=table)
            for slots, table in zip(slot_mappings, last_tables, strict=True)
        ]
        last_tokens = replace(last, further_groups=tuple(further_last))
    first, *further = [
        replace(metadata, slot_mapping=slots, block_tables=table, last_tokens=None)
        for slots, table in zip(slot_mappings, tables, strict=True)
    ]
    return replace(first, further_groups=tuple(further), last_tokens=last_tokens)


def decode_metadata(
    ops: Ops,
    layers: Sequence[Attention],
    inputs: DecodeInputs,
    rows: torch.Tensor,
    block_size: int,
    num_common_tokens: torch.Tensor | None,
) -> DecodeMetadata:
    """The first group's metadata of a decode step, with those of the others in `further_groups`.

    A CUDA graph can capture it: no shape depends on what is in the tensors.

    Args:
        ops: the backend.
        layers: a layer of each group.
        inputs: of the step, with the block tables of all groups and the first group's slots.
        rows: [B] int32, in the row table.
        block_size: tokens per block.
        num_common_tokens: as of `Ops.plan_decode`, of the first group; None if it has a window.
    """
    slot_mappings = [inputs.slot_mapping, *_further_slots(inputs, block_size, len(layers))]
    tables = inputs.block_tables.split(inputs.block_tables.shape[1] // len(layers), 1)
    first, *further = [
        DecodeMetadata(
            slot_mapping=slots,
            block_tables=table,
            context_lens=inputs.context_lens,
            plan=ops.plan_decode(
                layer.cache,
                table,
                inputs.context_lens,
                None if group else num_common_tokens,
                window=layer.window,
            ),
            rows=rows,
        )
        for group, (layer, slots, table) in enumerate(
            zip(layers, slot_mappings, tables, strict=True)
        )
    ]
    return replace(first, further_groups=tuple(further))


def _further_slots(
    inputs: DecodeInputs, block_size: int, num_groups: int
) -> Sequence[torch.Tensor]:
    """The new tokens' slots [B] int64 in each group but the first; -1 in a padded row."""
    if num_groups == 1:
        return ()
    tables = inputs.block_tables.unflatten(1, (num_groups, -1))[:, 1:]  # [B, G - 1, W]
    index = (inputs.positions // block_size).long()[:, None, None].expand(-1, num_groups - 1, 1)
    blocks = tables.gather(2, index).squeeze(2).T.long()  # [G - 1, B]
    slots = blocks * block_size + inputs.positions % block_size
    return slots.masked_fill(inputs.context_lens == 0, -1).contiguous().unbind()
