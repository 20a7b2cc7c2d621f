"""RMS norm, plain and fused with the residual sum, as one Triton kernel.

A program owns whole rows: it reads them once, keeps them in registers as float32 and writes the
result, so a norm costs one pass over memory. Rounding follows `torch_ops` step by step.
"""

import torch
import triton.language as tl

from nanovllm.kernels.triton.launch import (
    await_previous,
    cdiv,
    jit,
    next_power_of_2,
    num_multiprocessors,
    overlap_options,
    release_next,
)
from nanovllm.kernels.triton.linear import load_summed, parts_of
from nanovllm.kernels.types import LinearOutput

ELEMENTS_PER_PROGRAM = 1024  # short rows share a program until it has this many elements
ELEMENTS_PER_WARP = 256  # 8 elements a thread: one 16-byte access in half precision
ELEMENTS_PER_WARP_OF_PARTS = 128  # the same in float32
# Of a thread, where there are parts. Left to itself the assembler keeps to 32, and so it asks for
# two or three parts, waits for them, and asks for the next ones.
REGISTERS_OF_PARTS = 64
# From so many rows on the bandwidth counts, not a row's latency: fewer warps wait for each other.
MANY_ROWS = 1024
ELEMENTS_PER_WARP_OF_MANY_ROWS = 1024
MAX_WARPS = 16
MAX_WARPS_OF_TWO_PARTS = 8  # where multiprocessors have more than one row


@jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    out,
    x,
    residual,
    weight,
    num_rows,
    stride_x,
    stride_part,
    stride_residual,
    eps,
    NUM_PARTS: tl.constexpr,  # of x
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = row.to(tl.int64)
    column = tl.arange(0, PADDED_WIDTH)[None, :]
    in_width = column < WIDTH
    w = tl.load(weight + column, mask=in_width, other=0.0).to(tl.float32)
    await_previous(OVERLAP)
    mask = (row < num_rows) & in_width
    dtype: tl.constexpr = out.dtype.element_ty
    x = load_summed(x + row * stride_x + column, mask, stride_part, NUM_PARTS, dtype)
    if ADD:
        # The sum replaces the residual: no other program reads or writes these rows.
        residual_pointers = residual + row * stride_residual + column
        x += tl.load(residual_pointers, mask=mask, other=0.0)
        tl.store(residual_pointers, x, mask=mask)
    x = x.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / WIDTH
    normed = x * tl.rsqrt(mean_square + eps)
    if weight.dtype.element_ty == dtype:
        normed = normed.to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, (normed * w).to(dtype), mask=mask)


def _launch(
    x: LinearOutput, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    x, num_parts, stride_part, dtype = parts_of(x)
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=dtype, device=x.device)
    if num_rows == 0:
        return out
    assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    padded_width = next_power_of_2(width)
    rows = max(1, ELEMENTS_PER_PROGRAM // padded_width)
    elements_per_warp = ELEMENTS_PER_WARP if num_parts == 1 else ELEMENTS_PER_WARP_OF_PARTS
    if num_rows >= MANY_ROWS:
        elements_per_warp = ELEMENTS_PER_WARP_OF_MANY_ROWS
    most_warps = MAX_WARPS
    if num_parts == 2 and num_rows > num_multiprocessors(x.device):
        most_warps = MAX_WARPS_OF_TWO_PARTS
    _rms_norm_kernel[(cdiv(num_rows, rows),)](
        out,
        x,
        residual,
        weight,
        num_rows,
        x.stride(0),
        stride_part,
        0 if residual is None else residual.stride(0),
        eps,
        NUM_PARTS=num_parts,
        WIDTH=width,
        PADDED_WIDTH=padded_width,
        ROWS=rows,
        ADD=residual is not None,
        num_warps=min(most_warps, max(1, rows * padded_width // elements_per_warp)),
        **({} if num_parts == 1 else {"maxnreg": REGISTERS_OF_PARTS}),
        **overlap_options(x.device),
    )
    return out


def rms_norm(x: LinearOutput, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] / sqrt(mean(x^2) + eps) * weight [H] -> [T, H]."""
    return _launch(x, None, weight, eps)


def add_rms_norm(
    x: LinearOutput, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), both [T, H]; the sum takes the residual's memory."""
    return _launch(x, residual, weight, eps), residual
