"""Decode attention in Triton against `torch_ops`, to be run by pytest with TRITON_INTERPRET=1.

float32 and float16 only, see `triton_interpreter_checks.py`, which also explains how it is started.
"""

from dataclasses import replace

import pytest
import torch
from new_tokens import new_tokens
from triton_interpreter_checks import (
    DTYPES,
    HEADS,
    HEADS_AND_DTYPES,
    NO_SLOTS,
    OPS,
    assert_close,
    paged_inputs,
)

from nanovllm.kernels import torch_ops
from nanovllm.kernels.attention_steps import AttentionInSteps
from nanovllm.kernels.triton import common_prefix as triton_common_prefix
from nanovllm.kernels.triton import decode_attention as decode
from nanovllm.kernels.triton.fused_decode import MAX_ROWS, fuses
from nanovllm.kernels.types import FP8_DTYPE, DecodeMetadata, KVCache


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def columns_of(plan: decode.DecodePlan) -> list[list[int]]:
    """[row, begin, end, first item, number of splits] of every item that has a split."""
    is_used = plan.items[:, decode.NUM_SPLITS.value] > 0
    num_used = int(is_used.sum())
    assert is_used[:num_used].all(), "the programs without a split come last"
    return plan.items[:num_used].tolist()


# (context lengths, programs per multiprocessor, shortest split, common tokens)
PLANS = (
    ([1], 1, 16, 0),
    ([300], 1, 16, 0),
    ([300], 100, 16, 0),
    ([300], 100, 128, 0),
    ([0, 0], 4, 16, 0),
    ([1000, 3, 16, 17, 0, 255, 0], 8, 16, 0),
    ([200] * 40, 8, 32, 0),
    ([80, 33, 0, 49], 4, 16, 32),
    ([80, 44, 0, 49], 4, 16, 43),
    (list(range(1, 600, 4)), 64, 64, 0),  # more rows than one chunk of the items
)


