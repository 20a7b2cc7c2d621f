"""`CpuOps` against `torch_ops`, which the other tests hold to plain maths."""

import pytest
import torch

from nanovllm.kernels import cpu_ops, cpu_packed, torch_ops
from nanovllm.kernels.cpu_ops import CpuOps, OncePerStep
from nanovllm.kernels.torch_ops import pack_numbers
from nanovllm.kernels.types import (
    FP8_DTYPE,
    DecodeMetadata,
    KVCache,
    PackedWeight,
    PrefillMetadata,
)

BLOCK_SIZE, NUM_BLOCKS, KV_HEADS, HEADS, HEAD_DIM = 4, 12, 2, 4, 8
LENGTHS = 9, 0, 3, 10
TABLES = torch.tensor([[2, 3, 4], [0, 0, 0], [9, 0, 0], [7, 1, 6]], dtype=torch.int32)


def new_cache(is_fp8=False):
    """Keys and values where the tables' sequences have tokens, and NaN everywhere else."""
    shape = NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM
    if is_fp8:
        memory = [torch.randn(shape).to(FP8_DTYPE) for _ in range(2)]
        return KVCache(*memory, *torch.rand(2, NUM_BLOCKS, KV_HEADS, BLOCK_SIZE))
    cache = KVCache(*torch.full((2, *shape), torch.nan))
    for length, table in zip(LENGTHS, TABLES.tolist(), strict=True):
        for position in range(length):
            slot = table[position // BLOCK_SIZE], position % BLOCK_SIZE
            cache.key[slot], cache.value[slot] = torch.randn(2, KV_HEADS, HEAD_DIM)
    return cache


@pytest.mark.parametrize(
    "extras",
    [{}, {"window": 3}, {"softcap": 2.0, "window": 5}, {"sinks": torch.ones(HEADS)}, {"fp8": True}],
    ids=str,
)
@pytest.mark.parametrize("num_new", [(1, 1, 1, 1), (9, 0, 2, 4)])
def test_attention_reads_blocks_where_they_lie(extras, num_new, monkeypatch):
    monkeypatch.setattr("nanovllm.kernels.cpu_attention.MAX_SCORE_ELEMENTS", 30)  # few rows at once
    cache = new_cache(is_fp8=extras.get("fp8", False))
    extras = {name: value for name, value in extras.items() if name != "fp8"}
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    if num_new == (1, 1, 1, 1):
        metadata = DecodeMetadata(torch.zeros(0), TABLES, lengths)
    else:
        ends = [torch.tensor([0, *x]).cumsum(0).int() for x in (num_new, LENGTHS)]
        metadata = PrefillMetadata(torch.zeros(0), TABLES, *ends, 9, 10)
    query = torch.randn(sum(num_new), 2 * HEADS, HEAD_DIM)[:, :HEADS]
    out = CpuOps().attend(query, cache, metadata, 0.3, **extras)
    torch.testing.assert_close(out, torch_ops.attend(query, cache, metadata, 0.3, **extras))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 9])
