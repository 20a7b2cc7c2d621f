"""Products of few tokens with small weights, as a Triton kernel, and the choice for all products.

cuBLAS takes about 6 us for a product whose weights pass through memory in 1 to 3 us. Here every
program multiplies one tile of weights, which it fetches while the kernel before still runs, and the
parts of a split K are left unsummed: the next kernel adds them up as it reads (`load_summed`).
"""

import torch
import torch.nn.functional as F
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.triton.hopper_linear import BLOCK_K, BLOCK_N, hopper_linear
from nanovllm.kernels.triton.launch import (
    await_previous,
    cdiv,
    has_bulk_copies,
    is_hopper,
    jit,
    num_multiprocessors,
    overlap_options,
    release_next,
)
from nanovllm.kernels.triton.tiled_linear import LinearTile, tiled_linear
from nanovllm.kernels.triton.wide_linear import MAX_TOKENS, ROWS, WideTile, wide_linear
from nanovllm.kernels.types import LateOutput, LinearOutput, PartialSums, Product

NUM_WARPS = 4
# Tokens -> the most programs with which these kernels win over cuBLAS and over `tiled_linear`,
# measured on an H200: Qwen3-0.6B has 96 for down, 128 for QKV, 192 for gate and up, larger models
# 256 and more; see tests/benchmarks/bench_linear.py.
MAX_PROGRAMS = {8: 264, 16: 264, 32: 264, 64: 132, 128: 96}
MAX_HOPPER_TOKENS = 32  # from there on `hopper_linear` has not been measured
# Other weights are multiplied in tiles of a loop, for so many tokens and rows at most.
MAX_TILED_TOKENS = 32
MAX_TILED_ROWS = 32768
# From so many tokens on `wide_linear` multiplies small weights, and large ones by LARGE_TILES.
MIN_WIDE_TOKENS = 17
# Small weights: where so many programs of so many columns are enough, by the most tokens. Measured
# with Qwen3-0.6B and with QKV and O of Qwen3-30B-A3B.
MAX_WIDE_PROGRAMS = 96
MAX_WIDE_COLUMNS = {32: 1024, 64: 2048, 192: 1408, 256: 1024}
# Large ones: where programs of so many warpgroups, and with K in so many parts, are from this share
# of the multiprocessors to all of them; the most tokens. Measured with Qwen3-8B: QKV; O and down;
# gate and up.
LARGE_TILES = ((1, 1, 0.7, 224), (1, 2, 0.9, 224), (3, 1, 0.9, 256))
# Other large weights and so many tokens: K in as many parts as make two programs for each
# multiprocessor. Where its programs are up to three, all run at once, else two at a time.
MAX_FEW_TOKENS, MIN_BYTES_OF_PART = 64, 1024
# Most tokens -> in which pieces a warpgroup has them.
PIECES = {
    8: (8,),
    16: (16,),
    32: (32,),
    64: (64,),
    96: (64, 32),
    128: (128,),
    160: (128, 32),
    192: (128, 64),
    224: (128, 64, 32),
    256: (128, 128),
}
# Only with SiLU, from so many tokens on and up to so many columns of K: tokens in one of these
# numbers of shares, if that makes nearly a program for each multiprocessor.
MIN_SHARED_TOKENS, MAX_SHARED_COLUMNS, SHARES = 449, 2048, (2, 4)
SPLIT_LINEAR = True  # off for an ablation


@jit
def load_summed(pointers, mask, part_stride, NUM_PARTS: tl.constexpr, dtype: tl.constexpr):
    """What `pointers` show, summed over NUM_PARTS parts if there are several, in `dtype`."""
    x = tl.load(pointers, mask=mask, other=0.0)
    if NUM_PARTS > 1:
        x = x.to(tl.float32)
        for part in tl.static_range(1, NUM_PARTS):
            x += tl.load(pointers + part * part_stride, mask=mask, other=0.0).to(tl.float32)
    return x.to(dtype)


