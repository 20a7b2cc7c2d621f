"""Which layers leave the products O and down to the norm behind them, where the backend takes them.

The norm is then left to what reads it, see `Normed`. That has to be attention and an MLP that pass
their input to `linear_later` alone.
"""

from typing import cast

from torch import nn

from nanovllm.layers.linear import RowParallelLinear
from nanovllm.models.decoder import Decoder, DecoderLayer, GatedMLP, SelfAttention
from nanovllm.models.qwen3 import Qwen3Attention

READERS = {SelfAttention.forward, Qwen3Attention.forward, GatedMLP.forward}


def leave_products(decoder: Decoder) -> None:
    """Let the layers do so whose next norm allows it: not the last one, which the LM head reads."""
    layers = list(decoder.layers)
    for layer, next_layer in zip(layers, [*layers[1:], None], strict=True):
        if type(layer) is not DecoderLayer or not _reads_late(layer.mlp):
            continue
        if isinstance(layer.self_attn, SelfAttention):
            _leave(layer.self_attn.o_proj)
        if type(next_layer) is DecoderLayer and _reads_late(next_layer.self_attn):
            _leave(cast(GatedMLP, layer.mlp).down_proj)


def _reads_late(module: nn.Module) -> bool:
    return type(module).forward in READERS


def _leave(linear: RowParallelLinear) -> None:
    linear.leaves_product = getattr(linear.ops, "leaves_product", None)
