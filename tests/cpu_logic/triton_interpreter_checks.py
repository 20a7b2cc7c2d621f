"""Every Triton kernel against `torch_ops`, to be run by pytest with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter's bfloat16 is inexact. `test_triton_interpreter.py` starts
it; the name keeps pytest from collecting it in a process without the variable.
"""

import itertools

import pytest
import torch

from nanovllm.kernels import row_state, torch_ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.triton import rope as triton_rope
from nanovllm.kernels.triton.prefill_attention import prefill_attention
from nanovllm.kernels.types import FP8_DTYPE, KVCache, PrefillMetadata, Unreduced

DTYPES = (torch.float32, torch.float16)
EPS = 1e-6
OPS = select_ops("triton", torch.device("cpu"), torch.float32, 64, compile_torch_ops=False)
# (query heads, KV heads, head_dim)
HEADS = ((2, 2, 64), (6, 2, 24), (4, 1, 48), (3, 1, 128))
# Sizes and dtypes meet in no branch of a kernel, so each of the one goes with one of the other.
HEADS_AND_DTYPES = tuple(zip(HEADS, itertools.cycle(DTYPES)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    eps = (16 if got.dtype == torch.float32 else 4) * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (24, 64, 1025))
@pytest.mark.parametrize("num_rows", (0, 1, 5))
def test_norms_and_activation(dtype, width, num_rows):
    x, residual = torch.randn(2, num_rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    assert_close(OPS.rms_norm(x, weight, EPS), torch_ops.rms_norm(x, weight, EPS))
    expected = torch_ops.add_rms_norm(x, residual, weight, EPS)
    for got, want in zip(OPS.add_rms_norm(x, residual, weight, EPS), expected, strict=True):
        assert_close(got, want)
    gate_up = torch.randn(num_rows, 2 * width).to(dtype)
    assert_close(OPS.silu_and_mul(gate_up), torch_ops.silu_and_mul(gate_up))
    for is_tanh in (True, False):
        expected = torch_ops.gelu_and_mul(gate_up, is_tanh)
        assert_close(OPS.gelu_and_mul(gate_up, is_tanh), expected)


def test_a_float32_weight_is_multiplied_before_the_only_rounding():
    """Without a rounding between, ten times as exact as a norm that is rounded first."""
    x, residual, weight = torch.randn(64, 96).half(), torch.zeros(64, 96).half(), torch.randn(96)
    exact = torch_ops.rms_norm(x.double(), weight.double(), EPS)
    for ops in (OPS, torch_ops):
        for got in (
            ops.rms_norm(x, weight, EPS),
            ops.add_rms_norm(x, residual.clone(), weight, EPS)[0],
        ):
            assert torch.equal(got, exact.half()) or (got != exact.half()).float().mean() < 0.01
    rounded_twice = torch_ops.rms_norm(x, weight.half(), EPS)
    assert (rounded_twice != exact.half()).float().mean() > 0.1


def test_no_kernel_takes_a_term_that_is_not_summed_over_the_ranks():
    term, weight = Unreduced(torch.randn(3, 32)), torch.randn(32)
    for use in (
        lambda: OPS.rms_norm(term, weight, EPS),
        lambda: OPS.add_rms_norm(term, term.term, weight, EPS),
        lambda: OPS.silu_and_mul(term),
        lambda: OPS.linear(term, term.term),
    ):
        with pytest.raises((AttributeError, TypeError)):
            use()


@pytest.mark.parametrize(("heads", "dtype"), HEADS_AND_DTYPES)
@pytest.mark.parametrize("with_norm", (True, "float32", False))
@pytest.mark.parametrize("many_tokens", (1, 1024))
def test_qk_norm_rope_store(dtype, heads, with_norm, many_tokens, monkeypatch):
    monkeypatch.setattr(triton_rope, "MANY_TOKENS", many_tokens)
    num_heads, num_kv_heads, head_dim = heads
    positions = torch.tensor([0, 5, 30], dtype=torch.int32)
    slots = torch.tensor([35, -1, 0])
    cos_sin = torch.randn(31, head_dim)
    qkv = torch.randn(3, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    weights = torch.randn(2, head_dim) if with_norm else (None, None)
    if with_norm is True:
        weights = weights.to(dtype)
    caches = torch.zeros(2, 3, 16, num_kv_heads, head_dim, dtype=dtype)
    expected_caches = caches.clone()
    args = qkv, *weights, EPS, cos_sin, positions
    query = OPS.qk_norm_rope_store(*args, KVCache(*caches), slots)
    expected = torch_ops.qk_norm_rope_store(*args, KVCache(*expected_caches), slots)
    assert_close(query, expected)
    assert_close(caches, expected_caches)
    none = OPS.qk_norm_rope_store(qkv[:0], *args[1:], KVCache(*caches), slots[:0])
    assert none.shape[0] == 0


def test_qk_norm_rope_store_into_an_fp8_cache():
    """The interpreter rounds a few elements to a neighbouring fp8 number; scales are exact."""
    for num_heads, num_kv_heads, head_dim in HEADS:
        slots = torch.tensor([35, -1, 0, 17])
        positions = torch.tensor([0, 5, 30, 7], dtype=torch.int32)
        qkv = torch.randn(4, (num_heads + 2 * num_kv_heads) * head_dim)
        qkv[3] = 0
        args = qkv, *torch.randn(2, head_dim), EPS, torch.randn(31, head_dim), positions
        results = []
        for ops in (OPS, torch_ops):
            caches = torch.full((2, 3, 16, num_kv_heads, head_dim), 7.0).to(FP8_DTYPE)
            scales = torch.full((2, 3, num_kv_heads, 16), 7.0)
            query = ops.qk_norm_rope_store(*args, KVCache(*caches, *scales), slots)
            results.append((query, scales, caches.float()))
        (query, scales, caches), (expected_query, expected_scales, expected_caches) = results
        assert_close(query, expected_query)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
        assert (caches == expected_caches).float().mean() > 0.99
        torch.testing.assert_close(caches, expected_caches, rtol=0.5, atol=2**-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_alone_are_stored_as_they_are(dtype):
    """Without query heads, and with angles of 0: so models of transformers store theirs."""
    for _, num_kv_heads, head_dim in HEADS:
        kv = torch.randn(4, 2 * num_kv_heads, head_dim).to(dtype)
        slots, positions = torch.tensor([35, -1, 0, 17]), torch.zeros(4, dtype=torch.int32)
        cos_sin = torch.cat([torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)], 1)
        expected = torch.zeros(2, 48, num_kv_heads, head_dim, dtype=dtype)
        for memory, heads in zip(expected, kv.chunk(2, 1), strict=True):
            memory[slots[slots >= 0]] = heads[slots >= 0]
        for ops in (OPS, torch_ops):
            caches = torch.zeros(2, 3, 16, num_kv_heads, head_dim, dtype=dtype)
            args = kv.flatten(1), None, None, 1.0, cos_sin, positions, KVCache(*caches), slots
            assert ops.qk_norm_rope_store(*args).shape == (4, 0, head_dim)
            assert torch.equal(caches.flatten(1, 2), expected)


@pytest.mark.parametrize("is_fp8", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_units(dtype, is_fp8):
    for _, num_kv_heads, head_dim in HEADS:
        memory = torch.randn(2, 4, 128, num_kv_heads, head_dim)
        scales = torch.randn(2, 4, num_kv_heads, 128) if is_fp8 else ()
        memory = memory.to(FP8_DTYPE if is_fp8 else dtype)
        copies = torch.tensor([(1, 6), (5, 0), (2, 6), (6, 6), (6, 6)], dtype=torch.int32)
        expected = KVCache(*memory.clone(), *(scales.clone() if is_fp8 else ()))
        torch_ops.copy_units(expected, copies)
        cache = KVCache(*memory, *scales)
        OPS.copy_units(cache, copies[:0])
        OPS.copy_units(cache, copies)
        for got, wanted in zip(cache, expected, strict=True):
            assert got is wanted or torch.equal(got.float(), wanted.float())


NO_SLOTS = torch.empty(0, dtype=torch.int64)  # attention only reads the cache


def fp8_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache in fp8 and its scales; what is NaN stays NaN, and so do unused slots' scales."""
    quantized, scales = torch_ops.quantize(cache.float().flatten(0, 1))
    scales = scales.masked_fill(cache.flatten(0, 1).isnan().all(-1), torch.nan)
    return quantized.view(cache.shape), scales.view(cache.shape[:3]).transpose(1, 2).contiguous()


def paged_inputs(
    lens: list[int], block_size: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[KVCache, torch.Tensor]:
    """A cache of NaN (values: large numbers) outside the sequences' slots; block tables."""
    _, num_kv_heads, head_dim = heads
    width = -(-max(lens) // block_size) + 1
    num_blocks = width * len(lens)
    caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan).to(dtype)
    caches[1] = 1e4  # values in a cache are finite
    tables = torch.randperm(num_blocks).view(len(lens), width).int()
    for table, length in zip(tables, lens, strict=True):
        position = torch.arange(length)
        slots = table[position // block_size].long() * block_size + position % block_size
        values = torch.randn(2, length, num_kv_heads, head_dim).to(dtype)
        caches.flatten(1, 2)[:, slots] = values
    return KVCache(*caches), tables


# Tiles of queries and keys; whether bulk copies load the keys, which they do if a head fills its
# columns (64, 128). None: what the operations choose.
@pytest.mark.parametrize(
    ("heads", "dtype", "block_size", "prefills"),
    [
        ((2, 2, 64), DTYPES[0], 16, (None, (16, 16, True), (16, 16, False))),
        ((4, 2, 24), DTYPES[1], 64, (None, (16, 64, False))),
        ((2, 1, 48), DTYPES[0], 64, ((16, 16, True), (32, 16, False))),
        ((2, 1, 128), DTYPES[1], 64, ((32, 16, True), (16, 64, True))),
    ],
)
@pytest.mark.parametrize("is_fp8", (False, True))
def test_prefill_attention(heads, dtype, block_size, prefills, is_fp8):
    """Whole prompts, a cached prefix before several tiles and before one new token."""
    lens_k, lens_q = [1, 20, 67, 33], [1, 20, 18, 1]
    cache, tables = paged_inputs(lens_k, block_size, heads, dtype)
    if is_fp8:
        (keys, key_scales), (values, value_scales) = map(fp8_cache, cache[:2])
        cache, prefills = KVCache(keys, values, key_scales, value_scales), [(16, 16, None)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (lens_q, lens_k))
    query = torch.randn(sum(lens_q), heads[0], heads[2]).to(dtype)
    metadata = PrefillMetadata(NO_SLOTS, tables, cu_q, cu_k, max(lens_q), max(lens_k))
    args = query, cache, metadata, heads[2] ** -0.5
    expected = torch_ops.attend(*args)
    for prefill in prefills:
        if prefill is None:
            got = OPS.attend(*args)
        else:
            block_m, block_n, by_bulk_copies = prefill
            got = prefill_attention(
                *args, config=(block_m, block_n, 4, 1), use_tensor_descriptors=by_bulk_copies
            )
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", (50, 2048, 2049, 5000))
def test_sample(dtype, vocab_size):
    """Mixed temperatures, padded columns that would win, NaN, infinities, ties, slices."""
    logits = torch.randn(9, vocab_size + 8).to(dtype)
    logits[:, vocab_size:] = 100
    logits[1, [vocab_size - 1, 3]] = 50  # a tie
    logits[2] = torch.nan
    logits[3, torch.rand(vocab_size + 8) < 0.5] = torch.nan
    logits[6, [11, vocab_size - 2]] = torch.inf
    logits[7, torch.rand(vocab_size + 8) < 0.95] = -torch.inf
    logits[8] = -torch.inf
    temperatures = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.3, 2.0, 1.0, 0.7, 1.0])
    words = torch.randint(-(2**31), 2**31, (10, 2)).int()
    positions = torch.arange(9, dtype=torch.int32) * 1000
    for first in (0, vocab_size // 16 * 8, -(-vocab_size // 8) * 8):
        part = logits[:, first:]  # rows are not contiguous
        args = part, temperatures, words[:9], positions, first, vocab_size
        scores, ids = OPS.sample(*args)
        expected_scores, expected_ids = torch_ops.sample(*args)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)
    assert OPS.sample(logits[:0], temperatures[:0], words[:0], positions[:0], 0, 9)[1].shape == (0,)


def test_row_table():
    width = 300  # more than one program copies
    table = torch.randint(0, 1000, (6, row_state.BLOCK_TABLE + width)).int()
    table[:, row_state.LENGTH] = torch.tensor([1, 16, 17, 4800, 33, 0])
    table[:, row_state.TEMPERATURE] = torch.rand(6).view(torch.int32)
    table[:, row_state.SEED] = -5
    table[5] = 0
    table[2, row_state.BLOCK_TABLE + 1] = 2**30
    rows = torch.tensor([3, 5, 0, 2, 1, 5], dtype=torch.int32)
    expected = torch_ops.gather_decode_inputs(table, rows, 16)
    inputs = OPS.gather_decode_inputs(table, rows, 16)
    for name, got in inputs._asdict().items():
        want = getattr(expected, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name
    token_ids = torch.arange(100, 106, dtype=torch.int32)
    expected_table = table.clone()
    temperatures = torch.tensor([0.0, 1.0, -1.0, 0.5, -1.0, -1.0])
    for given in (None, temperatures):
        torch_ops.write_back(expected_table, rows, token_ids, inputs.positions, given)
        OPS.write_back(table, rows, token_ids, inputs.positions, given)
        assert torch.equal(table, expected_table)
        token_ids = token_ids + 50
