"""GPU memory that several processes map: allocated and exported here, imported here, through libcuda alone.  No torch.

`vmm`: segments of physical memory, each a file descriptor; the driver counts references, so they outlive whoever
allocated them, and one address range shows them in order.  `ipc`: the legacy handle of one plain allocation, where
descriptors are not supported; the exporter must stay alive.  The pool's user sees a `DeviceMemory` in both cases.
"""

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_byte, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1
KINDS = ("vmm", "ipc")
SEGMENT_BYTES = 1 << 30

# CUdevice_attribute, CUmemAllocationType and others, by their numbers in cuda.h
VMM_SUPPORTED, POSIX_FD_SUPPORTED = 102, 103
PINNED, POSIX_FD, ON_DEVICE, READ_WRITE, LAZY_PEER_ACCESS = 1, 1, 1, 3, 1


class Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AllocationProp(ctypes.Structure):
    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", AllocationFlags),
    )


class AccessDesc(ctypes.Structure):
    _fields_ = (("location", Location), ("flags", c_int))


class IpcHandle(ctypes.Structure):
    _fields_ = (("bytes", c_byte * 64),)


class Uuid(ctypes.Structure):
    _fields_ = (("bytes", c_byte * 16),)


class CudaError(RuntimeError):
    """A driver call failed; the message names the call and the driver's own word for it."""


