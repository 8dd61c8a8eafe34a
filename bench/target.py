"""Compiles what a Triton launcher would launch, for a GPU that is not here.

A launcher runs on CPU tensors under a driver that only names a target; every launch is compiled with its very
arguments and options instead, and kept, so nothing here can differ from serving.  Triton either interprets or
compiles in one process, never both: TRITON_INTERPRET must not be set.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = (80, 89, 90, 100)


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


@dataclass(frozen=True)
class Launch:
    """One launch that would have been: its compiled kernel and whatever it was given beside tensors."""

    name: str
    compiled: Any
    constants: dict[str, Any]


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Inside, launches compile for `capability` and land in the list, one for each distinct kernel."""
    launches: dict[str, Launch] = {}
    found: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        if kernel.hash not in launches:
            constants = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
            launches[kernel.hash] = Launch(kernel.metadata.name, kernel, constants)
            found.append(launches[kernel.hash])
        return kernel

    before = driver._active
    driver.set_active(NamedTarget(capability))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver.set_active(before)
