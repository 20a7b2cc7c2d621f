"""fp8 values for the second operand of a small `tl.dot`, loaded as int16 pairs.

The operand's registers hold two neighbouring rows of one column. 16-bit elements come from shared
memory in that order by one instruction for many, bytes only one by one. So fp8 [K, N] is loaded as
int16 [K, N / 2], and a product with the even columns and one with the odd ones take its place.
"""

import triton.language as tl

from nanovllm.kernels.triton.launch import jit


@jit
def unpack_pairs(pairs, ASSEMBLY: tl.constexpr):
    """int16 [K, N / 2], two e4m3 numbers each -> float16 (even columns, odd columns)."""
    if ASSEMBLY:
        # On two rows at a time: their four bytes are sorted by column, each half is converted.
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return even, odd
