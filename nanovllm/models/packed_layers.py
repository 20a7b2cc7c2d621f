"""Decoder layers with packed weights that leave what follows attention to one operation.

`Ops.layer_end` takes a few tokens from the heads of a layer to the queries, keys and values of the
next. So O's product is left to the norm behind it, which has the residual as well, and the modules
behind that pass the finished layer on. Where the operation does not take the tokens, the modules do
as without all this.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanovllm.kernels.types import FinishedLayer, LayerEnd, LinearOutput, PackedWeight, Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.norm import RMSNorm
from nanovllm.models.decoder import Decoder, DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.qwen3 import Qwen3Attention

MAX_TOKENS = 8  # for which O's product is left to the norm
ATTENTION = SelfAttention, Qwen3Attention  # whose input goes to `qkv_proj` and nowhere else


def finish_layers_at_once(decoder: Decoder, context: ModelContext) -> None:
    """Let the decoder's layers use `Ops.layer_end`, if all are plain ones with packed weights.

    Modules keep their names and parameters: only their classes change.
    """
    layers: list[Any] = [layer for layer in decoder.layers if _fits(layer, context)]
    if len(layers) < len(decoder.layers) or context.tp.size > 1:
        return
    counters = torch.zeros(4, dtype=torch.int32, device=context.device)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        norm: Any = decoder.norm
        projection: Any = None
        if following is not None:
            norm, projection = following.input_layernorm, following.self_attn.qkv_proj
            projection.__class__ = _FollowingProjection
        norm.__class__ = _FollowingNorm
        layer.mlp.__class__ = _LateMLP
        layer.self_attn.o_proj.__class__ = _LateProjection
        layer.post_attention_layernorm.__class__ = _FinishingNorm
        layer.post_attention_layernorm.end = _End(
            layer.self_attn.o_proj, layer.mlp, norm.weight, projection, counters
        )


def _fits(layer: nn.Module, context: ModelContext) -> bool:
    """Whether it is a layer whose parts `LayerEnd` describes."""
    if type(layer) is not DecoderLayer or type(layer.mlp) is not GatedMLP:
        return False
    norm = layer.post_attention_layernorm
    return (
        type(layer.self_attn) in ATTENTION
        and layer.mlp.activate == context.ops.silu_and_mul
        and norm.weight.dtype == context.dtype
        and isinstance(layer.mlp.down_proj.weight, PackedWeight)
    )


@dataclass(frozen=True)
class _Heads(Unreduced):
    """O's input in place of its output, as `term`."""


@dataclass(frozen=True)
class _End:
    """What follows a layer's attention; `projection` is None behind the last layer."""

    o_proj: RowParallelLinear
    mlp: GatedMLP
    next_norm: Tensor
    projection: ColumnParallelLinear | None
    counters: Tensor

    def finish(self, norm: RMSNorm, heads: Tensor, residual: Tensor) -> FinishedLayer | None:
        """heads [T, K] and, in place, residual [T, H] through the rest of the layer."""
        o, gate_up, down = (
            _packed(linear) for linear in (self.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj)
        )
        if o is None or gate_up is None or down is None:
            return None
        qkv = None if self.projection is None else _packed(self.projection)
        next_norm = None if qkv is None else self.next_norm
        end = LayerEnd(o, norm.weight, gate_up, down, next_norm, qkv, norm.eps, self.counters)
        return norm.ops.layer_end(heads, residual, end)


def _packed(linear: ColumnParallelLinear | RowParallelLinear) -> PackedWeight | None:
    """Its weight, if it multiplies by a packed one and does nothing else."""
    is_sum = linear.bias is not None or linear.has_adapters
    return linear.weight if isinstance(linear.weight, PackedWeight) and not is_sum else None


class _LateProjection(RowParallelLinear):
    """O."""

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, heads] -> [T, H], left to the norm if there are few tokens."""
        is_late = len(x) <= MAX_TOKENS and _packed(self) is not None
        return _Heads(x) if is_late else super().forward(x)


class _FinishingNorm(RMSNorm):
    """The norm ahead of the MLP."""

    end: _End

    def add(self, x: Tensor | Unreduced, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As `RMSNorm.add`; what is to be normed may be a finished layer in place of a tensor."""
        if not isinstance(x, _Heads):
            return super().add(x, residual)
        heads = x.term
        assert isinstance(heads, Tensor)
        finished = self.end.finish(self, heads, residual)
        if finished is not None:
            return cast(Tensor, finished), residual
        return super().add(Unreduced(self.end.o_proj.multiply(heads, None)), residual)


class _LateMLP(GatedMLP):
    """The MLP, which passes a finished layer on."""

    def forward(self, x: Tensor) -> Unreduced:
        """x [T, H], or a finished layer -> [T, H], or the same."""
        return cast(Unreduced, x) if isinstance(x, FinishedLayer) else super().forward(x)


class _FollowingNorm(RMSNorm):
    """The norm behind the MLP, ahead of the next layer or of the LM head."""

    def add(self, x: Tensor | Unreduced, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As `RMSNorm.add`; a finished layer whose successor's products are there is passed on."""
        if not isinstance(x, FinishedLayer):
            return super().add(x, residual)
        return (self(residual) if x.qkv is None else cast(Tensor, x)), residual


class _FollowingProjection(ColumnParallelLinear):
    """The queries, keys and values of all layers but the first."""

    def forward(self, x: Tensor) -> LinearOutput:
        """x [T, H] -> [T, N], or what a finished layer has of it."""
        if isinstance(x, FinishedLayer):
            assert x.qkv is not None
            return x.qkv
        return super().forward(x)
