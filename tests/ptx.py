"""Executes the inline PTX of our kernels on numpy: straight-line 32-bit integer code, as tl.inline_asm_elementwise takes it.

A register holds min(pack, 4 / item size) elements, the first lowest; what it has above them is unspecified, and is
ones here.  Which elements of a block share a pack is the layout's affair, so asm has to be element-pure: another
grouping must give the same bits, and `run` raises where it does not.  Asm that reads one argument (a scale) from one
lane for the whole pack says `// shares` in its text: it is right only where packs lie along the last axis and that
argument is constant over two of them.  Then elements change places only inside such pairs.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Register = np.ndarray  # uint32, one element a pack
SHARES = re.compile(r"//\s*shares\b")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
DECLARATION = re.compile(r"\.reg\s+\.[bus]32\s+(.+)", re.DOTALL)


class Packed(NamedTuple):
    """How one tensor of a call lies in registers."""

    per_register: int
    registers: int


def packed(itemsize: int, pack: int) -> Packed:
    if itemsize > 4:
        raise ValueError(f"inline asm on elements of {itemsize} bytes; executed here: 1, 2 and 4")
    per = min(4 // itemsize, pack)
    if pack % per:
        raise ValueError(f"a pack of {pack} elements of {itemsize} bytes does not fill its registers")
    return Packed(per, pack // per)


def _shift(a: Register, b: Register, by: Callable[[Register, Register], Register]) -> Register:
    """PTX clamps a shift at 32, numpy leaves it undefined."""
    return np.where(b > 31, by(by(a, np.uint32(31)), np.uint32(1)), by(a, np.minimum(b, np.uint32(31))))


def _shr_signed(a: Register, b: Register) -> Register:
    return (a.view(np.int32) >> np.minimum(b, np.uint32(31)).astype(np.int32)).view(np.uint32)


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    """Byte i of the result: byte (nibble i & 7) of b:a, or its sign eight times where the nibble has bit 3."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64)) & np.uint64(255)).astype(
            np.uint32
        )
        sign = np.where(byte > 127, np.uint32(255), np.uint32(0))
        out |= np.where(nibble > 7, sign, byte) << np.uint32(8 * i)
    return out


def _lop3(a: Register, b: Register, c: Register, lut: Register) -> Register:
    """Bit k = 4 a + 2 b + c of the table is the result for those three bits."""
    out = np.zeros_like(a)
    for k in range(8):
        rows = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        out |= np.where(lut >> np.uint32(k) & np.uint32(1), rows, np.uint32(0))
    return out


OPS: dict[str, tuple[int, Callable[..., Register]]] = {
    "mov": (1, lambda a: a),
    "not": (1, lambda a: ~a),
    "and": (2, lambda a, b: a & b),
    "or": (2, lambda a, b: a | b),
    "xor": (2, lambda a, b: a ^ b),
    "shl": (2, lambda a, b: _shift(a, b, np.left_shift)),
    "shr.u": (2, lambda a, b: _shift(a, b, np.right_shift)),
    "shr.s": (2, _shr_signed),
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul.lo": (2, lambda a, b: a * b),
    "mad.lo": (3, lambda a, b, c: a * b + c),
    "prmt": (3, _prmt),
    "lop3": (4, _lop3),
}
BITWISE = ("b32",)
INTEGER = ("u32", "s32")
TYPES = {"mov": BITWISE + INTEGER} | dict.fromkeys(("add", "sub", "mul.lo", "mad.lo"), INTEGER)


def operation(mnemonic: str) -> tuple[int, Callable[..., Register]]:
    name, _, kind = mnemonic.rpartition(".")
    if name == "shr" and kind in BITWISE + INTEGER:
        return OPS["shr.s" if kind == "s32" else "shr.u"]
    if name not in OPS or name.startswith("shr") or kind not in TYPES.get(name, BITWISE):
        raise ValueError(f"inline asm: {mnemonic!r} is not executed here; known: {', '.join(OPS)} on 32 bits")
    return OPS[name]


class Program(NamedTuple):
    """`declared`: the registers of its own.  A statement is (mnemonic, target, sources)."""

    declared: frozenset[str]
    statements: tuple[tuple[str, str, tuple[str, ...]], ...]


def parse(text: str) -> Program:
    declared: set[str] = set()
    statements = []
    for raw in COMMENT.sub(" ", text).replace("{", " ").replace("}", " ").split(";"):
        statement = raw.strip()
        if not statement:
            continue
        if statement.startswith(".reg"):
            match = DECLARATION.fullmatch(statement)
            if match is None:
                raise ValueError(
                    f"inline asm: only 32-bit integer registers are executed here, got {statement!r}"
                )
            declared.update(name.strip() for name in match[1].split(","))
            continue
        mnemonic, _, operands = statement.partition(" ")
        target, *sources = (operand.strip() for operand in operands.split(","))
        statements.append((mnemonic, target, tuple(sources)))
    return Program(frozenset(declared), tuple(statements))