@dataclass(frozen=True, slots=True)
class PoolHandle:
    """How to reach exported memory, beside its descriptors (`vmm`).  `device` is the ordinal on the exporter's side."""

    kind: str
    device: int
    uuid: str
    num_bytes: int
    segment_bytes: int = 0
    ipc: str = ""
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PoolHandle":
        try:
            fields = json.loads(text)
            version = fields.get("version")
            handle = cls(**fields) if version == VERSION else None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"not a handle of exported GPU memory: {text!r:.80}") from error
        if handle is None:
            raise ValueError(f"GPU memory handle of version {version}, this minserve reads {VERSION}")
        if handle.kind not in KINDS:
            raise ValueError(f"GPU memory handle kind must be one of {', '.join(KINDS)}, got {handle.kind!r}")
        return handle

    @property
    def num_fds(self) -> int:
        return -(-self.num_bytes // self.segment_bytes) if self.kind == "vmm" else 0


@dataclass(frozen=True, slots=True)
class Exported:
    """Allocated memory.  `fds` are the owner's to pass on and close; `release` frees what they do not hold."""

    handle: PoolHandle
    fds: tuple[int, ...]
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Mapped memory at `pointer`, until `release`."""

    pointer: int
    num_bytes: int
    device: int
    release: Callable[[], None]


class Driver:
    """libcuda with every result checked: `driver("cuInit", c_uint(0))`.  Arguments are ctypes values, never ints."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self("cuInit", c_uint(0))

    def __call__(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(c_int(code), byref(text))
            raise CudaError(f"{name} failed: {(text.value or b'unknown error').decode()} ({code})")

    def knows(self, name: str) -> bool:
        """Whether the driver has such a call."""
        return hasattr(self._library, name)

    def attribute(self, device: c_int, number: int) -> int:
        value = c_int()
        self("cuDeviceGetAttribute", byref(value), c_int(number), device)
        return value.value


def open_driver() -> Driver:
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise CudaError(f"no NVIDIA driver on this machine: {error}") from error


def find_device(driver: Driver, ordinal: int) -> tuple[c_int, str]:
    """The driver's device and its UUID, which names the same GPU in every process."""
    device, uuid = c_int(), Uuid()
    driver("cuDeviceGet", byref(device), c_int(ordinal))
    driver("cuDeviceGetUuid", byref(uuid), device)
    return device, bytes(uuid.bytes).hex()


@contextmanager
def context(driver: Driver, device: c_int) -> Iterator[None]:
    """The primary context, torch's own, current in this thread; created and destroyed where torch has none."""
    handle = c_void_p()
    driver("cuDevicePrimaryCtxRetain", byref(handle), device)
    try:
        driver("cuCtxPushCurrent_v2", handle)
        try:
            yield
        finally:
            driver("cuCtxPopCurrent_v2", byref(c_void_p()))
    finally:
        driver("cuDevicePrimaryCtxRelease_v2", device)


# ---- exporting


def export_memory(driver: Driver, ordinal: int, num_bytes: int, kind: str | None = None) -> Exported:
    """Allocates at least `num_bytes` on a GPU.  `kind` None: `vmm` where the driver can, else `ipc`."""
    if kind not in (None, *KINDS):
        raise ValueError(f"kind of exported GPU memory must be one of {', '.join(KINDS)}, got {kind!r}")
    device, uuid = find_device(driver, ordinal)
    if kind is None:
        able = driver.attribute(device, VMM_SUPPORTED) and driver.attribute(device, POSIX_FD_SUPPORTED)
        kind = "vmm" if able else "ipc"
    export = _export_vmm if kind == "vmm" else _export_ipc
    return export(driver, device, ordinal, uuid, num_bytes)


def _export_vmm(driver: Driver, device: c_int, ordinal: int, uuid: str, num_bytes: int) -> Exported:
    prop = AllocationProp(type=PINNED, handle_types=POSIX_FD, location=Location(ON_DEVICE, device.value))
    fds: list[int] = []
    with context(driver, device):
        unit = c_size_t()
        driver("cuMemGetAllocationGranularity", byref(unit), byref(prop), c_int(0))
        # every segment but the last has the same size, so that one number places them all
        segment = _round_up(SEGMENT_BYTES, unit.value)
        total = _round_up(num_bytes, unit.value)
        try:
            for start in range(0, total, segment):
                fds.append(_create_segment(driver, prop, min(segment, total - start)))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
    return Exported(PoolHandle("vmm", ordinal, uuid, total, segment), tuple(fds), lambda: None)


def _create_segment(driver: Driver, prop: AllocationProp, num_bytes: int) -> int:
    memory, fd = c_uint64(), c_int(-1)
    driver("cuMemCreate", byref(memory), c_size_t(num_bytes), byref(prop), c_uint64(0))
    try:
        driver("cuMemExportToShareableHandle", byref(fd), memory, c_int(POSIX_FD), c_uint64(0))
    finally:
        driver("cuMemRelease", memory)  # the descriptor holds the memory from here on
    os.set_inheritable(fd.value, False)
    return fd.value


def _export_ipc(driver: Driver, device: c_int, ordinal: int, uuid: str, num_bytes: int) -> Exported:
    pointer, handle, held = c_uint64(), IpcHandle(), c_void_p()
    # the memory goes with its context: one more reference keeps that until release
    driver("cuDevicePrimaryCtxRetain", byref(held), device)
    with context(driver, device):
        driver("cuMemAlloc_v2", byref(pointer), c_size_t(num_bytes))
        driver("cuIpcGetMemHandle", byref(handle), pointer)

    def release() -> None:
        with context(driver, device):
            driver("cuMemFree_v2", pointer)
        driver("cuDevicePrimaryCtxRelease_v2", device)

    return Exported(PoolHandle("ipc", ordinal, uuid, num_bytes, ipc=bytes(handle.bytes).hex()), (), release)


# ---- importing


def import_memory(driver: Driver, ordinal: int, handle: PoolHandle, fds: tuple[int, ...]) -> DeviceMemory:
    """Maps what `handle` and `fds` describe on the GPU that is `ordinal` here; `fds` stay the caller's."""
    device, uuid = find_device(driver, ordinal)
    if uuid != handle.uuid:
        raise ValueError(f"the pool is on GPU {handle.uuid}, device {ordinal} of this process is GPU {uuid}")
    if len(fds) != handle.num_fds:
        raise ValueError(f"the pool has {handle.num_fds} segments, {len(fds)} descriptors came with it")
    with context(driver, device):
        if handle.kind == "vmm":
            return _import_vmm(driver, device, ordinal, handle, fds)
        return _import_ipc(driver, device, ordinal, handle)


def _import_vmm(
    driver: Driver, device: c_int, ordinal: int, handle: PoolHandle, fds: tuple[int, ...]
) -> DeviceMemory:
    base, mapped = c_uint64(), 0
    total = c_size_t(handle.num_bytes)
    driver("cuMemAddressReserve", byref(base), total, c_size_t(0), c_uint64(0), c_uint64(0))

    def release() -> None:
        if mapped:
            driver("cuMemUnmap", base, c_size_t(mapped))
        driver("cuMemAddressFree", base, total)

    try:
        for fd in fds:
            size = min(handle.segment_bytes, handle.num_bytes - mapped)
            _map_segment(driver, fd, base.value + mapped, size)
            mapped += size
        access = AccessDesc(Location(ON_DEVICE, device.value), READ_WRITE)
        driver("cuMemSetAccess", base, total, byref(access), c_size_t(1))
    except BaseException:
        release()
        raise
    return DeviceMemory(base.value, handle.num_bytes, ordinal, release)


def _map_segment(driver: Driver, fd: int, address: int, num_bytes: int) -> None:
    memory = c_uint64()
    # the driver takes the descriptor as a pointer's value
    driver("cuMemImportFromShareableHandle", byref(memory), c_void_p(fd), c_int(POSIX_FD))
    try:
        driver("cuMemMap", c_uint64(address), c_size_t(num_bytes), c_size_t(0), memory, c_uint64(0))
    finally:
        driver("cuMemRelease", memory)  # the mapping holds the memory from here on


def _import_ipc(driver: Driver, device: c_int, ordinal: int, handle: PoolHandle) -> DeviceMemory:
    pointer, held = c_uint64(), c_void_p()
    ipc = IpcHandle.from_buffer_copy(bytes.fromhex(handle.ipc))
    driver("cuDevicePrimaryCtxRetain", byref(held), device)
    try:
        driver("cuIpcOpenMemHandle_v2", byref(pointer), ipc, c_uint(LAZY_PEER_ACCESS))
    except CudaError:
        driver("cuDevicePrimaryCtxRelease_v2", device)
        raise

    def release() -> None:
        with context(driver, device):
            driver("cuIpcCloseMemHandle", pointer)
        driver("cuDevicePrimaryCtxRelease_v2", device)

    return DeviceMemory(pointer.value, handle.num_bytes, ordinal, release)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
