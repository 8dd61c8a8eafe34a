"""`python -m tests.kernels.aot`: compiles what the Triton launchers would launch, for GPUs that are not here.

Each launcher runs on CPU tensors with a driver that only names a target; instead of launching, the kernel is compiled
with the very arguments and options of that launch, so nothing here can differ from serving.  Prints one JSON line a
kernel.  A process of its own: Triton either interprets or compiles, never both.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.catalog import SPECS

TARGETS = (80, 90)


class NamedTarget:
    """Stands in for the CUDA driver while compiling."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches per device, so that each target has its own number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(kernel: Any) -> dict[str, int]:
    """Registers and stack bytes (spills lie on the stack) out of the compiled binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}


def main() -> None:
    compiled: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        compiled[kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    for capability in TARGETS:
        driver.set_active(NamedTarget(capability))
        for spec in SPECS:
            for case in spec.compiles:
                compiled.clear()
                spec.bind("triton", spec.make(case, torch.Generator().manual_seed(0)))()
                for kernel in compiled.values():
                    mma = sorted(
                        set(
                            re.findall(
                                r"(wgmma\.mma_async|mma\.sync)[\w.]*?\.(s32\.s8\.s8|f32\.\w+)",
                                kernel.asm["ptx"],
                            )
                        )
                    )
                    line = {
                        "target": capability,
                        "case": f"{spec.name}-{case.id}",
                        "kernel": kernel.metadata.name,
                        "shared": kernel.metadata.shared,
                        "mma": [" ".join(m) for m in mma],
                        **resources(kernel),
                    }
                    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
