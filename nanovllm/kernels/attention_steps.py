"""A layer's attention as its steps, one operation after another."""

from torch import Tensor

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import AttentionMetadata, HeadInputs, KVCache, Product


class AttentionInSteps:
    """`Ops.attention` and `Ops.heads_linear` of a backend that has the other operations."""

    def heads_linear(
        self: Ops,
        qkv: Product,
        q_norm_weight: Tensor | None,
        k_norm_weight: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        cache: KVCache,
        slot_mapping: Tensor,
    ) -> Tensor:
        """See `Ops.heads_linear`."""
        rest = q_norm_weight, k_norm_weight, eps, cos_sin, positions, cache, slot_mapping
        return self.qk_norm_rope_store(self.linear(*qkv), *rest)

    def attention(
        self: Ops,
        heads: HeadInputs,
        cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.attention`."""
        qkv, rest = heads.qkv, (*heads[1:], cache, metadata.slot_mapping)
        if isinstance(qkv, Product):
            query = self.heads_linear(qkv, *rest)
        else:
            query = self.qk_norm_rope_store(qkv, *rest)
        if metadata.copies is not None:
            self.copy_units(cache, metadata.copies)
        if metadata.logits_indices is not None:
            query = query.index_select(0, metadata.logits_indices)
        return self.attend(
            query, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
        )
