"""Step plans as flat int32 arrays, which travel from rank 0 to the workers."""

import numpy as np

from nanovllm.engine.step_plan import PREFILL_FIELDS, StepPlan

# is_prefill, the lengths of rows, updates, token_ids and apart, num_common_blocks
HEADER_SIZE = 6


def pack(plan: StepPlan) -> np.ndarray:
    """The plan as one flat int32 array."""
    lengths = map(len, (plan.rows, plan.updates, plan.token_ids, plan.apart))
    header = np.array([plan.is_prefill, *lengths, plan.num_common_blocks], dtype=np.int32)
    parts = [header, plan.rows, plan.updates.ravel(), plan.token_ids, plan.apart]
    if plan.is_prefill:
        parts += [plan.starts, plan.lengths, plan.shared, plan.samples, plan.prompt_logits]
    return np.concatenate(parts)


def unpack(packed: np.ndarray) -> StepPlan:
    """The plan that `pack` flattened; its arrays are views of `packed`."""
    header = (int(n) for n in packed[:HEADER_SIZE])
    is_prefill, num_seqs, num_updates, num_tokens, num_apart, num_common_blocks = header
    num_fields = PREFILL_FIELDS * num_seqs if is_prefill else 0
    sizes = [HEADER_SIZE, num_seqs, 2 * num_updates, num_tokens, num_apart, num_fields]
    parts = np.split(packed[: sum(sizes)], np.cumsum(sizes)[:-1])
    _, rows, updates, token_ids, apart, numbers = parts
    return StepPlan(
        bool(is_prefill),
        rows,
        updates.reshape(-1, 2),
        token_ids,
        apart,
        *numbers.reshape(PREFILL_FIELDS, -1),
        num_common_blocks=num_common_blocks,
    )


def max_packed_size(max_num_seqs: int, max_num_batched_tokens: int, row_width: int) -> int:
    """An upper bound of a packed plan's int32 words."""
    # The row is new, its block table full, and it is sampled apart.
    per_seq = 1 + PREFILL_FIELDS + 2 * row_width + 1
    return HEADER_SIZE + max_num_seqs * per_seq + max_num_batched_tokens
