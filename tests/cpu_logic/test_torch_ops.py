"""The torch operations against plain float32 mathematics, Hugging Face's Qwen3 and exact odds."""

import math
import sys
from subprocess import run

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from nanovllm.kernels import row_state, select, torch_ops
from nanovllm.kernels.cache_units import COPY_UNIT
from nanovllm.kernels.cpu_ops import CpuOps
from nanovllm.kernels.device import DeviceLimits
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import (
    DRAW_GROUP,
    FP8_DTYPE,
    FP8_MAX,
    FP8_MIN_AMAX,
    DecodeMetadata,
    KVCache,
    PartialSums,
    PrefillMetadata,
    Unreduced,
)
from nanovllm.models.extras import GELU_IS_TANH

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6
# (query heads, KV heads, head_dim)
NO_SLOTS = torch.empty(0, dtype=torch.int64)  # attention only reads the cache
HEADS = ((2, 2, 24), (6, 2, 48), (16, 1, 64), (16, 8, 128), (3, 1, 80), (2, 1, 256))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    return {"rtol": eps, "atol": eps}


def paged_cache(
    lens: list[int], block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Caches full of NaN but for the sequences' own slots, in shuffled pages of equal width."""
    width = max(1, max(-(-n // block_size) for n in lens)) + 1
    num_blocks = width * len(lens) + 1
    caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan).to(dtype)
    tables = torch.randperm(num_blocks)[: width * len(lens)].view(len(lens), width).int()
    contents: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for table, length in zip(tables, lens, strict=True):
        position = torch.arange(length)
        slots = table[position // block_size].long() * block_size + position % block_size
        for cache, content in zip(caches, contents, strict=True):
            values = torch.randn(length, num_kv_heads, head_dim).to(dtype)
            cache.view(-1, num_kv_heads, head_dim)[slots] = values
            content.append(values)
    return caches[0], caches[1], tables, *contents


def dense_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of the last positions in float64, a head at a time."""
    num_queries, num_heads = query.shape[:2]
    len_k, num_kv_heads = keys.shape[:2]
    out = torch.empty(query.shape, dtype=torch.float64)
    future = torch.arange(len_k) > torch.arange(len_k - num_queries, len_k).unsqueeze(1)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores = query[:, head].double() @ keys[:, kv_head].double().T * scale
        scores[future] = -torch.inf
        out[:, head] = scores.softmax(-1) @ values[:, kv_head].double()
    return out


# Norms, activation, rotary embedding


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_hugging_faces(dtype):
    x, weight = torch.randn(7, 96).to(dtype), torch.randn(96).to(dtype)
    reference = Qwen3RMSNorm(96, eps=EPS).to(dtype)
    reference.weight.data.copy_(weight)
    assert torch.equal(torch_ops.rms_norm(x, weight, EPS), reference(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_a_float32_weight_is_gemmas(dtype):
    x, weight = torch.randn(7, 96).to(dtype), torch.randn(96).to(dtype)
    reference = Gemma2RMSNorm(96, eps=EPS).to(dtype)
    reference.weight.data.copy_(weight)
    assert torch.equal(torch_ops.rms_norm(x, 1 + weight.float(), EPS), reference(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_adds_first_and_changes_no_input(dtype):
    x, residual = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    inputs = x.clone(), residual.clone()
    normed, total = torch_ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, inputs[0] + inputs[1])
    assert torch.equal(normed, torch_ops.rms_norm(total, weight, EPS))
    assert torch.equal(x, inputs[0]) and torch.equal(residual, inputs[1])


def test_partial_sums_are_added_up_and_rounded():
    whole = torch.randn(3, 32).half()
    parts = PartialSums(torch.stack((whole.float() + 1, torch.full((3, 32), -1.0))), torch.float16)
    residual, weight = torch.randn(3, 32).half(), torch.randn(32).half()
    for got, want in zip(
        torch_ops.add_rms_norm(parts, residual, weight, EPS),
        torch_ops.add_rms_norm(whole, residual, weight, EPS),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch_ops.silu_and_mul(parts), torch_ops.silu_and_mul(whole))


def test_no_operation_takes_a_term_that_is_not_summed_over_the_ranks():
    """A norm after the block, say, must not pass one rank's term for the sum."""
    term = Unreduced(torch.randn(3, 32))
    x, weight = torch.randn(3, 32), torch.randn(32)
    for use in (
        lambda: torch_ops.rms_norm(term, weight, EPS),
        lambda: torch_ops.add_rms_norm(term, x, weight, EPS),
        lambda: torch_ops.silu_and_mul(term),
        lambda: torch_ops.linear(term, x),
        lambda: torch_ops.experts(x, term, x, x, 1, True),
        lambda: term + x,
        lambda: x + term,
        lambda: x * term,
        lambda: torch.cat((x, term)),
    ):
        with pytest.raises((AttributeError, TypeError)):
            use()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype):
    gate_up = torch.randn(5, 2 * 37).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(
        torch_ops.silu_and_mul(gate_up).double(), expected, **tolerance(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("gelu", "gelu_pytorch_tanh"))
def test_gelu_and_mul_is_hugging_faces(dtype, name):
    gate, up = torch.randn(2, 5, 37).to(dtype)
    got = torch_ops.gelu_and_mul(torch.cat((gate, up), -1), is_tanh=GELU_IS_TANH[name])
    torch.testing.assert_close(got, ACT2FN[name](gate) * up, **tolerance(dtype))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", (True, False))
def test_qk_norm_rope_store(heads, dtype, with_norm):
    num_heads, num_kv_heads, head_dim = heads
    positions = torch.tensor([0, 5, 99, 17], dtype=torch.int32)
    slots = torch.tensor([35, -1, 0, 16])
    angles = torch.outer(torch.arange(100), 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    qkv = torch.randn(4, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    q_weight, k_weight = torch.randn(2, head_dim).to(dtype) if with_norm else (None, None)
    caches = torch.full((2, 3, 16, num_kv_heads, head_dim), 7.0, dtype=dtype)
    query = torch_ops.qk_norm_rope_store(
        qkv, q_weight, k_weight, EPS, cos_sin, positions, KVCache(*caches), slots
    )

    sizes = [n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = (part.view(4, -1, head_dim) for part in qkv.split(sizes, -1))
    norm = Qwen3RMSNorm(head_dim, eps=EPS).to(dtype)
    if with_norm:
        norm.weight.data.copy_(q_weight)
        q = norm(q)
        norm.weight.data.copy_(k_weight)
        k = norm(k)
    emb = angles[positions.long()].repeat(1, 2)
    cos, sin = emb.cos().to(dtype), emb.sin().to(dtype)
    q, k = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    torch.testing.assert_close(query, q[0])
    stored = slots >= 0
    for cache, expected in zip(caches.flatten(1, 2), (k[0], v), strict=True):
        torch.testing.assert_close(cache[slots[stored]], expected[stored])
        cache[slots[stored]] = 7.0
        assert (cache == 7.0).all()  # nothing else was written


# The fp8 cache


def e4m3_magnitudes() -> torch.Tensor:
    """Every non-negative number of the format in float64: 4 exponent bits, 3 of the mantissa."""
    subnormal = [mantissa * 2.0**-9 for mantissa in range(8)]
    normal = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
    return torch.tensor(subnormal + normal[:-1], dtype=torch.float64)  # the last pattern is NaN


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_takes_the_nearest_number_and_uses_the_whole_range(dtype):
    magnitudes = e4m3_magnitudes()
    assert magnitudes[-1] == FP8_MAX == torch.finfo(FP8_DTYPE).max
    heads = (torch.randn(50, 3, 24) * torch.logspace(-4, 4, 50)[:, None, None]).to(dtype)
    heads[7, 1] = 0
    heads[8, 0, 1:] = 0
    quantized, scales = torch_ops.quantize(heads)
    assert quantized.dtype == FP8_DTYPE and scales.dtype == torch.float32
    assert quantized.shape == heads.shape and scales.shape == heads.shape[:2]
    assert scales[7, 1] == 1 and (quantized[7, 1].float() == 0).all()
    exact = heads.double()
    expected_scales = exact.abs().amax(-1) / 448
    expected_scales[7, 1] = 1
    torch.testing.assert_close(scales.double(), expected_scales, rtol=1e-6, atol=0)
    distance = (exact.abs() / expected_scales.unsqueeze(-1)).unsqueeze(-1) - magnitudes
    error = exact / expected_scales.unsqueeze(-1) - quantized.double()
    torch.testing.assert_close(error.abs(), distance.abs().amin(-1), rtol=0, atol=448 * 1e-6)
    assert (quantized.double().abs().amax(-1)[expected_scales != 1] == 448).all()


@pytest.mark.parametrize("magnitude", (1e-44, 1e-35, 1e-30, 3e38))
def test_quantize_extreme_magnitudes(magnitude):
    heads = torch.tensor([[[magnitude, -magnitude, 0, magnitude / 2]]])
    quantized, scales = torch_ops.quantize(heads)
    restored = quantized.double() * scales.double().unsqueeze(-1)
    torch.testing.assert_close(restored, heads.double(), rtol=1e-6, atol=FP8_MIN_AMAX)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_store_into_an_fp8_cache(dtype):
    """Stores what `quantize` makes of the unquantised store, and its scales, nothing else."""
    num_heads, num_kv_heads, head_dim = 4, 2, 24
    slots = torch.tensor([35, -1, 0, 16])
    qkv = torch.randn(4, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    weights = torch.randn(2, head_dim).to(dtype)
    positions = torch.tensor([0, 5, 99, 17], dtype=torch.int32)
    args = qkv, *weights, EPS, torch.randn(100, head_dim), positions
    plain = torch.zeros(2, 3, 16, num_kv_heads, head_dim, dtype=dtype)
    query = torch_ops.qk_norm_rope_store(*args, KVCache(*plain), slots)
    caches = torch.full(plain.shape, 7.0).to(FP8_DTYPE)
    scales = torch.full((2, 3, num_kv_heads, 16), 7.0)
    cache = KVCache(*caches, *scales)
    assert torch.equal(torch_ops.qk_norm_rope_store(*args, cache, slots), query)
    stored = slots[slots >= 0]
    for cache, scale, content in zip(caches, scales, plain, strict=True):
        expected, expected_scale = torch_ops.quantize(content.flatten(0, 1)[stored])
        by_slot = scale.transpose(1, 2).flatten(0, 1)  # a copy
        assert torch.equal(by_slot[stored], expected_scale)
        assert torch.equal(cache.float().flatten(0, 1)[stored], expected.float())
        others = torch.ones(48, dtype=torch.bool).index_fill(0, stored, False)
        assert (by_slot[others] == 7).all() and (cache.float().flatten(0, 1)[others] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8_DTYPE])
def test_copies_of_units_touch_nothing_else(dtype, monkeypatch):
    """Two units of 8 slots a block: unit 1 is the second half of block 0."""
    monkeypatch.setattr(torch_ops, "MAX_GATHER_ELEMENTS", 2 * COPY_UNIT * 3 * 8)
    memory = torch.randn(2, 5, 16, 3, 8).to(dtype)
    scales = torch.randn(2, 5, 3, 16) if dtype == FP8_DTYPE else None
    expected = memory.float(), None if scales is None else scales.clone()
    copies = [(1, 6), (5, 0), (2, 6)]
    for target, source in copies:
        block, half = target // 2, slice(target % 2 * 8, target % 2 * 8 + 8)
        from_block, from_half = source // 2, slice(source % 2 * 8, source % 2 * 8 + 8)
        expected[0][:, block, half] = expected[0][:, from_block, from_half]
        if scales is not None:
            expected[1][:, block, :, half] = expected[1][:, from_block, :, from_half]
    cache = KVCache(*memory, *(() if scales is None else scales))
    for pairs in (torch.empty(0, 2, dtype=torch.int32), torch.tensor(copies, dtype=torch.int32)):
        torch_ops.copy_units(cache, pairs)
    assert torch.equal(memory.float(), expected[0])
    assert scales is None or torch.equal(scales, expected[1])


def fp8_cache(
    cache: torch.Tensor, contents: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A paged cache in fp8, its scales, and the sequences' contents as they come back, float64.

    What is NaN in `cache` is NaN in fp8, and so are the scales of slots without a sequence.
    """
    quantized, scales = torch_ops.quantize(cache.float().flatten(0, 1))
    scales = scales.masked_fill(cache.flatten(0, 1).isnan().all(-1), torch.nan)
    restored = []
    for content in contents:
        content8, scale = torch_ops.quantize(content)
        restored.append(content8.double() * scale.double().unsqueeze(-1))
    scales = scales.view(cache.shape[:3]).transpose(1, 2).contiguous()
    return quantized.view(cache.shape), scales, restored


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_an_fp8_cache(heads, dtype):
    """Prefill and decode attention against float64 computations with the quantised numbers."""
    num_heads, num_kv_heads, head_dim = heads
    lens_k, lens_q = [1, 15, 16, 17, 40, 33], [1, 15, 16, 17, 7, 1]
    key_cache, value_cache, tables, keys, values = paged_cache(
        lens_k, 16, num_kv_heads, head_dim, dtype
    )
    # Magnitudes that differ by token show a scale of a wrong token.
    key_cache, value_cache = (
        cache * torch.rand(cache.shape[:3]).add(0.1).unsqueeze(-1).to(dtype)
        for cache in (key_cache, value_cache)
    )
    for table, length, k, v in zip(tables, lens_k, keys, values, strict=True):
        position = torch.arange(length)
        slots = table[position // 16].long() * 16 + position % 16
        k.copy_(key_cache.flatten(0, 1)[slots])
        v.copy_(value_cache.flatten(0, 1)[slots])
    key_cache, key_scales, keys = fp8_cache(key_cache, keys)
    value_cache, value_scales, values = fp8_cache(value_cache, values)
    cache = KVCache(key_cache, value_cache, key_scales, value_scales)
    cu_q, cu_k = (
        torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32) for lens in (lens_q, lens_k)
    )
    query = torch.randn(sum(lens_q), num_heads, head_dim).to(dtype)
    scale = head_dim**-0.5
    metadata = PrefillMetadata(NO_SLOTS, tables, cu_q, cu_k, 17, 40)
    out = torch_ops.attend(query, cache, metadata, scale)
    parts = zip(query.split(lens_q), out.split(lens_q), keys, values, strict=True)
    expected = [dense_attention(part, k, v, scale) for part, _, k, v in parts]
    torch.testing.assert_close(out.double(), torch.cat(expected), **tolerance(dtype))

    last = cu_q[1:].long() - 1
    context_lens = torch.tensor(lens_k, dtype=torch.int32)
    metadata = DecodeMetadata(NO_SLOTS, tables, context_lens)
    out = torch_ops.attend(query[last], cache, metadata, scale)
    torch.testing.assert_close(out.double(), torch.cat(expected)[last], **tolerance(dtype))
    context_lens[2] = 0
    metadata = DecodeMetadata(NO_SLOTS, tables, context_lens)
    out = torch_ops.attend(query[last], cache, metadata, scale)
    assert out.isfinite().all()


# Attention


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_attention(heads, dtype):
    num_heads, num_kv_heads, head_dim = heads
    lens_k, lens_q = [1, 15, 16, 17, 40, 33], [1, 15, 16, 17, 7, 1]
    key_cache, value_cache, tables, keys, values = paged_cache(
        lens_k, 16, num_kv_heads, head_dim, dtype
    )
    cu_q, cu_k = (
        torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32) for lens in (lens_q, lens_k)
    )
    query = torch.randn(sum(lens_q), num_heads, head_dim).to(dtype)
    scale = head_dim**-0.5
    metadata = PrefillMetadata(NO_SLOTS, tables, cu_q, cu_k, 17, 40)
    out = torch_ops.attend(query, KVCache(key_cache, value_cache), metadata, scale)
    for part, got, k, v in zip(query.split(lens_q), out.split(lens_q), keys, values, strict=True):
        expected = dense_attention(part, k, v, scale)
        torch.testing.assert_close(got.double(), expected, **tolerance(dtype))


def test_prefill_attention_in_slices_of_queries(monkeypatch):
    key_cache, value_cache, tables, keys, values = paged_cache([50], 16, 2, 24, torch.float32)
    query = torch.randn(50, 4, 24)
    cu = torch.tensor([0, 50], dtype=torch.int32)
    monkeypatch.setattr(torch_ops, "MAX_SCORE_ELEMENTS", 7 * 4 * 50)
    metadata = PrefillMetadata(NO_SLOTS, tables, cu, cu, 50, 50)
    out = torch_ops.prefill_attention(query, KVCache(key_cache, value_cache), metadata, 0.2)
    expected = dense_attention(query, keys[0], values[0], 0.2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_elements", (2**24, 1))
def test_decode_attention(heads, dtype, max_elements, monkeypatch):
    """Rows of several lengths and a padded one, together and one row at a time."""
    monkeypatch.setattr(torch_ops, "MAX_GATHER_ELEMENTS", max_elements)
    num_heads, num_kv_heads, head_dim = heads
    lens = [1, 15, 0, 16, 17, 64]
    key_cache, value_cache, tables, keys, values = paged_cache(
        lens, 16, num_kv_heads, head_dim, dtype
    )
    query = torch.randn(len(lens), num_heads, head_dim).to(dtype)
    scale = head_dim**-0.5
    context_lens = torch.tensor(lens, dtype=torch.int32)
    metadata = DecodeMetadata(NO_SLOTS, tables, context_lens)
    out = torch_ops.attend(query, KVCache(key_cache, value_cache), metadata, scale)
    assert out.isfinite().all()
    for row, length in enumerate(lens):
        if length > 0:
            expected = dense_attention(query[row : row + 1], keys[row], values[row], scale)
            torch.testing.assert_close(out[row].double(), expected[0], **tolerance(dtype))


# Sampling


def draw(
    logits: torch.Tensor,
    temperature: float | list[float],
    seeds: list[int] | None = None,
    position: int = 0,
    first_token_id: int = 0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size = logits.shape[0]
    if isinstance(temperature, float):
        temperature = [temperature] * batch_size
    seed_words = torch.tensor(
        [[seed, 12345] for seed in seeds or range(batch_size)], dtype=torch.int32
    )
    return torch_ops.sample(
        logits,
        torch.tensor(temperature),
        seed_words,
        torch.full((batch_size,), position, dtype=torch.int32),
        first_token_id,
        logits.shape[1] if vocab_size is None else vocab_size,
    )


@pytest.mark.parametrize("varied", ("seed", "position"))
@pytest.mark.parametrize(
    ("temperature", "odds"),
    ((1.0, (0.5, 0.3, 0.15, 0.05)), (0.5, (0.6849, 0.2466, 0.0616, 0.0068))),
)
def test_draws_follow_the_softmax(temperature, odds, varied):
    draws = 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(draws, -1)
    words = torch.zeros(draws, 2, dtype=torch.int32)
    positions = torch.zeros(draws, dtype=torch.int32)
    if varied == "seed":
        words[:, 0] = torch.arange(draws)
    else:
        positions = torch.arange(draws, dtype=torch.int32)
    _, ids = torch_ops.sample(
        logits, torch.full((draws,), temperature), words, positions, 0, vocab_size=4
    )
    shares = ids.bincount(minlength=4) / draws
    torch.testing.assert_close(shares, torch.tensor(odds), rtol=0, atol=0.017)


def chi_square_deviation(ids: torch.Tensor, odds: torch.Tensor) -> float:
    """How many standard deviations the tokens' chi-square is from its mean; odds are float64."""
    odds = odds / odds.sum()
    assert (ids.bincount(minlength=len(odds))[odds == 0] == 0).all()
    # Cells of at least five expected draws: the rare tokens together.
    cell = torch.where(odds * len(ids) >= 5, torch.arange(len(odds)) + 1, 0)
    expected = torch.zeros(len(odds) + 1, dtype=torch.float64).index_add(0, cell, odds * len(ids))
    counts = cell[ids.long()].bincount(minlength=len(expected)).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    chi_square = ((counts - expected).square() / expected).sum().item()
    return abs(chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab_size", (8, 13, 100, 1003))
@pytest.mark.parametrize("temperature", (0.1, 0.6, 3.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_draws_follow_the_softmax_over_many_groups(vocab_size, temperature, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    row = (2 * torch.randn(vocab_size, generator=generator)).to(dtype)
    _, ids = draw(row.expand(20_000, -1), temperature)
    odds = (row.double() / temperature).softmax(0)
    assert chi_square_deviation(ids, odds) < 4
    # Within every group, whichever groups won.
    for first in range(0, vocab_size, DRAW_GROUP):
        own = ids[(ids >= first) & (ids < first + DRAW_GROUP)] - first
        if len(own) >= 50:
            assert chi_square_deviation(own, odds[first : first + DRAW_GROUP]) < 5


def test_arrivals_are_exponential_whichever_token_wins():
    """So ranks' scores can be compared: Kolmogorov-Smirnov, for all draws and for each winner's."""
    generator = torch.Generator().manual_seed(0)
    logits, temperature = torch.randn(20, generator=generator), 0.8
    scores, ids = draw(logits.expand(30_000, -1), temperature)
    total = (logits.double() / temperature).exp().sum()
    arrivals = torch.exp2(-scores.double()) * math.log(2) * total
    parts = [arrivals[ids == token_id] for token_id in range(20)]
    assert sum(len(part) > 500 for part in parts) > 10
    for part in (arrivals, *parts):
        shares = torch.sort(-torch.expm1(-part)).values
        exact = (torch.arange(len(part)) + 0.5) / len(part)
        assert (shares - exact).abs().max().item() * math.sqrt(len(part)) < 1.95  # 0.1 %


@pytest.mark.parametrize("temperature", (0.3, 1.0))
def test_what_never_wins_does_not_change_the_odds_of_its_group(temperature):
    """NaN, -inf, padding and a threshold, beside tokens that may win."""
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(40, generator=generator)
    thresholds = torch.full((20_000,), -1.0)
    row[[0, 9, 10, 33]] = torch.nan
    row[[3, 11, *range(16, 24)]] = -torch.inf
    row[37:] = 50.0  # behind the vocabulary
    words = torch.zeros(20_000, 2, dtype=torch.int32)
    words[:, 1] = torch.arange(20_000)
    args = torch.full((20_000,), temperature), words, words[:, 0], 0, 37
    odds = (row[:37].double() / temperature).exp().nan_to_num(0)
    _, ids = torch_ops.sample(row.expand(20_000, -1), *args)
    assert chi_square_deviation(ids, odds) < 4
    _, ids = torch_ops.sample(row.expand(20_000, -1), *args, thresholds)
    assert chi_square_deviation(ids, odds.masked_fill(~(row[:37] >= -1), 0)) < 4


def test_infinite_logits_win():
    logits = torch.randn(6, 40)
    logits[0, 21] = logits[1, 3] = logits[2, 39] = logits[3, 30] = torch.inf
    logits[:2, 20] = logits[3, 31] = torch.nan
    logits[3, 24:30] = -torch.inf
    logits[4] = -torch.inf
    scores, ids = draw(logits, [1.0, 0.2, 0.0, 3.0, 1.0, 1.0])
    assert ids[:4].tolist() == [21, 3, 39, 30] and (scores[:4] == torch.inf).all()
    assert scores[4] == -torch.inf and scores[5].isfinite()


WORD = 2**32 - 1


def plain_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def plain_exponential(
    seed_lo: int, seed_hi: int, position: int, number: int, of_token: bool
) -> float:
    """The formula, written out with Python's integers and floats; of rate 1."""
    start = plain_mix(seed_lo ^ plain_mix(position))
    step = plain_mix(seed_hi ^ start) | 1
    if of_token:
        start = plain_mix(start ^ step)
    bits = start + (number + 1) * step & WORD
    bits = (bits ^ bits >> 16) * 0x7FEB352D & WORD
    bits = (bits ^ bits >> 15) * 0x846CA68B & WORD
    return -math.log1p(-(bits + 0.5) * 2.0**-32)


@pytest.mark.parametrize("of_tokens", (False, True))
def test_noise_matches_plain_unsigned_arithmetic(of_tokens):
    seed_lo, seed_hi, position, first = 0xFEDCBA98, 0x80000001, 4711, 70_000
    got = torch_ops.exponentials(
        torch.tensor([[seed_lo - 2**32, seed_hi - 2**32]], dtype=torch.int32),
        torch.tensor([position], dtype=torch.int32),
        torch.arange(first, first + 500, dtype=torch.int32),
        of_tokens,
    )
    expected = [
        math.log2(plain_exponential(seed_lo, seed_hi, position, number, of_tokens) / math.log(2))
        for number in range(first, first + 500)
    ]
    torch.testing.assert_close(got[0].log2(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", (0.4, 1.3))
def test_tokens_are_those_of_the_race_written_out(temperature):
    """Groups that arrive at E / W, then the first group's tokens, in Python's floats."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(100, 45, generator=generator)
    position, first_token_id = 77, 16
    scores, ids = draw(
        logits, temperature, position=position, first_token_id=first_token_id, vocab_size=100
    )
    for seed, row in enumerate((logits.double() / temperature).exp().tolist()):
        key = seed, 12345, position
        weights = dict(enumerate(row, first_token_id))
        groups: dict[int, list[int]] = {}
        for token_id in weights:
            groups.setdefault(token_id // DRAW_GROUP, []).append(token_id)
        arrivals = {
            group: plain_exponential(*key, group, False) / sum(weights[i] for i in members)
            for group, members in groups.items()
        }
        best = min(arrivals, key=arrivals.__getitem__)
        order = {i: plain_exponential(*key, i, True) / weights[i] for i in groups[best]}
        assert ids[seed] == min(order, key=order.__getitem__)
        expected = -math.log2(arrivals[best] / math.log(2))
        assert math.isclose(scores[seed], expected, abs_tol=1e-5)


def noise_bits(
    seed_words: torch.Tensor, positions: torch.Tensor, num_tokens: int, of_tokens: bool = False
) -> torch.Tensor:
    """The random 32-bit numbers [B, num_tokens] int64 behind the exponentials."""
    numbers = torch.arange(num_tokens, dtype=torch.int32)
    arrivals = torch_ops.exponentials(seed_words, positions, numbers, of_tokens)
    return (2**32 * -torch.expm1(-math.log(2) * arrivals.double())).long()


@pytest.mark.parametrize("varied", ("token", "position", "seed_low", "seed_high", "stream"))
def test_noise_of_neighbours_is_uniform_and_independent(varied):
    """Chi-square over 32 x 32 cells of the noise and that of a neighbour, and of winners alone."""
    num_draws, num_tokens = 200, 10_000
    count = torch.arange(num_draws, dtype=torch.int32)
    words = torch.zeros(num_draws, 2, dtype=torch.int32)
    positions = torch.full((num_draws,), 7, dtype=torch.int32)
    if varied == "position":
        positions = count
    else:
        words[:, int(varied in ("seed_high", "stream"))] = count
    bits = noise_bits(words, positions, num_tokens)
    if varied == "token":
        pairs = [(bits[:, :-lag], bits[:, lag:]) for lag in (1, 2, 3, 8, 16, 100, 256, 2048, 4096)]
    elif varied == "stream":  # a group's and those of its tokens, of the first and of the others
        of_tokens = noise_bits(words, positions, DRAW_GROUP * num_tokens, of_tokens=True)
        pairs = [(bits, of_tokens[:, i::DRAW_GROUP]) for i in (0, 1, DRAW_GROUP - 1)]
        pairs.append((bits, of_tokens[:, :num_tokens]))
    else:
        pairs = [(bits[:-lag], bits[lag:]) for lag in (1, 2, 3, 8, 16, 64, 128)]
    for mine, neighbour in pairs:
        for shift in (27, 22):  # the five leading bits, and five within the smallest 32nd
            if shift == 22:
                small = (mine < 2**27) & (neighbour < 2**27)
                mine, neighbour = mine[small], neighbour[small]
            cells = (mine >> shift) * 32 + (neighbour >> shift)
            counts = cells.flatten().bincount(minlength=1024).double()
            expected = counts.sum() / 1024
            chi_square = ((counts - expected).square() / expected).sum().item()
            assert abs(chi_square - 1023) < 5 * math.sqrt(2 * 1023)


def test_first_arrivals_follow_the_exponential():
    """The smallest of V exponentials, times V, is exponential too: Kolmogorov-Smirnov."""
    num_draws, num_tokens = 1000, 4000
    words = torch.zeros(num_draws, 2, dtype=torch.int32)
    words[:, 0] = torch.arange(num_draws)
    zeros = torch.zeros(num_draws, dtype=torch.int32)
    numbers = torch.arange(num_tokens, dtype=torch.int32)
    arrivals = torch_ops.exponentials(words, zeros, numbers, of_tokens=False)
    earliest = arrivals.amin(dim=1).double() * math.log(2) * num_tokens
    shares = torch.sort(-torch.expm1(-earliest)).values
    exact = (torch.arange(num_draws) + 0.5) / num_draws
    assert (shares - exact).abs().max().item() * math.sqrt(num_draws) < 1.95  # 0.1 % of fair draws


def test_extreme_bits_give_finite_noise(monkeypatch):
    monkeypatch.setattr(torch_ops, "_mix", torch.zeros_like)  # start 0, step 1
    one = torch.ones(1, dtype=torch.int32)
    # The hash turns 0 into 0 and this number into 2^32 - 1: the earliest and the latest arrival.
    for number, arrival in ((0, 2.0**-33 / math.log(2)), (0xDDFFEFCB - 2**32, 24.0)):
        got = torch_ops.exponentials(one.expand(1, 2), one, one * number - 1, of_tokens=False)
        torch.testing.assert_close(got.item(), arrival, rtol=1e-5, atol=0)


def test_draws_are_repeatable_and_independent_of_the_batch():
    logits, seeds = torch.randn(9, 1000), list(range(100, 109))
    _, ids = draw(logits, 1.0, seeds, position=3)
    _, again = draw(logits, 1.0, seeds, position=3)
    assert torch.equal(ids, again)
    order = torch.randperm(9)
    _, shuffled = draw(logits[order], 1.0, [seeds[i] for i in order], position=3)
    assert torch.equal(shuffled, ids[order])
    for row in range(9):
        _, alone = draw(logits[row : row + 1], 1.0, [seeds[row]], position=3)
        assert alone[0] == ids[row]
    _, elsewhere = draw(logits, 1.0, seeds, position=4)
    assert not torch.equal(elsewhere, ids)


def test_slices_of_rows_change_nothing(monkeypatch):
    logits = torch.randn(7, 50)
    temperatures = [0.0, 1.0, 0.7, 0.0, 2.0, 1.0, 0.1]
    expected = draw(logits, temperatures)
    monkeypatch.setattr(torch_ops, "MAX_SAMPLE_ELEMENTS", 100)
    torch.testing.assert_close(draw(logits, temperatures), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_zero_takes_the_lowest_of_equal_ids(dtype):
    logits = torch.zeros(3, 50, dtype=dtype)
    logits[0, [7, 30]] = 2.5
    logits[1, [49, 48]] = 1.0
    scores, ids = draw(logits, [0.0, 0.0, 1.0])
    assert ids[:2].tolist() == [7, 48] and scores[:2].tolist() == [2.5, 1.0]
    assert ids.dtype == torch.int32 and scores.dtype == torch.float32


def test_padded_vocabulary_is_never_drawn():
    logits = torch.zeros(2000, 8)
    logits[:, 5:] = 100.0
    for temperature in (0.0, 1.0):
        assert draw(logits, temperature, vocab_size=5)[1].max() < 5


@pytest.mark.parametrize("temperature", (0.0, 0.9))
@pytest.mark.parametrize(("width", "vocab_size"), ((32, 50), (512, 1003), (8, 21)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_shards_of_the_vocabulary_merge_to_the_whole(temperature, width, vocab_size, dtype):
    """The last shard is all padding."""
    logits = torch.randn(64, -(-vocab_size // width) * width + width).to(dtype)
    scores, ids = draw(logits, temperature, position=2, vocab_size=vocab_size)
    shards = [
        draw(part, temperature, position=2, first_token_id=width * rank, vocab_size=vocab_size)
        for rank, part in enumerate(logits.split(width, 1))
    ]
    shard_scores, shard_ids = (torch.stack(parts) for parts in zip(*shards, strict=True))
    assert (shard_scores[-1] == -torch.inf).all() and (shard_ids[-1] == vocab_size - 1).all()
    best = shard_scores.argmax(0, keepdim=True)
    assert torch.equal(shard_ids.gather(0, best)[0], ids)
    assert torch.equal(shard_scores.gather(0, best)[0], scores)


def test_logits_are_not_changed():
    for vocab_size in (5, 8, 50):
        logits = torch.randn(3, vocab_size)
        logits[:, 1] = torch.nan
        before = logits.clone()
        draw(logits, [0.0, 1.0, -1.0])
        torch.testing.assert_close(logits, before, equal_nan=True, rtol=0, atol=0)


def test_nan_logits_give_a_valid_id():
    logits = torch.full((4, 10), torch.nan)
    logits[1, 6] = -5.0
    logits[3, 2] = -5.0
    _, ids = draw(logits, [0.0, 0.0, 1.0, 1.0], vocab_size=9)
    assert ids[1] == 6 and ids[3] == 2
    assert ((ids >= 0) & (ids < 9)).all()


# Row table


def test_row_table_round_trip():
    block_size, width = 16, 3
    table = torch.zeros(4, row_state.BLOCK_TABLE + width, dtype=torch.int32)
    table[0] = torch.tensor([11, 16, 0, 5, -6, 0, 9, 8, 7])
    table[1] = torch.tensor([12, 17, 0, 1, 2, 3, 2**30, 2**30 + 1, 0])
    table[0, row_state.TEMPERATURE] = torch.tensor(0.75).view(torch.int32)
    rows = torch.tensor([1, 3, 0, 3], dtype=torch.int32)
    inputs = torch_ops.gather_decode_inputs(table, rows, block_size)
    assert inputs.input_ids.tolist() == [12, 0, 11, 0]
    assert inputs.positions.tolist() == [16, 0, 15, 0]
    assert inputs.slot_mapping.tolist() == [(2**30 + 1) * 16, -1, 9 * 16 + 15, -1]
    assert inputs.context_lens.tolist() == [17, 0, 16, 0]
    assert torch.equal(inputs.block_tables, table[rows.long(), row_state.BLOCK_TABLE :])
    assert inputs.temperatures.tolist() == [0, 0, 0.75, 0]
    assert inputs.seeds.tolist() == [[1, 2], [0, 0], [5, -6], [0, 0]]
    assert inputs.slot_mapping.dtype == torch.int64
    for tensor in (inputs.input_ids, inputs.positions, inputs.context_lens, inputs.seeds):
        assert tensor.dtype == torch.int32

    tokens = torch.tensor([21, 22, 23, 24], dtype=torch.int32)
    before = table.clone()
    torch_ops.write_back(table, rows, tokens, inputs.positions)
    before[1, :2] = torch.tensor([21, 18])
    before[0, :2] = torch.tensor([23, 17])
    assert torch.equal(table, before)

    temperatures = torch.tensor([row_state.SKIPPED, 0.5, 0.0, 0.5])
    torch_ops.write_back(table, rows, tokens + 10, inputs.positions + 1, temperatures)
    before[0, :2] = torch.tensor([33, 18])
    assert torch.equal(table, before), "a skipped row is left as it is"


# Selection


def test_select_ops_chooses_torch_without_a_gpu():
    for backend in ("auto", "torch"):
        ops = select_ops(backend, torch.device("cpu"), torch.float32, 64, compile_torch_ops=True)
        assert not ops.supports_cuda_graphs
        assert isinstance(ops, CpuOps)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "message"),
    (
        ("tritn", torch.float32, 64, "'tritn'.*auto, torch, triton, flash-attn"),
        ("triton", torch.float32, 64, "'triton'.*needs a CUDA device.*'cpu'"),
        ("flash-attn", torch.float16, 64, "'flash-attn'.*needs a CUDA device.*'cpu'"),
        ("torch", torch.float64, 64, "torch.float64.*torch.bfloat16"),
        ("torch", torch.float32, 33, "head_dim is 33"),
    ),
)
def test_select_ops_names_the_value_and_the_choices(backend, dtype, head_dim, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        select_ops(backend, torch.device("cpu"), dtype, head_dim, compile_torch_ops=False)


def test_select_ops_on_cuda():
    """Selecting launches nothing, so it needs no device."""
    pytest.importorskip("triton", reason="triton is not installed")
    device = torch.device("cuda")
    assert select_ops("auto", device, torch.float32, 64, False).supports_cuda_graphs
    assert select_ops("triton", device, torch.float32, 64, False).supports_cuda_graphs
    compiled = select_ops("torch", device, torch.float32, 64, compile_torch_ops=True)
    assert not compiled.supports_cuda_graphs
    assert compiled.rms_norm is not torch_ops.rms_norm
    with pytest.raises(ValueError, match=r"torch\.float32.*'flash-attn' computes in.*float16"):
        select_ops("flash-attn", device, torch.float32, 64, False)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_flash_attn_refuses_an_fp8_cache(device):
    message = "kv_cache_dtype is 'fp8', which attention_backend 'flash-attn' cannot read"
    with pytest.raises(ValueError, match=message):
        select_ops("flash-attn", torch.device(device), torch.bfloat16, 64, False, FP8_DTYPE)


def pretend_gpu(monkeypatch, capability):
    """Let every CUDA device have this compute capability, as far as a choice is concerned."""
    limits = DeviceLimits(capability, num_sms=1, shared_memory=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select, "device_limits", lambda device: limits)


@pytest.mark.parametrize("capability", ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)))
def test_an_fp8_cache_needs_a_gpu_that_converts_it(capability, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    pretend_gpu(monkeypatch, capability)
    args = torch.device("cuda", 0), torch.bfloat16, 64, False
    assert select_ops("auto", *args, torch.bfloat16).supports_cuda_graphs
    assert not select_ops("torch", *args, FP8_DTYPE).supports_cuda_graphs  # converts by itself
    for backend in ("auto", "triton"):
        if capability >= (8, 9):
            assert select_ops(backend, *args, FP8_DTYPE).supports_cuda_graphs
            continue
        found = f"{capability[0]}.{capability[1]}"
        with pytest.raises(ValueError, match=rf"capability 8\.9 or higher, but cuda:0 has {found}"):
            select_ops(backend, *args, FP8_DTYPE)


def test_a_gpu_that_triton_does_not_know_runs_on_torch(monkeypatch):
    pretend_gpu(monkeypatch, (7, 5))
    args = torch.device("cuda", 0), torch.float16, 64
    for backend in ("auto", "torch"):
        ops = select_ops(backend, *args, compile_torch_ops=True)
        assert ops.attend is torch_ops.attend
        assert ops.rms_norm is torch_ops.rms_norm, "torch.compile would ask Triton"
    for backend in ("triton", "flash-attn"):
        with pytest.raises(ValueError, match=rf"{backend}.*capability 8\.0 or higher.* has 7\.5"):
            select_ops(backend, *args, False)


def test_a_flash_attn_that_cannot_be_imported_is_reported(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "nanovllm.kernels.flash_attention", raising=False)
    with pytest.raises(ValueError, match=r"cannot be imported \(.*flash_attn.*\); choose 'triton'"):
        select_ops("flash-attn", torch.device("cuda"), torch.bfloat16, 64, False)


def test_torch_backend_imports_no_kernel_package():
    program = (
        "import sys, torch\n"
        "from nanovllm.kernels.select import select_ops\n"
        "before = set(sys.modules)\n"
        "select_ops('auto', torch.device('cpu'), torch.float32, 64, True)\n"
        "assert not {'triton', 'flash_attn'} & (set(sys.modules) - before)\n"
    )
    run([sys.executable, "-c", program], check=True)
