"""Reads machine code: the hot loop of a kernel, what it executes and how it waits for memory.

Works on what nvdisasm prints, which names branch targets.  Whatever cannot be read raises `Unreadable`: a gate must
not pass because its figure is missing.
"""

import re
from collections import Counter
from dataclasses import dataclass

# the first class whose pattern begins an opcode counts it
CLASSES = {
    "mma": r"[HIQ]G?MMA|UTC\w*MMA",
    "copy": r"LDGSTS|UTMALDG|UBLKCP",
    "ldg": r"LDG(?!DEPBAR)|LD\.E",
    "lds": r"LDSM?(?![A-Z])",
    "sts": r"STS|STSM",
    "local": r"LDL|STL",
    "stg": r"STG|ST\.E|UTMASTG|RED|ATOM",
    "convert": r"[IF]2[IF]P?|F2F|I2FP|FRND",
    "permute": r"PRMT|UPRMT",
    "logic": r"U?LOP3|U?SHF|SGXT|BFE|U?BMSK",
    "half": r"H(ADD|MUL|FMA|MNMX)2|HADD2|HSET",
    "float": r"F(ADD|MUL|FMA|MNMX|SETP|SEL|SWZ|CHK)",
    "special": r"MUFU",
    "shuffle": r"SHFL|REDUX",
    "wait": r"U?BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|ARRIVES|ERRBAR|FENCE|NANOSLEEP",
    "branch": r"U?BRA|BSSY|BSYNC|EXIT|CALL|RET|BREAK",
    "integer": r"U?IMAD|U?IADD|VIADD|U?LEA|U?ISETP|VIMNMX|IMNMX|IABS|U?SEL|U?MOV|CS2R|R2UR|U?PLOP3|VOTE|S2U?R|ULDC|LDC",
}  # fmt: skip
LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_x?_?\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")
# (rows, columns, depth) of one instruction: 16816 of a warp, 64x128x16 of four warps
SMALL_MMA = re.compile(r"[HIQ]MMA\.(?:SP\.)?(16|8)(8|16)(\d+)")
WIDE_MMA = re.compile(r"[HIQ]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")


class Unreadable(ValueError):
    """A figure that should be there and is not."""


@dataclass(frozen=True)
class Instruction:
    op: str
    rest: str


@dataclass(frozen=True)
class Loop:
    """`body` in address order, from the branch's target to the branch."""

    body: tuple[Instruction, ...]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.op)) for i in self.body)

    @property
    def classes(self) -> Counter[str]:
        names = (next((n for n, p in CLASSES.items() if re.match(p, i.op)), "other") for i in self.body)
        return Counter(names)

    @property
    def byte_loads(self) -> int:
        return self.count(r"LD[GS]\b.*\.[US]8\b")

    @property
    def tiles_in_flight(self) -> float | None:
        """Tiles whose copies run while one is computed on; None where nothing is copied or barriers count the bytes.

        A turn commits some groups of copies and waits until at most so many are under way.
        """
        groups = self.count("LDGDEPBAR")
        waits = [re.search(r"SB0, (0x[0-9a-f]+)", i.rest) for i in self.body if i.op == "DEPBAR.LE"]
        left = [int(w[1], 16) for w in waits if w]
        if not groups:
            return None
        if not left:
            raise Unreadable(f"{groups} groups of copies, and no wait for any")
        return 1 + min(left) / groups

    def mma_work(self, warps: int) -> float:
        """Operations of all products of one turn of the whole program, as if all were 16 bit: 8-bit ones cost half."""
        total = 0.0
        for i in self.body:
            wide, small = WIDE_MMA.match(i.op), SMALL_MMA.match(i.op)
            if wide or small:
                m, n, k = (int(x) for x in (wide or small).groups())
                weight = 0.5 if i.op[0] in "IQ" else 2.0 if ".TF32" in i.op else 1.0
                total += weight * 2 * m * n * k * (warps // 4 if wide else warps)
            elif re.match(CLASSES["mma"], i.op):
                raise Unreadable(f"a product of unknown shape: {i.op}")
        return total


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and for each label the number of the instruction behind it."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := LABEL.match(line.strip()):
            labels[found[1]] = len(code)
        elif found := LINE.search(line):
            code.append(Instruction(found[1], found[2].strip()))
    if not code or not any(i.op == "EXIT" for i in code):
        raise Unreadable(f"no machine code in {text[:80]!r}")
    return code, labels


def loops(text: str) -> list[Loop]:
    code, labels = parse(text)
    found = []
    for at, instruction in enumerate(code):
        if not re.match(r"U?BRA", instruction.op):
            continue
        target = TARGET.search(instruction.rest)
        if target is None or target[1] not in labels:
            raise Unreadable(f"a branch to nowhere: {instruction}")
        begin = labels[target[1]]
        if begin < at:  # a branch to itself ends every kernel
            found.append(Loop(tuple(code[begin : at + 1])))
    return found


def hot_loop(text: str) -> Loop | None:
    """The innermost loop that multiplies, else that reads memory, else the shortest; None without any."""

    def rank(loop: Loop) -> tuple[bool, bool, int]:
        kinds = loop.classes
        return kinds["mma"] > 0, kinds["copy"] + kinds["ldg"] > 0, -len(loop.body)

    return max(loops(text), key=rank, default=None)
