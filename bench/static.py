"""The figures of one compiled kernel that need no GPU: registers, spills, occupancy, and the cost of its hot loop.

issue/mem = instructions of a turn x warps / 4 schedulers over the clocks that memory takes for the bytes of that turn
(docs/kernels.md): above 1 the kernel cannot reach the memory's speed.  issue/mma is the same against the tensor cores.
Both ignore latency and slow pipes, so they bound the time from below.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import triton

from bench.packs import astray
from bench.sass import Loop, Unreadable, hot_loop
from bench.shapes import CHIP_OF, CHIPS
from bench.target import Launch

# of one SM: bytes of shared memory, those one program may have, warps, programs
ROOM = {
    80: (167936, 166912, 64, 32),
    89: (102400, 101376, 48, 24),
    90: (233472, 232448, 64, 32),
    100: (233472, 232448, 64, 32),
}
SM_REGISTERS = 65536
SHARED_OVERHEAD = 1024  # the system's own, for each program
# dense operations a clock and SM of 16-bit products
F16_PER_CLOCK = {80: 2048, 89: 1024, 90: 4096}
# Triton counts what ptxas makes of its kernels on these in labels that this reader knows
LOOPS = (80, 89, 90)
PTX_MMA = re.compile(r"\b(wgmma\.mma_async|mma|tcgen05\.mma)\.[\w.:]+")
LOAD = re.compile(r"= tt\.load .*: tensor<")


def run_tool(tool: str, *arguments: str, binary: bytes) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        return subprocess.run(
            [path, *arguments, str(file)], capture_output=True, text=True, check=True
        ).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and local memory, where spills lie."""
    text = run_tool("cuobjdump", "--dump-resource-usage", binary=cubin)
    found = {name: re.search(rf"\b{name}:(\d+)", text) for name in ("REG", "STACK", "LOCAL")}
    if not all(found.values()):
        raise Unreadable(f"no resource usage in {text!r}")
    numbers = {name: int(m[1]) for name, m in found.items() if m}
    return {"regs": numbers["REG"], "spill": numbers["STACK"] + numbers["LOCAL"]}


def programs_per_sm(target: int, regs: int, warps: int, shared: int) -> int:
    sm_shared, most, sm_warps, programs = ROOM[target]
    if shared > most:
        return 0
    by_registers = SM_REGISTERS // (-(-regs // 8) * 8 * 32 * warps)
    return min(programs, sm_warps // warps, by_registers, sm_shared // (shared + SHARED_OVERHEAD))


def mnemonics(ptx: str) -> list[str]:
    """Kinds of tensor-core products: `wgmma s32.s8.s8`."""
    kinds = set()
    for found in PTX_MMA.finditer(ptx):
        types = re.findall(r"(?:f32|f16|s32|bf16|tf32|e4m3|e5m2|s8|u8|kind::\w+)", found[0])
        kinds.add(" ".join([found[1].split(".")[0], ".".join(dict.fromkeys(types))]))
    return sorted(kinds)


def loop_lines(ttgir: str) -> list[list[str]]:
    """The bodies of all loops that hold no other loop."""
    open_loops: list[tuple[int, list[str]]] = []
    bodies: list[list[str]] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if re.search(r"\bscf\.(for|while)\b", line):
            for _, body in open_loops:
                body.clear()  # only the innermost count
            open_loops.append((indent, []))
        elif open_loops and indent <= open_loops[-1][0] and line.lstrip().startswith("}"):
            bodies.append(open_loops.pop()[1])
        elif open_loops:
            open_loops[-1][1].append(line)
    return bodies


def waiting_loads(ttgir: str) -> int:
    """Block loads in the innermost loops that the pipeliner left where they stand; scalars are not counted."""
    bodies = loop_lines(ttgir)
    dots = [b for b in bodies if any(re.search(r"\b(tt|ttng)\.\w*dot\b", x) for x in b)]
    return max((sum(bool(LOAD.search(x)) for x in b) for b in dots or bodies), default=0)


def buffers(ttgir: str) -> int | None:
    """Tiles that shared memory holds for a loop fed by barriers; the least of its operands."""
    depths = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x[a-z]", ttgir)
    return min(map(int, depths), default=None)


def in_flight(loop: Loop, ttgir: str) -> float | None:
    """Tiles on their way from memory while one is computed on; None where the loop copies nothing."""
    if not loop.classes["copy"]:
        return None
    if (tiles := loop.tiles_in_flight) is not None:
        return round(tiles, 2)
    held = buffers(ttgir)
    if held is None:
        raise Unreadable("a loop copies by barriers, and no buffers are to be found")
    return float(held - 1)


def loop_figures(
    launch: Launch, target: int, streams: Callable[[Mapping[str, Any]], int] | None
) -> dict[str, Any] | None:
    kernel = launch.compiled
    loop = hot_loop(run_tool("nvdisasm", "-c", binary=kernel.asm["cubin"]))
    if loop is None:
        if streams:
            raise Unreadable(f"{launch.name} says what its hot loop reads, and sm_{target} code has no loop")
        return None
    warps, chip = kernel.metadata.num_warps, CHIPS[CHIP_OF[target]]
    issue = len(loop.body) * warps / 4
    figures: dict[str, Any] = {
        "instructions": len(loop.body),
        "classes": dict(sorted(loop.classes.items())),
        "byte_loads": loop.byte_loads,
        "copies": loop.classes["copy"],
        "shared_stores": loop.classes["sts"],
        "waiting_loads": waiting_loads(kernel.asm["ttgir"]),
        "tiles": in_flight(loop, kernel.asm["ttgir"]),
    }
    if streams:
        turn_bytes = streams(launch.constants)
        figures |= {
            "bytes": turn_bytes,
            "issue_mem": round(issue / (turn_bytes / chip.bytes_per_clock), 3),
        }
    if work := loop.mma_work(warps):
        figures["issue_mma"] = round(issue / (work / F16_PER_CLOCK[target]), 3)
    return figures


def figures(
    launch: Launch, target: int, streams: Callable[[Mapping[str, Any]], int] | None
) -> dict[str, Any]:
    """One row of the static table; `loop` is None where the code has no loop, absent where none is read."""
    kernel = launch.compiled
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    used = resources(kernel.asm["cubin"])
    row = {
        "kernel": launch.name,
        "target": target,
        # launches of one build were compiled once
        "build": kernel.hash[:16],
        "warps": warps,
        **used,
        "shared": shared,
        "ctas": programs_per_sm(target, used["regs"], warps, shared),
        "mma": mnemonics(kernel.asm["ptx"]),
        "astray": list(astray(kernel.asm["ttgir"])),
    }
    if target in LOOPS:
        row["loop"] = loop_figures(launch, target, streams)
    return row
