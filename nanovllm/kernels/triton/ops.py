"""The Triton kernels as `Ops`."""

import torch

from nanovllm.kernels.attention_steps import AttentionInSteps
from nanovllm.kernels.torch_ops import vocab_linear
from nanovllm.kernels.triton import hopper_fused_decode
from nanovllm.kernels.triton.activation import gated_linear, gelu_and_mul, silu_and_mul
from nanovllm.kernels.triton.copy_units import copy_units
from nanovllm.kernels.triton.decode_attention import decode_attention, plan_decode
from nanovllm.kernels.triton.filters import filter_thresholds
from nanovllm.kernels.triton.fp8_linear import fp8_linear
from nanovllm.kernels.triton.fused_decode import fused_decode, fuses
from nanovllm.kernels.triton.gated_delta_net import (
    causal_conv1d,
    gated_delta_rule,
    gated_rms_norm,
    sigmoid_gate,
)
from nanovllm.kernels.triton.linear import linear
from nanovllm.kernels.triton.lora import add_adapters, plan_adapters
from nanovllm.kernels.triton.moe import experts
from nanovllm.kernels.triton.norm import add_rms_norm, rms_norm
from nanovllm.kernels.triton.packed_linear import packed_linear
from nanovllm.kernels.triton.prefill_attention import prefill_attention
from nanovllm.kernels.triton.rope import heads_linear, qk_norm_rope_store
from nanovllm.kernels.triton.row_state import gather_decode_inputs, write_back
from nanovllm.kernels.triton.sampling import sample
from nanovllm.kernels.types import (
    ATTENTION_EXTRAS,
    AttentionMetadata,
    DecodeMetadata,
    HeadInputs,
    KVCache,
    PrefillMetadata,
    Product,
)


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
    if isinstance(metadata, PrefillMetadata):
        return prefill_attention(
            query, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
        )
    return decode_attention(
        query, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
    )


class TritonKernels(AttentionInSteps):
    """All of `Ops` but attention."""

    supports_cuda_graphs = True

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    silu_and_mul = staticmethod(silu_and_mul)
    gelu_and_mul = staticmethod(gelu_and_mul)
    linear = staticmethod(linear)
    gated_linear = staticmethod(gated_linear)
    heads_linear = staticmethod(heads_linear)
    vocab_linear = staticmethod(vocab_linear)
    fp8_linear = staticmethod(fp8_linear)
    packed_linear = staticmethod(packed_linear)
    plan_adapters = staticmethod(plan_adapters)
    add_adapters = staticmethod(add_adapters)
    experts = staticmethod(experts)
    qk_norm_rope_store = staticmethod(qk_norm_rope_store)
    copy_units = staticmethod(copy_units)
    sigmoid_gate = staticmethod(sigmoid_gate)
    causal_conv1d = staticmethod(causal_conv1d)
    gated_delta_rule = staticmethod(gated_delta_rule)
    gated_rms_norm = staticmethod(gated_rms_norm)
    sample = staticmethod(sample)
    filter_thresholds = staticmethod(filter_thresholds)
    gather_decode_inputs = staticmethod(gather_decode_inputs)
    write_back = staticmethod(write_back)

    def __init__(self, has_fp8_products: bool) -> None:
        self.has_fp8_products = has_fp8_products


class TritonOps(TritonKernels):
    """`Ops` in Triton, on NVIDIA GPUs and in Triton's interpreter."""

    reads_common_blocks_once = True
    attention_extras = ATTENTION_EXTRAS

    attend = staticmethod(attend)
    plan_decode = staticmethod(plan_decode)

    def attention(
        self,
        heads: HeadInputs,
        cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Ops.attention`."""
        if isinstance(metadata, DecodeMetadata) and metadata.logits_indices is None:
            if isinstance(heads.qkv, Product):
                heads = heads._replace(qkv=linear(*heads.qkv))
            is_plain = softcap is None and sinks is None
            if is_plain and hopper_fused_decode.takes(heads, cache, metadata, window):
                return hopper_fused_decode.hopper_fused_decode(heads, cache, metadata, scale)
            if fuses(heads, cache, metadata, window):
                return fused_decode(
                    heads, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
                )
        return super().attention(
            heads, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
        )
