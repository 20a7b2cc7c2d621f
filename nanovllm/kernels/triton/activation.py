"""SwiGLU activation as one Triton kernel: gate_up [T, 2I] -> silu(gate) * up [T, I].

A program handles one block of columns of one row. silu is computed in float32 and rounded to the
dtype before the product, like `torch_ops`.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.launch import await_previous, jit, overlap_options
from nanovllm.kernels.triton.linear import load_summed, parts_of
from nanovllm.kernels.types import LinearOutput

BLOCK = 1024
NUM_WARPS = 4


@jit
def _silu_and_mul_kernel(
    out,
    gate_up,
    stride_gate_up,
    stride_part,
    NUM_PARTS: tl.constexpr,  # of gate_up
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate_pointers = gate_up + row * stride_gate_up + column
    dtype: tl.constexpr = out.dtype.element_ty
    gate = load_summed(gate_pointers, mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    up = load_summed(gate_pointers + WIDTH, mask, stride_part, NUM_PARTS, dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, (silu * up).to(dtype), mask=mask)


def silu_and_mul(gate_up: LinearOutput) -> torch.Tensor:
    """gate_up [T, 2I], gate first -> [T, I]."""
    gate_up, num_parts, stride_part, dtype = parts_of(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    assert gate_up.stride(1) == 1
    _silu_and_mul_kernel[(num_rows, triton.cdiv(width, BLOCK))](
        out,
        gate_up,
        gate_up.stride(0),
        stride_part,
        NUM_PARTS=num_parts,
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **overlap_options(gate_up.device),
    )
    return out
