"""What the CPU can do, and the way to a GPU; nothing else in this package asks a machine anything."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.driver import driver


class CpuFacts(NamedTuple):
    bf16: bool  # multiplies bf16 in hardware
    vnni: bool  # multiplies int8 into int32 without saturating in between


@functools.cache
def cpu_facts() -> CpuFacts:
    def has(feature: str) -> bool:
        ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
        return bool(ask and ask())

    amx = has("amx_tile")
    return CpuFacts(bf16=amx or has("avx512_bf16"), vnni=amx or has("vnni") or has("avx512_vnni"))


class GpuFacts(NamedTuple):
    """What a launch shape depends on.  `num_sms`: those this process may use, fewer than the chip has under MPS."""

    name: str
    capability: int  # 90 for sm_90
    num_sms: int
    shared_bytes: int  # one program may have


# what kernels are shaped for where no GPU is: in the interpreter, and ahead of time
ASSUMED = {
    80: GpuFacts("NVIDIA A100", 80, 108, 166912),
    89: GpuFacts("NVIDIA L40S", 89, 142, 101376),
    90: GpuFacts("NVIDIA H200", 90, 132, 232448),
    100: GpuFacts("NVIDIA B200", 100, 148, 232448),
}


@functools.cache
def _facts(index: int) -> GpuFacts:
    p = torch.cuda.get_device_properties(index)
    capability = 10 * p.major + p.minor
    return GpuFacts(p.name, capability, p.multi_processor_count, p.shared_memory_per_block_optin)


def gpu_facts(device: torch.device) -> GpuFacts:
    """Of the GPU a tensor is on; on a CPU, of the one that is compiled for ahead of time, else of an H200."""
    if device.type == "cuda":
        return _facts(torch.cuda.current_device() if device.index is None else device.index)
    return ASSUMED[getattr(driver._active, "capability", 90)]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta).  Tensors must start on 16 bytes; integers that vary are `do_not_specialize`."""
    kernel[grid](*args, **meta)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, in the order of its stream; the tensor itself where that is the host.

    Through pinned memory: a copy from pageable memory would wait for the step that still runs.
    """
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
