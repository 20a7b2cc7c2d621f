"""What one step tells every rank, as a few int32 arrays.

The plan carries only what the device's row table does not know yet: in a steady decode step that is
nothing but the row numbers.
"""

from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import row_state

PREFILL_FIELDS = 5  # per-sequence numbers of a prefill
# Fewer cost more than they save: reading the common blocks apart takes a kernel in every layer.
MIN_SPARED_BLOCK_READS = 32
POOLED = 2  # in StepPlan.samples
NONE = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class StepPlan:
    """One step's input. S sequences, T tokens, U updates of the row table.

    `updates` are (flat index, value) pairs written to the row table before anything else.
    The tokens and the per-sequence arrays from `starts` on are empty in a decode step. A of the
    sequences that are sampled are sampled apart: by `sampling.RequestSampler`, on rank 0.
    """

    is_prefill: bool
    rows: np.ndarray  # [S] row of each sequence
    updates: np.ndarray  # [U, 2]
    token_ids: np.ndarray  # [T] tokens to compute, sequence after sequence
    apart: np.ndarray  # [A] numbers among the sequences that are sampled
    starts: np.ndarray  # [S] position of the first token to compute
    lengths: np.ndarray  # [S] tokens to compute
    shared: np.ndarray  # [S] positions below this are in shared blocks: K/V not written
    # [S] of the last token: 1: its logits are sampled; 0: more chunks follow; POOLED: neither, its
    # hidden state is wanted. The N that are not 0 count as sampled wherever numbers are given.
    samples: np.ndarray
    prompt_logits: np.ndarray  # [S] leading tokens whose logits are wanted for prompt logprobs
    # Leading blocks that a decode step reads once for all its rows.
    num_common_blocks: int = field(default=0, kw_only=True)


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


def _apart(sampled: list[Sequence]) -> np.ndarray:
    """Numbers of those of `sampled` that are sampled apart."""
    return np.array([i for i, seq in enumerate(sampled) if seq.is_sampled_apart], dtype=np.int32)


def _samples(seq: Sequence) -> int:
    """See `StepPlan.samples`."""
    if not seq.is_prefilled:
        return 0
    return 1 if seq.pooler is None else POOLED


def _num_prompt_logits(seq: Sequence) -> int:
    """How many of the step's tokens have a prompt token after them whose logprob is wanted."""
    if not seq.wants_prompt_logprobs:
        return 0
    return min(seq.num_computed_tokens, seq.num_prompt_tokens - 1) - _start(seq)


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
        # Of the newest decode batch; None: a prefill has given a row another sequence since.
        self._decode_rows: np.ndarray | None = None
        self._num_common_blocks = 0
        self._apart = NONE

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
            self._update_decode_batch(seqs, rows)
            return StepPlan(
                False,
                rows,
                update_array,
                NONE,
                self._apart,
                *[NONE] * PREFILL_FIELDS,
                num_common_blocks=self._num_common_blocks,
            )
        self._decode_rows = None
        apart = _apart([seq for seq in seqs if seq.is_prefilled])
        chunks = (seq.token_ids[_start(seq) : seq.num_computed_tokens] for seq in seqs)
        token_ids = np.fromiter(chain.from_iterable(chunks), dtype=np.int32)
        numbers = np.array(
            [
                [_start(seq) for seq in seqs],
                [seq.num_scheduled_tokens for seq in seqs],
                [seq.num_shared_tokens for seq in seqs],
                [_samples(seq) for seq in seqs],
                [_num_prompt_logits(seq) for seq in seqs],
            ],
            dtype=np.int32,
        )
        return StepPlan(True, rows, update_array, token_ids, apart, *numbers)

    def _update_decode_batch(self, seqs: list[Sequence], rows: np.ndarray) -> None:
        # While the batch stays, decoding only appends blocks of each sequence's own.
        if self._decode_rows is None or not np.array_equal(rows, self._decode_rows):
            num_common = count_common_blocks([seq.block_table for seq in seqs])
            num_spared = (len(seqs) - 1) * num_common
            self._num_common_blocks = num_common if num_spared >= MIN_SPARED_BLOCK_READS else 0
            self._apart = _apart(seqs)
            self._decode_rows = rows

    def _row_head(self, seq: Sequence, row: int) -> list[tuple[int, int]]:
        first = row * self.row_width
        temperature = row_state.SKIPPED if seq.is_sampled_apart else seq.sampling_params.temperature
        temperature_bits = int(np.float32(temperature).view(np.int32))
        seed_low, seed_high = np.array([seq.seed], dtype=np.uint64).view(np.int32)
        return [
            (first + row_state.TEMPERATURE, temperature_bits),
            (first + row_state.SEED, int(seed_low)),
            (first + row_state.SEED + 1, int(seed_high)),
        ]
