"""Codes as operands of tensor cores: inline PTX that turns four bytes at a time into fp16 or int8.

fp16 comes by placing a code in the mantissa of 1024 (0x6400): code u reads as 1024 + u, a high nibble left in place as
1024 + 16u.  The caller folds such biases into sums that it has anyway; nothing is subtracted per element.
Every block treats its elements alike and keeps their order, so it is right for any register layout.
"""

import triton
import triton.language as tl

BYTES_ASM: tl.constexpr = tl.constexpr("""
    prmt.b32 $0, $2, 0x64646464, 0x4140;
    prmt.b32 $1, $2, 0x64646464, 0x4342;
""")
NIBBLES_ASM: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high;
    and.b32 low, $4, 0x0F0F0F0F;
    and.b32 high, $4, 0xF0F0F0F0;
    prmt.b32 $0, low, 0x64646464, 0x4140;
    prmt.b32 $1, low, 0x64646464, 0x4342;
    prmt.b32 $2, high, 0x64646464, 0x4140;
    prmt.b32 $3, high, 0x64646464, 0x4342;
}""")
# high nibbles: x ^ 8 is the two's complement of x - 8, and where they stand it counts sixteen times
INT8_ASM: tl.constexpr = tl.constexpr("""
    and.b32 $0, $2, 0x0F0F0F0F;
    lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
""")


@triton.jit
def bytes_to_fp16(b_u):
    """1024 + u, u the bytes of an int8 tensor as 0..255."""
    return tl.inline_asm_elementwise(BYTES_ASM, "=r,=r,r", [b_u], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def nibbles_to_fp16(b_u):
    """1024 + low, 1024 + 16 * high."""
    return tl.inline_asm_elementwise(
        NIBBLES_ASM, "=r,=r,=r,=r,r", [b_u], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
    )


@triton.jit
def nibbles_to_int8(b_u):
    """low (0..15), 16 * (high - 8)."""
    return tl.inline_asm_elementwise(
        INT8_ASM, "=r,=r,r", [b_u], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def scale_pair(b_pair):
    """Key and value scales (or zeros), packed as two fp16 in an int32: 2-byte loads in a loop are not pipelined."""
    b_k = b_pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_k, (b_pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
