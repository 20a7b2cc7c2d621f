"""Gated delta nets as Triton kernels: the convolution, the delta rule, the gates.

A decode step and a prefill of few tokens run the same code: a sequence's tokens, one or several,
with the state of its row in the row table. Rounding follows `torch_delta_rule` step by step. No
shape depends on device values, so decode steps can be captured in CUDA graphs.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.delta_rule_chunks import L2_EPS, delta_rule_chunks
from nanovllm.kernels.triton.launch import await_previous, jit, overlap_options, release_next
from nanovllm.kernels.triton.linear import load_summed, parts_of
from nanovllm.kernels.types import AttentionMetadata, DecodeMetadata, LinearOutput

GATE_COLUMNS = 1024  # of a program
NORM_ELEMENTS = 1024
CONV_CHANNELS = 256
CONV_TOKENS = 16
MIN_CHUNKED_TOKENS = 32  # of the longest sequence of a prefill
VALUE_TILE = 32  # columns of a head's state that a program keeps in registers


# Gates


@jit
def _sigmoid_gate_kernel(
    out,  # [T, N]
    x,  # [T, N]
    gate,
    stride_x,
    stride_gate,
    stride_part,
    NUM_PARTS: tl.constexpr,  # of gate
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    dtype: tl.constexpr = out.dtype.element_ty
    g = load_summed(gate + row * stride_gate + column, mask, stride_part, NUM_PARTS, dtype)
    g = (1 / (1 + tl.exp(-g.to(tl.float32)))).to(dtype).to(tl.float32)
    value = tl.load(x + row * stride_x + column, mask=mask).to(tl.float32)
    tl.store(out + row * N + column, (value * g).to(dtype), mask=mask)


def sigmoid_gate(x: torch.Tensor, gate: LinearOutput) -> torch.Tensor:
    """x [T, N], gate [T, N] -> x * sigmoid(gate) [T, N]."""
    gate, num_parts, stride_part, dtype = parts_of(gate)
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=dtype, device=x.device)
    if num_rows == 0:
        return out
    assert x.stride(1) == 1 and gate.stride(1) == 1
    _sigmoid_gate_kernel[(num_rows, triton.cdiv(width, GATE_COLUMNS))](
        out,
        x,
        gate,
        x.stride(0),
        gate.stride(0),
        stride_part,
        NUM_PARTS=num_parts,
        N=width,
        BLOCK=GATE_COLUMNS,
        num_warps=4,
        **overlap_options(x.device),
    )
    return out


@jit(do_not_specialize=["num_heads_of_all"])
def _gated_rms_norm_kernel(
    out,  # [T * Hv, Dv]
    x,  # [T * Hv, Dv]
    gate,  # [T, Hv * Dv]
    weight,  # [Dv]
    num_heads_of_all,  # T * Hv
    stride_gate,
    stride_part,
    eps,
    NUM_PARTS: tl.constexpr,  # of gate
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    head = (tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]).to(tl.int64)
    i = tl.arange(0, PADDED_DIM)[None, :]
    in_dim = i < VALUE_DIM
    w = tl.load(weight + i, mask=in_dim, other=0.0).to(tl.float32)
    await_previous(OVERLAP)
    mask = (head < num_heads_of_all) & in_dim
    dtype: tl.constexpr = out.dtype.element_ty
    value = tl.load(x + head * VALUE_DIM + i, mask=mask, other=0.0).to(tl.float32)
    mean_square = tl.sum(value * value, axis=1, keep_dims=True) / VALUE_DIM
    normed = (value * tl.rsqrt(mean_square + eps)).to(dtype).to(tl.float32)
    normed = (normed * w).to(dtype).to(tl.float32)
    gates = gate + head // NUM_HEADS * stride_gate + head % NUM_HEADS * VALUE_DIM + i
    g = load_summed(gates, mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    tl.store(out + head * VALUE_DIM + i, (normed * (g / (1 + tl.exp(-g)))).to(dtype), mask=mask)


def gated_rms_norm(
    x: torch.Tensor, gate: LinearOutput, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """x [T, Hv, Dv], gate [T, Hv * Dv] -> norm(x) * silu(gate) [T, Hv * Dv]."""
    gate, num_parts, stride_part, dtype = parts_of(gate)
    num_tokens, num_heads, value_dim = x.shape
    out = torch.empty((num_tokens, num_heads * value_dim), dtype=dtype, device=x.device)
    if num_tokens == 0:
        return out
    assert x.is_contiguous() and gate.stride(1) == 1
    padded_dim = triton.next_power_of_2(value_dim)
    heads = max(1, NORM_ELEMENTS // padded_dim)
    _gated_rms_norm_kernel[(triton.cdiv(num_tokens * num_heads, heads),)](
        out,
        x,
        gate,
        weight,
        num_tokens * num_heads,
        gate.stride(0),
        stride_part,
        eps,
        NUM_PARTS=num_parts,
        NUM_HEADS=num_heads,
        VALUE_DIM=value_dim,
        PADDED_DIM=padded_dim,
        HEADS=heads,
        num_warps=4,
        **overlap_options(x.device),
    )
    return out


# Which tokens of a sequence a step computes


@jit
def _tokens_of(cu_seqlens_q, cu_seqlens_k, context_lens, seq, IS_DECODE: tl.constexpr):
    """Where they begin and end, and how many are before them; none if the row is empty.

    In a decode step token `seq` is the newest of row `seq`.
    """
    if IS_DECODE:
        length = tl.load(context_lens + seq)
        begin = seq
        end = seq + tl.where(length > 0, 1, 0)
        num_before = length - 1
    else:
        begin = tl.load(cu_seqlens_q + seq)
        end = tl.load(cu_seqlens_q + seq + 1)
        length = tl.load(cu_seqlens_k + seq + 1) - tl.load(cu_seqlens_k + seq)
        num_before = length - (end - begin)
    return begin, end, num_before


def _places(
    metadata: AttentionMetadata,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int]:
    """rows, cu_seqlens_q, cu_seqlens_k, context_lens and the most tokens of a sequence."""
    assert metadata.rows is not None
    if isinstance(metadata, DecodeMetadata):
        return metadata.rows, None, None, metadata.context_lens, 1
    lengths = metadata.cu_seqlens_q, metadata.cu_seqlens_k
    return metadata.rows, *lengths, None, metadata.max_seqlen_q


PLACES = ["rows", "cu_seqlens_q", "cu_seqlens_k", "context_lens"]  # slices of a packed buffer


# The convolution


@jit(do_not_specialize_on_alignment=PLACES)
def _causal_conv1d_kernel(
    out,  # [T, C]
    x,  # [T, C]
    weight,  # [C, K]
    state,  # [rows, C, K - 1]
    rows,
    cu_seqlens_q,
    cu_seqlens_k,
    context_lens,
    stride_x,
    stride_part,
    NUM_PARTS: tl.constexpr,  # of x
    NUM_CHANNELS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    IS_DECODE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    seq = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    in_channels = channel < NUM_CHANNELS
    await_previous(OVERLAP)
    begin, end, num_before = _tokens_of(cu_seqlens_q, cu_seqlens_k, context_lens, seq, IS_DECODE)
    BEFORE: tl.constexpr = KERNEL_SIZE - 1
    dtype: tl.constexpr = out.dtype.element_ty
    memory = state + tl.load(rows + seq).to(tl.int64) * NUM_CHANNELS * BEFORE + channel * BEFORE
    first = begin + tl.program_id(2) * TOKENS
    token = first + tl.arange(0, TOKENS)[:, None]
    mask = (token < end) & in_channels
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for j in tl.static_range(KERNEL_SIZE):
        w = tl.load(weight + channel * KERNEL_SIZE + j, mask=in_channels, other=0.0)
        source = token + (j - BEFORE)
        pointers = x + source.to(tl.int64) * stride_x + channel
        value = load_summed(pointers, mask & (source >= begin), stride_part, NUM_PARTS, dtype)
        if j < BEFORE:
            is_old = mask & (source < begin) & (source >= begin - num_before)
            value += tl.load(memory + (source - begin + BEFORE), mask=is_old, other=0.0)
        total += value.to(tl.float32) * w.to(tl.float32)
    total = total.to(dtype).to(tl.float32)
    y = (total / (1 + tl.exp(-total))).to(dtype)
    if IS_DECODE:  # an empty row gives zeros, as it has read
        tl.store(out + token.to(tl.int64) * NUM_CHANNELS + channel, y, mask=in_channels)
    else:
        tl.store(out + token.to(tl.int64) * NUM_CHANNELS + channel, y, mask=mask)
    # The program of a sequence's first tokens alone reads its state, and replaces it. Place j gets
    # what is at place j + (number of tokens) of the old state and the tokens side by side: a place
    # that is read is not yet written.
    if (tl.program_id(2) == 0) & (end > begin):
        for j in tl.static_range(BEFORE):
            last = end - BEFORE + j + tl.arange(0, 1)[:, None]
            is_new = in_channels & (last >= begin)
            last_pointers = x + last.to(tl.int64) * stride_x + channel
            kept = load_summed(last_pointers, is_new, stride_part, NUM_PARTS, dtype)
            was_kept = in_channels & (last < begin) & (last >= begin - num_before)
            kept += tl.load(memory + (last - begin + BEFORE), mask=was_kept, other=0.0)
            tl.debug_barrier()
            tl.store(memory + j, kept, mask=in_channels)


def causal_conv1d(
    x: LinearOutput, weight: torch.Tensor, state: torch.Tensor, metadata: AttentionMetadata
) -> torch.Tensor:
    """See `Ops.causal_conv1d`."""
    x, num_parts, stride_part, dtype = parts_of(x)
    num_channels, kernel_size = weight.shape
    out = torch.empty((len(x), num_channels), dtype=dtype, device=x.device)
    rows, cu_seqlens_q, cu_seqlens_k, context_lens, max_tokens = _places(metadata)
    if len(rows) == 0:
        return out
    assert x.stride(1) == 1 and weight.is_contiguous() and state.is_contiguous()
    is_decode = context_lens is not None
    tokens = 1 if is_decode else CONV_TOKENS
    grid = len(rows), triton.cdiv(num_channels, CONV_CHANNELS), triton.cdiv(max_tokens, tokens)
    _causal_conv1d_kernel[grid](
        out,
        x,
        weight,
        state,
        rows,
        cu_seqlens_q,
        cu_seqlens_k,
        context_lens,
        x.stride(0),
        stride_part,
        NUM_PARTS=num_parts,
        NUM_CHANNELS=num_channels,
        KERNEL_SIZE=kernel_size,
        IS_DECODE=is_decode,
        TOKENS=tokens,
        CHANNELS=CONV_CHANNELS,
        num_warps=2 if is_decode else 4,
        **overlap_options(x.device),
    )
    return out


# The delta rule


@jit(do_not_specialize_on_alignment=PLACES)
def _gated_delta_rule_kernel(
    out,  # [T, Hv, Dv]
    qkv,  # [T, 2 Hk Dk + Hv Dv]
    beta,  # [T, Hv]
    decay,  # [T, Hv]
    decay_rate,  # [Hv] float32
    decay_bias,
    state,  # [rows, Hv, Dk, Dv] float32
    rows,
    cu_seqlens_q,
    cu_seqlens_k,
    context_lens,
    stride_beta,
    beta_part,
    stride_decay,
    decay_part,
    NUM_PARTS: tl.constexpr,  # of beta and decay
    NUM_KEY_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    IS_DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program goes through a sequence's tokens with a tile of one head's state in registers."""
    release_next(OVERLAP)
    head = tl.program_id(0)
    seq = tl.program_id(1)
    i = tl.arange(0, PADDED_KEY_DIM)
    in_key = i < KEY_DIM
    j = tl.program_id(2) * VALUE_TILE + tl.arange(0, VALUE_TILE)
    in_value = j < VALUE_DIM
    one = head + tl.arange(0, 1)  # the head as a tensor, as `load_summed` takes it
    is_one = one < NUM_HEADS
    rate = tl.exp(tl.load(decay_rate + one))
    bias = tl.load(decay_bias + one)
    await_previous(OVERLAP)
    begin, end, num_before = _tokens_of(cu_seqlens_q, cu_seqlens_k, context_lens, seq, IS_DECODE)
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.load(rows + seq).to(tl.int64)
    memory = state + ((row * NUM_HEADS + head) * KEY_DIM + i[:, None]) * VALUE_DIM + j[None, :]
    # Of the state's rows none are read if the sequence begins, and none written if there is none.
    num_written = tl.where(end > begin, KEY_DIM, 0)
    is_read = (i < tl.where(num_before > 0, num_written, 0))[:, None] & in_value[None, :]
    s = tl.load(memory, mask=is_read, other=0.0)
    KEY_SIZE: tl.constexpr = NUM_KEY_HEADS * KEY_DIM
    WIDTH: tl.constexpr = 2 * KEY_SIZE + NUM_HEADS * VALUE_DIM
    key_head = head // (NUM_HEADS // NUM_KEY_HEADS)
    # An empty row of a decode step gives zeros, as other rows' next layers must not meet NaN.
    if IS_DECODE:  # noqa: SIM102 (known when the kernel is compiled)
        if end == begin:
            pointers = out + (seq.to(tl.int64) * NUM_HEADS + head) * VALUE_DIM + j
            tl.store(pointers, tl.zeros((VALUE_TILE,), dtype), mask=in_value)
    for number in range(end - begin):
        token = begin.to(tl.int64) + number
        heads = qkv + token * WIDTH
        q = tl.load(heads + key_head * KEY_DIM + i, mask=in_key, other=0.0).to(tl.float32)
        k = tl.load(heads + KEY_SIZE + key_head * KEY_DIM + i, mask=in_key, other=0.0)
        k = k.to(tl.float32)
        v = tl.load(heads + 2 * KEY_SIZE + head * VALUE_DIM + j, mask=in_value, other=0.0)
        q = q * tl.rsqrt(tl.sum(q * q) + L2_EPS) * (KEY_DIM**-0.5)
        k = k * tl.rsqrt(tl.sum(k * k) + L2_EPS)
        b = load_summed(beta + token * stride_beta + one, is_one, beta_part, NUM_PARTS, dtype)
        strength = (1 / (1 + tl.exp(-b.to(tl.float32)))).to(dtype).to(tl.float32)
        a = load_summed(decay + token * stride_decay + one, is_one, decay_part, NUM_PARTS, dtype)
        a = a.to(tl.float32) + bias
        softplus = tl.where(a > 20.0, a, tl.log(1 + tl.exp(tl.minimum(a, 20.0))))
        s = s * tl.exp(-rate * softplus)[:, None]
        delta = strength * (v.to(tl.float32) - tl.sum(s * k[:, None], axis=0))
        s += k[:, None] * delta[None, :]
        y = tl.sum(s * q[:, None], axis=0)
        tl.store(out + (token * NUM_HEADS + head) * VALUE_DIM + j, y.to(dtype), mask=in_value)
    tl.store(memory, s, mask=(i < num_written)[:, None] & in_value[None, :])


