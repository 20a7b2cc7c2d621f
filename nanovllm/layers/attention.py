"""Attention over the paged KV cache."""

from torch import Tensor, nn

from nanovllm.kernels.select import check_attention_extras
from nanovllm.kernels.types import AttentionMetadata, HeadInputs, KVCache, KVCacheSpec, LateOutput
from nanovllm.layers.context import ModelContext


class Attention(nn.Module):
    """Rotation, KV write and attention.

    The runner sets `cache`, which is as `cache_spec` says, and `cache_group`, the number of the
    layer's cache group.

    Args:
        cache_spec: what the layer remembers of each token.
        cos_sin: of `cos_sin_table`.
        context: what the rank's layers are built with.
        scale: as in `Ops.attend`; None: head_dim^-0.5.
        softcap: as in `Ops.attend`.
        sinks: this rank's, as in `Ops.attend`.

    Raises:
        ArgumentError: the backend does not offer the window, soft cap or sinks.
    """

    cache: KVCache
    cache_group = 0

    def __init__(
        self,
        cache_spec: KVCacheSpec,
        cos_sin: Tensor,
        context: ModelContext,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ops, self.cache_spec, self.cos_sin = context.ops, cache_spec, cos_sin
        self.scale = cache_spec.head_dim**-0.5 if scale is None else scale
        self.window, self.cap, self.sinks = cache_spec.window, softcap, sinks
        check_attention_extras(self.ops, self.window, softcap, sinks)

    def forward(
        self,
        qkv: LateOutput,
        positions: Tensor,
        metadata: AttentionMetadata,
        q_norm_weight: Tensor | None = None,
        k_norm_weight: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) * D], positions [T] int32 -> [T, Hq * D], at `logits_indices`.

        With norm weights ([D] each), q and k are RMS-normalised per head before the rotation.
        """
        if self.cache_group:
            metadata = metadata.further_groups[self.cache_group - 1]
        norms = q_norm_weight, k_norm_weight, eps
        heads = HeadInputs(qkv, *norms, self.cos_sin, positions)
        window, cap, sinks = self.window, self.cap, self.sinks
        return self.ops.attention(
            heads, self.cache, metadata, self.scale, window=window, softcap=cap, sinks=sinks
        ).flatten(1)


def at_logits_indices(x: Tensor, metadata: AttentionMetadata) -> Tensor:
    """The rows of x [T, ...] that a layer computes on once it has stored K/V: mostly all."""
    indices = metadata.logits_indices
    return x if indices is None else x.index_select(0, indices)
