"""The static gate: what serving launches compiles for GPUs that are not here, within its limits; and it can fail."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench import gates
from bench.aot import plan
from bench.gates import Limit, failures
from bench.packs import astray
from bench.sass import Unreadable, hot_loop
from bench.static import programs_per_sm, waiting_loads
from bench.target import TARGETS
from kernels.catalog import SPECS
from tests.source import ROOT

TRITON_OPS = {spec.name for spec in SPECS if "triton" in spec.runs}
MAX_COMPILES = 250


def gate(*options: str, timeout_s: int) -> dict[str, Any]:
    """The gate in a process of its own: here Triton interprets.  What it compiled is kept in bench/out."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.aot", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == bool(result["failures"]), done.stderr[-3000:]
    return result


def assert_holds(result: dict[str, Any]) -> None:
    assert not result["failures"], "\n".join(result["failures"])
    seen = result["rows"] + result["unsupported"]
    assert {(r["op"], r["target"]) for r in seen} == {(op, t) for op in TRITON_OPS for t in TARGETS}
    assert all(r["tag"] == "static" for r in seen)
    assert all(r["target"] < 89 for r in result["unsupported"]), result["unsupported"]


def test_what_is_served_holds() -> None:
    result = gate(timeout_s=300)
    builds = len({r["build"] for r in result["rows"]})
    assert builds <= MAX_COMPILES, f"{builds} compiles: too many for `make test`"
    assert_holds(result)
    integer = [r for r in result["rows"] if r["kernel"].startswith("_gemm_w") and r["mma"]]
    assert integer
    assert all(any(t in kind for t in ("s32.s8", "f32.e4m3")) for r in integer for kind in r["mma"]), integer


@pytest.mark.slow
def test_everything_holds() -> None:
    assert_holds(gate("--full", timeout_s=3600))


def sass(*lines: str) -> str:
    """nvdisasm's form: labels as they are, instructions behind their address."""
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * i:04x}*/    {line} ;"
        for i, line in enumerate(lines)
    )


PIPELINED = sass(
    "LDC R1, c[0x0][0x28]",
    ".L_x_1:",
    "@P0 LDG.E.128 R4, desc[UR4][R2.64]",
    "@P0 BRA `(.L_x_1)",
    ".L_x_2:",
    "DEPBAR.LE SB0, 0x3",
    "LDS.U8 R8, [R9]",
    "HMMA.16816.F32.BF16 R4, R4, R8, R4",
    "IMMA.16832.S8.S8 R4, R4.ROW, R8.COL, R4",
    "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
    "LDGDEPBAR",
    "LDGDEPBAR",
    "LDGDEPBAR",
    "@!P4 BRA `(.L_x_2)",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_3)",
)


def test_the_hot_loop_is_the_one_that_multiplies() -> None:
    loop = hot_loop(PIPELINED)
    assert loop is not None
    assert loop.body[0].op == "DEPBAR.LE"
    assert len(loop.body) == 9
    assert loop.classes["mma"] == 2
    assert loop.classes["copy"] == loop.byte_loads == 1
    assert loop.tiles_in_flight == 2
    # of two warps; the integer product takes half as long
    assert loop.mma_work(2) == 2 * (2 * 16 * 8 * 16 + 16 * 8 * 32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        sass("LDC R1, c[0x0][0x28]"),
        PIPELINED.replace(".L_x_1:", ".L_x_9:"),
        PIPELINED.replace("DEPBAR.LE SB0, 0x3", "NOP"),
        PIPELINED.replace("HMMA.16816", "HMMA.NEW"),
    ],
)
def test_what_cannot_be_read_is_no_pass(text: str) -> None:
    def read() -> None:
        loop = hot_loop(text)
        assert loop is not None
        assert loop.tiles_in_flight
        assert loop.mma_work(4)

    with pytest.raises(Unreadable):
        read()


def test_occupancy() -> None:
    assert programs_per_sm(90, 128, 4, 0) == 4  # by registers
    assert programs_per_sm(90, 32, 4, 0) == 16  # by warps
    assert programs_per_sm(90, 32, 1, 50_000) == 4  # by shared memory
    assert programs_per_sm(80, 32, 1, 200_000) == 0


def test_loads_that_wait_are_those_of_the_innermost_product_loop() -> None:
    text = """
      scf.for %i = %a to %b step %c {
        %q = tt.load %p : tensor<16x!tt.ptr<f16>, #blocked>
        scf.for %j = %a to %b step %c {
          %x = tt.load %p : tensor<16x!tt.ptr<f16>, #blocked>
          %y = tt.load %p : !tt.ptr<i32>
          %d = tt.dot %x, %x, %z : tensor<16x16xf16>
        }
      }
    """
    assert waiting_loads(text) == 1


