"""What one step tells every rank, as a few int32 arrays that pack into one buffer.

The plan carries only what the device's row table does not know yet: in a steady decode step that is
nothing but the row numbers.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np

from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import row_state

HEADER_SIZE = 5  # is_prefill, the lengths of rows, updates and token_ids, num_common_blocks
PREFILL_FIELDS = 4  # per-sequence numbers of a prefill
# Fewer cost more than they save: reading the common blocks apart takes a kernel in every layer.
MIN_SPARED_BLOCK_READS = 32


@dataclass(frozen=True)
class StepPlan:
    """One step's input. S sequences, T tokens, U updates of the row table.

    `updates` are (flat index, value) pairs written to the row table before anything else.
    The per-sequence arrays below `rows` and the tokens are empty in a decode step.
    """

    is_prefill: bool
    rows: np.ndarray  # [S] row of each sequence
    updates: np.ndarray  # [U, 2]
    token_ids: np.ndarray  # [T] tokens to compute, sequence after sequence
    starts: np.ndarray  # [S] position of the first token to compute
    lengths: np.ndarray  # [S] tokens to compute
    shared: np.ndarray  # [S] positions below this are in shared blocks: K/V not written
    samples: np.ndarray  # [S] 1: the last token's logits are sampled; 0: more chunks follow
    num_common_blocks: int = 0  # leading blocks that a decode step reads once for all its rows

    def pack(self) -> np.ndarray:
        """The plan as one flat int32 array."""
        lengths = [len(self.rows), len(self.updates), len(self.token_ids)]
        header = np.array([self.is_prefill, *lengths, self.num_common_blocks], dtype=np.int32)
        parts = [header, self.rows, self.updates.ravel(), self.token_ids]
        if self.is_prefill:
            parts += [self.starts, self.lengths, self.shared, self.samples]
        return np.concatenate(parts)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "StepPlan":
        """The plan that `pack` flattened; its arrays are views of `packed`."""
        header = (int(n) for n in packed[:HEADER_SIZE])
        is_prefill, num_seqs, num_updates, num_tokens, num_common_blocks = header
        num_fields = PREFILL_FIELDS * num_seqs if is_prefill else 0
        sizes = [HEADER_SIZE, num_seqs, 2 * num_updates, num_tokens, num_fields]
        _, rows, updates, token_ids, numbers = np.split(packed[: sum(sizes)], np.cumsum(sizes)[:-1])
        starts, lengths, shared, samples = numbers.reshape(PREFILL_FIELDS, -1)
        return cls(
            bool(is_prefill),
            rows,
            updates.reshape(-1, 2),
            token_ids,
            starts,
            lengths,
            shared,
            samples,
            num_common_blocks,
        )

    @staticmethod
    def max_packed_size(max_num_seqs: int, max_num_batched_tokens: int, row_width: int) -> int:
        """An upper bound of a packed plan's int32 words."""
        per_seq = 1 + PREFILL_FIELDS + 2 * row_width  # the row is new and its block table full
        return HEADER_SIZE + max_num_seqs * per_seq + max_num_batched_tokens


def count_common_blocks(block_tables: list[list[int]]) -> int:
    """How many leading blocks all tables share."""
    # What the smallest and the largest have in common, all in between have too.
    lowest, highest = min(block_tables), max(block_tables)
    num_common = 0
    for block_id, other in zip(lowest, highest, strict=False):
        if block_id != other:
            break
        num_common += 1
    return num_common


def _start(seq: Sequence) -> int:
    """Position of the first token that the newest scheduled step computes."""
    return seq.num_computed_tokens - seq.num_scheduled_tokens


class PlanBuilder:
    """Turns scheduled sequences into plans; remembers how much of each block table was sent.

    Args:
        row_width: int32 words of a row in the row table.
        num_rows: rows, without the padding row.
    """

    def __init__(self, num_rows: int, row_width: int) -> None:
        self.row_width = row_width
        self.num_sent_blocks = [0] * num_rows
        # Of the newest decode batch; None: a prefill has given a row another table since.
        self._decode_rows: np.ndarray | None = None
        self._num_common_blocks = 0

    def build(self, seqs: list[Sequence], is_prefill: bool) -> StepPlan:
        """The plan of a step that computes `seq.num_scheduled_tokens` tokens of each sequence."""
        updates: list[tuple[int, int]] = []
        for seq in seqs:
            row = seq.row
            assert row is not None
            if is_prefill and _start(seq) == seq.num_cached_tokens:  # the first chunk: a new row
                self.num_sent_blocks[row] = 0
                updates += self._row_head(seq, row)
            num_sent = self.num_sent_blocks[row]
            if num_sent < len(seq.block_table):
                first = row * self.row_width + row_state.BLOCK_TABLE + num_sent
                updates += enumerate(seq.block_table[num_sent:], first)
                self.num_sent_blocks[row] = len(seq.block_table)
        rows = np.array([seq.row for seq in seqs], dtype=np.int32)
        update_array = np.array(updates, dtype=np.int32).reshape(-1, 2)
        if not is_prefill:
            none = np.empty(0, dtype=np.int32)
            num_common_blocks = self._common_blocks(seqs, rows)
            return StepPlan(
                False, rows, update_array, none, none, none, none, none, num_common_blocks
            )
        self._decode_rows = None
        chunks = (seq.token_ids[_start(seq) : seq.num_computed_tokens] for seq in seqs)
        token_ids = np.fromiter(chain.from_iterable(chunks), dtype=np.int32)
        numbers = np.array(
            [
                [_start(seq) for seq in seqs],
                [seq.num_scheduled_tokens for seq in seqs],
                [seq.num_shared_tokens for seq in seqs],
                [seq.is_prefilled for seq in seqs],
            ],
            dtype=np.int32,
        )
        return StepPlan(True, rows, update_array, token_ids, *numbers)

    def _common_blocks(self, seqs: list[Sequence], rows: np.ndarray) -> int:
        # While the batch stays, decoding only appends blocks of each sequence's own.
        if self._decode_rows is None or not np.array_equal(rows, self._decode_rows):
            num_common = count_common_blocks([seq.block_table for seq in seqs])
            num_spared = (len(seqs) - 1) * num_common
            self._num_common_blocks = num_common if num_spared >= MIN_SPARED_BLOCK_READS else 0
            self._decode_rows = rows
        return self._num_common_blocks

    def _row_head(self, seq: Sequence, row: int) -> list[tuple[int, int]]:
        first = row * self.row_width
        temperature = np.float32(seq.sampling_params.temperature).view(np.int32)
        seed_low, seed_high = np.array([seq.seed], dtype=np.uint64).view(np.int32)
        return [
            (first + row_state.TEMPERATURE, int(temperature)),
            (first + row_state.SEED, int(seed_low)),
            (first + row_state.SEED + 1, int(seed_high)),
        ]
