"""Gated activations as one Triton kernel: gate_up [T, 2I] -> act(gate) * up [T, I].

A program handles one block of columns of one row. The activation is computed in float32 and rounded
to the dtype before the product, like `torch_ops`. Products of few tokens may compute SiLU
themselves.
"""

import math

import torch
import triton.language as tl

from nanovllm.kernels.triton.hopper_fused_linear import hopper_silu_linear, takes
from nanovllm.kernels.triton.hopper_linear import hopper_gated_linear, takes_gated
from nanovllm.kernels.triton.launch import (
    await_previous,
    cdiv,
    is_hopper,
    jit,
    num_multiprocessors,
    overlap_options,
)
from nanovllm.kernels.triton.linear import (
    choose_block_m,
    choose_gated,
    linear,
    load_summed,
    parts_of,
)
from nanovllm.kernels.triton.wide_linear import wide_linear
from nanovllm.kernels.types import LinearOutput

BLOCK = 1024
BLOCK_OF_PARTS = 512  # more programs, as each reads every part
NUM_WARPS = 4
SILU, GELU, GELU_TANH = range(3)  # which activation
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
SQRT_8_OVER_PI = tl.constexpr(math.sqrt(8 / math.pi))


@jit
def _act_and_mul_kernel(
    out,
    gate_up,
    stride_gate_up,
    stride_part,
    NUM_PARTS: tl.constexpr,  # of gate_up
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    if ACTIVATION == 0:
        act = gate / (1 + tl.exp(-gate))
    elif ACTIVATION == 1:
        act = 0.5 * gate * (1 + tl.erf(gate * SQRT_HALF))
    else:
        # 0.5 * (1 + tanh(y / 2)) is 1 / (1 + exp(-y)), y / 2 = sqrt(2 / pi) * (x + 0.044715 x^3).
        y = (gate + 0.044715 * gate * gate * gate) * SQRT_8_OVER_PI
        act = gate / (1 + tl.exp(-y))
    act = act.to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, (act * up).to(dtype), mask=mask)


def silu_and_mul(gate_up: LinearOutput) -> torch.Tensor:
    """gate_up [T, 2I], gate first -> silu(gate) * up [T, I]."""
    return _act_and_mul(gate_up, SILU)


def gelu_and_mul(gate_up: LinearOutput, is_tanh: bool) -> torch.Tensor:
    """gate_up [T, 2I], gate first -> gelu(gate) * up [T, I]."""
    return _act_and_mul(gate_up, GELU_TANH if is_tanh else GELU)


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight [2I, K] -> [T, I]; see `Ops.gated_linear`.

    One kernel for many tokens, and for few where K is split.
    """
    if takes(x, weight):
        return hopper_silu_linear(x, weight)
    num_tokens, k = x.shape
    n = weight.shape[0]
    if num_tokens and is_hopper(x.device):
        wide = choose_gated(num_tokens, n, k, weight.dtype, num_multiprocessors(x.device))
        if wide is not None:
            product = wide_linear(x, weight, None, wide, is_gated=True)
            assert isinstance(product, torch.Tensor)
            return product
        block_m = choose_block_m(num_tokens, n, k, weight.dtype)
        if block_m and takes_gated(num_tokens, n, k):
            return hopper_gated_linear(x, weight, block_m)
    return silu_and_mul(linear(x, weight))


def _act_and_mul(gate_up: LinearOutput, activation: int) -> torch.Tensor:
    gate_up, num_parts, stride_part, dtype = parts_of(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    assert gate_up.stride(1) == 1
    block = BLOCK if num_parts == 1 else BLOCK_OF_PARTS
    _act_and_mul_kernel[(num_rows, cdiv(width, block))](
        out,
        gate_up,
        gate_up.stride(0),
        stride_part,
        NUM_PARTS=num_parts,
        WIDTH=width,
        BLOCK=block,
        ACTIVATION=activation,
        num_warps=NUM_WARPS,
        **overlap_options(gate_up.device),
    )
    return out
