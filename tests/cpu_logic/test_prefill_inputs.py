"""A prefill's inputs against a loop over its tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.prefill_inputs import PrefillInputs, prefill_arrays
from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels import row_state
from nanovllm.kernels.copies import upload

NUM_ROWS = 8
NUM_BLOCKS = 5  # of a block table
NUM_GROUPS = 3
ROW_WIDTH = row_state.BLOCK_TABLE + NUM_GROUPS * NUM_BLOCKS


def int32(numbers) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def make_plan(rows, starts, lengths, shared, is_last) -> StepPlan:
    return StepPlan(
        True,
        int32(rows),
        np.empty((0, 2), dtype=np.int32),
        token_ids=np.arange(100, 100 + sum(lengths), dtype=np.int32),
        starts=int32(starts),
        lengths=int32(lengths),
        shared=int32(shared),
        is_last=int32(is_last),
        copies=int32([[3, 1], [7, 2]]),
    )


def inputs_of(plan, row_table, block_size, num_groups=1) -> PrefillInputs:
    arrays = prefill_arrays(plan, row_table, block_size, num_groups)
    assert tuple(arrays) == PrefillInputs._fields
    return PrefillInputs(*upload(arrays.values(), torch.device("cpu")))


@st.composite
def prefills(draw) -> tuple[StepPlan, np.ndarray, int, int]:
    block_size = draw(st.integers(1, 7))
    rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, unique=True))
    longest = block_size * NUM_BLOCKS
    spans = [sorted(draw(st.tuples(*[st.integers(0, longest - 1)] * 2))) for _ in rows]
    starts = [start for start, _ in spans]
    lengths = [last + 1 - start for start, last in spans]
    shared = [draw(st.integers(0, longest)) for _ in rows]
    is_last = [draw(st.integers(0, 1)) for _ in rows]
    words = draw(st.integers(0, 2**32 - 1))
    row_table = np.random.default_rng(words).integers(
        0, 2**31, (NUM_ROWS + 1, ROW_WIDTH), dtype=np.int32
    )
    num_groups = draw(st.integers(1, NUM_GROUPS))
    row_table = row_table[:, : row_state.BLOCK_TABLE + num_groups * NUM_BLOCKS]
    return make_plan(rows, starts, lengths, shared, is_last), row_table, block_size, num_groups


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(prefills())
def test_inputs_are_those_of_a_loop_over_the_tokens(prefill):
    plan, row_table, block_size, num_groups = prefill
    inputs = inputs_of(plan, row_table, block_size, num_groups)
    slots: list[list[int]] = [[] for _ in range(num_groups)]
    positions, ends_q, ends_k = [], [0], [0]
    last_tokens, last_positions, rows, seeds, temperature_bits = [], [], [], [], []
    last_lengths = []
    numbers = zip(plan.rows, plan.starts, plan.lengths, plan.shared, plan.is_last, strict=True)
    for row, start, length, shared, is_last in (map(int, line) for line in numbers):
        state = row_table[row].tolist()
        for position in range(start, start + length):
            positions.append(position)
            for group, own_slots in enumerate(slots):
                column = row_state.BLOCK_TABLE + group * NUM_BLOCKS + position // block_size
                slot = state[column] * block_size + position % block_size
                own_slots.append(-1 if position < shared else slot)
        ends_q.append(len(positions))
        ends_k.append(ends_k[-1] + start + length)
        if is_last:
            last_tokens.append(len(positions) - 1)
            last_positions.append(start + length - 1)
            last_lengths.append(start + length)
            rows.append(row)
            seeds.append(state[row_state.SEED : row_state.SEED + 2])
            temperature_bits.append(state[row_state.TEMPERATURE])
    expected = PrefillInputs(
        token_ids=torch.from_numpy(plan.token_ids),
        positions=torch.from_numpy(int32(positions)),
        slot_mappings=torch.tensor(slots),
        cu_seqlens_q=torch.from_numpy(int32(ends_q)),
        cu_seqlens_k=torch.from_numpy(int32(ends_k)),
        block_tables=torch.from_numpy(row_table[plan.rows, row_state.BLOCK_TABLE :]),
        last_tokens=torch.from_numpy(int32(last_tokens)),
        last_positions=torch.from_numpy(int32(last_positions)),
        last_lengths=torch.from_numpy(int32(last_lengths)),
        last_block_tables=torch.from_numpy(row_table[int32(rows), row_state.BLOCK_TABLE :]),
        seq_rows=torch.from_numpy(plan.rows),
        rows=torch.from_numpy(int32(rows)),
        temperatures=torch.from_numpy(int32(temperature_bits).view(np.float32)),
        seeds=torch.from_numpy(int32(seeds).reshape(-1, 2)),
        copies=torch.from_numpy(plan.copies),
        bounds=torch.from_numpy(
            int32([len(plan.rows), max(plan.lengths), max(plan.starts + plan.lengths)])
        ),
    )
    for name, tensor, wanted in zip(PrefillInputs._fields, inputs, expected, strict=True):
        assert tensor.is_contiguous(), name
        # equal_nan: a temperature of random bits may be any float
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True, msg=name)


def test_slots_beyond_32_bits_are_right():
    row_table = np.zeros((1, ROW_WIDTH), dtype=np.int32)
    row_table[0, row_state.BLOCK_TABLE] = 2**31 - 1
    inputs = inputs_of(make_plan([0], [254], [2], [0], [1]), row_table, 256)
    assert inputs.slot_mappings.tolist() == [[256 * (2**31 - 1) + 254, 256 * (2**31 - 1) + 255]]


def test_inputs_are_copies():
    """A plan may lie in memory that another process writes to."""
    plan = make_plan([0], [0], [3], [0], [1])
    inputs = inputs_of(plan, np.zeros((1, ROW_WIDTH), dtype=np.int32), 4)
    plan.token_ids[:] = plan.rows[:] = -5
    assert inputs.token_ids.tolist() == [100, 101, 102]
    assert inputs.rows.tolist() == [0]