GOOD = {
    "op": "attention", "case": "fmtint8", "served": ["K128-fmtint8"], "config": None, "kernel": "_attn_decode_kernel", "target": 90, "regs": 100, "spill": 0,
    "shared": 1000, "ctas": 4, "loop": {"byte_loads": 0, "tiles": 2.0, "issue_mem": 0.24, "instructions": 400},
}  # fmt: skip


def changed(**keys: Any) -> dict[str, Any]:
    own = {k: v for k, v in keys.items() if k in GOOD}
    return {**GOOD, **own, "loop": {**GOOD["loop"], **{k: v for k, v in keys.items() if k not in GOOD}}}


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (changed(spill=8), "spills"),
        (changed(ctas=0), "does not fit"),
        (changed(byte_loads=1), "single bytes"),
        (changed(tiles=1.0), "tiles"),
        (changed(issue_mem=0.251), "issue_mem"),
        (changed(issue_mem=None), "issue_mem"),
        (changed(regs=111), "regs"),
        (changed(instructions=441), "instructions"),
        (changed(ctas=3), "ctas"),
        (changed(instructions=None), "not read"),
        (changed(kernel="_attn_other_kernel"), "nothing recorded"),
    ],
)
def test_every_gate_closes(row: dict[str, Any], word: str) -> None:
    assert not failures([GOOD], [GOOD], whole=False)
    found = failures([row], [GOOD], whole=False)
    assert any(word in line for line in found), found


def test_bytes_are_read_by_the_named_formats_alone() -> None:
    row = changed(kernel="_rope_kv_write_kernel", byte_loads=8)
    for fmt, wrong in (("fmtint4", False), ("fmtbf16", True)):
        one = {**row, "case": f"K128-{fmt}", "served": []}
        assert any("single bytes" in line for line in failures([one], None, whole=False)) == wrong


def test_limits_of_rows_that_are_not_served_wait_for_a_full_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "LIMITS", (Limit("_other_kernel", "tiles", 2, full_only=True),))
    assert not failures([GOOD], None, whole=True, full=False)
    assert any("finds no row" in line for line in failures([GOOD], None, whole=True))


def test_other_targets_compile_a_case_of_the_tensor_cores() -> None:
    """Not one of fp32, whose products they do not take."""
    jobs = plan(
        full=False, ops=["attention", "attn_prefill", "gemm_w8a8", "gemm_w4a8"], targets=[80, 89, 100]
    )
    assert len(jobs) == 12
    assert all(job.case.dtype == torch.bfloat16 for job in jobs)
    assert not any("fp8" in job.case.id for job in jobs if job.target == 80)


def test_the_widest_tiles_that_serving_launches_are_compiled() -> None:
    served = {name for job in plan(full=False, ops=["attention"], targets=[90]) for name in job.served}
    for K in (64, 128):
        for fmt in ("bf16", "fp8", "int8", "int4", "int4z"):
            assert f"H32-G8-K{K}-fmt{fmt}-decodes64-context4096-tokens16-bfloat16" in served


def test_a_limit_without_rows_fails_a_whole_run() -> None:
    assert any("finds no row" in line for line in failures([GOOD], None, whole=True))
    assert not Limit("_attn_decode_kernel", "tiles", 2, target=80).covers(GOOD)


ASM_IR = """#blocked = #ttg.blocked<{sizePerThread = SIZES, threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = ORDER}>
%1 = tt.elementwise_inline_asm "{\\0A // shares $3\\0A}" {pack = 4 : i32} %a, %b : tensor<64x64xi8, #blocked>, tensor<64x64xi32, #blocked> -> tensor<64x64xi8, #blocked>
"""


def test_a_shared_pack_along_another_axis_is_found() -> None:
    right = ASM_IR.replace("SIZES", "[1, 16]").replace("ORDER", "[1, 0]")
    assert not list(astray(right))
    for sizes, order in (("[1, 2]", "[1, 0]"), ("[4, 4]", "[0, 1]")):
        wrong = ASM_IR.replace("SIZES", sizes).replace("ORDER", order)
        assert len(list(astray(wrong))) == 1
        assert not list(astray(wrong.replace("// shares", "// pure"))), (
            "asm that shares nothing may lie anyhow"
        )
    register_operand = "tensor<64x64xi8, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>>"
    assert not list(
        astray(wrong.replace("tensor<64x64xi8, #blocked>, tensor<64x64xi32, #blocked>", register_operand))
    )
