"""The suite on a machine with a GPU, as far as that can be tried without one: nothing is on the wrong device."""

import os
import subprocess
import sys

import pytest

from tests.source import ROOT

# what ran on host tensors once, and what is quick
QUICK = [
    "tests/kernels/test_work_buffers.py::test_refilled_is_fresh",
    "tests/kernels/test_gemm_w8a8.py::test_fp8_codes_keep_one_copy_and_one_scale_may_serve_all",
]
ENGINE = ["tests/minserve/test_graphs.py", "tests/e2e/test_triton_engine.py"]
# one is about the interpreter, one about machine code
AWAY = ["tests/kernels/test_interpreter.py", "tests/kernels/test_aot.py"]
WRONG = """
import pytest, torch
from kernels.catalog import SPECS
from kernels.silu_mul import silu_mul_triton

def test_two_devices():
    x = torch.ones(3, 4, device="cuda")
    assert (x + 1).cpu().sum() == 24 and x.device.type == "cuda" and x[:, 0].is_cuda
    x[0] = torch.zeros(4)
    with pytest.raises(RuntimeError, match="add: all tensors must be on the same device"):
        x + torch.ones(4)
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()

def test_a_kernel_of_host_tensors():
    assert silu_mul_triton(torch.ones(2, 8, device="cuda"))[0].is_cuda
    with pytest.raises(ValueError, match="cpu tensor"):
        silu_mul_triton(torch.ones(2, 8))
"""


def believe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "tests.pretend_gpu", "-q", "--tb=short", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_it_sees_what_a_gpu_would_not_do(tmp_path) -> None:
    file = tmp_path / "test_wrong.py"
    file.write_text(WRONG)
    done = believe(str(file), "--rootdir", str(tmp_path), "-c", os.devnull)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(
            ["tests/kernels", *(f"--ignore={f}" for f in AWAY)], id="kernels", marks=pytest.mark.slow
        ),
        pytest.param(ENGINE, id="engine", marks=pytest.mark.slow),
    ],
)
def test_no_kernel_is_given_what_is_not_on_its_device(files: list[str]) -> None:
    done = believe("-m", "not slow and not gpu", *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
