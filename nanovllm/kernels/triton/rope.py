"""Per-head RMS norm of q and k, rotary embedding and the K/V store in one Triton kernel.

The fused projection's row is Hq query, Hkv key and Hkv value heads of D elements. A program takes a
few neighbouring heads of one token, whatever their kind: q goes to the output, k and v to their
cache slot. Rounding follows `torch_ops` step by step. An fp8 cache takes k and v divided by the
head's scale, which lies in one program's registers as whole heads do.
"""

import torch
import triton.language as tl

from nanovllm.kernels import types
from nanovllm.kernels.triton.hopper_fused_linear import hopper_heads_linear, takes_heads
from nanovllm.kernels.triton.launch import (
    await_previous,
    cdiv,
    jit,
    next_power_of_2,
    overlap_options,
    release_next,
)
from nanovllm.kernels.triton.linear import linear, load_summed, parts_of
from nanovllm.kernels.types import KVCache, LinearOutput, Product

FP8_MAX = tl.constexpr(types.FP8_MAX)
FP8_MIN_AMAX = tl.constexpr(types.FP8_MIN_AMAX)
HEADS_PER_PROGRAM = 8
# From so many tokens on a program takes more of a token: fewer instructions per element.
MANY_TOKENS = 1024
ELEMENTS_WITH_MANY_TOKENS = 4096
NUM_WARPS = 4


