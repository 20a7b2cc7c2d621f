"""Windows, soft caps and sinks in Triton against `torch_ops`, run with TRITON_INTERPRET=1.

float32 and float16 only, see `triton_interpreter_checks.py`, which also explains how it is started.
"""

import math
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from test_attention_extras import extreme_sinks
from triton_decode_checks import columns_of, ints
from triton_interpreter_checks import NO_SLOTS, OPS, assert_close, fp8_cache, paged_inputs

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import attention_scores
from nanovllm.kernels.triton import decode_attention as decode
from nanovllm.kernels.triton.launch import jit
from nanovllm.kernels.triton.prefill_attention import prefill_attention
from nanovllm.kernels.types import DecodeMetadata, KVCache, PrefillMetadata

BLOCK_SIZE = 32  # two tiles
# (window, soft cap, whether there are sinks): around tiles, blocks and lengths; alone and together.
EXTRAS = (
    (1, None, False),
    (16, 1.5, False),
    (17, None, True),
    (33, 1.5, True),
    (1000, 1.5, True),
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@jit
def _tanh_kernel(out, x, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, attention_scores.tanh(tl.load(x + index)))


def test_tanh():
    """Its relative error too: a soft cap leaves small scores as they are."""
    small = 10 ** torch.linspace(-30, 2, 2047)
    x = torch.cat((small, -small, torch.tensor([0.0, 1e38])))
    got = torch.empty_like(x)
    _tanh_kernel[(1,)](got, x, SIZE=4096)
    torch.testing.assert_close(got, x.double().tanh().float(), rtol=5e-7, atol=0)


def extras_of(case, num_heads: int, dtype: torch.dtype) -> dict:
    window, softcap, has_sinks = case
    sinks = extreme_sinks(num_heads).to(dtype) if has_sinks else None
    return {"window": window, "softcap": softcap, "sinks": sinks}


def forget(cache: KVCache, tables, lens_q, lens_k, window: int | None) -> None:
    """Make NaN of every block of which no query sees a token; the tables name them still."""
    for table, len_q, len_k in zip(tables, lens_q, lens_k, strict=True):
        num_dead = 0 if window is None else max(0, len_k - len_q + 1 - window) // BLOCK_SIZE
        for part in cache[:2]:
            part[table[:num_dead].long()] = torch.nan


def in_fp8(cache: KVCache) -> KVCache:
    (keys, key_scales), (values, value_scales) = map(fp8_cache, cache[:2])
    return KVCache(keys, values, key_scales, value_scales)


@pytest.mark.parametrize("case", EXTRAS)
def test_prefill(case):
    """A whole prompt, a cached prefix before new tokens, one new token; both walks, and fp8."""
    lens_k, lens_q = [17, 60, 50], [17, 20, 1]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (lens_q, lens_k))
    for dtype, is_fp8, config, by_bulk_copies in (
        (torch.float32, False, (16, 16, 4, 1), False),
        (torch.float16, False, (16, 32, 4, 1), True),
        (torch.float16, True, (32, 16, 4, 1), False),
    ):
        cache, tables = paged_inputs(lens_k, BLOCK_SIZE, (2, 1, 16), dtype)
        extras = extras_of(case, 2, dtype)
        forget(cache, tables, lens_q, lens_k, case[0])
        query = torch.randn(sum(lens_q), 2, 16).to(dtype)
        metadata = PrefillMetadata(NO_SLOTS, tables, cu_q, cu_k, max(lens_q), max(lens_k))
        args = query, in_fp8(cache) if is_fp8 else cache, metadata, 0.3
        got = prefill_attention(
            *args, **extras, config=config, use_tensor_descriptors=by_bulk_copies
        )
        assert_close(got, torch_ops.attend(*args, **extras))


