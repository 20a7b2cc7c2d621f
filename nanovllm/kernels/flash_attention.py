"""The attention operations of `Ops` on the flash-attn 2 package, imported only when asked for.

flash-attn reads the same paged caches (pages of a multiple of 256 tokens) in float16 and bfloat16,
not in fp8: `select_ops` never gives it scales.
"""

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [T, Hq, D] -> [T, Hq, D]; see `Ops.prefill_attention`."""
    assert key_scales is None and value_scales is None
    return flash_attn_varlen_func(
        query,
        key_cache,
        value_cache,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        block_table=block_tables,
    )


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    plan: None = None,
) -> torch.Tensor:
    """query [B, Hq, D] -> [B, Hq, D]; see `Ops.decode_attention`."""
    assert key_scales is None and value_scales is None
    return flash_attn_with_kvcache(
        query.unsqueeze(1),
        key_cache,
        value_cache,
        cache_seqlens=context_lens,
        block_table=block_tables,
        softmax_scale=scale,
        causal=True,
    ).squeeze(1)
