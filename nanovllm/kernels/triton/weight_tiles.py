"""Tiles of a weight that bulk tensor copies bring, for Hopper, and SiLU in the product with one.

For SiLU a tile has runs of gate's rows and of up's in turns, so that one thread gets both of a row.
"""

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE_BYTES = 128  # of a row of a tile: by so many shared memory is swizzled
COLUMNS = TILE_BYTES // 2  # of a tile in half precision
RUN = 8  # rows of gate, and behind them those of up


@cache
def tile_layout(rank: int, bits: int = 16) -> Any:
    """Of a tile of TILE_BYTES a row in shared memory, as matrix instructions read it."""
    return gl.NVMMASharedLayout(TILE_BYTES, bits, rank)


def weight_tiles(weight: torch.Tensor, rows: int, is_gated: bool, num_experts: int = 1) -> Any:
    """A tensor descriptor of tiles [rows, COLUMNS] of a weight [N, K], or of experts' [E * N, K].

    With is_gated a tile has RUN rows of the first half of an expert's N, RUN of its second, and on.
    Of an fp8 weight, without is_gated, a tile has TILE_BYTES columns.
    """
    n, k = weight.shape
    if not is_gated:
        size = weight.element_size()
        block = [rows, TILE_BYTES // size]
        return TensorDescriptor(weight, [n, k], [k, 1], block, tile_layout(2, 8 * size))
    runs_of_half = n // num_experts // 2 // RUN
    num_runs = (2 * num_experts - 1) * runs_of_half  # at which a tile may begin
    strides = [RUN * k, runs_of_half * RUN * k, k, 1]
    block = [rows // RUN // 2, 2, RUN, COLUMNS]
    return TensorDescriptor(weight, [num_runs, 2, RUN, k], strides, block, tile_layout(4))


@gluon.jit
def silu_of_runs(product, RUN: gl.constexpr, dtype: gl.constexpr):
    """silu(gate) * up, float32 [rows / 2, T], of the product [rows, T] with such a tile.

    Rounded as `silu_and_mul` does behind a product in `dtype`.
    """
    HALF: gl.constexpr = product.shape[0] // 2
    BLOCK_T: gl.constexpr = product.shape[1]
    runs = product.reshape([HALF // RUN, 2, RUN, BLOCK_T])
    gate, up = gl.split(runs.permute(0, 2, 3, 1))
    gate = gate.reshape([HALF, BLOCK_T]).to(dtype).to(gl.float32)
    up = up.reshape([HALF, BLOCK_T]).to(dtype).to(gl.float32)
    return (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32) * up
