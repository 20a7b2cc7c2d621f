"""Attention on the flash-attn 2 package, imported only when asked for; the rest in Triton.

flash-attn reads the same paged caches (pages of a multiple of 256 tokens) in float16 and bfloat16,
not in fp8: `select_ops` never gives it scales.
"""

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.ops import TritonKernels
from nanovllm.kernels.types import AttentionMetadata, KVCache, PrefillMetadata


def attend(
    query: torch.Tensor, cache: KVCache, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """See `Ops.attend`."""
    assert cache.key_scales is None
    if isinstance(metadata, PrefillMetadata):
        return flash_attn_varlen_func(
            query,
            cache.key,
            cache.value,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            block_table=metadata.block_tables,
        )
    return flash_attn_with_kvcache(
        query.unsqueeze(1),
        cache.key,
        cache.value,
        cache_seqlens=metadata.context_lens,
        block_table=metadata.block_tables,
        softmax_scale=scale,
        causal=True,
    ).squeeze(1)


class FlashAttentionOps(TritonKernels):
    """`Ops` with the attention of flash-attn."""

    reads_common_blocks_once = False

    attend = staticmethod(attend)
    plan_decode = staticmethod(torch_ops.plan_decode)
