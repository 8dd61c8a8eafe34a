"""What the CPU can do, and the way to a GPU; nothing else in this package asks a machine anything."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


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


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, in the order of its stream; the tensor itself where that is the host.

    Through pinned memory: a copy from pageable memory would wait for the step that still runs.
    """
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
