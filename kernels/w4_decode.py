"""From a byte to the two weights in it: int4 codes to what the tensor core multiplies, in registers.

A byte holds one code of each of two neighbouring groups, so both halves of a block feed a dot over one whole group and
nothing changes its place.  Four bytes are decoded at a time, because Triton's own int8 arithmetic widens every element:
3 instructions for 8 symmetric weights, 7 for 8 with zero points or progressive scales (IMAD and XOR as in LiquidGEMM,
arXiv 2509.01229), 7 for 8 as e4m3.  Every variant is tried on all bytes in tests/kernels/test_w4_decode.py.
"""

import triton
import triton.language as tl

# codes in two's complement, moved to the high half of a byte: 16 times the weight
SYMMETRIC: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 even;
    shl.b32 even, $2, 4;
    and.b32 $0, even, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0;
    }"""
)

# u + (128 - zero) in 113..143, never a carry; flipping the sign bit takes 128 away.  $3, $7: that term in every byte
ZEROS: tl.constexpr = tl.constexpr(
    """{
    // shares $3 and $7
    .reg .b32 even, odd;
    and.b32 even, $2, 0x0F0F0F0F;
    shr.u32 odd, $2, 4;
    and.b32 odd, odd, 0x0F0F0F0F;
    add.u32 even, even, $3;
    add.u32 odd, odd, $7;
    xor.b32 $0, even, 0x80808080;
    xor.b32 $1, odd, 0x80808080;
    }"""
)

# u * step + (128 - offset): in 0..255 for every legal weight, so the bytes of the sum are exact even where the term is
# negative.  $3, $11: the step; $7, $15: the term times 0x01010101
PROGRESSIVE: tl.constexpr = tl.constexpr(
    """{
    // shares $3, $7, $11 and $15
    .reg .b32 even, odd;
    and.b32 even, $2, 0x0F0F0F0F;
    shr.u32 odd, $2, 4;
    and.b32 odd, odd, 0x0F0F0F0F;
    mad.lo.u32 even, even, $3, $7;
    mad.lo.u32 odd, odd, $11, $15;
    xor.b32 $0, even, 0x80808080;
    xor.b32 $1, odd, 0x80808080;
    }"""
)

# nibble: magnitude (less one where negative) << 1 | sign.  e4m3 is linear from its subnormals to 16 * 2^-9, so the byte
# of 2 q is 2 |q| | sign << 7: magnitude << 1, plus 0x82 where negative; the value is q * 2^-8
E4M3: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 shifted, magnitude, sign;
    and.b32 magnitude, $2, 0x0E0E0E0E;
    and.b32 sign, $2, 0x01010101;
    mad.lo.u32 $0, sign, 0x82, magnitude;
    shr.u32 shifted, $2, 4;
    and.b32 magnitude, shifted, 0x0E0E0E0E;
    and.b32 sign, shifted, 0x01010101;
    mad.lo.u32 $1, sign, 0x82, magnitude;
    }"""
)


@triton.jit
def _in_every_byte(b):
    return b * 0x01010101


@triton.jit
def decode(b_w, p_meta, DECODE: tl.constexpr):
    """The even and the odd group of a block of bytes [N, CHUNK]; `p_meta` [N] is read where DECODE has any."""
    if DECODE == "symmetric":
        b_even, b_odd = tl.inline_asm_elementwise(
            SYMMETRIC, "=r,=r,r", [b_w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    elif DECODE == "e4m3":
        b_even, b_odd = tl.inline_asm_elementwise(
            E4M3, "=r,=r,r", [b_w], dtype=(tl.float8e4nv, tl.float8e4nv), is_pure=True, pack=4
        )
    elif DECODE == "zeros":
        b_z = tl.load(p_meta)
        b_c0 = _in_every_byte(128 - (b_z & 0xFF))
        b_c1 = _in_every_byte(128 - ((b_z >> 8) & 0xFF))
        b_even, b_odd = tl.inline_asm_elementwise(
            ZEROS,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [b_w, b_c0[:, None], b_c1[:, None]],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        # step | offset << 8 of the even group, the odd one's above
        b_z = tl.load(p_meta)
        b_c0 = _in_every_byte(128 - ((b_z >> 8) & 0xFF))
        b_c1 = _in_every_byte(128 - ((b_z >> 24) & 0xFF))
        b_even, b_odd = tl.inline_asm_elementwise(
            PROGRESSIVE,
            "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [b_w, (b_z & 0xFF)[:, None], b_c0[:, None], ((b_z >> 16) & 0xFF)[:, None], b_c1[:, None]],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return b_even, b_odd
