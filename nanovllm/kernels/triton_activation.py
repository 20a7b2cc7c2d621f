"""SwiGLU activation as one Triton kernel: gate_up [T, 2I] -> silu(gate) * up [T, I].

A program handles one block of columns of one row. silu is computed in float32 and rounded to the
dtype before the product, like `torch_ops`.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton_launch import await_previous, overlap_options

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _silu_and_mul_kernel(
    out, gate_up, stride_gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate_pointers = gate_up + row * stride_gate_up + column
    gate = tl.load(gate_pointers, mask=mask, other=0.0)
    up = tl.load(gate_pointers + WIDTH, mask=mask, other=0.0).to(tl.float32)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, (silu * up).to(dtype), mask=mask)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I], gate first -> [T, I]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    assert gate_up.stride(1) == 1
    _silu_and_mul_kernel[(num_rows, triton.cdiv(width, BLOCK))](
        out,
        gate_up,
        gate_up.stride(0),
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **overlap_options(gate_up.device),
    )
    return out