def gated_delta_rule(
    qkv: torch.Tensor,
    beta: LinearOutput,
    decay: LinearOutput,
    decay_rate: torch.Tensor,
    decay_bias: torch.Tensor,
    state: torch.Tensor,
    metadata: AttentionMetadata,
) -> torch.Tensor:
    """See `Ops.gated_delta_rule`."""
    beta, num_parts, beta_part, _ = parts_of(beta)
    decay, num_decay_parts, decay_part, _ = parts_of(decay)
    assert num_parts == num_decay_parts
    _, num_heads, key_dim, value_dim = state.shape
    rows, cu_seqlens_q, cu_seqlens_k, context_lens, max_tokens = _places(metadata)
    assert qkv.is_contiguous() and state.is_contiguous()
    if cu_seqlens_q is not None and cu_seqlens_k is not None and max_tokens >= MIN_CHUNKED_TOKENS:
        return delta_rule_chunks(
            qkv,
            beta,
            decay,
            (num_parts, beta_part, decay_part),
            decay_rate,
            decay_bias,
            state,
            rows,
            cu_seqlens_q,
            cu_seqlens_k,
            max_tokens,
        )
    num_key_heads = (qkv.shape[1] - num_heads * value_dim) // (2 * key_dim)
    out = torch.empty((len(qkv), num_heads, value_dim), dtype=qkv.dtype, device=qkv.device)
    if len(rows) == 0:
        return out
    value_tile = min(VALUE_TILE, triton.next_power_of_2(value_dim))
    _gated_delta_rule_kernel[(num_heads, len(rows), triton.cdiv(value_dim, value_tile))](
        out,
        qkv,
        beta,
        decay,
        decay_rate,
        decay_bias,
        state,
        rows,
        cu_seqlens_q,
        cu_seqlens_k,
        context_lens,
        beta.stride(0),
        beta_part,
        decay.stride(0),
        decay_part,
        NUM_PARTS=num_parts,
        NUM_KEY_HEADS=num_key_heads,
        NUM_HEADS=num_heads,
        KEY_DIM=key_dim,
        PADDED_KEY_DIM=triton.next_power_of_2(key_dim),
        VALUE_DIM=value_dim,
        VALUE_TILE=value_tile,
        IS_DECODE=context_lens is not None,
        num_warps=4,
        **overlap_options(qkv.device),
    )
    return out
