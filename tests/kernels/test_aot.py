"""Every Triton kernel, as its launcher would launch it, compiles for GPUs that are not here and does not spill."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from kernels.catalog import SPECS
from tests.source import ROOT

# bytes of shared memory one program may have
SHARED = {80: 166912, 90: 232448}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    # compiled binaries are kept between runs, keyed by Triton on source, options and version
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))
    command = [sys.executable, "-m", "tests.kernels.aot"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(compiled: list[dict[str, Any]]):
    expected = {(f"{s.name}-{c.id}", target) for s in SPECS for c in s.compiles for target in SHARED}
    assert {(line["case"], line["target"]) for line in compiled} == expected
    assert all(spec.compiles for spec in SPECS if "triton" in spec.runs)


def test_nothing_spills(compiled: list[dict[str, Any]]):
    for line in compiled:
        assert line["stack"] == line["local"] == 0, f"spills: {line}"
        assert line["shared"] <= SHARED[line["target"]], f"too much shared memory: {line}"


def test_integer_matmuls_use_integer_tensor_cores(compiled: list[dict[str, Any]]):
    lines = [line for line in compiled if line["kernel"].startswith("_gemm_w")]
    assert lines
    for line in lines:
        assert line["mma"], line
        assert all("s32.s8.s8" in m for m in line["mma"]), line
