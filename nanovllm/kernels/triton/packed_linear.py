"""Products with weights of 4 or 8 bits, as Triton kernels.

Few tokens are bound by the weights' bandwidth, and next to that by the instructions that take the
numbers apart: about two for each. A program loops over blocks of int16 numbers, which hold 4 or 2
columns of the weight each. It takes them apart in registers: the first columns of all int16 make
one operand, which meets every fourth or second run of 8 columns of x (see `PackedWeight`), the
second ones the next. A block lies in one group, so a scale multiplies its product. Scales are
loaded a step ahead, as the products would wait for them. Where K is split, the parts are left
unsummed, as those of kernels/triton/linear.py. For many tokens the weight is dequantised once, and
cuBLAS multiplies. Hopper has more kernels for 4 bits, in hopper_packed.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nanovllm.kernels.device import DeviceLimits, device_limits
from nanovllm.kernels.triton import hopper_packed
from nanovllm.kernels.triton.launch import (
    await_previous,
    is_gpu,
    jit,
    num_multiprocessors,
    overlap_options,
)
from nanovllm.kernels.types import LinearOutput, PackedWeight, PartialSums

MIN_COLUMNS_PER_PART = 512  # of a split K
MAX_BLOCK_COLUMNS = 128
MIN_WIDTH = 16  # columns of a product on tensor cores
MAX_RAW_TOKENS = 16  # of a tile whose numbers keep what unpacking adds


class PackedTile(NamedTuple):
    """How a product is cut up: block_m tokens, block_n rows of the weight."""

    block_m: int
    block_n: int
    blocks: int  # of columns, fetched at a time; of 8-bit numbers half as many
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that a split of K aims at where there would be fewer
    fetch_ahead: int = 0  # lines of 128 bytes of each row that are asked for before x is there


# Tokens, at most -> tile; see tests/benchmarks/bench_packed_linear.py. More tokens: cuBLAS.
TILES = {
    8: PackedTile(8, 64, 2, 2, 4, 6),
    16: PackedTile(16, 128, 2, 4, 3, 3, 4),
    32: PackedTile(32, 128, 2, 8, 3, 2, 4),
    64: PackedTile(64, 256, 1, 8, 3, 1),
    128: PackedTile(64, 128, 1, 8, 4, 1),
}
# Unpacked numbers lie in tensor memory, where there is one. With zeros Triton 3.6 fills all of it.
MAX_ROWS_IN_TENSOR_MEMORY = 64
MAX_WORKSPACE = 2**26  # elements of a weight that are dequantised at a time
DEQUANTIZE_ROWS, DEQUANTIZE_COLUMNS = 4, 1024  # of a program
LINE = tl.constexpr(64)  # int16 that are fetched at a time


# Numbers


def _assembly(bits: int, is_bfloat16: bool, added: int) -> str:
    """PTX of `unpack` for two int16 at a time.

    A number's bits, put below those of 128 (bfloat16) or 1,024 (float16), add it to that. One more
    instruction makes that sum number + `added`, unless it is already. bfloat16 has no room for 8
    bits: the highest one, which makes 256 of 128, is added to the others.
    """
    planes = 16 // bits
    packed = f"${planes}"
    back = {  # -128 - 8, -1,024 - 8; -256 - 128, -1,024 - 128
        (4, True): "0xC308C308",
        (4, False): "0xE408E408",
        (8, True): "0xC3C0C3C0",
        (8, False): "0xE480E480",
    }[bits, is_bfloat16]
    lines = [".reg .b32 bits, low, high, one, back;", f"mov.b32 back, {back};"]
    lines.append("mov.b32 one, 0x3F803F80;")
    for plane in range(planes):
        source = "bits" if plane else packed
        if plane:
            lines.append(f"shr.u32 bits, {packed}, {plane * bits};")
        if not is_bfloat16:
            mask = "0x000F000F" if bits == 4 else "0x00FF00FF"
            lines.append(f"lop3.b32 low, {source}, {mask}, 0x64006400, 0xEA;")
            lines.append(f"add.rn.f16x2 ${plane}, low, back;")
        elif added == 128:
            lines.append(f"lop3.b32 ${plane}, {source}, 0x000F000F, 0x43004300, 0xEA;")
        elif bits == 4:
            lines.append(f"lop3.b32 low, {source}, 0x000F000F, 0x43004300, 0xEA;")
            lines.append(f"fma.rn.bf16x2 ${plane}, low, one, back;")
        else:
            lines.append(f"lop3.b32 low, {source}, 0x007F007F, 0x43004300, 0xEA;")
            lines.append(f"lop3.b32 high, {source}, 0x00800080, 0x43004300, 0xEA;")
            lines.append("fma.rn.bf16x2 low, low, one, back;")
            lines.append(f"fma.rn.bf16x2 ${plane}, low, one, high;")
    return "{" + "\n".join(lines) + "}"


UNPACK_4_BF16_RAW = tl.constexpr(_assembly(4, is_bfloat16=True, added=128))
UNPACK_4_BF16 = tl.constexpr(_assembly(4, is_bfloat16=True, added=-8))
UNPACK_4_FP16 = tl.constexpr(_assembly(4, is_bfloat16=False, added=-8))
UNPACK_8_BF16 = tl.constexpr(_assembly(8, is_bfloat16=True, added=-128))
UNPACK_8_FP16 = tl.constexpr(_assembly(8, is_bfloat16=False, added=-128))


@jit
def unpack_4(packed, dtype: tl.constexpr, ADDED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int16 -> its four numbers of 4 bits + ADDED (-8; bfloat16: or 128), the lowest first."""
    if not ASSEMBLY:
        bits = packed.to(tl.int32)
        a = ((bits & 15) + ADDED).to(dtype)
        b = (((bits >> 4) & 15) + ADDED).to(dtype)
        c = (((bits >> 8) & 15) + ADDED).to(dtype)
        d = (((bits >> 12) & 15) + ADDED).to(dtype)
    elif dtype == tl.bfloat16:
        a, b, c, d = tl.inline_asm_elementwise(
            UNPACK_4_BF16_RAW if ADDED == 128 else UNPACK_4_BF16,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        tl.static_assert(ADDED == -8)
        a, b, c, d = tl.inline_asm_elementwise(
            UNPACK_4_FP16,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@jit
def unpack_8(packed, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int16 -> its two numbers of 8 bits, the lower first, less 128, in `dtype`."""
    if not ASSEMBLY:
        bits = packed.to(tl.int32)
        a = ((bits & 255) - 128).to(dtype)
        b = (((bits >> 8) & 255) - 128).to(dtype)
    elif dtype == tl.bfloat16:
        a, b = tl.inline_asm_elementwise(
            UNPACK_8_BF16,
            "=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b = tl.inline_asm_elementwise(
            UNPACK_8_FP16,
            "=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b


# Few tokens


@jit
def multiply_packed(
    x,  # pointers [BLOCK_M, WIDTH] to the columns that the int16's lowest bits meet
    x_mask,
    packed,  # int16 [BLOCK_N, WIDTH]
    scale,  # [BLOCK_N] of the group
    zero,  # uint8, the same, or None
    BITS: tl.constexpr,
    ADDED: tl.constexpr,  # to each number as it meets x
    ASSEMBLY: tl.constexpr,
):
    """x times a block's weights of one group -> float32 [BLOCK_N, BLOCK_M]; x_mask chooses them.

    The weight's rows are the rows of the matrix instruction: it takes them from registers. Numbers
    are multiplied with something added, which comes off again as that many times the sum of x.
    """
    RUN: tl.constexpr = 8
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    dtype: tl.constexpr = x.dtype.element_ty
    x_a = tl.load(x, mask=x_mask, other=0.0).T
    x_b = tl.load(x + RUN, mask=x_mask, other=0.0).T
    if BITS == 4:
        x_c = tl.load(x + 2 * RUN, mask=x_mask, other=0.0).T
        x_d = tl.load(x + 3 * RUN, mask=x_mask, other=0.0).T
        a, b, c, d = unpack_4(packed, dtype, ADDED, ASSEMBLY)
        product = tl.dot(a, x_a, input_precision="ieee")
        product = tl.dot(b, x_b, product, input_precision="ieee")
        product = tl.dot(c, x_c, product, input_precision="ieee")
        product = tl.dot(d, x_d, product, input_precision="ieee")
    else:
        a, b = unpack_8(packed, dtype, ASSEMBLY)
        product = tl.dot(a, x_a, input_precision="ieee")
        product = tl.dot(b, x_b, product, input_precision="ieee")
    if zero is not None:
        ones = tl.full(packed.shape, 1.0, dtype)
        sums = tl.dot(ones, x_a, input_precision="ieee")
        sums = tl.dot(ones, x_b, sums, input_precision="ieee")
        if BITS == 4:
            sums = tl.dot(ones, x_c, sums, input_precision="ieee")
            sums = tl.dot(ones, x_d, sums, input_precision="ieee")
        product -= sums * (zero.to(tl.float32) + ADDED)[:, None]
    elif ADDED != -MIDDLE:
        rest = tl.full(packed.shape, -ADDED - MIDDLE, dtype)
        product = tl.dot(rest, x_a, product, input_precision="ieee")
        product = tl.dot(rest, x_b, product, input_precision="ieee")
        product = tl.dot(rest, x_c, product, input_precision="ieee")
        product = tl.dot(rest, x_d, product, input_precision="ieee")
    return product * scale.to(tl.float32)[:, None]


@jit
def load_groups(
    scales,  # pointers [BLOCK_N] to the rows' first groups
    zeros,  # the same, or None
    first,  # block
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Each group's scale, and its zero if there are any, of so many blocks from `first` on.

    Past the last group it is the last one's.
    """
    BLOCK_K: tl.constexpr = WIDTH * 16 // BITS
    GROUPS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP  # of a block: 1, or 2 of 32 columns
    values = ()
    for i in tl.static_range(BLOCKS * GROUPS):
        group = (first + i // GROUPS) * BLOCK_K // GROUP + i % GROUPS
        group = tl.minimum(group, K // GROUP - 1)
        values += (tl.load(scales + group),)  # type: ignore[assignment]
        if zeros is not None:
            values += (tl.load(zeros + group),)  # type: ignore[assignment]
    return values


@jit
def multiply_blocks(
    product,  # float32 [BLOCK_N, BLOCK_M]
    x,  # pointers [BLOCK_M, 1] to the rows of x
    x_mask,
    numbers,  # pointers [BLOCK_N, 1] to the rows of the weight
    groups,  # of `load_groups`
    HAS_ZEROS: tl.constexpr,
    first,  # block
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    ADDED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """product + the weight times x^T, of so many blocks from `first` on."""
    RUN: tl.constexpr = 8
    PLANES: tl.constexpr = 16 // BITS
    BLOCK_K: tl.constexpr = WIDTH * PLANES
    GROUPS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
    IS_EVEN: tl.constexpr = K % (BLOCK_K * BLOCKS) == 0
    column = tl.arange(0, WIDTH)
    # Copies of 8 bytes go through the multiprocessor's cache, where planes share lines and programs
    # share x; those of 16 bytes would not.
    x_column = tl.max_contiguous(column // RUN * (RUN * PLANES) + column % RUN, 4)
    for offset in tl.static_range(BLOCKS):
        block = first + offset
        pointers = numbers + (block * WIDTH + column)[None, :]
        if IS_EVEN:
            packed = tl.load(pointers)
            mask = x_mask
        else:
            in_row = (block * WIDTH + column < K // PLANES)[None, :]
            packed = tl.load(pointers, mask=in_row, other=0)
            mask = x_mask & in_row
        for i in tl.static_range(GROUPS):
            of_group = mask
            if GROUPS > 1:
                of_group = mask & (column // (WIDTH // GROUPS) == i)[None, :]
            if HAS_ZEROS:
                scale = groups[2 * (offset * GROUPS + i)]
                zero = groups[2 * (offset * GROUPS + i) + 1]
            else:
                scale = groups[offset * GROUPS + i]
                zero = None
            product += multiply_packed(
                x + (block * BLOCK_K + x_column)[None, :],
                of_group,
                packed,
                scale,
                zero,
                BITS,
                ADDED,
                ASSEMBLY,
            )
    return product


@jit(do_not_specialize=["num_tokens", "blocks_per_part"])
def _packed_linear_kernel(
    out,  # [T, N], or float32 [parts, T, N]
    x,  # [T, K]
    numbers,  # int16 [N, K * BITS / 16]
    scales,  # [N, K / GROUP]
    zeros,  # uint8, the same, or None
    bias,  # [N] or None
    num_tokens,
    blocks_per_part,  # that a program multiplies, a multiple of BLOCKS
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,  # int16 of a row of a block
    BLOCKS: tl.constexpr,  # that are fetched at a time
    FETCH_AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADDED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    NUM_INT16: tl.constexpr = K * BITS // 16
    NUM_BLOCKS: tl.constexpr = (NUM_INT16 + WIDTH - 1) // WIDTH
    # Programs that run at the same time share tiles of the weight, in the L2 cache.
    num_token_tiles = tl.cdiv(num_tokens, BLOCK_M)
    first_token = tl.program_id(0) % num_token_tiles * BLOCK_M
    first_row = tl.program_id(0) // num_token_tiles * BLOCK_N
    part = tl.program_id(1)
    begin = part * blocks_per_part
    end = tl.minimum(begin + blocks_per_part, NUM_BLOCKS)
    row = first_row + tl.arange(0, BLOCK_N)
    is_row = row < N
    safe_row = tl.where(is_row, row, 0).to(tl.int64)  # what others give is not stored
    row_numbers = numbers + safe_row[:, None] * NUM_INT16
    row_scales = scales + safe_row * (K // GROUP)
    row_zeros = None if zeros is None else zeros + safe_row * (K // GROUP)
    # No kernel writes weights: they may come before the wait. Groups are a step ahead of numbers.
    groups = load_groups(row_scales, row_zeros, begin, K, GROUP, BITS, WIDTH, BLOCKS)
    if FETCH_AHEAD > 0 and ASSEMBLY:
        line = begin * WIDTH + tl.arange(0, FETCH_AHEAD) * LINE
        prefetch(row_numbers + tl.minimum(line, NUM_INT16 - 1)[None, :])
    await_previous(OVERLAP)
    token = first_token + tl.arange(0, BLOCK_M)
    is_token = token < num_tokens
    row_x = x + token[:, None].to(tl.int64) * K
    product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCKS):
        later = first + BLOCKS
        next_groups = load_groups(row_scales, row_zeros, later, K, GROUP, BITS, WIDTH, BLOCKS)
        product = multiply_blocks(
            product,
            row_x,
            is_token[:, None],
            row_numbers,
            groups,
            zeros is not None,
            first,
            K,
            GROUP,
            BITS,
            WIDTH,
            BLOCKS,
            ADDED,
            ASSEMBLY,
        )
        groups = next_groups
    if bias is not None:
        bias_values = tl.load(bias + safe_row).to(tl.float32)
        product += tl.where(part == 0, bias_values, 0.0)[:, None]
    pointers = out + (part * num_tokens + token[None, :]).to(tl.int64) * N + row[:, None]
    mask = is_token[None, :] & is_row[:, None]
    tl.store(pointers, product.to(out.dtype.element_ty), mask=mask)


@jit
def prefetch(pointers):
    """Ask for the lines that the pointers show: they will be in the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def width_of_block(weight: PackedWeight) -> int:
    """int16 of a row of a block: of one group, or of two where it has 32 columns of 4 bits."""
    return max(MIN_WIDTH, math.gcd(weight.group_size, MAX_BLOCK_COLUMNS) * weight.bits // 16)


def as_int16(weight: PackedWeight) -> torch.Tensor:
    """The numbers [N, K * bits / 16]."""
    return weight.numbers.view(torch.int16)


def uses_assembly(x: torch.Tensor) -> bool:
    """Whether `unpack_4` and `unpack_8` to x's dtype, and where it lies, have instructions."""
    return is_gpu(x.device) and x.dtype != torch.float32


def added_to(weight: PackedWeight, x: torch.Tensor, block_m: int, num_warps: int) -> int:
    """ADDED of a tile: 128 saves instructions for each number, and takes some for each token.

    Four warps would multiply asynchronously, and wait for more products. float16 needs 1,024, which
    would cost too many of its product's bits.
    """
    is_raw = weight.bits == 4 and x.dtype == torch.bfloat16
    if is_raw and block_m <= MAX_RAW_TOKENS and num_warps < 4:
        return 128
    return -(2 ** (weight.bits - 1))


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, tile: PackedTile
) -> LinearOutput:
    """`packed_linear` by the kernel, whatever wins; without `order`."""
    num_tokens, k = x.shape
    n = weight.shape[0]
    assert x.is_contiguous() and weight.numbers.is_contiguous() and weight.scales.is_contiguous()
    width = width_of_block(weight)
    blocks = max(1, tile.blocks * 4 // weight.bits)
    num_steps = triton.cdiv(k * weight.bits // 16, width * blocks)
    num_tiles = triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(n, tile.block_n)
    num_programs = tile.programs_per_sm * num_multiprocessors(x.device)
    num_parts = max(1, min(k // MIN_COLUMNS_PER_PART, round(num_programs / num_tiles)))
    steps_per_part = triton.cdiv(num_steps, num_parts)
    num_parts = triton.cdiv(num_steps, steps_per_part)
    if num_parts == 1:
        out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(num_parts, num_tokens, n, dtype=torch.float32, device=x.device)
    _packed_linear_kernel[(num_tiles, num_parts)](
        out,
        x,
        as_int16(weight),
        weight.scales,
        weight.zeros,
        bias,
        num_tokens,
        steps_per_part * blocks,
        n,
        K=k,
        GROUP=weight.group_size,
        BITS=weight.bits,
        WIDTH=width,
        BLOCKS=blocks,
        FETCH_AHEAD=tile.fetch_ahead,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        ADDED=added_to(weight, x, tile.block_m, tile.num_warps),
        ASSEMBLY=uses_assembly(x),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap_options(x.device),
    )
    return out if num_parts == 1 else PartialSums(out, x.dtype)


# Many tokens


def _dequantizing_assembly(bits: int, is_bfloat16: bool) -> str:
    """PTX of `dequantized` for two numbers: (number + added - base) * scale, see `_assembly`."""
    kind = "bf16x2" if is_bfloat16 else "f16x2"
    lines = [".reg .b32 shift, bits, high, one, minus;", "and.b32 shift, $2, 31;"]
    lines += ["shr.u32 bits, $1, shift;"]
    if not is_bfloat16:
        mask = "0x000F000F" if bits == 4 else "0x00FF00FF"
        lines.append(f"lop3.b32 bits, bits, {mask}, 0x64006400, 0xEA;")
    elif bits == 4:
        lines.append("lop3.b32 bits, bits, 0x000F000F, 0x43004300, 0xEA;")
    else:
        lines.append("lop3.b32 high, bits, 0x00800080, 0x43004300, 0xEA;")
        lines.append("lop3.b32 bits, bits, 0x007F007F, 0x43004300, 0xEA;")
        lines.append("mov.b32 minus, 0xC3C0C3C0;")  # -384
        lines.append("mov.b32 one, 0x3F803F80;")
        lines.append("fma.rn.bf16x2 bits, bits, one, minus;")
        lines.append("fma.rn.bf16x2 bits, bits, one, high;")
    if is_bfloat16:
        lines.append("mov.b32 minus, 0xBF80BF80;")
        lines.append("fma.rn.bf16x2 bits, $3, minus, bits;")
    else:
        lines.append("sub.rn.f16x2 bits, bits, $3;")
    lines.append(f"mul.rn.{kind} $0, bits, $4;")
    return "{" + "\n".join(lines) + "}"


DEQUANTIZE_4_BF16 = tl.constexpr(_dequantizing_assembly(4, is_bfloat16=True))
DEQUANTIZE_4_FP16 = tl.constexpr(_dequantizing_assembly(4, is_bfloat16=False))
DEQUANTIZE_8_BF16 = tl.constexpr(_dequantizing_assembly(8, is_bfloat16=True))
DEQUANTIZE_8_FP16 = tl.constexpr(_dequantizing_assembly(8, is_bfloat16=False))


@jit
def dequantized(packed, shift, zero, scale, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """(number - zero) * scale in scale's dtype; the number is in int16 `packed` above `shift`.

    shift, zero and scale have one value for each row. In half precision the difference is exact.
    """
    dtype: tl.constexpr = scale.dtype
    if not ASSEMBLY:
        number = (packed.to(tl.int32) >> shift) & (2**BITS - 1)
        return ((number - zero).to(tl.float32) * scale.to(tl.float32)).to(dtype)
    ADDED: tl.constexpr = 1024 if dtype == tl.float16 else 128 if BITS == 4 else -128
    IN_FP16: tl.constexpr = DEQUANTIZE_4_FP16 if BITS == 4 else DEQUANTIZE_8_FP16
    IN_BF16: tl.constexpr = DEQUANTIZE_4_BF16 if BITS == 4 else DEQUANTIZE_8_BF16
    shift = tl.broadcast_to(shift.to(tl.int16), packed.shape)
    base = tl.broadcast_to((zero + ADDED).to(tl.float32).to(dtype), packed.shape)
    scale = tl.broadcast_to(scale, packed.shape)
    return tl.inline_asm_elementwise(
        IN_FP16 if dtype == tl.float16 else IN_BF16,
        "=r,r,r,r,r",
        [packed, shift, base, scale],
        dtype=scale.dtype,
        is_pure=True,
        pack=2,
    )


@jit
def _dequantize_kernel(
    out,  # [N, K]
    numbers,  # int16 [N, K * BITS / 16]
    scales,  # [N, K / GROUP]
    zeros,  # uint8, the same, or None
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A thread takes runs of 8 columns: one shift and one scale, 16 bytes read, 16 written.

    The runs of a chunk, side by side, read the same bytes.
    """
    await_previous(OVERLAP)
    RUN: tl.constexpr = 8
    PLANES: tl.constexpr = 16 // BITS
    RUNS: tl.constexpr = COLUMNS // RUN
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    index = tl.arange(0, ROWS * RUNS)
    row = index // RUNS
    run = tl.program_id(1) * RUNS + index % RUNS
    column = tl.arange(0, RUN)[None, :]
    is_run = (first_row + row < N) & (run < K // RUN)
    place = (row * (K // PLANES) + run // PLANES * RUN)[:, None] + column
    packed = tl.load(numbers + first_row * (K // PLANES) + place, mask=is_run[:, None], other=0)
    group = first_row * (K // GROUP) + row * (K // GROUP) + run // (GROUP // RUN)
    scale = tl.load(scales + group, mask=is_run, other=0.0)
    if zeros is not None:
        zero = tl.load(zeros + group, mask=is_run, other=0).to(tl.int32)
    else:
        zero = tl.full([ROWS * RUNS], 2 ** (BITS - 1), tl.int32)
    shift = run % PLANES * BITS
    values = dequantized(
        packed,
        shift[:, None],
        zero[:, None],
        scale.to(out.dtype.element_ty)[:, None],
        BITS,
        ASSEMBLY,
    )
    pointers = out + first_row * K + (row * K + run * RUN)[:, None] + column
    tl.store(pointers, values, mask=is_run[:, None])


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in `dtype`, its columns in their own order, not in that of x."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.numbers.device)
    columns = min(DEQUANTIZE_COLUMNS, triton.next_power_of_2(k))
    grid = triton.cdiv(n, DEQUANTIZE_ROWS), triton.cdiv(k, columns)
    _dequantize_kernel[grid](
        out,
        as_int16(weight),
        weight.scales,
        weight.zeros,
        n,
        K=k,
        GROUP=weight.group_size,
        BITS=weight.bits,
        ROWS=DEQUANTIZE_ROWS,
        COLUMNS=columns,
        ASSEMBLY=uses_assembly(out),
        num_warps=4,
        **overlap_options(out.device),
    )
    return out


def multiply_dequantized(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """`packed_linear` by cuBLAS, with at most MAX_WORKSPACE dequantised elements at a time."""
    n, k = weight.shape
    rows = max(16, MAX_WORKSPACE // k // 16 * 16)
    if n <= rows:
        return F.linear(x, dequantize(weight, x.dtype), bias)
    out = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    for begin in range(0, n, rows):
        part = slice(begin, begin + rows)
        values = dequantize(weight.rows(part), x.dtype)
        if bias is None:
            torch.mm(x, values.t(), out=out[:, part])
        else:
            torch.addmm(bias[part], x, values.t(), out=out[:, part])
    return out


# The choice


def choose_tile(num_tokens: int, dtype: torch.dtype, limits: DeviceLimits) -> PackedTile | None:
    """The tile of `multiply`, or None: dequantise for cuBLAS."""
    if dtype == torch.float32:
        return None
    tile = next((tile for most, tile in TILES.items() if num_tokens <= most), None)
    if tile and limits.has_tensor_memory:
        return tile._replace(block_n=min(tile.block_n, MAX_ROWS_IN_TENSOR_MEMORY))
    return tile


def packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
) -> LinearOutput:
    """x [T, K], packed weight [N, K], bias [N] -> [T, N]; see `Ops.packed_linear`."""
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    if len(x) == 0:
        return x.new_empty(0, weight.shape[0])
    if hopper_tile := hopper_packed.choose_tile(x, weight):
        return hopper_packed.hopper_packed_linear(x, weight, bias, hopper_tile)
    if tile := choose_tile(len(x), x.dtype, device_limits(x.device)):
        return multiply(x, weight, bias, tile)
    return multiply_dequantized(x, weight, bias)