@pytest.mark.parametrize(("lens", "programs_per_sm", "min_split", "num_common"), PLANS)
def test_a_plan_covers_every_token_once_in_splits_of_one_size(
    lens, programs_per_sm, min_split, num_common
):
    tile = 16
    tables = torch.zeros(len(lens), -(-max(16, *lens) // 16), dtype=torch.int32)
    cache = KVCache(torch.empty(1, 16, 2, 64), torch.empty(1, 16, 2, 64))
    common = ints([num_common]) if num_common else None
    plan = decode.plan_decode(
        cache,
        tables,
        ints(lens),
        common,
        tile=tile,
        programs_per_sm=programs_per_sm,
        min_split=min_split,
    )
    assert (plan.arrivals == 0).all() and plan.arrivals.shape == (len(lens), 2)
    items = columns_of(plan)
    assert [item[0] for item in items] == sorted(item[0] for item in items)
    first_token = num_common // tile * tile
    num_own_tiles = [-(-max(0, length - first_token) // tile) for length in lens]
    target = max(1, programs_per_sm // 2)  # the interpreter has one multiprocessor
    longest = max(-(-sum(num_own_tiles) // target), min_split // tile) * tile
    for row, length in enumerate(lens):
        splits = [item for item in items if item[0] == row]
        first = items.index(splits[0])
        assert all(item[3:] == [first, len(splits)] for item in splits)
        assert [item[1] for item in splits[1:]] == [item[2] for item in splits[:-1]]
        assert splits[0][1] == num_common
        if num_own_tiles[row] == 0:
            assert len(splits) == 1 and splits[0][2] <= splits[0][1]
            continue
        assert splits[-1][2] == length
        sizes = [-(-end // tile) - begin // tile for _, begin, end, _, _ in splits]
        assert all(item[1] % tile == 0 for item in splits[1:])
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert max(sizes) * tile <= longest and len(splits) == -(
            -num_own_tiles[row] * tile // longest
        )


def decode_inputs(lens: list[int], num_common: int, block_size: int, heads, dtype: torch.dtype):
    """Arguments of `decode_attention`, with the first row's leading tokens in all rows.

    Whole blocks are shared, of the next one each row has a copy.
    """
    cache, tables = paged_inputs(lens, block_size, heads, dtype)
    num_blocks, num_copied = divmod(num_common, block_size)
    tables[:, :num_blocks] = tables[:1, :num_blocks].clone()
    for memory in cache[:2]:
        memory[tables[1:, num_blocks], :num_copied] = memory[tables[0, num_blocks], :num_copied]
    query = torch.randn(len(lens), heads[0], heads[2]).to(dtype)
    return query, cache, DecodeMetadata(NO_SLOTS, tables, ints(lens)), heads[2] ** -0.5


def attend(args, plan: decode.DecodePlan) -> torch.Tensor:
    query, cache, metadata, scale = args
    return decode.decode_attention(query, cache, replace(metadata, plan=plan), scale)


@pytest.mark.parametrize(
    ("heads", "block_size", "programs_per_sm", "dtype"),
    [
        (HEADS[0], 16, 200, DTYPES[0]),
        (HEADS[0], 64, 20, DTYPES[1]),
        (HEADS[1], 16, 200, DTYPES[1]),
        (HEADS[1], 64, 1, DTYPES[0]),
        (HEADS[2], 64, 20, DTYPES[0]),
        (HEADS[2], 64, 1, DTYPES[1]),
        (HEADS[3], 16, 200, DTYPES[0]),
        (HEADS[3], 64, 1, DTYPES[1]),
    ],
)
def test_decode_attention(dtype, heads, block_size, programs_per_sm, monkeypatch):
    """Whole rows, a few splits, and more splits than are merged at a time."""
    args = decode_inputs([1, 0, 16, 17, 100], 0, block_size, heads, dtype)
    _, cache, metadata, _ = args
    expected = torch_ops.attend(*args)
    plan = decode.plan_decode(
        cache,
        metadata.block_tables,
        metadata.context_lens,
        tile=16,
        programs_per_sm=programs_per_sm,
        min_split=16,
    )
    if programs_per_sm == 200:
        monkeypatch.setattr(decode, "MERGE_ELEMENTS", 256)
        merged_at_a_time = 256 // (heads[0] // heads[1] * heads[2])
        assert plan.items[:, decode.NUM_SPLITS.value].max() > merged_at_a_time
    assert_close(attend(args, plan), expected)
    if programs_per_sm == 1:
        assert_close(decode.decode_attention(*args), expected)
    else:  # a plan serves every layer
        assert_close(attend(args, plan), expected)


def test_decode_attention_of_no_rows():
    args = decode_inputs([3], 0, 16, HEADS[0], torch.float32)
    query, cache, metadata, scale = args
    tables, lens = metadata.block_tables[:0], metadata.context_lens[:0]
    for plan in (OPS.plan_decode(cache, tables, lens, None), None):
        empty = DecodeMetadata(NO_SLOTS, tables, lens, plan)
        assert OPS.attend(query[:0], cache, empty, scale).shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("heads", "dtype", "lens", "num_common", "num_prefix_splits"),
    (
        (*HEADS_AND_DTYPES[2], [50, 33, 81, 65, 0, 0], 32, 4),  # splits without a token
        ((12, 1, 24), DTYPES[1], [33, 43, *4 * [38]], 32, 1),  # more queries than one program takes
        (*HEADS_AND_DTYPES[2], [35, 45], 0, 2),
        (*HEADS_AND_DTYPES[1], [161], 160, 4),
        (*HEADS_AND_DTYPES[2], [90, 64, 0, 59], 56, 2),
        (*HEADS_AND_DTYPES[1], [35, 8, 70], 7, 2),
    ),
)
def test_common_tokens_are_read_once_with_the_same_result(
    dtype, heads, lens, num_common, num_prefix_splits, monkeypatch
):
    monkeypatch.setattr(decode, "choose_prefix_splits", lambda *args: num_prefix_splits)
    args = decode_inputs(lens, num_common, 32, heads, dtype)
    _, cache, metadata, _ = args
    is_live = metadata.context_lens > 0
    expected = torch_ops.attend(*args)[is_live]
    num_blocks, num_copied = divmod(num_common, 32)
    for memory in cache[:2]:  # only the first row's are read
        memory[metadata.block_tables[1:, num_blocks], :num_copied] = torch.nan
    for programs_per_sm, num_layers in ((1, 1), (50, 2)):
        plan = decode.plan_decode(
            cache,
            metadata.block_tables,
            metadata.context_lens,
            ints([num_common]),
            tile=16,
            programs_per_sm=programs_per_sm,
            min_split=16,
        )
        for _ in range(num_layers):
            got = attend(args, plan)
            assert got.isfinite().all()
            assert_close(got[is_live], expected)


@pytest.mark.parametrize("num_common", (32, 27, 17))
def test_the_common_prefix_reads_only_common_tokens(num_common):
    """All other ones are NaN; the table's later entries are out of range."""
    caches = torch.full((2, 3, 16, 2, 32), torch.nan)
    caches[:, 2] = torch.randn(2, 16, 2, 32)
    caches[:, 1, : num_common - 16] = torch.randn(2, num_common - 16, 2, 32)
    cache = KVCache(*caches)
    query = torch.randn(5, 4, 32)
    partial, partial_lse = torch.full((3, 5, 4, 32), torch.nan), torch.full((3, 5, 4), torch.nan)
    table = ints([2, 1, 2**30])
    triton_common_prefix.attend_to_common_prefix(
        partial, partial_lse, query, cache, table, ints([num_common]), 0.5
    )
    weights = torch.exp2(partial_lse - partial_lse.amax(0))
    got = (partial * weights.unsqueeze(-1)).sum(0) / weights.sum(0).unsqueeze(-1)
    lens = torch.full((5,), num_common, dtype=torch.int32)
    metadata = DecodeMetadata(NO_SLOTS, table[:2].expand(5, 2), lens)
    expected = torch_ops.attend(query, cache, metadata, 0.5)
    assert_close(got, expected)
    triton_common_prefix.attend_to_common_prefix(
        partial, partial_lse, query, cache, table, ints([0]), 0.5
    )
    assert (partial == 0).all() and (partial_lse == -torch.inf).all()


@pytest.mark.parametrize(("heads", "dtype"), HEADS_AND_DTYPES[1:3])
def test_fp8_cache(dtype, heads):
    _, num_kv_heads, head_dim = heads
    lens, block_size, width = [70, 65, 0, 129], 64, 3
    num_blocks = width * len(lens)
    caches = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim).to(FP8_DTYPE)
    scales = torch.rand(2, num_blocks, num_kv_heads, block_size) * 10 ** torch.linspace(-6, 1, 64)
    tables = torch.randperm(num_blocks).view(len(lens), width).int()
    tables[:, 0] = tables[0, 0]
    query = torch.randn(len(lens), heads[0], head_dim).to(dtype)
    cache, metadata = KVCache(*caches, *scales), DecodeMetadata(NO_SLOTS, tables, ints(lens))
    args = query, cache, metadata, head_dim**-0.5
    expected = torch_ops.attend(query.float(), *args[1:])
    for common in (None, ints([64]), ints([41])):
        plan = decode.plan_decode(
            cache, tables, ints(lens), common, programs_per_sm=10, min_split=32
        )
        got = attend(args, plan)
        eps = torch.finfo(dtype).eps
        is_live = ints(lens) > 0
        torch.testing.assert_close(
            got[is_live].float(),
            expected[is_live],
            rtol=4 * eps,
            atol=8 * eps * expected.abs().max(),
        )


FUSED = (
    # heads, parts of the QKV product, extras of attention
    ((4, 2, 64), 2, {}),
    ((3, 1, 128), 1, {"window": 40}),
    ((2, 2, 64), 1, {"softcap": 2.0, "window": 20}),
    ((4, 2, 64), 2, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
)


@pytest.mark.parametrize(("heads", "num_parts", "extras"), FUSED)
def test_heads_are_made_in_decode_attention(heads, num_parts, extras):
    """Bit for bit as by the two kernels, K/V included."""
    args = new_tokens([1, 0, 70], heads, DTYPES[1], torch.device("cpu"), num_parts=num_parts)
    inputs, cache, metadata, scale = args
    live, window = metadata.context_lens > 0, extras.get("window")
    caches = [KVCache(*(x.clone() for x in cache[:2])) for _ in range(3)]
    expected = torch_ops.TorchOps().attention(inputs, caches[0], metadata, scale, **extras)
    tables, lens = metadata.block_tables, metadata.context_lens
    plan = decode.plan_decode(
        cache, tables, lens, None, window, tile=16, programs_per_sm=50, min_split=32
    )
    planned = replace(metadata, plan=plan)
    assert fuses(inputs, cache, planned, window)
    in_steps = AttentionInSteps.attention(OPS, inputs, caches[1], planned, scale, **extras)
    fused = OPS.attention(inputs, caches[2], planned, scale, **extras)
    assert torch.equal(fused[live], in_steps[live]) and (fused[~live] == 0).all()
    assert_close(fused[live], expected[live])
    for ours, other in zip(caches[1][:2], caches[2][:2], strict=True):
        assert torch.equal(ours.nan_to_num(), other.nan_to_num())


def test_what_decode_attention_leaves_to_kernels_of_their_own():
    args = new_tokens([1, 33], (4, 2, 64), DTYPES[1], torch.device("cpu"))
    inputs, cache, metadata, _ = args
    tables, lens = metadata.block_tables, metadata.context_lens
    plan = decode.plan_decode(cache, tables, lens)
    planned = replace(metadata, plan=plan)
    assert fuses(inputs, cache, planned, None)
    assert not fuses(inputs, cache, metadata, None), "the last layer of a prefill"
    assert not fuses(inputs, cache, replace(planned, logits_indices=ints([0, 1])), None)
    shared = replace(metadata, plan=decode.plan_decode(cache, tables, lens, ints([0])))
    assert not fuses(inputs, cache, shared, None) and fuses(inputs, cache, shared, 8)
    for norms in ((None, None), (None, inputs.k_norm_weight), [torch.ones(64)] * 2):
        without = inputs._replace(q_norm_weight=norms[0], k_norm_weight=norms[1])
        assert not fuses(without, cache, planned, None)
    assert not fuses(inputs, cache._replace(key_scales=torch.ones(1)), planned, None)
    slots = torch.zeros(MAX_ROWS + 1, dtype=torch.int64)
    assert not fuses(inputs, cache, replace(planned, slot_mapping=slots), None)
