"""The gated delta rule for long sequences, in chunks of tokens: products on tensor cores.

Within a chunk the tokens' changes of the state solve a triangular system, see
`torch_delta_rule.delta_rule_chunk`. The first kernel inverts the systems of all chunks at once. The
second goes through each sequence's chunks in turn, with a tile of the state in registers.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.launch import await_previous, jit, overlap_options, release_next
from nanovllm.kernels.triton.linear import load_summed

L2_EPS = tl.constexpr(1e-6)
CHUNK = 32  # tokens: with 64 the products take more shared memory than most GPUs have
VALUE_TILE = 32  # columns of a head's state that a program keeps in registers


@jit
def _unit_rows(x):
    """x [M, N] float32, each row divided by its length."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) + L2_EPS)


@jit(do_not_specialize_on_alignment=["cu_seqlens_q"])
def _invert_kernel(
    inverses,  # [T, Hv, CHUNK] float32 out: rows of (I + A)^-1
    scores,  # [T, Hv, CHUNK] float32 out: q k, decayed
    decays,  # [T, Hv] float32 out: the log of the decays' product since the chunk began
    strengths,  # [T, Hv] float32 out
    qkv,  # [T, 2 Hk Dk + Hv Dv]
    beta,  # [T, Hv]
    decay,  # [T, Hv]
    decay_rate,  # [Hv] float32
    decay_bias,
    cu_seqlens_q,
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
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program takes one chunk of one head."""
    release_next(OVERLAP)
    head = tl.program_id(0)
    seq = tl.program_id(1)
    rate = tl.exp(tl.load(decay_rate + head))
    bias = tl.load(decay_bias + head)
    await_previous(OVERLAP)
    first = tl.load(cu_seqlens_q + seq) + tl.program_id(2) * CHUNK
    end = tl.load(cu_seqlens_q + seq + 1)
    if first >= end:
        return
    t = tl.arange(0, CHUNK)
    token = (first + t).to(tl.int64)
    live = first + t < end
    dtype: tl.constexpr = qkv.dtype.element_ty
    b = load_summed(beta + token * stride_beta + head, live, beta_part, NUM_PARTS, dtype)
    strength = (1 / (1 + tl.exp(-b.to(tl.float32)))).to(dtype).to(tl.float32)
    a = load_summed(decay + token * stride_decay + head, live, decay_part, NUM_PARTS, dtype)
    a = a.to(tl.float32) + bias
    softplus = tl.where(a > 20.0, a, tl.log(1 + tl.exp(tl.minimum(a, 20.0))))
    log_decay = tl.cumsum(tl.where(live, -rate * softplus, 0.0), axis=0)
    tl.store(decays + token * NUM_HEADS + head, log_decay, mask=live)
    tl.store(strengths + token * NUM_HEADS + head, strength, mask=live)

    i = tl.arange(0, PADDED_KEY_DIM)
    KEY_SIZE: tl.constexpr = NUM_KEY_HEADS * KEY_DIM
    WIDTH: tl.constexpr = 2 * KEY_SIZE + NUM_HEADS * VALUE_DIM
    key_head = head // (NUM_HEADS // NUM_KEY_HEADS)
    pointers = qkv + token[:, None] * WIDTH + key_head * KEY_DIM + i[None, :]
    mask = live[:, None] & (i < KEY_DIM)[None, :]
    q = _unit_rows(tl.load(pointers, mask=mask, other=0.0).to(tl.float32)) * (KEY_DIM**-0.5)
    k = _unit_rows(tl.load(pointers + KEY_SIZE, mask=mask, other=0.0).to(tl.float32))
    ratio = tl.exp(tl.minimum(log_decay[:, None] - log_decay[None, :], 0.0))  # [t, j], j <= t
    keys = tl.trans(k)
    score = tl.dot(q, keys, input_precision=PRECISION) * ratio
    system = tl.dot(k, keys, input_precision=PRECISION) * ratio * strength[:, None]
    score = tl.where(t[:, None] >= t[None, :], score, 0.0)
    system = tl.where(t[:, None] > t[None, :], system, 0.0)
    # Row n of the inverse is that of the identity less the rows above it, times those of A's row.
    inverse = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    for n in range(1, CHUNK):
        row = tl.sum(tl.where(t[:, None] == n, system, 0.0), axis=0)
        change = tl.sum(row[:, None] * inverse, axis=0)
        inverse -= tl.where(t[:, None] == n, change[None, :], 0.0)
    places = (token[:, None] * NUM_HEADS + head) * CHUNK + t[None, :]
    in_chunk = live[:, None] & (t[None, :] < CHUNK)
    tl.store(scores + places, score, mask=in_chunk)
    tl.store(inverses + places, inverse, mask=in_chunk)


@jit(do_not_specialize_on_alignment=["rows", "cu_seqlens_q", "cu_seqlens_k"])
def _chunks_kernel(
    out,  # [T, Hv, Dv]
    qkv,  # [T, 2 Hk Dk + Hv Dv]
    inverses,  # as `_invert_kernel` leaves them
    scores,
    decays,
    strengths,
    state,  # [rows, Hv, Dk, Dv] float32
    rows,
    cu_seqlens_q,
    cu_seqlens_k,
    NUM_KEY_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program goes through a sequence's chunks with a tile of one head's state in registers."""
    release_next(OVERLAP)
    head = tl.program_id(0)
    seq = tl.program_id(1)
    t = tl.arange(0, CHUNK)
    i = tl.arange(0, PADDED_KEY_DIM)
    j = tl.program_id(2) * VALUE_TILE + tl.arange(0, VALUE_TILE)
    in_key = i < KEY_DIM
    in_value = j < VALUE_DIM
    KEY_SIZE: tl.constexpr = NUM_KEY_HEADS * KEY_DIM
    WIDTH: tl.constexpr = 2 * KEY_SIZE + NUM_HEADS * VALUE_DIM
    key_head = head // (NUM_HEADS // NUM_KEY_HEADS)
    await_previous(OVERLAP)
    begin = tl.load(cu_seqlens_q + seq)
    end = tl.load(cu_seqlens_q + seq + 1)
    length = tl.load(cu_seqlens_k + seq + 1) - tl.load(cu_seqlens_k + seq)
    row = tl.load(rows + seq).to(tl.int64)
    memory = state + ((row * NUM_HEADS + head) * KEY_DIM + i[:, None]) * VALUE_DIM + j[None, :]
    num_read = tl.where(length > end - begin, KEY_DIM, 0)  # none of a sequence that begins
    s = tl.load(memory, mask=(i < num_read)[:, None] & in_value[None, :], other=0.0)
    for number in range(tl.cdiv(end - begin, CHUNK)):
        first = begin + number * CHUNK
        token = (first + t).to(tl.int64)
        live = first + t < end
        heads = qkv + token[:, None] * WIDTH
        in_keys = live[:, None] & in_key[None, :]
        q = tl.load(heads + key_head * KEY_DIM + i[None, :], mask=in_keys, other=0.0)
        k = tl.load(heads + KEY_SIZE + key_head * KEY_DIM + i[None, :], mask=in_keys, other=0.0)
        in_values = live[:, None] & in_value[None, :]
        v_pointers = heads + 2 * KEY_SIZE + head * VALUE_DIM + j[None, :]
        v = tl.load(v_pointers, mask=in_values, other=0.0).to(tl.float32)
        q = _unit_rows(q.to(tl.float32)) * (KEY_DIM**-0.5)
        k = _unit_rows(k.to(tl.float32))
        of_head = token * NUM_HEADS + head
        log_decay = tl.load(decays + of_head, mask=live, other=0.0)
        strength = tl.load(strengths + of_head, mask=live, other=0.0)
        places = of_head[:, None] * CHUNK + t[None, :]
        in_chunk = live[:, None] & (t[None, :] < CHUNK)
        inverse = tl.load(inverses + places, mask=in_chunk, other=0.0)
        score = tl.load(scores + places, mask=in_chunk, other=0.0)
        last = (tl.minimum(first + CHUNK, end) - 1).to(tl.int64)
        last_decay = tl.load(decays + last * NUM_HEADS + head)
        passed = tl.exp(log_decay)[:, None]
        wanted = strength[:, None] * (v - passed * tl.dot(k, s, input_precision=PRECISION))
        delta = tl.dot(inverse, wanted, input_precision=PRECISION)
        y = passed * tl.dot(q, s, input_precision=PRECISION)
        y += tl.dot(score, delta, input_precision=PRECISION)
        tl.store(
            out + of_head[:, None] * VALUE_DIM + j[None, :],
            y.to(out.dtype.element_ty),
            mask=in_values,
        )
        remaining = k * tl.exp(tl.minimum(last_decay - log_decay, 0.0))[:, None]
        s = s * tl.exp(last_decay)
        s += tl.dot(tl.trans(remaining), delta, input_precision=PRECISION)
    tl.store(memory, s, mask=in_key[:, None] & in_value[None, :])


def delta_rule_chunks(
    qkv: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor,
    parts: tuple[int, int, int],
    decay_rate: torch.Tensor,
    decay_bias: torch.Tensor,
    state: torch.Tensor,
    rows: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
) -> torch.Tensor:
    """`Ops.gated_delta_rule` of a prefill.

    Args:
        qkv: as there.
        beta: the first part of it.
        decay: the same.
        parts: how many there are, and elements from one to the next in beta and in decay.
        decay_rate: as there, like what follows.
        decay_bias: the same.
        state: the same.
        rows: of the metadata, like what follows.
        cu_seqlens_q: the same.
        cu_seqlens_k: the same.
        max_seqlen_q: the same.

    Returns:
        [T, Hv, Dv].
    """
    num_parts, beta_part, decay_part = parts
    num_tokens, (_, num_heads, key_dim, value_dim) = len(qkv), state.shape
    num_key_heads = (qkv.shape[1] - num_heads * value_dim) // (2 * key_dim)
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=qkv.dtype, device=qkv.device)
    inverses, scores = (
        torch.empty((num_tokens, num_heads, CHUNK), dtype=torch.float32, device=qkv.device)
        for _ in range(2)
    )
    decays, strengths = (
        torch.empty((num_tokens, num_heads), dtype=torch.float32, device=qkv.device)
        for _ in range(2)
    )
    sizes = {
        "NUM_KEY_HEADS": num_key_heads,
        "NUM_HEADS": num_heads,
        "KEY_DIM": key_dim,
        "PADDED_KEY_DIM": max(16, triton.next_power_of_2(key_dim)),
        "VALUE_DIM": value_dim,
        "CHUNK": CHUNK,
        "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 1 if qkv.dtype == torch.float32 else 2,
        **overlap_options(qkv.device),
    }
    _invert_kernel[(num_heads, len(rows), triton.cdiv(max_seqlen_q, CHUNK))](
        inverses,
        scores,
        decays,
        strengths,
        qkv,
        beta,
        decay,
        decay_rate,
        decay_bias,
        cu_seqlens_q,
        beta.stride(0),
        beta_part,
        decay.stride(0),
        decay_part,
        NUM_PARTS=num_parts,
        **sizes,
    )
    _chunks_kernel[(num_heads, len(rows), triton.cdiv(value_dim, VALUE_TILE))](
        out,
        qkv,
        inverses,
        scores,
        decays,
        strengths,
        state,
        rows,
        cu_seqlens_q,
        cu_seqlens_k,
        VALUE_TILE=VALUE_TILE,
        **sizes,
    )
    return out