@jit
def finite(x):
    """x, with 0 for NaN and infinities."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@jit
def sum_of_squares(x1, x2):
    """x1^2 + x2^2 summed over the columns, float32 [ROWS, 1].

    In float64, where the order of summands does not show: other kernels get the same.
    """
    x = (x1 * x1).to(tl.float64) + (x2 * x2).to(tl.float64)
    return tl.sum(x, axis=1, keep_dims=True).to(tl.float32)


# Per-token inputs may be slices of one packed buffer: no recompilation for their alignment.
@jit(do_not_specialize_on_alignment=["positions", "slot_mapping"])
def _qk_norm_rope_store_kernel(
    query,  # [T, Hq, D] out
    qkv,  # [T, (Hq + 2 Hkv) * D]
    q_norm_weight,  # [D] or None
    k_norm_weight,  # [D] or None
    cos_sin,  # [max_position, D] float32
    positions,  # [T] int32
    key_cache,  # [num_slots, Hkv, D]
    value_cache,
    key_scales,  # [num_blocks, Hkv, BLOCK_SIZE] float32 if the caches are fp8, else None
    value_scales,
    slot_mapping,  # [T] int64
    eps,
    stride_qkv,
    stride_part,
    stride_slot,
    NUM_PARTS: tl.constexpr,  # of qkv
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    EXACT: tl.constexpr,  # whether sums do not depend on their order
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, PADDED_HALF)[None, :]  # [1, D/2]: i pairs with i + D/2
    in_half = i < HALF
    if q_norm_weight is not None:
        q_weight1 = tl.load(q_norm_weight + i, mask=in_half, other=0.0)
        q_weight2 = tl.load(q_norm_weight + HALF + i, mask=in_half, other=0.0)
    if k_norm_weight is not None:
        k_weight1 = tl.load(k_norm_weight + i, mask=in_half, other=0.0)
        k_weight2 = tl.load(k_norm_weight + HALF + i, mask=in_half, other=0.0)
    # The positions have been complete since `_gather_kernel`, or a prefill's copy to the device.
    position = tl.load(positions + token, cache_modifier=".cg").to(tl.int64)
    angle = cos_sin + position * HEAD_DIM + i
    cos = tl.load(angle, mask=in_half, other=0.0)
    sin = tl.load(angle + HALF, mask=in_half, other=0.0)
    await_previous(OVERLAP)
    is_q = head < NUM_Q_HEADS
    is_k = (head >= NUM_Q_HEADS) & (head < NUM_Q_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_Q_HEADS + NUM_KV_HEADS) & (head < NUM_Q_HEADS + 2 * NUM_KV_HEADS)

    x_pointers = qkv + token * stride_qkv + head * HEAD_DIM + i
    in_row = (is_q | is_k | is_v) & in_half
    dtype: tl.constexpr = query.dtype.element_ty
    raw1 = load_summed(x_pointers, in_row, stride_part, NUM_PARTS, dtype)
    raw2 = load_summed(x_pointers + HALF, in_row, stride_part, NUM_PARTS, dtype)

    # Norm; a kind without a weight is left as it is.
    x1 = raw1.to(tl.float32)
    x2 = raw2.to(tl.float32)
    if EXACT:
        mean_square = sum_of_squares(x1, x2) / HEAD_DIM
    else:
        mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / HEAD_DIM
    inverse_rms = tl.rsqrt(mean_square + eps)
    normed1 = x1 * inverse_rms
    normed2 = x2 * inverse_rms
    if q_norm_weight is not None:
        if q_norm_weight.dtype.element_ty == dtype:
            normed1 = normed1.to(dtype).to(tl.float32)
            normed2 = normed2.to(dtype).to(tl.float32)
        x1 = tl.where(is_q, (normed1 * q_weight1.to(tl.float32)).to(dtype).to(tl.float32), x1)
        x2 = tl.where(is_q, (normed2 * q_weight2.to(tl.float32)).to(dtype).to(tl.float32), x2)
    if k_norm_weight is not None:
        if k_norm_weight.dtype.element_ty == dtype:  # as that of q, if both have one
            normed1 = normed1.to(dtype).to(tl.float32)
            normed2 = normed2.to(dtype).to(tl.float32)
        x1 = tl.where(is_k, (normed1 * k_weight1.to(tl.float32)).to(dtype).to(tl.float32), x1)
        x2 = tl.where(is_k, (normed2 * k_weight2.to(tl.float32)).to(dtype).to(tl.float32), x2)

    # Rotation, products rounded to the dtype before their sum.
    cos = cos.to(dtype).to(tl.float32)
    sin = sin.to(dtype).to(tl.float32)
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
        k_head = head - NUM_Q_HEADS
        v_head = k_head - NUM_KV_HEADS
        # Values are kept finite: attention may multiply those that it masks by 0.
        kv1 = tl.where(is_k, rotated1, finite(raw1))
        kv2 = tl.where(is_k, rotated2, finite(raw2))
        if key_scales is not None:
            kv1 = kv1.to(tl.float32)
            kv2 = kv2.to(tl.float32)
            amax = tl.max(tl.maximum(tl.abs(kv1), tl.abs(kv2)), axis=1, keep_dims=True)
            is_nonzero = amax > FP8_MIN_AMAX
            inverse = tl.where(is_nonzero, tl.div_rn(FP8_MAX, amax), 1.0)
            kv1 = (kv1 * inverse).to(key_cache.dtype.element_ty)
            kv2 = (kv2 * inverse).to(key_cache.dtype.element_ty)
            scale = tl.where(is_nonzero, amax * (1 / FP8_MAX), 1.0)  # [HEADS, 1]
            block_scales = slot // BLOCK_SIZE * NUM_KV_HEADS * BLOCK_SIZE + slot % BLOCK_SIZE
            tl.store(key_scales + block_scales + k_head * BLOCK_SIZE, scale, mask=is_k)
            tl.store(value_scales + block_scales + v_head * BLOCK_SIZE, scale, mask=is_v)
        k_pointers = key_cache + slot * stride_slot + k_head * HEAD_DIM + i
        tl.store(k_pointers, kv1, mask=is_k & in_half)
        tl.store(k_pointers + HALF, kv2, mask=is_k & in_half)
        v_pointers = value_cache + slot * stride_slot + v_head * HEAD_DIM + i
        tl.store(v_pointers, kv1, mask=is_v & in_half)
        tl.store(v_pointers + HALF, kv2, mask=is_v & in_half)


def qk_norm_rope_store(
    qkv: LinearOutput,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """qkv [T, (Hq + 2 Hkv) * D] -> query [T, Hq, D]; see `Ops.qk_norm_rope_store`."""
    qkv, num_parts, stride_part, dtype = parts_of(qkv)
    num_tokens = qkv.shape[0]
    key_cache, value_cache, key_scales, value_scales = cache
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim
    num_q_heads = num_heads - 2 * num_kv_heads
    query = torch.empty((num_tokens, num_q_heads, head_dim), dtype=dtype, device=qkv.device)
    if num_tokens == 0:
        return query
    assert qkv.stride(1) == 1 and cos_sin.is_contiguous()
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    padded_half = next_power_of_2(head_dim // 2)
    heads = HEADS_PER_PROGRAM
    if num_tokens >= MANY_TOKENS:
        heads = max(heads, ELEMENTS_WITH_MANY_TOKENS // (2 * padded_half))
    _qk_norm_rope_store_kernel[(num_tokens, cdiv(num_heads, heads))](
        query,
        qkv,
        q_norm_weight,
        k_norm_weight,
        cos_sin,
        positions,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        slot_mapping,
        eps,
        qkv.stride(0),
        stride_part,
        key_cache.stride(1),
        NUM_PARTS=num_parts,
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_HALF=padded_half,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        EXACT=num_tokens < MANY_TOKENS,
        num_warps=NUM_WARPS,
        **overlap_options(qkv.device),
    )
    return query


def heads_linear(
    qkv: Product,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """A product -> query [T, Hq, D]; see `Ops.heads_linear`. One kernel for many tokens."""
    rest = q_norm_weight, k_norm_weight, eps, cos_sin, positions, cache, slot_mapping
    if takes_heads(qkv, q_norm_weight, k_norm_weight, cache):
        return hopper_heads_linear(qkv, *rest)
    return qk_norm_rope_store(linear(*qkv), *rest)
