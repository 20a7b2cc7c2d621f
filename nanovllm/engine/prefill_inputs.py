"""A prefill step's inputs: computed on the host, so that they reach the device in one copy."""

from typing import NamedTuple

import numpy as np
import torch

from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels import row_state


class PrefillInputs(NamedTuple):
    """T tokens of S sequences, one sequence after another; N of them are sampled or pooled."""

    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32, index of each token in its sequence
    slot_mappings: torch.Tensor  # [G, T] int64, slots of the tokens' K/V by cache group; -1: none
    cu_seqlens_q: torch.Tensor  # [S + 1] int32, where the sequences begin among the tokens
    cu_seqlens_k: torch.Tensor  # [S + 1] int32, the same among all that they attend to
    block_tables: torch.Tensor  # [S, W] int32, of all cache groups
    last_tokens: torch.Tensor  # [N] int32, where the sampled sequences end among the tokens
    last_positions: torch.Tensor  # [N] int32, index of these tokens in their sequences
    last_lengths: torch.Tensor  # [N] int32, one more: what they attend to
    last_block_tables: torch.Tensor  # [N, W] int32
    seq_rows: torch.Tensor  # [S] int32, of all sequences
    rows: torch.Tensor  # [N] int32, of those that are sampled or pooled
    temperatures: torch.Tensor  # [N] float32
    seeds: torch.Tensor  # [N, 2] int32
    copies: torch.Tensor  # [C, 2] int32, as in `PrefillMetadata`
    bounds: torch.Tensor  # [3] int32, as in `PrefillMetadata`


def prefill_arrays(
    plan: StepPlan, row_table: np.ndarray, block_size: int, num_groups: int = 1
) -> dict[str, np.ndarray]:
    """The inputs of a prefill plan on the host, by their names in `PrefillInputs` and in its order.

    Args:
        plan: the step.
        row_table: int32, the host's copy of the row table, the plan's updates included.
        block_size: tokens per KV block.
        num_groups: cache groups, whose block tables stand side by side in a row.
    """
    cu_seqlens_q = _cumulative(plan.lengths)
    num_tokens = cu_seqlens_q[-1]
    # Token t is number t - cu_seqlens_q[s] of the step's tokens of its sequence s.
    first_positions = np.repeat(plan.starts - cu_seqlens_q[:-1], plan.lengths)
    positions = first_positions + np.arange(num_tokens, dtype=np.int32)
    block_tables = row_table[plan.rows, row_state.BLOCK_TABLE :]
    seq_of_token = np.repeat(np.arange(len(plan.rows)), plan.lengths)
    first_columns = np.arange(num_groups)[:, None] * (block_tables.shape[1] // num_groups)
    blocks = block_tables[seq_of_token, first_columns + positions // block_size].astype(np.int64)
    slots = blocks * block_size + positions % block_size
    is_shared = positions < np.repeat(plan.shared, plan.lengths)
    ends, is_last = plan.starts + plan.lengths, plan.is_last != 0
    states = row_table[plan.rows[is_last]]
    return {
        "token_ids": plan.token_ids,
        "positions": positions,
        "slot_mappings": np.where(is_shared, -1, slots),
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": _cumulative(ends),
        "block_tables": block_tables,
        "last_tokens": cu_seqlens_q[1:][is_last] - 1,
        "last_positions": ends[is_last] - 1,
        "last_lengths": ends[is_last],
        "last_block_tables": block_tables[is_last],
        "seq_rows": plan.rows,
        "rows": plan.rows[is_last],
        "temperatures": states[:, row_state.TEMPERATURE].copy().view(np.float32),
        "seeds": states[:, row_state.SEED : row_state.SEED + 2],
        "copies": plan.copies,
        "bounds": np.array([len(plan.rows), plan.lengths.max(), ends.max()], dtype=np.int32),
    }


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    """[S] -> [S + 1] int32, 0 first."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
