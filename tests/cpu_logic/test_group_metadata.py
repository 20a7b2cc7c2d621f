"""Each cache group's slots and block tables, against loops over rows and groups."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm.engine.group_metadata import decode_metadata, prefill_metadata
from nanovllm.kernels import row_state, torch_ops
from nanovllm.kernels.types import DecodeMetadata, PrefillMetadata

BLOCK_SIZE = 4
NUM_COLUMNS = 5  # of one group's table


class RecordingOps(torch_ops.TorchOps):
    """What `plan_decode` is called with takes the plan's place."""

    def plan_decode(self, cache, block_tables, context_lens, num_common_tokens=None, window=None):
        return cache, block_tables.tolist(), num_common_tokens, window


def layers_with(windows: list[int | None]) -> list[SimpleNamespace]:
    return [SimpleNamespace(cache=f"cache {i}", window=w) for i, w in enumerate(windows)]


@pytest.mark.parametrize("windows", [[None, 9], [None, 9, 3], [9, 3, 2], [9]])
def test_decode(windows):
    num_groups = len(windows)
    generator = torch.Generator().manual_seed(0)
    width = row_state.BLOCK_TABLE + num_groups * NUM_COLUMNS
    row_table = torch.randint(0, 100, (6, width), generator=generator, dtype=torch.int32)
    lengths = [1, 4, 5, 20, 13, 0]  # the last row is padding
    row_table[:, row_state.LENGTH] = torch.tensor(lengths)
    rows = torch.tensor([3, 0, 5, 1, 4, 2, 5], dtype=torch.int32)
    inputs = torch_ops.gather_decode_inputs(row_table, rows, BLOCK_SIZE)
    common = torch.tensor([2], dtype=torch.int32)
    layers = layers_with(windows)
    metadata = decode_metadata(RecordingOps(), layers, inputs, rows, BLOCK_SIZE, common)
    groups = [metadata, *metadata.further_groups]
    assert len(groups) == num_groups
    for number, group in enumerate(groups):
        slots, tables = [], []
        for row in rows.tolist():
            first = row_state.BLOCK_TABLE + number * NUM_COLUMNS
            table = row_table[row, first : first + NUM_COLUMNS].tolist()
            position = lengths[row] - 1
            slot = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            slots.append(slot if lengths[row] else -1)
            tables.append(table)
        assert group.slot_mapping.tolist() == slots
        assert group.slot_mapping.dtype == torch.int64 and group.slot_mapping.is_contiguous()
        assert group.block_tables.tolist() == tables
        assert group.block_tables.stride(1) == 1
        assert group.context_lens is inputs.context_lens
        assert group.rows is rows
        assert group.logits_indices is None
        expected_common = common if number == 0 else None
        assert group.plan == (f"cache {number}", tables, expected_common, windows[number])


@pytest.mark.parametrize("has_last_tokens", [True, False])
@pytest.mark.parametrize("num_groups", [2, 3])
def test_prefill(num_groups, has_last_tokens):
    tables = torch.arange(2 * num_groups * NUM_COLUMNS, dtype=torch.int32).view(2, -1)
    slots = torch.arange(num_groups * 7).view(num_groups, 7)
    last = DecodeMetadata(
        slot_mapping=slots[0],
        block_tables=tables[1:],
        context_lens=torch.tensor([6]),
        logits_indices=torch.tensor([6]),
    )
    metadata = PrefillMetadata(
        slot_mapping=slots[0],
        block_tables=tables,
        cu_seqlens_q=torch.tensor([0, 3, 7]),
        cu_seqlens_k=torch.tensor([0, 5, 11]),
        max_seqlen_q=4,
        max_seqlen_k=6,
        last_tokens=last if has_last_tokens else None,
    )
    first = prefill_metadata(metadata, slots.unbind())
    groups = [first, *first.further_groups]
    of_last_tokens = [None] * num_groups
    if has_last_tokens:
        of_last_tokens = [first.last_tokens, *first.last_tokens.further_groups]
    for number, (group, last_tokens) in enumerate(zip(groups, of_last_tokens, strict=True)):
        columns = slice(number * NUM_COLUMNS, (number + 1) * NUM_COLUMNS)
        assert group.slot_mapping.tolist() == slots[number].tolist()
        assert group.block_tables.tolist() == tables[:, columns].tolist()
        assert group.cu_seqlens_q is metadata.cu_seqlens_q
        assert group.cu_seqlens_k is metadata.cu_seqlens_k
        assert (group.max_seqlen_q, group.max_seqlen_k) == (4, 6)
        if last_tokens is not None:
            assert last_tokens.slot_mapping.tolist() == slots[number].tolist()
            assert last_tokens.block_tables.tolist() == tables[1:, columns].tolist()
            assert last_tokens.context_lens is last.context_lens
            assert last_tokens.logits_indices is last.logits_indices
    assert (first.last_tokens is None) == (not has_last_tokens)
