"""Windows, soft caps and sinks of the torch attention, against a plain dense formula in float64."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from test_torch_ops import DTYPES, NO_SLOTS, fp8_cache, paged_cache, tolerance
from torch import nn

from nanovllm.errors import ArgumentError
from nanovllm.kernels import torch_ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import DecodeMetadata, KVCache, KVCacheSpec, PrefillMetadata
from nanovllm.layers.attention import Attention
from nanovllm.layers.context import ModelContext
from nanovllm.parallel.tensor_parallel import TensorParallel

BLOCK_SIZE = 16
# Whole prompts, new tokens after a cached prefix, and one new token; around blocks.
LENS_K, LENS_Q = [1, 15, 16, 17, 40, 33], [1, 15, 16, 17, 7, 1]
# Windows of one token, within, equal to and across blocks, as long as a sequence, longer than all.
WINDOWS = (None, 1, 2, 15, 16, 17, 33, 40, 1000)
HEADS = ((6, 2, 48), (3, 1, 80))  # (query heads, KV heads, head_dim)


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the last positions, a head at a time: the formula itself."""
    num_queries, num_heads = query.shape[:2]
    len_k, num_kv_heads = keys.shape[:2]
    position = torch.arange(len_k)
    distance = position[len_k - num_queries :].unsqueeze(1) - position
    hidden = (distance < 0) | (distance >= (window or len_k))
    out = torch.empty(query.shape, dtype=torch.float64)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores = query[:, head].double() @ keys[:, kv_head].double().T * scale
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        scores[hidden] = -torch.inf
        if sinks is not None:
            scores = torch.cat((scores, sinks[head].double().expand(num_queries, 1)), 1)
        out[:, head] = scores.softmax(1)[:, :len_k] @ values[:, kv_head].double()
    return out


def extreme_sinks(num_heads: int) -> torch.Tensor:
    """Of no weight, of little, of much and of all."""
    sinks = [-math.inf, -1e30, -1.0, 3.0, 1e30, torch.finfo(torch.float32).max]
    return torch.tensor([sinks[head % len(sinks)] for head in range(num_heads)])


def forget(cache: KVCache, table: torch.Tensor, first_position: int, window: int | None) -> None:
    """Make NaN of blocks that no query from `first_position` on sees; the table names them still.

    The last of them is no block of this sequence any more: the table names one with other tokens.
    """
    if window is None:
        return
    num_dead = max(0, first_position + 1 - window) // BLOCK_SIZE
    for part in cache:
        if part is not None:
            part[table[:num_dead].long()] = torch.nan
    if num_dead:
        table[num_dead - 1] = table[-1]


def kv_cache(heads, dtype, is_fp8: bool):
    """A cache of LENS_K's sequences, tables, and the sequences' keys and values."""
    key_cache, value_cache, tables, keys, values = paged_cache(
        LENS_K, BLOCK_SIZE, heads[1], heads[2], dtype
    )
    if not is_fp8:
        return KVCache(key_cache, value_cache), tables, keys, values
    key_cache, key_scales, keys = fp8_cache(key_cache, keys)
    value_cache, value_scales, values = fp8_cache(value_cache, values)
    return KVCache(key_cache, value_cache, key_scales, value_scales), tables, keys, values


