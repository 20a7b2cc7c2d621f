"""What soft caps and sinks make of attention scores, for all attention kernels.

Scores are kept as powers of two: a score times log2(e), so that exp2 gives its exponential.
"""

import math

import torch
import triton.language as tl

from nanovllm.kernels.triton.launch import jit

LOG2_E = math.log2(math.e)

LOG2_E_CONSTANT = tl.constexpr(LOG2_E)
# A score that no real one reaches, finite, so that no difference of two is NaN.
LARGEST = tl.constexpr(1e30)


def score_scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(scale_log2, tanh_scale) for a kernel; scale and softcap as in `Ops.attend`.

    A score of a product x of q and k is x * scale_log2, or with a tanh_scale
    tanh(x * tanh_scale) * scale_log2.
    """
    if softcap is None:
        return scale * LOG2_E, None
    return softcap * LOG2_E, scale / softcap


def check_sinks(sinks: torch.Tensor | None, num_heads: int) -> None:
    """The kernels read [Hq] numbers one after another."""
    assert sinks is None or (sinks.shape == (num_heads,) and sinks.is_contiguous())


@jit
def tanh(x):
    """Hyperbolic tangent of float32, to about four roundings."""
    # Near 0 the quotient's numerator would cancel: Taylor's series instead, to x^9.
    square = x * x
    series = 62 / 2835 * square - 17 / 315
    series = series * square + 2 / 15
    series = series * square - 1 / 3
    small = x + x * square * series
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E_CONSTANT))  # exp(-2 |x|), at most 1
    large = (1 - e) / (1 + e)
    return tl.where(square < 0.0625, small, tl.where(x < 0, -large, large))


@jit
def load_sinks(sinks, head, mask):
    """Scores of the heads' sinks as powers of two, within LARGEST; 0 where not `mask`."""
    sink = tl.load(sinks + head, mask=mask, other=0.0).to(tl.float32) * LOG2_E_CONSTANT
    return tl.minimum(tl.maximum(sink, -LARGEST), LARGEST)
