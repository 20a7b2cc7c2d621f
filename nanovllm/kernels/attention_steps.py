"""A layer's attention as its steps, one operation after another."""

from torch import Tensor

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import AttentionMetadata, HeadInputs, KVCache


class AttentionInSteps:
    """`Ops.attention` of a backend that has the other operations."""

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
        query = self.qk_norm_rope_store(*heads, cache, metadata.slot_mapping)
        if metadata.copies is not None:
            self.copy_units(cache, metadata.copies)
        if metadata.logits_indices is not None:
            query = query.index_select(0, metadata.logits_indices)
        return self.attend(
            query, cache, metadata, scale, window=window, softcap=softcap, sinks=sinks
        )
