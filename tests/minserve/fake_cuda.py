"""A libcuda for machines without one: the calls that cuda_memory makes, over memfds and mmap.

Physical memory is a memfd, an address range is reserved with PROT_NONE and mapped with MAP_FIXED, so what two
processes import is really the same bytes.  It refuses what the driver refuses: unknown handles, wrong sizes, calls
without a context.  Run as a module it is the keeper's process.
"""

import ctypes
import os
import sys
from ctypes import c_char_p

GRANULARITY = 2 << 20
LIMIT = 64 << 20
INVALID, OUT_OF_MEMORY, INVALID_CONTEXT = 1, 2, 201
PROT_NONE, PROT_RW, MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANON = 0, 3, 1, 2, 16, 32

ATTRIBUTES = {"sms": 132, "compute_mode": 0, "major": 9, "minor": 0, "mps": 0, "broken_streams": 0}

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class FakeCuda:
    """Every call takes what ctypes would pass on and returns a CUresult."""

    def __init__(self, uuid: bytes = b"gpu-of-the-tests", vmm: bool = True, **facts: int) -> None:
        """`facts`: what the driver says of itself and the device, as ATTRIBUTES and `driver`, `groups`."""
        self.uuid, self.vmm = uuid, vmm
        self.facts = {"driver": 13010, "groups": 16, **ATTRIBUTES, **facts}
        self.green: dict[int, int] = {}  # handle -> SMs
        self.streams: dict[int, int] = {}
        self.memory: dict[int, tuple[int, int]] = {}  # handle -> memfd, bytes
        self.ranges: dict[int, int] = {}
        self.mapped: dict[int, tuple[int, bool]] = {}  # address -> bytes, accessible
        self.contexts, self.retained, self.serial, self.created = 0, 0, 0, 0

    def left_over(self) -> list[str]:
        """What somebody forgot to give back."""
        names = ("memory", "ranges", "mapped", "contexts", "retained", "green", "streams")
        return [name for name in names if getattr(self, name)]

    def cuInit(self, flags):
        return 0

    def cuGetErrorString(self, code, out):
        texts = {
            INVALID: b"invalid argument",
            OUT_OF_MEMORY: b"out of memory",
            INVALID_CONTEXT: b"invalid context",
        }
        out._obj.value = texts.get(code.value, c_char_p(None).value)
        return 0

    def cuDeviceGet(self, out, ordinal):
        out._obj.value = ordinal.value
        return 0 if ordinal.value < 2 else 101

    def cuDeviceGetUuid(self, out, device):
        out._obj.bytes[:] = [b - 256 * (b > 127) for b in self.uuid]
        return 0

    def cuDeviceGetAttribute(self, out, number, device):
        names = {16: "sms", 20: "compute_mode", 75: "major", 76: "minor", 133: "mps"}
        if number.value in names:
            value = self.facts[names[number.value]]
            out._obj.value = max(value, 0)
            return 0 if value >= 0 else INVALID  # negative: a driver that does not know the attribute
        out._obj.value = int(self.vmm)
        return 0

    def cuDeviceGetName(self, out, length, device):
        out.value = b"Fake GPU"
        return 0

    def cuDriverGetVersion(self, out):
        out._obj.value = self.facts["driver"]
        return 0

    def cuDevicePrimaryCtxRetain(self, out, device):
        self.retained += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):
        self.retained -= 1
        assert self.retained >= 0
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts += 1
        return 0

    def cuCtxPopCurrent_v2(self, out):
        self.contexts -= 1
        return 0

    def cuMemGetAllocationGranularity(self, out, prop, option):
        out._obj.value = GRANULARITY
        return 0

    def cuMemCreate(self, out, size, prop, flags):
        p = prop._obj
        if (p.type, p.handle_types, p.location.type) != (1, 1, 1) or size.value % GRANULARITY:
            return INVALID
        if self.created + size.value > LIMIT:
            return OUT_OF_MEMORY
        self.created += size.value
        fd = os.memfd_create("gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, size.value)
        return self._keep(out, fd, size.value)

    def _keep(self, out, fd, size):
        self.serial += 1
        self.memory[self.serial] = (fd, size)
        out._obj.value = self.serial
        return 0

    def cuMemExportToShareableHandle(self, out, handle, kind, flags):
        if handle.value not in self.memory or kind.value != 1:
            return INVALID
        out._obj.value = os.dup(self.memory[handle.value][0])
        os.set_inheritable(out._obj.value, True)
        return 0

    def cuMemImportFromShareableHandle(self, out, fd, kind):
        if kind.value != 1 or not os.readlink(f"/proc/self/fd/{fd.value}").startswith("/memfd:gpu"):
            return INVALID
        return self._keep(out, os.dup(fd.value), os.fstat(fd.value).st_size)

    def cuMemRelease(self, handle):
        if handle.value not in self.memory:
            return INVALID
        os.close(self.memory.pop(handle.value)[0])
        return 0

    def cuMemAddressReserve(self, out, size, alignment, address, flags):
        if size.value % GRANULARITY:
            return INVALID
        base = libc.mmap(None, size.value, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0)
        out._obj.value = base
        self.ranges[base] = size.value
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):
        fd, available = self.memory.get(handle.value, (-1, 0))
        at = address.value
        inside = any(base <= at and at + size.value <= base + n for base, n in self.ranges.items())
        if size.value != available or offset.value or not inside or at in self.mapped:
            return INVALID
        assert libc.mmap(at, available, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0) == at
        self.mapped[at] = (available, False)
        return 0

    def cuMemSetAccess(self, address, size, desc, count):
        d, at = desc._obj, address.value
        if (d.location.type, d.flags, count.value) != (1, 3, 1):
            return INVALID
        inside = {a: n for a, (n, _) in self.mapped.items() if at <= a < at + size.value}
        if sum(inside.values()) != size.value:
            return INVALID
        for a, n in inside.items():
            assert libc.mprotect(ctypes.c_void_p(a), ctypes.c_size_t(n), PROT_RW) == 0
            self.mapped[a] = (n, True)
        return 0

    def cuMemUnmap(self, address, size):
        inside = [a for a in self.mapped if address.value <= a < address.value + size.value]
        if sum(self.mapped[a][0] for a in inside) != size.value:
            return INVALID
        for a in inside:
            del self.mapped[a]
        return 0

    def cuMemAddressFree(self, address, size):
        if self.ranges.get(address.value) != size.value or any(a >= address.value for a in self.mapped):
            return INVALID
        del self.ranges[address.value]
        return libc.munmap(address.value, size.value)

    def cuMemsetD8_v2(self, pointer, value, count):
        if not self.contexts:
            return INVALID_CONTEXT
        ctypes.memset(pointer.value, value.value, count.value)
        return 0

    def cuMemcpyDtoH_v2(self, to, pointer, count):
        if not self.contexts:
            return INVALID_CONTEXT
        ctypes.memmove(to, pointer.value, count.value)
        return 0

    # green contexts: a resource is a number of SMs, the groups of a split know their place

    def cuDeviceGetDevResource(self, device, out, kind):
        r = out._obj
        r.type, r.sms, r.least, r.step = kind.value, self.facts["sms"], 8, 8
        return 0 if kind.value == 1 else INVALID

    def cuDevSmResourceSplitByCount(self, groups, count, whole, rest, flags, least):
        n, size = self.facts["groups"] * 8 // least.value, least.value
        if whole._obj.type != 1 or size % 8:
            return INVALID
        for i in range(min(count._obj.value, n) if groups is not None else 0):
            groups[i].type, groups[i].sms, groups[i].rest[0] = 1, size, i + 1
        count._obj.value = n if groups is None else min(count._obj.value, n)
        if rest is not None:
            rest._obj.sms = self.facts["sms"] - size * n
        return 0

    def cuDevResourceGenerateDesc(self, out, resources, count):
        own = list(resources)
        if len(own) != count.value or any(r.type != 1 or not r.rest[0] for r in own):
            return INVALID
        if len(own) > 1 and self.facts["driver"] < 13000:
            return INVALID
        self.asked = [r.rest[0] - 1 for r in own]
        out._obj.value = 77
        return 0

    def cuGreenCtxCreate(self, out, desc, device, flags):
        if not self.contexts or desc.value != 77 or flags.value != 1:
            return INVALID
        self.serial += 1
        self.green[self.serial], out._obj.value = len(self.asked), self.serial
        return 0

    def cuGreenCtxStreamCreate(self, out, green, flags, priority):
        if green.value not in self.green or flags.value != 1 or self.facts["broken_streams"]:
            return INVALID
        self.serial += 1
        self.streams[self.serial], out._obj.value = green.value, self.serial
        return 0

    def cuStreamDestroy_v2(self, stream):
        return 0 if self.streams.pop(stream.value, None) else INVALID

    def cuGreenCtxDestroy(self, green):
        if green.value in self.streams.values():
            return INVALID
        return 0 if self.green.pop(green.value, None) else INVALID

    # the legacy way: the handle names a memfd of the exporter, which has to be alive

    def cuMemAlloc_v2(self, out, size):
        if not self.contexts:
            return INVALID_CONTEXT
        fd = os.memfd_create("gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, size.value)
        return self._keep(out, fd, size.value)

    def cuMemFree_v2(self, pointer):
        return self.cuMemRelease(pointer) if self.contexts else INVALID_CONTEXT

    def cuIpcGetMemHandle(self, out, pointer):
        fd, size = self.memory[pointer.value]
        text = f"{os.getpid()} {fd} {size}".encode().ljust(64)
        out._obj.bytes[:] = list(text)
        return 0

    def cuIpcOpenMemHandle_v2(self, out, handle, flags):
        if not self.contexts or flags.value != 1:
            return INVALID_CONTEXT
        pid, fd, size = map(int, bytes(handle.bytes).split())
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError:
            return INVALID
        out._obj.value = libc.mmap(None, size, PROT_RW, MAP_SHARED, own, 0)
        os.close(own)
        self.mapped[out._obj.value] = (size, True)
        return 0

    def cuIpcCloseMemHandle(self, pointer):
        size, _ = self.mapped.pop(pointer.value)
        return libc.munmap(pointer.value, size)


def touch() -> None:
    """The importing process of minserve.probe."""
    from minserve import cuda_memory, probe

    probe.touch(lambda: cuda_memory.Driver(FakeCuda()))


def main() -> None:
    from minserve import cuda_memory, keeper

    cuda_memory.SEGMENT_BYTES = 4 << 20
    keeper.open_driver = lambda: cuda_memory.Driver(FakeCuda())
    assert "torch" not in sys.modules
    keeper.main()
