"""The bytes of a slab pool as a tensor, and the slab sets that one model leases from it.

On a CPU the bytes are a memfd that every process maps; on a GPU the keeper exports them.  A set is one
slab for each layer, any slabs; `LeasedSets.slab_table_SL[set, layer]` is the byte offset of that layer's blocks in the pool.
Nothing here knows blocks: inside a set they are the Batcher's.
"""

import heapq
import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minserve.cuda_memory import DeviceMemory, PoolHandle, Segments, import_memory, open_driver
from minserve.shared_memory import create_memfd, reopen_memfd
from minserve.slab_table import Lease, SlabTable
from minserve.slab_words import Int64s
from sched.slabs import PoolPlan

# all bits set is a NaN in fp32, fp16, bf16 and fp8, and an implausible scale in the integer formats
NAN_BYTE = 0xFF


class SlabPool:
    """The table and the bytes it describes.  `pool_fd` is the memfd to pass on, None for a pool that is not shared."""

    def __init__(
        self,
        table: SlabTable,
        pool_bytes: Tensor,
        pool_fd: int | None = None,
        release: Callable[[], None] | None = None,
        segments: Segments | None = None,
    ) -> None:
        """Takes over the table; `release` gives the memory back once `close` has dropped the tensor."""
        if pool_bytes.dtype != torch.uint8 or pool_bytes.dim() != 1:
            raise ValueError(
                f"pool bytes must be a flat uint8 tensor, got {pool_bytes.dtype} {pool_bytes.shape}"
            )
        if pool_bytes.numel() < table.plan.pool_bytes:
            raise ValueError(f"the pool must have {table.plan.pool_bytes} bytes, got {pool_bytes.numel()}")
        self.table, self.plan, self.pool_fd, self._release = table, table.plan, pool_fd, release
        self.segments = segments  # of a GPU's pool that can give memory back
        self.bytes = pool_bytes[: table.plan.pool_bytes]

    @classmethod
    def create(cls, plan: PoolPlan, device: str = "cpu", *, timeout_s: float | None = None) -> "SlabPool":
        """A new pool: on a CPU one that others can attach, on a GPU one of this process alone."""
        table = SlabTable.create(plan, timeout_s=timeout_s)
        if torch.device(device).type != "cpu":
            return cls(table, torch.empty(plan.pool_bytes, dtype=torch.uint8, device=device))
        fd = create_memfd("minserve-slab-pool", plan.pool_bytes)
        return cls(table, map_memfd(fd, plan.pool_bytes), fd)

    @classmethod
    def attach(cls, table_fd: int, pool_fd: int, *, timeout_s: float | None = None) -> "SlabPool":
        """A CPU pool from the two descriptors of its creator, which stay open and the caller's."""
        table = SlabTable.attach(table_fd, timeout_s=timeout_s)
        own = None
        try:
            own, size = reopen_memfd(pool_fd, "slab pool")
            expected = table.plan.pool_bytes
            if size != expected:
                raise ValueError(f"slab pool fd {pool_fd} has {size} bytes, its table says {expected}")
            return cls(table, map_memfd(own, size), own)
        except BaseException:
            table.close()
            if own is not None:
                os.close(own)
            raise

    @classmethod
    def attach_device(
        cls,
        table_fd: int,
        handle: PoolHandle,
        fds: tuple[int, ...],
        device: str,
        *,
        timeout_s: float | None = None,
    ) -> "SlabPool":
        """A GPU pool that the keeper exported.  All descriptors stay the caller's, who may close them afterwards."""
        table = SlabTable.attach(table_fd, timeout_s=timeout_s)
        memory = None
        try:
            memory = import_memory(open_driver(), torch.device(device).index or 0, handle, fds)
            return cls(table, device_tensor(memory), release=memory.release, segments=memory.segments)
        except BaseException:
            table.close()
            if memory is not None:
                memory.release()
            raise

    def fill(self, byte: int = NAN_BYTE) -> None:
        """Overwrites every byte, leased or not: for tests, before anything is served."""
        self.bytes.fill_(byte)

    def slab(self, slab: int) -> Tensor:
        """A view of one slab's bytes."""
        return self.bytes[slab * self.plan.slab_bytes : (slab + 1) * self.plan.slab_bytes]

    def close(self) -> None:
        """Lets go of bytes and table.  What is still leased stays leased until somebody reclaims it."""
        del self.bytes
        if self.pool_fd is not None:
            os.close(self.pool_fd)
        self.table.close()
        if self._release is not None:
            self._release()


def map_memfd(fd: int, num_bytes: int) -> Tensor:
    """A uint8 tensor over a shared mapping, which lives as long as the tensor."""
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)


@dataclass(frozen=True)
class _CudaArray:
    """What torch needs to see memory that it did not allocate."""

    __cuda_array_interface__: dict[str, object]


def device_tensor(memory: DeviceMemory) -> Tensor:
    """A uint8 view of imported memory; it must be dropped before `memory.release`."""
    interface = {
        "shape": (memory.num_bytes,),
        "typestr": "|u1",
        "data": (memory.pointer, False),
        "version": 3,
    }
    return torch.as_tensor(_CudaArray(interface), device=f"cuda:{memory.device}")


@dataclass(frozen=True, slots=True)
class _Draining:
    set_id: int
    lease: Lease
    passed: Callable[[], bool]


def no_fence() -> Callable[[], bool]:
    """For work that is done when its call returns, as on a CPU."""
    return _passed


def _passed() -> bool:
    return True


def cuda_fence() -> Callable[[], bool]:
    """Passed once the GPU has done all that was enqueued on the current stream before."""
    event = torch.cuda.Event()
    event.record()
    return event.query


