"""Attention on the flash-attn 2 package, imported only when asked for; the rest in Triton.

flash-attn reads the same paged caches (pages of a multiple of 256 tokens) in float16 and bfloat16,
not in fp8: `select_ops` never gives it scales. It has no sinks, and soft caps since version 2.6.
"""

from inspect import signature

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.ops import TritonKernels
from nanovllm.kernels.types import AttentionMetadata, KVCache, PrefillMetadata

# An extra of `Ops.attend` -> the parameter of flash-attn's functions that it needs, and a value.
PARAMETERS: dict[str, tuple[str, object]] = {
    "window": ("window_size", (0, 0)),
    "softcap": ("softcap", 1.0),
}


def _offered_extras() -> frozenset[str]:
    """What the installed version has parameters for, and was built with.

    Whether it was built with them shows only in a call: flash-attn can be compiled without.
    """
    return frozenset(extra for extra in PARAMETERS if _takes(*PARAMETERS[extra]))


def _takes(parameter: str, value: object) -> bool:
    functions = flash_attn_varlen_func, flash_attn_with_kvcache
    if any(parameter not in signature(function).parameters for function in functions):
        return False
    if not torch.cuda.is_available():  # a dry run
        return True
    x = torch.zeros(2, 1, 128, dtype=torch.bfloat16, device="cuda")  # a sequence of two tokens
    ends = torch.tensor([0, 2], dtype=torch.int32, device="cuda")
    try:
        flash_attn_varlen_func(x, x, x, ends, ends, 2, 2, causal=True, **{parameter: value})
    except RuntimeError:
        return False
    return True


def attend(
    query: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `Ops.attend`."""
    assert cache.key_scales is None and sinks is None
    extras: dict[str, object] = {}
    if window is not None:
        extras["window_size"] = (window - 1, 0)  # how many keys on each side of a query's own
    if softcap is not None:
        extras["softcap"] = softcap
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
            **extras,
        )
    return flash_attn_with_kvcache(
        query.unsqueeze(1),
        cache.key,
        cache.value,
        cache_seqlens=metadata.context_lens,
        block_table=metadata.block_tables,
        softmax_scale=scale,
        causal=True,
        **extras,
    ).squeeze(1)


class FlashAttentionOps(TritonKernels):
    """`Ops` with the attention of flash-attn."""

    reads_common_blocks_once = False
    attention_extras = _offered_extras()

    attend = staticmethod(attend)
    plan_decode = staticmethod(torch_ops.plan_decode)
