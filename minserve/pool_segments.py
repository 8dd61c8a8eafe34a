"""The agent's hand on a GPU pool's memory at run time: segments given back to the device, and taken again.  No torch.

A load or a wake that finds no room on its GPU gets it from the pool; what comes free by an unload or a sleep goes to the
pool again.  Every worker lets go of a segment before its memory is released, and maps it before its slabs are anybody's:
the order is slab_segments.py's.  Descriptors travel over the workers' own sockets.  What does not succeed is undone.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from minserve.cuda_memory import GONE
from minserve.host import Host
from minserve.keeper import Keeper
from minserve.slab_segments import SlabSegments, gone_segments
from minserve.slab_table import SlabTable
from minserve.wire import Segment

log = logging.getLogger("minserve")

LOOK_S = 0.02
# for slabs in use to come free, and for a worker to answer: between two of its steps
EMPTY_TIMEOUT_S, ANSWER_TIMEOUT_S = 30.0, 30.0
GiB = 1 << 30
T = TypeVar("T")


class PoolSegments:
    """`hosts`: of all models of the pool.  One change at a time."""

    def __init__(self, table: SlabTable, keeper: Keeper, hosts: Sequence[Host]) -> None:
        self._table, self._keeper, self._hosts = table, keeper, hosts
        self._segments = SlabSegments(table, keeper.handle.segment_bytes)
        self._changing = asyncio.Lock()
        self._told: set[asyncio.Task[str]] = set()  # workers that load answer when they have loaded

    def size(self, segment: int) -> int:
        handle = self._keeper.handle
        return min(handle.segment_bytes, handle.num_bytes - segment * handle.segment_bytes)

    async def give(self, num_bytes: int) -> int:
        """Gives at least so many bytes back to the device, or what can be had; returns how many."""
        given = 0
        async with self._changing:
            while given < num_bytes and (segment := self._segments.emptiest()) is not None:
                if not await self._empty(segment):
                    break
                await self._locked(partial(self._segments.leave, segment))
                self._replace(segment, GONE)
                await self._tell_all(segment, GONE)
                given += self.size(segment)
        if num_bytes > 0:
            asked = f"{num_bytes / GiB:.2f} GiB were asked for"
            log.info("the pool gave %.2f GiB back to its GPU, %s", given / GiB, asked)
        return given

    async def take(self, num_bytes: int) -> int:
        """Takes back at most so many bytes, as far as the device has them; returns how many."""
        taken = 0
        async with self._changing:
            for segment in sorted(gone_segments(self._table)):
                if taken + self.size(segment) > num_bytes or not await self._bring_back(segment):
                    break
                taken += self.size(segment)
        return taken

    async def _bring_back(self, segment: int) -> bool:
        try:
            fd = await asyncio.to_thread(self._keeper.segment, self.size(segment))
        except RuntimeError as error:
            log.warning("segment %d of the pool stays away: %s", segment, error)
            return False
        # who starts from now on has it; no worker starts between this and the next line
        self._replace(segment, fd)
        if await self._tell_all(segment, fd):
            await self._locked(partial(self._segments.restore, segment))
            return True
        # one that has not answered might lease its slabs before it has mapped them
        self._replace(segment, GONE)
        await self._tell_all(segment, GONE)
        return False

    async def _empty(self, segment: int) -> bool:
        """Whether all of its slabs are away; where they do not come free in time, or may not, all are back."""
        end, problem = time.monotonic() + EMPTY_TIMEOUT_S, "its slabs did not come free"
        while time.monotonic() < end:
            try:
                if await self._locked(partial(self._segments.withdraw, segment)) == 0:
                    return True
            except ValueError as error:
                problem = str(error)
                break
            await asyncio.sleep(LOOK_S)
        await self._locked(partial(self._segments.restore, segment))
        log.warning("segment %d of the pool is not given back: %s", segment, problem)
        return False

    async def _tell_all(self, segment: int, fd: int) -> bool:
        """Whether every worker has let go of it, or mapped `fd`.

        One that cannot map it is killed: it starts again with what is there.  One that loads is not waited for: it hears
        of it before its first request.
        """
        message, given = Segment(segment, fd != GONE), None if fd == GONE else fd
        tasks = {
            host: asyncio.create_task(host._link.tell_segment(message, given))
            for host in self._hosts
            if host.pid is not None and host._link is not None
        }
        self._told.update(tasks.values())
        for task in tasks.values():
            task.add_done_callback(self._told.discard)
        waited = {host: task for host, task in tasks.items() if host.state != "loading"}
        if waited:
            await asyncio.wait(waited.values(), timeout=ANSWER_TIMEOUT_S)
        late = [host.name for host, task in waited.items() if not task.done()]
        for host, task in waited.items():
            error = task.result() if task.done() else ""
            if error:
                log.error("[%s] segment %d of the pool: %s", host.name, segment, error)
            if error and fd != GONE:
                host.kill()
        if late:
            log.warning("segment %d of the pool: %s did not answer", segment, ", ".join(late))
        return not late

    def _replace(self, segment: int, fd: int) -> None:
        """What the keeper's side holds, and workers that start from now on are given."""
        fds = list(self._keeper.fds)
        if fds[segment] != GONE:
            os.close(fds[segment])
        fds[segment] = fd
        self._keeper.fds = tuple(fds)
        for host in self._hosts:
            host._start = msgspec.structs.replace(host._start, pool_fds=self._keeper.fds)

    async def _locked(self, change: Callable[[], T]) -> T:
        """A change of the table, however long it takes to get the lock."""
        while True:
            try:
                return await asyncio.to_thread(change)
            except TimeoutError:
                log.warning("waiting for the slab table: a stopped worker holds its lock")


class DeviceRoom:
    """Memory of a GPU for models that come and go.  `free`: (bytes free, bytes in all); `needs`: of each model awake;
    `keep`: bytes that stay free."""

    def __init__(
        self,
        segments: PoolSegments,
        free: Callable[[], tuple[int, int]],
        needs: Mapping[str, int],
        keep: Callable[[int], int],
    ) -> None:
        self._segments, self._free, self._needs, self._keep = segments, free, needs, keep

    async def make(self, name: str) -> None:
        """For a model that is about to load or to wake; where there is not enough, that will say so."""
        free, total = await asyncio.to_thread(self._free)
        missing = self._needs[name] + self._keep(total) - free
        if missing > 0:
            await self._segments.give(missing)

    async def reclaim(self) -> None:
        """A model has gone, or sleeps."""
        if gone_segments(self._segments._table):
            free, total = await asyncio.to_thread(self._free)
            await self._segments.take(free - self._keep(total))
