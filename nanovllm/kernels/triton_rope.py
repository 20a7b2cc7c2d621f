"""Per-head RMS norm of q and k, rotary embedding and the K/V store in one Triton kernel.

The fused projection's row is Hq query, Hkv key and Hkv value heads of D elements. A program takes a
few neighbouring heads of one token, whatever their kind: q goes to the output, k and v to their
cache slot. Rounding follows `torch_ops` step by step.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton_launch import await_previous, overlap_options

HEADS_PER_PROGRAM = 8
NUM_WARPS = 4


# Per-token inputs may be slices of one packed buffer: no recompilation for their alignment.
@triton.jit(do_not_specialize_on_alignment=["positions", "slot_mapping"])
def _qk_norm_rope_store_kernel(
    query,  # [T, Hq, D] out
    qkv,  # [T, (Hq + 2 Hkv) * D]
    q_norm_weight,  # [D] or None
    k_norm_weight,  # [D] or None
    cos_sin,  # [max_position, D] float32
    positions,  # [T] int32
    key_cache,  # [num_slots, Hkv, D]
    value_cache,
    slot_mapping,  # [T] int64
    eps,
    stride_qkv,
    stride_slot,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, PADDED_HALF)[None, :]  # [1, D/2]: i pairs with i + D/2
    in_half = i < HALF
    is_q = head < NUM_Q_HEADS
    is_k = (head >= NUM_Q_HEADS) & (head < NUM_Q_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_Q_HEADS + NUM_KV_HEADS) & (head < NUM_Q_HEADS + 2 * NUM_KV_HEADS)

    x_pointers = qkv + token * stride_qkv + head * HEAD_DIM + i
    in_row = (is_q | is_k | is_v) & in_half
    raw1 = tl.load(x_pointers, mask=in_row, other=0.0)
    raw2 = tl.load(x_pointers + HALF, mask=in_row, other=0.0)
    dtype = raw1.dtype

    # Norm; a kind without a weight is left as it is.
    x1 = raw1.to(tl.float32)
    x2 = raw2.to(tl.float32)
    mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / HEAD_DIM
    inverse_rms = tl.rsqrt(mean_square + eps)
    normed1 = (x1 * inverse_rms).to(dtype).to(tl.float32)
    normed2 = (x2 * inverse_rms).to(dtype).to(tl.float32)
    if q_norm_weight is not None:
        w1 = tl.load(q_norm_weight + i, mask=in_half, other=0.0).to(tl.float32)
        w2 = tl.load(q_norm_weight + HALF + i, mask=in_half, other=0.0).to(tl.float32)
        x1 = tl.where(is_q, (normed1 * w1).to(dtype).to(tl.float32), x1)
        x2 = tl.where(is_q, (normed2 * w2).to(dtype).to(tl.float32), x2)
    if k_norm_weight is not None:
        w1 = tl.load(k_norm_weight + i, mask=in_half, other=0.0).to(tl.float32)
        w2 = tl.load(k_norm_weight + HALF + i, mask=in_half, other=0.0).to(tl.float32)
        x1 = tl.where(is_k, (normed1 * w1).to(dtype).to(tl.float32), x1)
        x2 = tl.where(is_k, (normed2 * w2).to(dtype).to(tl.float32), x2)

    # Rotation, products rounded to the dtype before their sum.
    angle = cos_sin + tl.load(positions + token).to(tl.int64) * HEAD_DIM + i
    cos = tl.load(angle, mask=in_half, other=0.0).to(dtype).to(tl.float32)
    sin = tl.load(angle + HALF, mask=in_half, other=0.0).to(dtype).to(tl.float32)
    x1_cos = (x1 * cos).to(dtype).to(tl.float32)
    x2_cos = (x2 * cos).to(dtype).to(tl.float32)
    x1_sin = (x1 * sin).to(dtype).to(tl.float32)
    x2_sin = (x2 * sin).to(dtype).to(tl.float32)
    rotated1 = (x1_cos - x2_sin).to(dtype)
    rotated2 = (x2_cos + x1_sin).to(dtype)

    q_pointers = query + (token * NUM_Q_HEADS + head) * HEAD_DIM + i
    tl.store(q_pointers, rotated1, mask=is_q & in_half)
    tl.store(q_pointers + HALF, rotated2, mask=is_q & in_half)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        k_pointers = key_cache + slot * stride_slot + (head - NUM_Q_HEADS) * HEAD_DIM + i
        tl.store(k_pointers, rotated1, mask=is_k & in_half)
        tl.store(k_pointers + HALF, rotated2, mask=is_k & in_half)
        v_head = head - NUM_Q_HEADS - NUM_KV_HEADS
        v_pointers = value_cache + slot * stride_slot + v_head * HEAD_DIM + i
        tl.store(v_pointers, raw1, mask=is_v & in_half)
        tl.store(v_pointers + HALF, raw2, mask=is_v & in_half)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """qkv [T, (Hq + 2 Hkv) * D] -> query [T, Hq, D]; see `Ops.qk_norm_rope_store`."""
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = key_cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim
    num_q_heads = num_heads - 2 * num_kv_heads
    query = torch.empty((num_tokens, num_q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return query
    assert qkv.stride(1) == 1 and cos_sin.is_contiguous()
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    _qk_norm_rope_store_kernel[(num_tokens, triton.cdiv(num_heads, HEADS_PER_PROGRAM))](
        query,
        qkv,
        q_norm_weight,
        k_norm_weight,
        cos_sin,
        positions,
        key_cache,
        value_cache,
        slot_mapping,
        eps,
        qkv.stride(0),
        key_cache.stride(1),
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        HEADS=HEADS_PER_PROGRAM,
        num_warps=NUM_WARPS,
        **overlap_options(qkv.device),
    )
    return query