@pytest.mark.parametrize("case", EXTRAS)
def test_decode(case):
    """Rows in one split and in many, with an empty one; with and without the layer's own plan."""
    lens = [1, 0, 17, 75]
    for dtype, is_fp8, heads in (
        (torch.float32, False, (6, 2, 24)),
        (torch.float16, True, (3, 1, 24)),
    ):
        cache, tables = paged_inputs(lens, BLOCK_SIZE, heads, dtype)
        forget(cache, tables, [1] * len(lens), lens, case[0])
        if is_fp8:
            cache = in_fp8(cache)
        args = torch.randn(len(lens), *heads[::2]).to(dtype), cache
        extras = extras_of(case, heads[0], dtype)
        metadata = DecodeMetadata(NO_SLOTS, tables, ints(lens))
        expected = torch_ops.attend(*args, metadata, 0.3, **extras)
        sizes = {"tile": 16, "programs_per_sm": 40, "min_split": 16}
        of_layer = decode.plan_decode(cache, tables, ints(lens), None, case[0], **sizes)
        of_others = decode.plan_decode(cache, tables, ints(lens), None, 18, **sizes)
        for plan in (of_layer, of_others):
            got = OPS.attend(*args, replace(metadata, plan=plan), 0.3, **extras)
            assert got.isfinite().all()
            assert_close(got, expected)


@pytest.mark.parametrize("num_common", (64, 50))
def test_a_windowed_layer_reads_no_common_tokens(num_common):
    """Nor does it spoil the plan for the layers that do."""
    lens, window = [80, 75, 97, 0], 40
    cache, tables = paged_inputs(lens, BLOCK_SIZE, (3, 1, 32), torch.float32)
    tables[:, :2] = tables[:1, :2].clone()
    cache.key[tables[0, 1].long()], cache.value[tables[0, 1].long()] = torch.randn(2, 32, 1, 32)
    query = torch.randn(len(lens), 3, 32)
    is_live = ints(lens) > 0
    for window_of_plan in (None, window):
        plan = OPS.plan_decode(cache, tables, ints(lens), ints([num_common]), window_of_plan)
        metadata = DecodeMetadata(NO_SLOTS, tables, ints(lens), plan)
        for extras in (
            {"window": window, "sinks": extreme_sinks(3)},
            {"window": 10_000, "softcap": 0.7, "sinks": extreme_sinks(3)},
        ):
            args = query, cache, metadata, 0.3
            got, expected = (ops.attend(*args, **extras) for ops in (OPS, torch_ops))
            assert got.isfinite().all()
            assert_close(got[is_live], expected[is_live])
        assert set(plan.others) == {(1, None if window_of_plan else window)}, "one for all layers"
    # The first block is out of sight of all, and may be anything.
    cache.key[tables[0, 0].long()] = cache.value[tables[0, 0].long()] = torch.nan
    assert_close(OPS.attend(*args, window=window), torch_ops.attend(*args, window=window))


@pytest.mark.parametrize("window", (1, 17, 40, 100))
@pytest.mark.parametrize(("programs_per_sm", "min_split"), ((1, 16), (100, 16), (100, 32)))
def test_a_plan_covers_the_window_alone(window, programs_per_sm, min_split):
    lens, tile = [0, 1, 16, 17, 40, 41, 200, 193], 16
    tables = torch.zeros(len(lens), 7, dtype=torch.int32)
    cache = KVCache(*torch.empty(2, 1, BLOCK_SIZE, 2, 64))
    plan = decode.plan_decode(
        cache,
        tables,
        ints(lens),
        None,
        window,
        tile=tile,
        programs_per_sm=programs_per_sm,
        min_split=min_split,
    )
    items = columns_of(plan)
    for row, length in enumerate(lens):
        splits = [item for item in items if item[0] == row]
        assert all(item[3:] == [items.index(splits[0]), len(splits)] for item in splits)
        assert [item[1] for item in splits[1:]] == [item[2] for item in splits[:-1]]
        assert (splits[0][1], splits[-1][2]) == (max(0, length - window), length)
        assert all(item[1] % tile == 0 for item in splits[1:])
        assert length == 0 or all(item[1] < item[2] for item in splits)
    # The grid does not depend on the table's width.
    most_tiles = math.ceil((window - 1) / tile) + 1
    assert len(plan.items) <= len(lens) * math.ceil(most_tiles * tile / min_split)


def test_layers_with_another_number_of_kv_heads_have_a_plan_of_their_own():
    lens = [20, 3]
    for heads in ((4, 1, 32), (4, 4, 32)):
        cache, tables = paged_inputs(lens, BLOCK_SIZE, heads, torch.float32)
        other = KVCache(*torch.empty(2, 1, BLOCK_SIZE, 2, 64))
        metadata = DecodeMetadata(
            NO_SLOTS, tables, ints(lens), OPS.plan_decode(other, tables, ints(lens))
        )
        args = torch.randn(2, 4, 32), cache, metadata, 0.3
        assert_close(OPS.attend(*args), torch_ops.attend(*args))
