"""The inline PTX that the interpreter executes, op by op against plain Python integers; and what it refuses."""

import itertools
import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests import ptx

pytestmark = pytest.mark.skipif("torch.cuda.is_available()", reason="on a GPU the asm is assembled")
WORDS = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x01020304, 0x8899AABB, 0x0F0F0F0F]
MASK = 0xFFFFFFFF
WORD = np.dtype(np.uint32)


def signed(x: int) -> int:
    return x - 2**32 if x >> 31 else x


def prmt(a: int, b: int, selector: int) -> int:
    octets = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        octet = octets[nibble & 7]
        out |= (255 * (octet >> 7) if nibble & 8 else octet) << 8 * i
    return out


def lop3(table: int, a: int, b: int, c: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
    return sum((table >> k & 1) << i for i, k in enumerate(bits))


PLAIN = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "not.b32": lambda a: ~a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.b32": lambda a, b: a >> b,
    "shr.u32": lambda a, b: a >> b,
    "shr.s32": lambda a, b: signed(a) >> b,
    "add.u32": lambda a, b: a + b,
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.lo.s32": lambda a, b: signed(a) * signed(b),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.lo.s32": lambda a, b, c: signed(a) * signed(b) + signed(c),
    "prmt.b32": prmt,
}


def on_words(text: str, *columns: np.ndarray) -> list[int]:
    constraints = ",".join(["=r"] + ["r"] * len(columns))
    return ptx.run(ptx.Call(text, constraints, (WORD,), 1), columns)[0].tolist()


@pytest.mark.parametrize("mnemonic", PLAIN)
def test_an_op_is_its_definition(mnemonic):
    arity = PLAIN[mnemonic].__code__.co_argcount
    rows = list(itertools.product(WORDS, repeat=arity))
    rng = random.Random(0)
    rows += [tuple(rng.getrandbits(32) for _ in range(arity)) for _ in range(500)]
    columns = [np.array(column, np.uint32) for column in zip(*rows, strict=True)]
    operands = ", ".join(f"${i}" for i in range(arity + 1))
    assert on_words(f"{mnemonic} {operands};", *columns) == [PLAIN[mnemonic](*row) & MASK for row in rows]


@pytest.mark.parametrize("table", [0xEA, 0x96, 0xE8, 0x6A, 0xCA, 0xF8, 0x00, 0xFF, 0x01, 0x80])
def test_lop3_is_its_table(table):
    rows = list(itertools.product(WORDS, repeat=3))
    columns = [np.array(column, np.uint32) for column in zip(*rows, strict=True)]
    got = on_words(f"lop3.b32 $0, $1, $2, $3, {table:#x};", *columns)
    assert got == [lop3(table, *row) for row in rows]


def test_every_selector_nibble_of_prmt():
    a, b = 0x7F80FF01, 0x00C0DEAD
    selectors = np.arange(2**16, dtype=np.uint32)
    pair = [np.full(2**16, x, np.uint32) for x in (a, b)]
    assert on_words("prmt.b32 $0, $1, $2, $3;", *pair, selectors) == [prmt(a, b, s) for s in range(2**16)]


def test_registers_comments_scopes_and_immediates():
    text = """{ // a scope
    .reg .b32 lo, hi; /* two
    registers */
    and.b32 lo, $1, 15; shr.u32 hi, $1, 0x1C;
    mad.lo.s32 $0, lo, 256, hi; }"""
    assert on_words(text, np.array([0xA000000B], np.uint32)) == [0xB0A]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("mov.b32 $0, t;", "invalid literal"),
        (".reg .b32 t; mov.b32 $0, t;", "before it is written"),
        (".reg .b32 t; mov.b32 t, $1;", "never writes"),
        ("mov.b32 $1, 0; mov.b32 $0, $1;", "writes"),
        ("mov.b32 t, $1; mov.b32 $0, t;", "writes t"),
        (".reg .f32 t; mov.b32 $0, $1;", "only 32-bit integer registers"),
        ("add.b32 $0, $1, $1;", "not executed"),
        ("and.u32 $0, $1, $1;", "not executed"),
        ("add.f32 $0, $1, $1;", "not executed"),
        ("add.u32 $0, $1;", "takes 2 operands"),
        ("prmt.b32.f4e $0, $1, $1, 0;", "not executed"),
    ],
)
def test_what_is_not_straight_integer_code_is_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        on_words(text, np.array([1], np.uint32))


