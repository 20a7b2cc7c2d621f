"""What one step tells every rank, as a few int32 arrays.

The plan carries only what the device's row table does not know yet: in a steady decode step that is
nothing but the row numbers.
"""

import struct
from itertools import chain
from typing import NamedTuple

import numpy as np

from nanovllm.engine.cache_groups import SentTables
from nanovllm.engine.common_prefix import num_common_tokens
from nanovllm.engine.prefix_units import copied_units
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.kernels import row_state

NONE = np.empty(0, dtype=np.int32)


class StepPlan(NamedTuple):
    """One step's input. S sequences, T tokens, U updates of the row table.

    `updates` are (flat index, value) pairs written to the row table before anything else.
    The tokens and the per-sequence arrays from `starts` on are empty in a decode step.
    """

    is_prefill: bool
    rows: np.ndarray  # [S] row of each sequence
    updates: np.ndarray  # [U, 2]
    wants: np.ndarray = NONE  # [S] `Sequence.wants`; empty: nobody wants anything
    num_common_tokens: int = 0  # the first ones, which a decode step reads once for all its rows
    token_ids: np.ndarray = NONE  # [T] tokens to compute, sequence after sequence
    starts: np.ndarray = NONE  # [S] position of the first token to compute
    lengths: np.ndarray = NONE  # [S] tokens to compute
    shared: np.ndarray = NONE  # [S] positions below this are in shared blocks: K/V not written
    is_last: np.ndarray = NONE  # [S] 1: a token follows the last of them; 0: more chunks do
    copies: np.ndarray = NONE  # [C, 2] as in `PrefillMetadata`

    def has(self, want: int) -> bool:
        """Whether a sequence of the step wants it, one of `Wants`."""
        return len(self.wants) > 0 and bool((self.wants & want).any())

    def all_want(self, want: int) -> bool:
        """Whether all sequences want it whose last token a prefill step computes."""
        return len(self.wants) > 0 and bool((self.wants[self.is_last != 0] & want).all())


def _wants(seqs: list[Sequence]) -> np.ndarray:
    wants = np.array([seq.wants for seq in seqs], dtype=np.int32)
    return wants if wants.any() else NONE


def _start(seq: Sequence) -> int:
    """Position of the first token that the newest scheduled step computes."""
    return seq.num_computed_tokens - seq.num_scheduled_tokens


class PlanBuilder:
    """Turns scheduled sequences into plans; remembers how much of each block table was sent.

    Args:
        num_rows: rows, without the padding row.
        row_width: int32 words of a row in the row table.
        block_size: tokens per KV block.
    """

    def __init__(self, num_rows: int, row_width: int, block_size: int) -> None:
        self.row_width, self.block_size = row_width, block_size
        self.num_sent_blocks = [0] * num_rows
        self._further_tables = SentTables()
        # Of the newest decode batch; None: a prefill has given a row another sequence since.
        self._decode_rows: np.ndarray | None = None
        self._num_common_tokens = 0
        self._decode_wants = NONE

    def build(self, seqs: list[Sequence], is_prefill: bool) -> StepPlan:
        """The plan of a step that computes `seq.num_scheduled_tokens` tokens of each sequence."""
        updates: list[tuple[int, int]] = []
        for seq in seqs:
            row = seq.row
            assert row is not None
            # The first chunk: a new row.
            if is_new := is_prefill and _start(seq) == seq.num_cached_tokens:
                self.num_sent_blocks[row] = 0
                updates += self._row_head(seq, row)
            num_sent = self.num_sent_blocks[row]
            if num_sent < len(seq.block_table):
                first = row * self.row_width + row_state.BLOCK_TABLE + num_sent
                updates += enumerate(seq.block_table[num_sent:], first)
                self.num_sent_blocks[row] = len(seq.block_table)
            if seq.further_tables:
                updates += self._further_tables.new_entries(seq, self.row_width, is_new)
        rows = np.array([seq.row for seq in seqs], dtype=np.int32)
        update_array = np.fromiter(chain.from_iterable(updates), dtype=np.int32).reshape(-1, 2)
        if not is_prefill:
            self._note_decode_batch(seqs, rows)
            return StepPlan(False, rows, update_array, self._decode_wants, self._num_common_tokens)
        self._decode_rows = None
        chunks = (seq.token_ids[_start(seq) : seq.num_computed_tokens] for seq in seqs)
        token_ids = np.fromiter(chain.from_iterable(chunks), dtype=np.int32)
        numbers = [
            (_start(seq), seq.num_scheduled_tokens, seq.num_shared_tokens, seq.is_prefilled)
            for seq in seqs
        ]
        copies = [c for seq in seqs if _start(seq) == seq.num_cached_tokens for c in seq.copies]
        arrays = [*np.array(numbers, dtype=np.int32).T, copied_units(copies)]
        return StepPlan(True, rows, update_array, _wants(seqs), 0, token_ids, *arrays)

    def _note_decode_batch(self, seqs: list[Sequence], rows: np.ndarray) -> None:
        # While the batch stays, decoding only appends blocks of each sequence's own.
        if self._decode_rows is None or not np.array_equal(rows, self._decode_rows):
            self._num_common_tokens = num_common_tokens(seqs, self.block_size)
            self._decode_wants = _wants(seqs)
            self._decode_rows = rows

    def _row_head(self, seq: Sequence, row: int) -> list[tuple[int, int]]:
        first = row * self.row_width
        wants_logits = seq.wants & Wants.LOGITS
        temperature = row_state.SKIPPED if wants_logits else seq.sampling_params.temperature
        head = struct.pack("<fQi", temperature, seq.seed, seq.features.adapter_slot)
        # TEMPERATURE, the two words of SEED, and ADAPTER stand side by side.
        return list(enumerate(struct.unpack("<4i", head), first + row_state.TEMPERATURE))
