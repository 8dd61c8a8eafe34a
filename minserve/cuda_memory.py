"""GPU memory that several processes map: allocated and exported here, imported here, through libcuda alone.  No torch.

`vmm`: segments of physical memory, each a file descriptor; the driver counts references, so they outlive whoever
allocated them, and one address range shows them in order.  A segment can be unmapped and another mapped in its place at
run time: the addresses of the others, and what captured graphs hold of them, stay.  `ipc`: the legacy handle of one plain allocation, where
descriptors are not supported; the exporter must stay alive.  The pool's user sees a `DeviceMemory` in both cases.
"""

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_byte, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import asdict, dataclass
from typing import Any, Protocol

VERSION = 1
KINDS = ("vmm", "ipc")
GONE = -1  # in place of a descriptor
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


class Segments(Protocol):
    """The segments of mapped memory, by their place."""

    def map(self, segment: int, fd: int) -> None:
        """Shows the memory behind `fd`, which stays the caller's."""

    def unmap(self, segment: int) -> None:
        """Nobody may touch it from here on; its memory is free once every process and descriptor has let go."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Mapped memory at `pointer`, until `release`.  `segments` None: it comes and goes as a whole."""

    pointer: int
    num_bytes: int
    device: int
    release: Callable[[], None]
    segments: Segments | None = None


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
    prop, fds = _prop(device), list[int]()
    with context(driver, device):
        unit = c_size_t()
        driver("cuMemGetAllocationGranularity", byref(unit), byref(prop), c_int(0))
        # every segment but the last has the same size, so that one number places them all
        segment = _round_up(SEGMENT_BYTES, unit.value)
        total = _round_up(num_bytes, unit.value)
        try:
            for start in range(0, total, segment):
                fds.append(_create(driver, prop, min(segment, total - start)))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
    return Exported(PoolHandle("vmm", ordinal, uuid, total, segment), tuple(fds), lambda: None)


def export_segment(driver: Driver, ordinal: int, num_bytes: int) -> int:
    """A segment more, as a descriptor: to take the place of one that was given back.  `num_bytes` as that had."""
    device, _ = find_device(driver, ordinal)
    with context(driver, device):
        return _create(driver, _prop(device), num_bytes)


def _prop(device: c_int) -> AllocationProp:
    return AllocationProp(type=PINNED, handle_types=POSIX_FD, location=Location(ON_DEVICE, device.value))


def _create(driver: Driver, prop: AllocationProp, num_bytes: int) -> int:
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
    """Maps what `handle` and `fds` describe on the GPU that is `ordinal` here; `fds` stay the caller's.

    A descriptor of GONE: the segment has no memory now, and its addresses none.
    """
    device, uuid = find_device(driver, ordinal)
    if uuid != handle.uuid:
        raise ValueError(f"the pool is on GPU {handle.uuid}, device {ordinal} of this process is GPU {uuid}")
    if len(fds) != handle.num_fds:
        raise ValueError(f"the pool has {handle.num_fds} segments, {len(fds)} descriptors came with it")
    with context(driver, device):
        if handle.kind == "vmm":
            return _import_vmm(driver, device, ordinal, handle, fds)
        return _import_ipc(driver, device, ordinal, handle)


class Mapped:
    """One reserved range, and the segments that are mapped in it.  Every call takes the device's primary context."""

    def __init__(self, driver: Driver, device: c_int, handle: PoolHandle) -> None:
        self._driver, self._device, self._handle = driver, device, handle
        self._base, self._total = c_uint64(), c_size_t(handle.num_bytes)
        self._there: set[int] = set()
        driver("cuMemAddressReserve", byref(self._base), self._total, c_size_t(0), c_uint64(0), c_uint64(0))

    @property
    def pointer(self) -> int:
        return self._base.value

    def map(self, segment: int, fd: int) -> None:
        address, size = self._place(segment)
        if segment in self._there:
            raise ValueError(f"segment {segment} is mapped already")
        driver, memory = self._driver, c_uint64()
        with context(driver, self._device):
            # the driver takes the descriptor as a pointer's value
            driver("cuMemImportFromShareableHandle", byref(memory), c_void_p(fd), c_int(POSIX_FD))
            try:
                driver("cuMemMap", address, size, c_size_t(0), memory, c_uint64(0))
            finally:
                driver("cuMemRelease", memory)  # the mapping holds the memory from here on
            access = AccessDesc(Location(ON_DEVICE, self._device.value), READ_WRITE)
            try:
                driver("cuMemSetAccess", address, size, byref(access), c_size_t(1))
            except CudaError:
                driver("cuMemUnmap", address, size)
                raise
        self._there.add(segment)

    def unmap(self, segment: int) -> None:
        address, size = self._place(segment)
        if segment not in self._there:
            raise ValueError(f"segment {segment} is not mapped")
        with context(self._driver, self._device):
            self._driver("cuMemUnmap", address, size)
        self._there.remove(segment)

    def release(self) -> None:
        for segment in sorted(self._there):
            self.unmap(segment)
        self._driver("cuMemAddressFree", self._base, self._total)

    def _place(self, segment: int) -> tuple[c_uint64, c_size_t]:
        num, size = self._handle.num_fds, self._handle.segment_bytes
        if not 0 <= segment < num:
            raise ValueError(f"segment must be in [0, {num}), got {segment}")
        return c_uint64(self.pointer + segment * size), c_size_t(
            min(size, self._handle.num_bytes - segment * size)
        )


def _import_vmm(
    driver: Driver, device: c_int, ordinal: int, handle: PoolHandle, fds: tuple[int, ...]
) -> DeviceMemory:
    mapped = Mapped(driver, device, handle)
    try:
        for segment, fd in enumerate(fds):
            if fd != GONE:
                mapped.map(segment, fd)
    except BaseException:
        mapped.release()
        raise
    return DeviceMemory(mapped.pointer, handle.num_bytes, ordinal, mapped.release, mapped)


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
