"""A green context: some of a GPU's multiprocessors and a stream that runs on these alone, through libcuda.  No torch.

The GPU is split once into groups of the least size, and a context gets neighbouring groups of that one split: contexts
of different groups share no multiprocessor.  What this gives between processes: docs/sm-shares.md.
"""

import ctypes
from collections.abc import Callable
from ctypes import byref, c_int, c_uint, c_void_p
from dataclasses import dataclass

from minserve.cuda_memory import CudaError, Driver, context, find_device

# CUdevResourceType, CUgreenCtxCreate_flags and CUstream_flags, by their numbers in cuda.h
SM, DEFAULT_STREAM, NON_BLOCKING = 1, 1, 1
LEAST_SMS = 8  # of a group, where the driver does not say: compute capability 9.0


class Resource(ctypes.Structure):
    """CUdevResource of type SM.  Drivers before CUDA 13 leave `least` and `step` at 0."""

    _fields_ = (
        ("type", c_int),
        ("internal", ctypes.c_ubyte * 92),
        ("sms", c_uint),
        ("least", c_uint),
        ("step", c_uint),
        ("rest", ctypes.c_ubyte * 36),
    )


@dataclass(frozen=True, slots=True)
class GreenContext:
    """`stream` is a CUstream; what is launched there runs on `sms` multiprocessors.  Until `release`."""

    stream: int
    sms: int
    release: Callable[[], None]


def split(driver: Driver, device: c_int, times: int = 1) -> "ctypes.Array[Resource]":
    """All groups of `times` the least size.  CudaError where the driver knows no green contexts."""
    whole, rest, count = Resource(), Resource(), c_uint(0)
    driver("cuDeviceGetDevResource", device, byref(whole), c_int(SM))
    least = c_uint(times * (whole.least or LEAST_SMS))
    driver("cuDevSmResourceSplitByCount", None, byref(count), byref(whole), None, c_uint(0), least)
    groups = (Resource * count.value)()
    driver("cuDevSmResourceSplitByCount", groups, byref(count), byref(whole), byref(rest), c_uint(0), least)
    return groups


def create_green(driver: Driver, ordinal: int, first: int, count: int) -> GreenContext:
    """A context of `count` groups from `first` on.  ValueError where the GPU has not so many."""
    device, _ = find_device(driver, ordinal)
    held, desc, green, stream = c_void_p(), c_void_p(), c_void_p(), c_void_p()
    # the memory is that of the primary context, torch's own
    driver("cuDevicePrimaryCtxRetain", byref(held), device)
    try:
        with context(driver, device):
            groups = split(driver, device)
            if count < 1 or not 0 <= first <= len(groups) - count:
                raise ValueError(
                    f"groups of SMs must be among the {len(groups)} of device {ordinal}, got {count} from {first} on"
                )
            own = (Resource * count)(*groups[first : first + count])
            try:
                driver("cuDevResourceGenerateDesc", byref(desc), own, c_uint(count))
            except CudaError:
                # drivers before CUDA 13 take one group: one as large, of a split of its own, where it has such a place
                if count == 1 or first % count:
                    raise
                own = (Resource * 1)(split(driver, device, count)[first // count])
                driver("cuDevResourceGenerateDesc", byref(desc), own, c_uint(1))
            driver("cuGreenCtxCreate", byref(green), desc, device, c_uint(DEFAULT_STREAM))
            try:
                driver("cuGreenCtxStreamCreate", byref(stream), green, c_uint(NON_BLOCKING), c_int(0))
            except CudaError:
                driver("cuGreenCtxDestroy", green)
                raise
    except BaseException:
        driver("cuDevicePrimaryCtxRelease_v2", device)
        raise

    def release() -> None:
        driver("cuStreamDestroy_v2", stream)
        driver("cuGreenCtxDestroy", green)
        driver("cuDevicePrimaryCtxRelease_v2", device)

    return GreenContext(stream.value or 0, sum(g.sms for g in own), release)
