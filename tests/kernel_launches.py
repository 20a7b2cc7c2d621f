"""Launches of every Triton kernel on fake tensors, for `kernel_compilation`.

A kernel that is added gets a line here: a function that calls the library as a model would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from kernel_compilation import CUDA

from nanovllm.kernels import row_state
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.triton.peer_memory import PeerMemory, num_memory_bytes
from nanovllm.kernels.types import (
    FP8_DTYPE,
    DecodeMetadata,
    HeadInputs,
    KVCache,
    LinearOutput,
    LoRAWeights,
    PackedWeight,
    PartialSums,
    PrefillMetadata,
    Product,
)

BLOCK_SIZE, NUM_BLOCKS, TABLE_WIDTH = 256, 64, 16
INT32, INT64, FLOAT32 = torch.int32, torch.int64, torch.float32


@dataclass(frozen=True)
class Shape:
    """What a model's sizes and a step's rows make of a kernel."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    num_heads: int = 16
    num_kv_heads: int = 8
    is_fp8_cache: bool = False
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    rows: int = 512  # of a decode step
    tokens: int = 2048  # of a prefill
    hidden_size: int = 1024
    vocab_size: int = 151936
    num_experts: int = 128
    is_fp8_weight: bool = False
    has_blocks: bool = False  # scales of blocks, not of rows
    bits: int = 4  # of packed weights
    has_zeros: bool = False
    num_parts: int = 1  # in which products come
    num_ranks: int = 2

    def ops(self) -> Ops | None:
        """The library's, or None where it refuses the shape."""
        kv_cache_dtype = FP8_DTYPE if self.is_fp8_cache else None
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            try:
                return select_ops("auto", CUDA, self.dtype, self.head_dim, False, kv_cache_dtype)
            except ValueError:
                return None


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def product(shape: Shape, *sizes: int) -> LinearOutput:
    """A product [T, N], in parts if the shape says so."""
    if shape.num_parts == 1:
        return empty(*sizes, dtype=shape.dtype)
    return PartialSums(empty(shape.num_parts, *sizes, dtype=FLOAT32), shape.dtype)


def cache_of(shape: Shape) -> KVCache:
    sizes = NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim
    dtype = FP8_DTYPE if shape.is_fp8_cache else shape.dtype
    scales = None, None
    if shape.is_fp8_cache:
        sizes_of_scales = NUM_BLOCKS, shape.num_kv_heads, BLOCK_SIZE
        scales = empty(*sizes_of_scales, dtype=FLOAT32), empty(*sizes_of_scales, dtype=FLOAT32)
    return KVCache(empty(*sizes, dtype=dtype), empty(*sizes, dtype=dtype), *scales)


def extras_of(shape: Shape) -> dict[str, object]:
    sinks = empty(shape.num_heads, dtype=shape.dtype) if shape.has_sinks else None
    return {"window": shape.window, "softcap": shape.softcap, "sinks": sinks}