def test_constraints_name_every_register():
    with pytest.raises(ValueError, match="constraints"):
        ptx.run(ptx.Call("mov.b32 $0, $1;", "=r,r,r", (WORD,), 1), [np.zeros(4, np.uint32)])


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("pack", [1, 2, 4])
def test_packs_keep_the_order_of_the_last_axis(itemsize, pack):
    """A copy is a copy; the lanes above an element that does not fill its register hold ones."""
    dtype = np.dtype(f"u{itemsize}")
    per, count = ptx.packed(itemsize, pack)
    values = np.random.default_rng(0).integers(0, 2 ** (8 * itemsize), (4, 8)).astype(dtype)
    copy = "".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    constraints = ",".join(["=r"] * count + ["r"] * count)
    assert np.array_equal(ptx.run(ptx.Call(copy, constraints, (dtype,), pack), [values])[0], values)
    held = 8 * itemsize * per
    first = ptx._to_registers(values.reshape(-1), pack)[0][0]
    assert int(first) >> held == MASK >> held
    assert (int(first) & 2 ** (8 * itemsize) - 1, count * per) == (values[0, 0], pack)


SWAP: tl.constexpr = tl.constexpr("prmt.b32 $0, $1, 0, 0x2301;")
NIBBLES: tl.constexpr = tl.constexpr("""{
    .reg .b32 t;
    and.b32 $0, $2, 0x0F0F0F0F;
    shr.u32 t, $2, 4;
    and.b32 $1, t, 0x0F0F0F0F;
}""")
SCALE: tl.constexpr = tl.constexpr("mad.lo.u32 $0, $1, $2, 0;")
SHARED_SCALE: tl.constexpr = tl.constexpr("""// shares the scale
    mad.lo.u32 $0, $1, $2, 0;""")
SHARED_SWAP: tl.constexpr = tl.constexpr("""// shares
    .reg .b32 t; prmt.b32 t, $1, 0, 0x2301; mad.lo.u32 $0, t, $2, 0;""")


@triton.jit
def _bytes_kernel(out, x, ASM: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(x + o_n)
    tl.store(out + o_n, tl.inline_asm_elementwise(ASM, "=r,r", [b_x], tl.uint8, is_pure=True, pack=4))


@triton.jit
def _two_results_kernel(low, high, x, R: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    b_low, b_high = tl.inline_asm_elementwise(
        NIBBLES, "=r,=r,r", [tl.load(x + o_n)], (tl.int8, tl.uint8), is_pure=True, pack=4
    )
    tl.store(low + o_n, b_low)
    tl.store(high + o_n, b_high)


@triton.jit
def _scaled_kernel(out, x, scale, ASM: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    o_r = tl.arange(0, R)[:, None]
    o_n = o_r * N + tl.arange(0, N)[None, :]
    b_out = tl.inline_asm_elementwise(
        ASM, "=r,r,r,r,r,r", [tl.load(x + o_n), tl.load(scale + o_r)], tl.uint8, is_pure=True, pack=4
    )
    tl.store(out + o_n, b_out)


def test_a_kernel_with_two_results_of_other_types():
    x = torch.arange(256).to(torch.uint8).view(8, 32)
    low, high = torch.empty(8, 32, dtype=torch.int8), torch.empty(8, 32, dtype=torch.uint8)
    _two_results_kernel[(1,)](low, high, x, R=8, N=32)
    assert torch.equal(low, (x & 15).to(torch.int8))
    assert torch.equal(high, x >> 4)


@pytest.mark.parametrize("size", [8, 32])
def test_asm_that_moves_elements_inside_a_pack_is_refused(size):
    x = torch.arange(size).to(torch.uint8)
    with pytest.raises(Exception, match="not element-pure"):
        _bytes_kernel[(1,)](torch.empty_like(x), x, ASM=SWAP, N=size)


def test_a_scale_read_from_one_lane_has_to_be_declared():
    x = (torch.arange(64) % 15).to(torch.uint8).view(4, 16)
    scale = torch.tensor([1, 2, 3, 16], dtype=torch.int32)
    out = torch.empty_like(x)
    with pytest.raises(Exception, match="not element-pure"):
        _scaled_kernel[(1,)](out, x, scale, ASM=SCALE, R=4, N=16)
    _scaled_kernel[(1,)](out, x, scale, ASM=SHARED_SCALE, R=4, N=16)
    assert torch.equal(out, (x * scale[:, None]).to(torch.uint8))
    with pytest.raises(Exception, match="not element-pure"):
        _scaled_kernel[(1,)](out, x, scale, ASM=SHARED_SWAP, R=4, N=16)


def test_a_block_is_a_whole_number_of_packs():
    with pytest.raises(Exception, match="no multiple of the pack"):
        _bytes_kernel[(1,)](
            torch.empty(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), ASM=SWAP, N=2
        )
