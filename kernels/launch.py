"""Facts about the machine a kernel runs on, and the way there; nothing else in this package asks a device anything.

The SM count is read in the process that launches: under an MPS share the runtime reports the visible part only.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class DeviceFacts(NamedTuple):
    sm_count: int
    shared_bytes: int
    capability: tuple[int, int]


class CpuFacts(NamedTuple):
    bf16: bool  # multiplies bf16 in hardware
    vnni: bool  # multiplies int8 into int32 without saturating in between


@functools.cache
def device_facts(index: int) -> DeviceFacts:
    props = torch.cuda.get_device_properties(index)
    shared = getattr(props, "shared_memory_per_block_optin", 48 * 1024)
    return DeviceFacts(props.multi_processor_count, shared, (props.major, props.minor))


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