def parts_of(x: LateOutput) -> tuple[torch.Tensor, int, int, torch.dtype]:
    """x's first part [T, N], the number of parts, elements from one to the next, x's dtype."""
    assert not isinstance(x, Product)  # who gets one computes it first
    if isinstance(x, PartialSums):
        return x.parts[0], x.parts.shape[0], x.parts.stride(0), x.dtype
    return x, 1, 0, x.dtype


@jit(do_not_specialize=["num_tokens"])
def _split_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x_tiles,  # x [T, K] as tiles of [BLOCK_M, BLOCK_K]; rows past T read as zeros
    weight_tiles,  # weight [N, K] as tiles of [BLOCK_N, BLOCK_K]; rows past N read as zeros
    bias,  # [N] or None
    num_tokens,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release_next(OVERLAP)
    first_row = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    # No kernel writes weights: they come before the wait.
    weight = weight_tiles.load([first_row, part * BLOCK_K])
    await_previous(OVERLAP)
    x = x_tiles.load([0, part * BLOCK_K])
    # The weights' rows are the rows of the matrix instruction, which has at least 64 of them.
    product = tl.dot(weight, x.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    row = first_row + tl.arange(0, BLOCK_N)
    if bias is not None:
        bias_values = tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        product += tl.where(part == 0, bias_values, 0.0)[:, None]
    token = tl.arange(0, BLOCK_M)
    pointers = out + (part * num_tokens + token[None, :]).to(tl.int64) * N + row[:, None]
    mask = (token < num_tokens)[None, :] & (row < N)[:, None]
    tl.store(pointers, product.to(out.dtype.element_ty), mask=mask)


def choose_block_m(num_tokens: int, n: int, k: int, dtype: torch.dtype) -> int | None:
    """Padded number of tokens for x [num_tokens, k] and weight [n, k]; None: not by `split_linear`.

    Other products are left to `tiled_linear` or cuBLAS.
    """
    if not SPLIT_LINEAR or dtype == torch.float32 or k % BLOCK_K:
        return None
    num_programs = cdiv(n, BLOCK_N) * (k // BLOCK_K)
    for block_m, most in MAX_PROGRAMS.items():
        if num_tokens <= block_m:
            return block_m if num_programs <= most else None
    return None


def choose_wide(
    num_tokens: int, n: int, k: int, dtype: torch.dtype, num_sms: int
) -> WideTile | None:
    """How `wide_linear` multiplies on a GPU of so many multiprocessors; None: another does."""
    if not _suits_wide(n, k, dtype) or not 0 < num_tokens <= MAX_TOKENS:
        return None
    if tile := _choose_by_programs(num_tokens, n, k, num_sms):
        return tile
    if choose_block_m(num_tokens, n, k, dtype):  # a kernel with less latency
        return None
    return choose_for_few(num_tokens, n, 2 * k, num_sms)


def _choose_by_programs(num_tokens: int, n: int, k: int, num_sms: int) -> WideTile | None:
    """The tile where one wave of programs multiplies small weights, or fills the GPU with large."""
    if num_tokens < MIN_WIDE_TOKENS:
        return None
    pieces = _pieces(num_tokens)
    num_parts = min(MAX_WIDE_PROGRAMS // (n // ROWS), k // BLOCK_K)
    most = next(most for tokens, most in MAX_WIDE_COLUMNS.items() if num_tokens <= tokens)
    if k <= num_parts * most:
        # Of many tokens each program has half, if K is whole and all run at once even then.
        if num_tokens > 192 and num_parts == 1 and 2 * n // ROWS <= num_sms:
            pieces = PIECES[128]
        return WideTile(pieces, 1, num_parts)
    for groups, num_parts, share, most_tokens in LARGE_TILES:
        num_programs = cdiv(n, ROWS * groups) * num_parts
        if num_tokens <= most_tokens and share * num_sms <= num_programs <= num_sms:
            return WideTile(pieces, groups, num_parts)
    return None


def choose_for_few(
    num_tokens: int, n: int, row_bytes: int, num_sms: int, programs_of_parts: int = 2
) -> WideTile | None:
    """How `wide_linear` multiplies few tokens and large weights; None: they are too many.

    row_bytes: of the weight. programs_of_parts: for each multiprocessor, by splitting K.
    """
    if num_tokens > MAX_FEW_TOKENS:
        return None
    num_tiles = cdiv(n, ROWS)
    most_parts = max(1, row_bytes // MIN_BYTES_OF_PART)
    num_parts = max(1, min(programs_of_parts * num_sms // num_tiles, most_parts))
    programs_per_sm = cdiv(num_tiles * num_parts, num_sms)
    per_sm = programs_per_sm if programs_per_sm <= 3 else 2
    return WideTile(_pieces(num_tokens), 1, num_parts, per_sm)


def choose_gated(
    num_tokens: int, n: int, k: int, dtype: torch.dtype, num_sms: int
) -> WideTile | None:
    """How `wide_linear` multiplies and computes SiLU; None: it does not."""
    if num_tokens <= MAX_TOKENS:
        tile = choose_wide(num_tokens, n, k, dtype, num_sms)
        return tile if tile is not None and tile.num_parts == 1 else None
    num_programs = cdiv(n, 3 * ROWS)
    num_shares = num_sms // num_programs
    is_taken = MIN_SHARED_TOKENS <= num_tokens <= num_shares * MAX_TOKENS and num_shares in SHARES
    fills = num_shares * num_programs >= 0.9 * num_sms
    if is_taken and fills and k <= MAX_SHARED_COLUMNS and _suits_wide(n, k, dtype):
        return WideTile(_pieces(cdiv(num_tokens, num_shares)), 3)
    return None


def _suits_wide(n: int, k: int, dtype: torch.dtype) -> bool:
    return SPLIT_LINEAR and dtype != torch.float32 and k % BLOCK_K == 0 and n % ROWS == 0


def _pieces(num_tokens: int) -> tuple[int, ...]:
    return next(pieces for most, pieces in PIECES.items() if num_tokens <= most)


def choose_tile(num_tokens: int, n: int, k: int, dtype: torch.dtype) -> LinearTile | None:
    """The tile for `tiled_linear`, or None: leave it to cuBLAS."""
    too_large = num_tokens > MAX_TILED_TOKENS or n > MAX_TILED_ROWS
    if not SPLIT_LINEAR or dtype == torch.float32 or k % 8 or too_large:
        return None
    block_m = 16 if num_tokens <= 16 else 32
    if k > 2048:  # a long loop
        return LinearTile(block_m, 64, 256, 4, 4, 1)
    return LinearTile(block_m, 64, 128, 4, 4, 2)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> LinearOutput:
    """x [T, K], weight [N, K], bias [N] -> [T, N]; see `Ops.linear`."""
    num_tokens, k = x.shape
    n = weight.shape[0]
    if num_tokens == 0 or not has_bulk_copies(x.device):
        return F.linear(x, weight, bias)
    if is_hopper(x.device):
        wide = choose_wide(num_tokens, n, k, weight.dtype, num_multiprocessors(x.device))
        if wide is not None:
            return wide_linear(x, weight, bias, wide)
    if block_m := choose_block_m(num_tokens, n, k, weight.dtype):
        if block_m <= MAX_HOPPER_TOKENS and is_hopper(x.device):
            return hopper_linear(x, weight, bias, block_m)
        return split_linear(x, weight, bias, block_m)
    if tile := choose_tile(num_tokens, n, k, weight.dtype):
        return tiled_linear(x, weight, bias, tile, x.dtype, len(x))
    return F.linear(x, weight, bias)


def split_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block_m: int
) -> LinearOutput:
    """`linear` by the kernel, whatever wins; T <= block_m, K a multiple of BLOCK_K."""
    num_tokens, k = x.shape
    n = weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous() and num_tokens <= block_m
    num_parts = k // BLOCK_K
    assert num_parts * BLOCK_K == k
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    _split_linear_kernel[(cdiv(n, BLOCK_N), num_parts)](
        out,
        TensorDescriptor.from_tensor(x, [block_m, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
        bias,
        num_tokens,
        N=n,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, x.dtype)
