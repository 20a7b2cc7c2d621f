"""`Ops` for the CPU: what `torch_ops` defines, with less traffic and fewer operations.

The rounding of float16 and bfloat16 between operations is that of `torch_ops`.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

from nanovllm.kernels import cpu_attention, torch_ops
from nanovllm.kernels.cpu_packed import PackedProducts, in_chunks
from nanovllm.kernels.types import AttentionMetadata, KVCache, LinearOutput, summed

FEW_TOKENS = 8
ONEDNN_ELEMENTS = 2**20  # of a weight from which on oneDNN's product is worth its set-up
# These processors have no bfloat16 arithmetic, and torch then multiplies by slow loops.
CONVERTS_16_BITS = torch.backends.cpu.get_cpu_capability() == "AVX2"
HAS_ONEDNN = torch.backends.mkldnn.is_available()

Value = TypeVar("Value")


class OncePerStep(Generic[Value]):
    """A function that the layers of a step call with the same objects: computed for the first.

    The objects must not change while they are in use here; those of a step do not.
    """

    MAX_KEPT = 8  # different arguments within a step, such as windows

    def __init__(self, function: Callable[..., Value]) -> None:
        self._function = function
        self._results: dict[tuple[int, ...], tuple[tuple[object, ...], Value]] = {}

    def __call__(self, *args: object) -> Value:
        key = tuple(map(id, args))  # valid as long as the arguments are kept
        if key not in self._results:
            if len(self._results) >= self.MAX_KEPT:
                self._results.clear()
            self._results[key] = args, self._function(*args)
        return self._results[key][1]


# Products


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    num_tokens = len(x)
    if x.dtype == torch.float32:
        return _linear32(x, weight, bias)
    if num_tokens < FEW_TOKENS or not CONVERTS_16_BITS:
        return F.linear(x, weight, bias)
    return in_chunks(x, weight.__getitem__, x.new_empty(num_tokens, len(weight)), bias)


def _linear32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` in float32."""
    num_tokens = len(x)
    if 1 < num_tokens < FEW_TOKENS:  # MKL likes few columns better than few rows
        out = torch.mm(weight, x.t()).t().contiguous()
        return out if bias is None else out.add_(bias)
    if num_tokens >= FEW_TOKENS and weight.numel() >= ONEDNN_ELEMENTS and HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def vocab_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `Ops.vocab_linear`."""
    if out is None:
        return linear(x, weight)
    if len(x) == 1 or (x.dtype != torch.float32 and len(x) < FEW_TOKENS):
        return torch.mm(x, weight.t(), out=out)
    if x.dtype != torch.float32 and CONVERTS_16_BITS:
        return in_chunks(x, weight.__getitem__, out)
    return out.copy_(linear(x, weight))


# Norms and rotation


def rms_norm(x: LinearOutput, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Ops.rms_norm`."""
    x = summed(x)
    x32 = x.float()
    normed = x32 * x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if weight.dtype != x.dtype:
        return normed.mul_(weight).to(x.dtype)
    return normed.to(x.dtype).mul_(weight)


def add_rms_norm(
    x: LinearOutput, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Ops.add_rms_norm`."""
    total = summed(x) + residual
    return rms_norm(total, weight, eps), total


def _angles(
    cos_sin: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos [T, 1, D], each pair's twice, and sin [T, 1, D / 2] of the tokens, in `dtype`."""
    cos, sin = cos_sin.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), sin


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + D/2) of x [T, H, D]; cos and sin of `_angles`."""
    first, second = x.chunk(2, dim=-1)
    out = x * cos
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.sub_(second * sin)
    out_second.add_(first * sin)
    return out


def _stored(slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The slots that are written to, and the tokens whose slots they are; None: all."""
    is_stored = slot_mapping >= 0
    if bool(is_stored.all()):
        return slot_mapping, None
    return slot_mapping[is_stored], is_stored.nonzero().squeeze(1)


# Sampling


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_token_id: int,
    vocab_size: int,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Ops.sample`; plain greedy rows take two passes over the logits."""
    if thresholds is None and not temperatures.any() and first_token_id == 0 and len(logits):
        scored = logits[:, :vocab_size].float()
        columns = scored.argmax(dim=1, keepdim=True)  # the first of equals; a NaN is the largest
        scores = scored.gather(1, columns).squeeze(1)
        if not bool(scores.isnan().any()):
            return scores, columns.squeeze(1).int()
    return torch_ops.sample(
        logits, temperatures, seeds, positions, first_token_id, vocab_size, thresholds
    )


class CpuOps(torch_ops.TorchOps):
    """`Ops` on the CPU."""

    linear = staticmethod(linear)
    vocab_linear = staticmethod(vocab_linear)

    def __init__(self) -> None:
        super().__init__()
        self.rms_norm = rms_norm
        self.add_rms_norm = add_rms_norm
        self.sample = sample
        self.packed_linear = PackedProducts()
        self.qk_norm_rope_store = self._qk_norm_rope_store
        self._angles = OncePerStep(_angles)
        self._stored = OncePerStep(_stored)
        self._spans = OncePerStep(cpu_attention.spans_of)

    def _qk_norm_rope_store(
        self,
        qkv: LinearOutput,
        q_norm_weight: torch.Tensor | None,
        k_norm_weight: torch.Tensor | None,
        eps: float,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        qkv = summed(qkv)
        num_kv_heads, head_dim = cache.key.shape[2:]
        heads = qkv.unflatten(-1, (-1, head_dim))
        query_key, value = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
        if q_norm_weight is not None or k_norm_weight is not None:
            parts = query_key[:, :-num_kv_heads], query_key[:, -num_kv_heads:]
            weights = q_norm_weight, k_norm_weight
            normed = [
                part if weight is None else rms_norm(part, weight, eps)
                for part, weight in zip(parts, weights, strict=True)
            ]
            query_key = torch.cat(normed, dim=1)
        rotated = _rotate(query_key, *self._angles(cos_sin, positions, qkv.dtype))
        key = rotated[:, -num_kv_heads:]
        slots, stored = self._stored(slot_mapping)
        if stored is not None:
            key, value = key[stored], value[stored]
        torch_ops.store(key, value, cache, slots)
        return rotated[:, :-num_kv_heads]

    def attend(
        self,
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
        spans = self._spans(metadata, window, cache.key.shape[1])
        return cpu_attention.attend(
            query, cache, spans, scale, window=window, softcap=softcap, sinks=sinks
        )
