"""Facts about the machine a kernel runs on; the only file of this package that asks a device or a CPU anything.

The SM count is read in the process that launches: under an MPS share the runtime reports the visible part only.
"""

import functools
from typing import NamedTuple

import torch


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


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