def decode(ops: Ops, shape: Shape) -> None:
    cache, rows = cache_of(shape), shape.rows
    tables, lengths = empty(rows, TABLE_WIDTH, dtype=INT32), empty(rows, dtype=INT32)
    common = None if shape.window else empty(1, dtype=INT32)
    plan = ops.plan_decode(cache, tables, lengths, common, shape.window)
    metadata = DecodeMetadata(empty(rows, dtype=INT64), tables, lengths, plan)
    query = empty(rows, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    ops.attend(query, cache, metadata, 0.1, **extras_of(shape))


def attention_of_new_tokens(ops: Ops, shape: Shape) -> None:
    """Decode steps of one row and of many."""
    cache = cache_of(shape)
    weight = empty(shape.head_dim, dtype=shape.dtype)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    cos_sin = empty(4096, shape.head_dim, dtype=FLOAT32)
    for rows in (1, 128):
        tables, lengths = empty(rows, TABLE_WIDTH, dtype=INT32), empty(rows, dtype=INT32)
        plan = ops.plan_decode(cache, tables, lengths, None, shape.window)
        metadata = DecodeMetadata(empty(rows, dtype=INT64), tables, lengths, plan)
        qkv, positions = product(shape, rows, width), empty(rows, dtype=INT32)
        heads = HeadInputs(qkv, weight, weight, 1e-6, cos_sin, positions)
        ops.attention(heads, cache, metadata, 0.1, **extras_of(shape))


def prefill_metadata(shape: Shape) -> PrefillMetadata:
    return PrefillMetadata(
        empty(shape.tokens, dtype=INT64),
        empty(4, TABLE_WIDTH, dtype=INT32),
        empty(5, dtype=INT32),
        empty(5, dtype=INT32),
        max_seqlen_q=shape.tokens,
        max_seqlen_k=shape.tokens,
        rows=empty(4, dtype=INT32),
        bounds=empty(3, dtype=INT32),
    )


def prefill(ops: Ops, shape: Shape) -> None:
    query = empty(shape.tokens, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    ops.attend(query, cache_of(shape), prefill_metadata(shape), 0.1, **extras_of(shape))


def rope(ops: Ops, shape: Shape) -> None:
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    weight = empty(shape.head_dim, dtype=shape.dtype)
    ops.qk_norm_rope_store(
        product(shape, shape.tokens, width),
        weight,
        weight,
        1e-6,
        empty(4096, shape.head_dim, dtype=FLOAT32),
        empty(shape.tokens, dtype=INT32),
        cache_of(shape),
        empty(shape.tokens, dtype=INT64),
    )


def products_of_heads(ops: Ops, shape: Shape) -> None:
    """Of many tokens, in one kernel where the GPU has it."""
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    norm = empty(shape.head_dim, dtype=shape.dtype)
    x = empty(shape.tokens, shape.hidden_size, dtype=shape.dtype)
    ops.heads_linear(
        Product(x, empty(width, shape.hidden_size, dtype=shape.dtype)),
        norm,
        norm,
        1e-6,
        empty(4096, shape.head_dim, dtype=FLOAT32),
        empty(shape.tokens, dtype=INT32),
        cache_of(shape),
        empty(shape.tokens, dtype=INT64),
    )


def copies(ops: Ops, shape: Shape) -> None:
    cache = KVCache(*cache_of(shape)[:2])  # no kernel copies scales
    ops.copy_units(cache, empty(shape.rows, 2, dtype=INT32))


def norms(ops: Ops, shape: Shape) -> None:
    x = product(shape, shape.rows, shape.hidden_size)
    residual = empty(shape.rows, shape.hidden_size, dtype=shape.dtype)
    ops.add_rms_norm(x, residual, empty(shape.hidden_size, dtype=shape.dtype), 1e-6)


def activations(ops: Ops, shape: Shape) -> None:
    ops.silu_and_mul(product(shape, shape.rows, 6 * shape.hidden_size))


def other_activations(ops: Ops, shape: Shape) -> None:
    for is_tanh in (False, True):
        ops.gelu_and_mul(product(shape, shape.rows, 6 * shape.hidden_size), is_tanh)


def products(ops: Ops, shape: Shape) -> None:
    """Few tokens: K of the small model is split, that of the large one is not."""
    for rows in (16, 64):
        for size in (shape.hidden_size, 8 * shape.hidden_size):
            x = empty(rows, size, dtype=shape.dtype)
            ops.linear(x, empty(4096, size, dtype=shape.dtype), None)
    size = shape.hidden_size
    for rows in (112, 160, 224):
        x = empty(rows, size, dtype=shape.dtype)
        ops.linear(x, empty(4 * size, size, dtype=shape.dtype), None)
        x = empty(rows, 4 * size, dtype=shape.dtype)
        for n in (4 * size, 24 * size):
            ops.linear(x, empty(n, 4 * size, dtype=shape.dtype), None)
    ops.linear(empty(64, size, dtype=shape.dtype), empty(1000, size, dtype=shape.dtype), None)


def gated_products(ops: Ops, shape: Shape) -> None:
    """In one kernel, where the GPU has it; few tokens of the larger model in two."""
    size = shape.hidden_size
    for k, tokens in ((size, (1, 32, 160, shape.tokens)), (8 * size, (1, 32, 160))):
        for rows in tokens:
            x = empty(rows, k, dtype=shape.dtype)
            ops.gated_linear(x, empty(6 * size, k, dtype=shape.dtype))
    for rows in (64, 128, 256):
        x = empty(rows, 4 * size, dtype=shape.dtype)
        ops.gated_linear(x, empty(24 * size, 4 * size, dtype=shape.dtype))


def scales_of(shape: Shape, n: int, k: int) -> torch.Tensor:
    sizes = (-(-n // 128), -(-k // 128)) if shape.has_blocks else (n,)
    return empty(*sizes, dtype=FLOAT32)


def fp8_products(ops: Ops, shape: Shape) -> None:
    if ops.has_fp8_products:
        n, k = 4096, 4 * shape.hidden_size
        weight = empty(n, k, dtype=FP8_DTYPE)
        for rows in (8, 64, 128):
            ops.fp8_linear(empty(rows, k, dtype=shape.dtype), weight, scales_of(shape, n, k))


def experts(ops: Ops, shape: Shape) -> None:
    if shape.is_fp8_weight and not ops.has_fp8_products:
        return
    hidden, size = shape.hidden_size, 768
    dtype = FP8_DTYPE if shape.is_fp8_weight else shape.dtype
    rows = shape.num_experts * 2 * size, shape.num_experts * hidden
    scales = (None, None)
    if shape.is_fp8_weight:
        scales = scales_of(shape, rows[0], hidden), scales_of(shape, rows[1], size)
    ops.experts(
        empty(shape.tokens, hidden, dtype=shape.dtype),
        product(shape, shape.tokens, shape.num_experts),
        empty(rows[0], hidden, dtype=dtype),
        empty(rows[1], size, dtype=dtype),
        8,
        True,
        *scales,
    )


def packed(shape: Shape, n: int, k: int) -> PackedWeight:
    zeros = empty(n, k // 128, dtype=torch.uint8) if shape.has_zeros else None
    numbers = empty(n, k * shape.bits // 8, dtype=torch.uint8)
    scales = empty(n, k // 128, dtype=shape.dtype)
    return PackedWeight(numbers, scales, zeros, None, shape.bits, 128)


def packed_products(ops: Ops, shape: Shape) -> None:
    """In every tile, and dequantised."""
    weight = packed(shape, 4096, 4 * shape.hidden_size)
    for tokens in (1, 8, 16, 32, 64, 128, 2048):
        ops.packed_linear(empty(tokens, 4 * shape.hidden_size, dtype=shape.dtype), weight)


def packed_experts(ops: Ops, shape: Shape) -> None:
    hidden, size = shape.hidden_size, 768
    ops.experts(
        empty(shape.tokens, hidden, dtype=shape.dtype),
        product(shape, shape.tokens, shape.num_experts),
        packed(shape, shape.num_experts * 2 * size, hidden),
        packed(shape, shape.num_experts * hidden, size),
        8,
        True,
    )


def adapters(ops: Ops, shape: Shape) -> None:
    """Few tokens and many, with adapters of small and of the largest rank."""
    n, k = 4096, shape.hidden_size
    rows = (0, n // 2), (n // 2, n)
    for tokens in (shape.rows, shape.tokens):
        plan = ops.plan_adapters(empty(tokens, dtype=INT32), 8)
        for rank in (16, 256):
            a, b = empty(8, 2 * rank, k, dtype=shape.dtype), empty(8, n, rank, dtype=shape.dtype)
            x, out = empty(tokens, k, dtype=shape.dtype), product(shape, tokens, n)
            ops.add_adapters(out, x, LoRAWeights(a, b, rows), plan)


def delta_net(ops: Ops, shape: Shape) -> None:
    """A prefill of long sequences, then the rule and the convolution of a decode step."""
    key_heads, heads, dim = 16, 32, shape.head_dim
    channels = (2 * key_heads + heads) * dim
    state = empty(65, heads, dim, dim, dtype=FLOAT32)
    conv_state = empty(65, channels, 3, dtype=shape.dtype)
    rows = empty(shape.rows, dtype=INT32)
    decode = DecodeMetadata(
        empty(shape.rows, dtype=INT64),
        empty(shape.rows, TABLE_WIDTH, dtype=INT32),
        empty(shape.rows, dtype=INT32),
        rows=rows,
    )
    rates = empty(heads, dtype=FLOAT32), empty(heads, dtype=FLOAT32)
    for metadata, tokens in ((decode, shape.rows), (prefill_metadata(shape), shape.tokens)):
        x = product(shape, tokens, channels)
        qkv = ops.causal_conv1d(x, empty(channels, 4, dtype=shape.dtype), conv_state, metadata)
        beta, decay = product(shape, tokens, heads), product(shape, tokens, heads)
        out = ops.gated_delta_rule(qkv, beta, decay, *rates, state, metadata)
    gate = product(shape, shape.tokens, heads * dim)
    ops.gated_rms_norm(out, gate, empty(dim, dtype=shape.dtype), 1e-6)
    width = shape.num_heads * shape.head_dim
    x = empty(shape.tokens, width, dtype=shape.dtype)
    ops.sigmoid_gate(x, product(shape, shape.tokens, width))


def sampling(ops: Ops, shape: Shape) -> None:
    rows = shape.rows
    logits = empty(rows, shape.vocab_size, dtype=shape.dtype)
    ops.sample(
        logits,
        empty(rows, dtype=FLOAT32),
        empty(rows, 2, dtype=INT32),
        empty(rows, dtype=INT32),
        0,
        shape.vocab_size,
    )


def filters(ops: Ops, shape: Shape) -> None:
    rows = shape.rows
    logits = empty(rows, shape.vocab_size, dtype=shape.dtype)
    top_k, numbers = empty(rows, dtype=INT32), empty(rows, dtype=FLOAT32)
    ops.filter_thresholds(logits, numbers, top_k, numbers, numbers, shape.vocab_size)


def row_table(ops: Ops, shape: Shape) -> None:
    table = empty(513, row_state.BLOCK_TABLE + TABLE_WIDTH, dtype=INT32)
    rows = empty(shape.rows, dtype=INT32)
    inputs = ops.gather_decode_inputs(table, rows, BLOCK_SIZE)
    ops.write_back(table, rows, inputs.input_ids, inputs.positions)


def sums_over_ranks(ops: Ops, shape: Shape) -> None:
    size, width = shape.num_ranks, shape.hidden_size
    memory = empty(num_memory_bytes(size, width, shape.dtype), dtype=torch.uint8)
    abort = empty(1, dtype=INT32)
    peers = PeerMemory(0, [0] * size, memory, width, shape.dtype, abort)
    residual = empty(shape.rows, width, dtype=shape.dtype)
    weight = empty(width, dtype=shape.dtype)
    peers.add_rms_norm(product(shape, shape.rows, width), residual, weight, 1e-6)
    peers.embedding(empty(shape.rows, dtype=INT32), empty(1000, width, dtype=shape.dtype), 0)
    peers.argmax(empty(shape.rows, dtype=FLOAT32), empty(shape.rows, dtype=INT32))


SHAPE = Shape()
FEW = replace(SHAPE, rows=8, num_parts=2)
ALL = (
    decode,
    attention_of_new_tokens,
    prefill,
    rope,
    products_of_heads,
    copies,
    norms,
    activations,
    products,
    gated_products,
    fp8_products,
    experts,
    packed_products,
    packed_experts,
    adapters,
    delta_net,
    sampling,
    filters,
    row_table,
    sums_over_ranks,
)


def launch(function: Callable[[Ops, Shape], None], shape: Shape = SHAPE) -> None:
    """One of ALL, inside of `compiling_for`, where the library takes the shape."""
    if (ops := shape.ops()) is not None:
        function(ops, shape)