def test_products_of_any_number_of_tokens(dtype, num_tokens, monkeypatch):
    monkeypatch.setattr(cpu_ops, "CONVERTS_16_BITS", True)
    monkeypatch.setattr(cpu_packed, "CHUNK_ELEMENTS", 100)
    x, weight, bias = (torch.randn(n).to(dtype) for n in ((num_tokens, 16), (20, 16), (20,)))
    close = dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 2**-7)
    expected = x.double() @ weight.double().t()
    for minimum in (0, 10**9):  # of oneDNN
        monkeypatch.setattr(cpu_ops, "ONEDNN_ELEMENTS", minimum)
        with_bias = CpuOps.linear(x, weight, bias).double()
        torch.testing.assert_close(with_bias, expected + bias.double(), **close)
        out = torch.empty(num_tokens, 20, dtype=dtype)
        assert CpuOps.vocab_linear(x, weight, out) is out
        torch.testing.assert_close(out.double(), expected, **close)
        torch.testing.assert_close(CpuOps.vocab_linear(x, weight).double(), expected, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norms", [(True, True), (False, False), (True, False)])
def test_rotation_and_store_have_the_same_bits(dtype, has_norms):
    ops, slots = CpuOps(), torch.tensor([5, -1, 40])
    cos_sin, positions = torch.randn(50, HEAD_DIM), torch.tensor([7, 9, 30], dtype=torch.int32)
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    norms = [torch.randn(HEAD_DIM).to(dtype) if has_norm else None for has_norm in has_norms]
    for slot_mapping in (slots, slots[[0, 2, 2]] + torch.tensor([0, 0, 1])):
        caches = [
            KVCache(*torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype))
            for _ in range(2)
        ]
        queries = [
            each.qk_norm_rope_store(qkv, *norms, 1e-6, cos_sin, positions, cache, slot_mapping)
            for each, cache in zip((ops, torch_ops.TorchOps()), caches, strict=True)
        ]
        assert torch.equal(*queries)
        assert torch.equal(torch.stack(caches[0][:2]), torch.stack(caches[1][:2]))
    x, residual, weight = torch.randn(3, 4, HEAD_DIM).to(dtype)
    for norm in (weight[0], weight[0].float()):
        results = [each.add_rms_norm(x, residual, norm, 1e-6) for each in (ops, torch_ops)]
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("temperature", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("logit", [0.0, torch.nan, torch.inf])
def test_the_same_tokens_are_sampled(temperature, logit):
    logits = torch.randn(2, 9)
    logits[1, 4] = logits[1, 6] = logit
    args = logits, torch.tensor([0.0, temperature]), torch.ones(2, 2).int(), torch.ones(2).int()
    for first, thresholds in ((0, None), (16, None), (0, torch.tensor([9.0, 0.0]))):
        results = [ops.sample(*args, first, first + 8, thresholds) for ops in (CpuOps(), torch_ops)]
        assert all(map(torch.equal, *results))


def test_once_per_step_knows_its_arguments_by_identity():
    calls = []
    function = OncePerStep(lambda *args: calls.append(args) or len(calls))
    first, second = torch.zeros(1), torch.zeros(1)
    assert [function(first, None), function(second, None), function(first, None)] == [1, 2, 1]
    assert [function(torch.zeros(1), 3) for _ in range(20)] == [*range(3, 23)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(4, 32), (4, 128), (4, 64), (8, 128), (8, 32)], ids=str
)
def test_products_with_packed_weights(bits, group_size, dtype, monkeypatch):
    monkeypatch.setattr(cpu_packed, "CHUNK_ELEMENTS", 1000)
    shape, groups = (32, 128), 128 // group_size
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    numbers = pack_numbers(values, bits)
    scales = torch.rand(32, groups).to(dtype) / 2**bits
    packed_linear = CpuOps().packed_linear
    for has_zeros, num_tokens in ((False, 3), (True, 3), (False, 70)):
        zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8) if has_zeros else None
        order = torch.randperm(128).int() if has_zeros else None
        weight = PackedWeight(numbers.clone(), scales, zeros, order, bits, group_size)
        assert cpu_packed.has_kernel(weight) == (bits == 4 or (groups == 1 and not has_zeros))
        middle = torch.tensor(2.0 ** (bits - 1)) if zeros is None else zeros.double().unsqueeze(2)
        exact = values.double().unflatten(1, (groups, -1)) - middle
        exact = (exact * scales.double().unsqueeze(2)).flatten(1)
        x, bias = torch.randn(num_tokens, 128).to(dtype), torch.randn(32).to(dtype)
        columns = x if order is None else x[:, order.long()]
        expected = columns.double() @ exact.t() + bias.double()
        close = dict.fromkeys(("rtol", "atol"), 1e-4 if dtype == torch.float32 else 0.1)
        torch.testing.assert_close(packed_linear(x, weight, bias).double(), expected, **close)
        weight.numbers.fill_(0)  # weights may be loaded again
        torch.testing.assert_close(
            packed_linear(x, weight).double(),
            columns.double()
            @ (torch.zeros(32, groups, group_size) - middle)
            .mul(scales.double().unsqueeze(2))
            .flatten(1)
            .double()
            .t(),
            **close,
        )