class LeasedSets:
    """The sets of one model, as the Batcher's SetSource.  Set ids are dense, small and reused.

    A row of `slab_table_SL` is valid while its set is leased; others are 0, a slab that may be read but says nothing.
    `fence()` is called when a set comes back and returns a question, "has everything enqueued so far been done?":
    until it says yes the set is draining, and neither its slabs nor its id are given out again.
    """

    def __init__(
        self,
        pool: SlabPool,
        model: str,
        *,
        fence: Callable[[], Callable[[], bool]] | None = None,
        zero_on_lease: bool = False,
    ) -> None:
        self.pool, self.model, self.shape = pool, model, pool.plan.models[model]
        self.owner, self._table = pool.table.owner_of(model), pool.table
        # an array: numpy takes twice as long to multiply by a Python int
        self._layers, self._slab_bytes = self.shape.layers, np.array(pool.plan.slab_bytes)
        places = self.shape.places or tuple((layer, 0) for layer in range(self.shape.layers))
        self._slab_L, self._byte_L = np.array(places, np.int64).T
        self._plain = not self.shape.places  # a layer has a slab, and begins where that begins
        self.slab_table_SL = torch.zeros(pool.plan.max_sets(model), len(places), dtype=torch.int64)
        self._rows = self.slab_table_SL.numpy()
        self._row_of = list(self._rows)  # views: to take one of the table costs more than to write it
        self._fence = fence or (cuda_fence if pool.bytes.is_cuda else no_fence)
        self._zero_on_lease = zero_on_lease
        self._leases: dict[int, Lease] = {}
        self._draining: deque[_Draining] = deque()
        self._ids = list(range(len(self._rows)))
        self._changed: set[int] = set()

    def lease(self, *, urgent: bool = False) -> int | None:
        """A set id, or None when the pool refuses.  `urgent` may use the liveness reserve."""
        if self._draining:
            self.poll()
        lease = self._table.lease(self.owner, self._layers, urgent=urgent)
        if lease is None:
            return None
        # a pool of max_sets sets cannot lease one more, so an id is there
        set_id = heapq.heappop(self._ids)
        self._leases[set_id] = lease
        self._write_row(self._row_of[set_id], lease)
        self._changed.add(set_id)
        if self._zero_on_lease:
            for slab in lease.inherited.tolist():
                self.pool.slab(slab).zero_()
        return set_id

    def give_back(self, set_id: int) -> None:
        """The set is empty and no planned step names it; what the GPU may still be doing, the fence covers."""
        lease = self._leases.pop(set_id, None)
        if lease is None:
            raise ValueError(f"set {set_id} is not leased by {self.model}; leased are {sorted(self._leases)}")
        passed = self._fence()
        if passed():
            self._free(set_id, lease)
        else:
            self._table.drain(self.owner, lease)
            self._draining.append(_Draining(set_id, lease, passed))
        if self._draining:
            self.poll()

    def poll(self) -> None:
        """Frees the draining sets whose fence has passed, oldest first: cheap, call it every step."""
        while self._draining and self._draining[0].passed():
            self._free(self._draining[0].set_id, self._draining[0].lease)
            self._draining.popleft()

    def _write_row(self, row_L: Int64s, lease: Lease) -> None:
        if self._plain:
            np.multiply(lease.slabs, self._slab_bytes, row_L)
        else:
            row_L[:] = lease.slabs[self._slab_L] * self._slab_bytes + self._byte_L

    def _free(self, set_id: int, lease: Lease) -> None:
        self._table.free(self.owner, lease)
        self._row_of[set_id].fill(0)
        heapq.heappush(self._ids, set_id)

    def take_changed(self) -> list[int]:
        """The rows of `slab_table_SL` to copy to the device: sets leased since the last call."""
        changed = sorted(self._changed & self._leases.keys())
        self._changed.clear()
        return changed

    @property
    def excess(self) -> int:
        """Sets to give back, because this model holds more than its quota and others are short."""
        return -(-self.pool.table.quotas.excess(self.owner) // self.shape.layers)

    def publish(self, **status: int) -> None:
        """Words of `slab_words.STATUS`, for the agent and the other workers to see."""
        self.pool.table.publish(self.owner, **status)

    @property
    def num_leased(self) -> int:
        return len(self._leases)

    @property
    def num_draining(self) -> int:
        return len(self._draining)

    def close(self, timeout_s: float = 60.0) -> None:
        """Gives everything back, and waits until the device has done all that could touch it."""
        for set_id in list(self._leases):
            self.give_back(set_id)
        end = time.monotonic() + timeout_s
        while self._draining and time.monotonic() < end:
            self.poll()
            time.sleep(0.0001)
        assert not self._draining, f"{len(self._draining)} sets of {self.model} are still draining at close"

    def check(self) -> None:
        """AssertionError unless the truth says that every set here is ours, and every row shows its slabs."""
        for set_id, lease in self._leases.items():
            assert self.pool.table.holds(self.owner, lease), (
                f"set {set_id} of {self.model} has lost its slabs"
            )
            offsets = lease.slabs[self._slab_L] * self._slab_bytes + self._byte_L
            assert (self._rows[set_id] == offsets).all(), f"row {set_id} names other slabs"
        for done in self._draining:
            assert self.pool.table.holds(self.owner, done.lease), (
                f"draining set {done.set_id} has lost its slabs"
            )
        ids = sorted([*self._ids, *self._leases, *(d.set_id for d in self._draining)])
        assert ids == list(range(len(self._rows))), f"set ids of {self.model} are lost or twice: {ids}"