# Each of the three with and without each other one.
@pytest.mark.parametrize(
    ("softcap", "has_sinks", "is_fp8"),
    ((None, False, False), (None, True, True), (1.5, False, True), (1.5, True, False)),
)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("phase", ("prefill", "decode"))
def test_attention_is_the_formula(phase, window, softcap, has_sinks, is_fp8, monkeypatch):
    for heads, dtype in zip(HEADS, (torch.float32, torch.bfloat16), strict=True):
        cache, tables, keys, values = kv_cache(heads, dtype, is_fp8)
        extras = {"window": window, "softcap": softcap, "sinks": None}
        if has_sinks:
            extras["sinks"] = extreme_sinks(heads[0]).to(dtype)
        lens_q = LENS_Q if phase == "prefill" else [1] * len(LENS_K)
        query = torch.randn(sum(lens_q), heads[0], heads[2]).to(dtype)
        for table, len_q, len_k in zip(tables, lens_q, LENS_K, strict=True):
            forget(cache, table, len_k - len_q, window)
        metadata = DecodeMetadata(NO_SLOTS, tables, torch.tensor(LENS_K, dtype=torch.int32))
        if phase == "prefill":
            cu_q, cu_k = (
                torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32) for lens in (lens_q, LENS_K)
            )
            metadata = PrefillMetadata(NO_SLOTS, tables, cu_q, cu_k, max(lens_q), max(LENS_K))
        expected = torch.cat(
            [
                dense_attention(q, k, v, 0.2, **extras)
                for q, k, v in zip(query.split(lens_q), keys, values, strict=True)
            ]
        )
        # All at once, in slices of one to seven queries, and of few rows too.
        few = 7 * heads[0] * 40
        for most in ((2**24, 2**24), (few, 2**24), (few, few)):
            monkeypatch.setattr(torch_ops, "MAX_SCORE_ELEMENTS", most[0])
            monkeypatch.setattr(torch_ops, "MAX_GATHER_ELEMENTS", most[1])
            got = torch_ops.attend(query, cache, metadata, 0.2, **extras)
            torch.testing.assert_close(got.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("window", (None, 20))
@pytest.mark.parametrize("has_sinks", (False, True))
def test_empty_rows_give_finite_values(window, has_sinks):
    key_cache, value_cache, tables, *_ = paged_cache([0, 40, 0], BLOCK_SIZE, 2, 24, torch.float32)
    metadata = DecodeMetadata(NO_SLOTS, tables, torch.tensor([0, 40, 0], dtype=torch.int32))
    got = torch_ops.attend(
        torch.randn(3, 4, 24),
        KVCache(key_cache, value_cache),
        metadata,
        0.2,
        window=window,
        softcap=2.0,
        sinks=extreme_sinks(4) if has_sinks else None,
    )
    assert got.isfinite().all() and (got[[0, 2]] == 0).all() and (got[1] != 0).any()


# The layer


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_the_layer_hands_its_extras_on(dtype):
    context = ModelContext(torch_ops.TorchOps(), TensorParallel(), dtype, torch.device("cpu"))
    sinks = nn.Parameter(torch.randn(4), requires_grad=False)
    spec = KVCacheSpec(2, 24, dtype, window=5)
    cos_sin = torch.cat((torch.ones(99, 12), torch.zeros(99, 12)), 1)  # no rotation
    qkv = torch.randn(9, 8 * 24)
    query, key, value = qkv.view(9, 8, 24).split((4, 2, 2), 1)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    tables = torch.tensor([[1]], dtype=torch.int32)
    metadata = PrefillMetadata(torch.arange(16, 25), tables, cu, cu, 9, 9)
    cases = (
        (Attention(spec, cos_sin, context), (24**-0.5, 5, None, None)),
        (
            Attention(spec._replace(window=3), cos_sin, context, 0.5, 1.0, sinks),
            (0.5, 3, 1.0, sinks),
        ),
    )
    for layer, extras in cases:
        layer.cache = KVCache(*torch.zeros(2, 2, BLOCK_SIZE, 2, 24))
        got = layer(qkv, torch.arange(9, dtype=torch.int32), metadata)
        expected = dense_attention(query, key, value, *extras).flatten(1)
        torch.testing.assert_close(got.double(), expected, **tolerance(dtype))


def test_the_layer_refuses_what_the_backend_does_not_offer():
    class Ops(torch_ops.TorchOps):
        attention_extras = frozenset({"window"})

    context = ModelContext(Ops(), TensorParallel(), torch.float32, torch.device("cpu"))
    spec = KVCacheSpec(2, 24, torch.float32, window=5)
    cos_sin = torch.zeros(99, 24)
    Attention(spec, cos_sin, context)
    with pytest.raises(ArgumentError, match="attention has sinks and softcap, which"):
        Attention(spec, cos_sin, context, softcap=3.0, sinks=torch.zeros(4))


# flash-attn


@pytest.mark.parametrize("has_softcap", (False, True))
def test_flash_attn_gets_what_its_functions_take(has_softcap, monkeypatch):
    """A stand-in for the package, with the parameters that version 2.6 has, or those of 2.5."""
    pytest.importorskip("triton", reason="triton is not installed")
    calls = []

    def new(query, *args, window_size=(-1, -1), softcap=0.0, **kwargs):
        calls.append((window_size, softcap))
        return query

    def old(query, *args, window_size=(-1, -1), **kwargs):
        calls.append((window_size, None))
        return query

    function = new if has_softcap else old
    package = SimpleNamespace(flash_attn_varlen_func=function, flash_attn_with_kvcache=function)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delitem(sys.modules, "nanovllm.kernels.flash_attention", raising=False)
    ops = select_ops("flash-attn", torch.device("cuda"), torch.bfloat16, 64, False)
    monkeypatch.delitem(sys.modules, "nanovllm.kernels.flash_attention")
    assert ops.attention_extras == ({"window", "softcap"} if has_softcap else {"window"})
    tables, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    cache = KVCache(*torch.zeros(2, 1, 256, 1, 64))
    for metadata in (
        DecodeMetadata(NO_SLOTS, tables, lens),
        PrefillMetadata(NO_SLOTS, tables, lens, lens, 1, 1),
    ):
        calls.clear()
        query = torch.zeros(1, 1, 64)
        ops.attend(query, cache, metadata, 1.0)
        ops.attend(query, cache, metadata, 1.0, window=5)
        nothing = 0.0 if has_softcap else None
        assert calls == [((-1, -1), nothing), ((4, 0), nothing)]
        if has_softcap:
            ops.attend(query, cache, metadata, 1.0, softcap=3.0)
            assert calls[2] == ((-1, -1), 3.0)