def _execute(
    program: Program, inputs: dict[str, Register], outputs: Sequence[str], lanes: int
) -> list[Register]:
    values = dict(inputs)

    def read(operand: str) -> Register:
        if operand in values:
            return values[operand]
        if operand in program.declared or operand in outputs:
            raise ValueError(f"inline asm reads {operand} before it is written")
        return np.full(lanes, int(operand, 0) & 0xFFFFFFFF, np.uint32)

    for mnemonic, target, sources in program.statements:
        arity, compute = operation(mnemonic)
        if len(sources) != arity:
            raise ValueError(f"inline asm: {mnemonic} takes {arity} operands, got {sources}")
        if target not in program.declared and target not in outputs:
            raise ValueError(f"inline asm writes {target}, neither an output nor a register of its own")
        with np.errstate(over="ignore"):
            values[target] = compute(*map(read, sources)).astype(np.uint32)
    missing = [name for name in outputs if name not in values]
    if missing:
        raise ValueError(f"inline asm never writes {missing}")
    return [values[name] for name in outputs]


def _to_registers(flat: np.ndarray, pack: int) -> list[Register]:
    per, count = packed(flat.dtype.itemsize, pack)
    lanes = flat.view(np.uint8).reshape(-1, count, per * flat.dtype.itemsize)
    full = np.full((*lanes.shape[:2], 4), 0xFF, np.uint8)
    full[..., : lanes.shape[2]] = lanes
    words = full.view(np.uint32)[..., 0]
    return [words[:, i].copy() for i in range(count)]


def _from_registers(registers: Sequence[Register], dtype: np.dtype, pack: int) -> np.ndarray:
    per, _ = packed(dtype.itemsize, pack)
    lanes = np.stack(registers, 1)[..., None].view(np.uint8)[..., : per * dtype.itemsize]
    return np.ascontiguousarray(lanes).view(dtype).reshape(-1)


class Call(NamedTuple):
    """One inline_asm_elementwise: its text, its constraints, the numpy types of its results, elements a pack."""

    text: str
    constraints: str
    dtypes: tuple[np.dtype, ...]
    pack: int

    def on(self, flats: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The results for flat arguments whose elements are grouped as they stand."""
        counts = [packed(dtype.itemsize, self.pack).registers for dtype in self.dtypes]
        outputs = [f"${i}" for i in range(sum(counts))]
        arguments = [register for flat in flats for register in _to_registers(flat, self.pack)]
        inputs = {f"${len(outputs) + i}": register for i, register in enumerate(arguments)}
        expected = ["=r"] * len(outputs) + ["r"] * len(inputs)
        if self.constraints.replace(" ", "").replace("&", "").split(",") != expected:
            raise ValueError(f"inline asm: constraints {self.constraints!r}, registers {','.join(expected)}")
        results = _execute(parse(self.text), inputs, outputs, flats[0].size // self.pack)
        ends = np.cumsum(counts)
        return [
            _from_registers(results[end - count : end], dtype, self.pack)
            for end, count, dtype in zip(ends, counts, self.dtypes, strict=True)
        ]


def regrouped(size: int, pack: int, shares: bool) -> np.ndarray:
    """Another order of the elements: packs of elements far apart, or shifted by one in every two packs."""
    order = np.arange(size)
    if not shares:
        return order.reshape(pack, -1)[::-1].T.reshape(-1)
    pair = 2 * pack if size % (2 * pack) == 0 else pack
    return np.roll(order.reshape(-1, pair), -1, axis=1).reshape(-1)


def run(call: Call, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results, of the broadcast shape of the arguments."""
    shape = np.broadcast_shapes(*(a.shape for a in arguments))
    flats = [np.ascontiguousarray(np.broadcast_to(a, shape)).reshape(-1) for a in arguments]
    size = flats[0].size
    if size % call.pack:
        raise ValueError(f"inline asm: {size} elements are no multiple of the pack of {call.pack}")
    results = call.on(flats)
    if call.pack > 1:
        order = regrouped(size, call.pack, bool(SHARES.search(call.text)))
        for result, other in zip(results, call.on([flat[order] for flat in flats]), strict=True):
            if result[order].tobytes() != other.tobytes():
                raise ValueError(
                    f"inline asm is not element-pure: its result depends on which {call.pack} elements share a "
                    f"register, in which order (see tests/ptx.py on `// shares`): {call.text}"
                )
    return [result.reshape(shape) for result in results]
