"""Step plans as flat int32 arrays, which travel from rank 0 to the workers."""

import numpy as np

from nanovllm.engine.step_plan import StepPlan

ARRAYS = (
    *("rows", "updates", "wants", "token_ids", "starts", "lengths", "shared", "is_last"),
    "copies",
)
HEADER_SIZE = 2 + len(ARRAYS)  # is_prefill, num_common_tokens, the words of each array


def pack(plan: StepPlan) -> np.ndarray:
    """The plan as one flat int32 array."""
    arrays = [getattr(plan, name).ravel() for name in ARRAYS]
    header = [plan.is_prefill, plan.num_common_tokens, *map(len, arrays)]
    return np.concatenate([np.array(header, dtype=np.int32), *arrays])


def unpack(packed: np.ndarray) -> StepPlan:
    """The plan that `pack` flattened; its arrays are views of `packed`."""
    is_prefill, num_common_tokens, *sizes = packed[:HEADER_SIZE].tolist()
    ends = np.cumsum([HEADER_SIZE, *sizes])
    parts = np.split(packed[: ends[-1]], ends[:-1])[1:]
    arrays = dict(zip(ARRAYS, parts, strict=True))
    for name in ("updates", "copies"):
        arrays[name] = arrays[name].reshape(-1, 2)
    return StepPlan(bool(is_prefill), num_common_tokens=num_common_tokens, **arrays)


def max_packed_size(
    max_num_seqs: int, max_num_batched_tokens: int, row_width: int, max_copies: int
) -> int:
    """An upper bound of a packed plan's int32 words; `max_copies` are those of a sequence."""
    # The row is new and its block table full; beside that, a number in each array but three.
    per_seq = 2 * row_width + 2 * max_copies + len(ARRAYS) - 3
    return HEADER_SIZE + max_num_seqs * per_seq + max_num_batched_tokens
