"""A pool's memory given back at run time: the agent's side, a keeper's process, and workers that map a driver of memfds.

A worker is a thread with the real ends of its socket: frames, descriptors and answers go the way they go when serving.
"""

import asyncio
import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop

from minserve import pool_segments
from minserve.cuda_memory import GONE, Driver, import_memory
from minserve.keeper import Keeper
from minserve.link import Link
from minserve.pool_segments import DeviceRoom, PoolSegments
from minserve.slab_segments import gone_segments, num_away
from minserve.slab_table import SlabTable
from minserve.wire import Channel, Segment, SegmentDone, Start, encode
from sched.slabs import PoolPlan
from tests.minserve.fake_cuda import FakeCuda
from tests.minserve.small_table import leased, shape
from tests.minserve.test_keeper import FAKE_BOOT

MB = 1 << 20
# 22 slabs of 1 MiB in six segments, the last of 2; a's reserve is 2 slabs, b's 1, and 2 for the longest sequence
PLAN = PoolPlan(MB, 22, {"a": shape(2, 1, 1), "b": shape(1, 1, 1)}, 2)


class Worker:
    """Stands where a Host stands, with a thread as its process."""

    def __init__(self, name: str, keeper: Keeper) -> None:
        self.name, self.state, self.pid, self.killed = name, "ready", os.getpid(), False
        self._start = Start({}, "cuda:0", 0, -1, keeper.fds)
        self._link: Any = None
        self.fake, self.broken, self.goes_on = FakeCuda(), False, threading.Event()
        self.goes_on.set()
        self.memory = import_memory(Driver(self.fake), 0, keeper.handle, keeper.fds)
        self.done: list[tuple[int, bool]] = []

    async def connect(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(theirs)
        self.theirs = theirs
        loop = asyncio.get_running_loop()
        _, self._link = await loop.create_unix_connection(
            lambda: Link(lambda told: None, ours.dup()), sock=ours
        )
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                for message in self.channel.receive(None):
                    assert isinstance(message, Segment)
                    self.goes_on.wait()
                    self.channel.send(SegmentDone(message.index, self._move(message)))

    def _move(self, message: Segment) -> str:
        fd = self.channel.fds.popleft() if message.there else None
        self.done.append((message.index, message.there))
        try:
            if self.broken:
                return "no such thing"
            if fd is None:
                self.memory.segments.unmap(message.index)
            else:
                self.memory.segments.map(message.index, fd)
        finally:
            if fd is not None:
                os.close(fd)
        return ""

    def kill(self) -> None:
        self.killed = True

    async def end(self) -> None:
        self.goes_on.set()
        self._link.hang_up()
        await self._link.closed.wait()
        await asyncio.to_thread(self.thread.join, 10)
        for fd in self.channel.fds:
            os.close(fd)
        self.theirs.close()
        self.memory.release()
        assert self.fake.left_over() == []


class Site:
    def __init__(self) -> None:
        self.table = SlabTable.create(PLAN)
        self.keeper = Keeper(0, PLAN.pool_bytes, boot=FAKE_BOOT, timeout_s=30)
        self.workers = [Worker(name, self.keeper) for name in PLAN.models]
        self.segments = PoolSegments(self.table, self.keeper, self.workers)  # type: ignore[arg-type]

    def run(self, story: Callable[[], Awaitable[None]], *, uv: bool = False) -> None:
        async def all_of_it() -> None:
            for worker in self.workers:
                await worker.connect()
            try:
                async with asyncio.timeout(60):
                    await story()
            finally:
                for worker in self.workers:
                    await worker.end()

        (uvloop.run if uv else asyncio.run)(all_of_it())

    def write(self, worker: int, byte: int) -> None:
        ctypes.memset(self.workers[worker].memory.pointer, byte, PLAN.pool_bytes)

    def read(self, worker: int) -> set[int]:
        return set(ctypes.string_at(self.workers[worker].memory.pointer, PLAN.pool_bytes))

    def close(self) -> None:
        self.table.check()
        self.keeper.close()
        self.table.close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(pool_segments, "EMPTY_TIMEOUT_S", 5.0)
    monkeypatch.setattr(pool_segments, "ANSWER_TIMEOUT_S", 5.0)
    uvloop.run(asyncio.sleep(0))  # what it keeps open for good
    before = len(os.listdir("/proc/self/fd"))
    site = Site()
    yield site
    site.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


@pytest.mark.parametrize("uv", [False, True])
def test_memory_goes_and_comes_back_everywhere(site: Site, uv: bool) -> None:
    async def story() -> None:
        site.write(0, 0x11)
        assert await site.segments.give(5 * MB) == 6 * MB
        assert gone_segments(site.table) == {4, 5}
        assert site.table.counts().mapped == 16
        for worker in site.workers:
            assert worker.done == [(5, False), (4, False)]
            assert worker._start.pool_fds[4:] == (GONE, GONE), "who starts now maps what is there"
        lease = leased(site.table, 0, 12)
        assert lease.slabs.max() < 16
        site.table.free(0, lease)
        assert await site.segments.take(5 * MB) == 4 * MB, "no more than there is room for"
        assert gone_segments(site.table) == {5}
        assert await site.segments.take(100 * MB) == 2 * MB
        assert num_away(site.table) == 0
        site.write(1, 0x22)
        assert site.read(0) == {0x22}, "both map the same memory"
        late = import_memory(Driver(FakeCuda()), 0, site.keeper.handle, site.workers[0]._start.pool_fds)
        assert ctypes.string_at(late.pointer + 20 * MB, 1) == b"\x22"
        late.release()

    site.run(story, uv=uv)


def test_what_is_in_use_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        low = leased(site.table, 0, 16)
        high = leased(site.table, 1, 2)
        site.table.free(0, low)
        assert set(high.slabs.tolist()) == {16, 17}
        monkeypatch.setattr(site.segments._segments, "emptiest", lambda: 4)
        giving = asyncio.create_task(site.segments.give(4 * MB))
        while num_away(site.table) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert gone_segments(site.table) == frozenset(), "two of its slabs are somebody's"
        assert site.workers[0].done == []
        site.table.free(1, high)
        assert await giving == 4 * MB
        assert gone_segments(site.table) == {4}

    site.run(story)


def test_what_does_not_come_free_stays(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_segments, "EMPTY_TIMEOUT_S", 0.2)

    async def story() -> None:
        held = leased(site.table, 0, 19)
        assert await site.segments.give(8 * MB) == 0, (
            "one slab of the last segment is held, and two are promised"
        )
        assert num_away(site.table) == 0
        site.table.free(0, held)

    site.run(story)


def test_reserves_bound_what_is_given(site: Site) -> None:
    async def story() -> None:
        assert await site.segments.give(1 << 40) == 14 * MB, "five slabs are promised: two segments stay"
        assert await site.segments.take(1 << 40) == 14 * MB

    site.run(story)


def test_a_worker_that_cannot_map_is_killed_and_one_that_is_silent_keeps_it_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        a, b = site.workers
        await site.segments.give(2 * MB)
        b.goes_on.clear()  # as if it were stopped
        monkeypatch.setattr(pool_segments, "ANSWER_TIMEOUT_S", 0.2)
        assert await site.segments.take(2 * MB) == 0
        assert gone_segments(site.table) == {5}
        assert a.done == [(5, False), (5, True), (5, False)]
        assert a._start.pool_fds[5] == GONE
        b.goes_on.set()
        monkeypatch.setattr(pool_segments, "ANSWER_TIMEOUT_S", 5.0)
        b.broken = True
        assert await site.segments.take(2 * MB) == 2 * MB
        assert (a.killed, b.killed) == (False, True), "it starts again with what is there"
        assert b.done == [(5, False), *a.done[1:]], "what it had missed it did in its order"

    site.run(story)


def test_who_loads_is_told_and_not_waited_for(site: Site) -> None:
    async def story() -> None:
        site.workers[1].state = "loading"
        site.workers[1].goes_on.clear()
        assert await site.segments.give(2 * MB) == 2 * MB
        assert site.workers[0].done == [(5, False)]
        site.workers[1].pid = None
        assert await site.segments.take(2 * MB) == 2 * MB, "a model without a process is not asked"

    site.run(story)


def test_a_worker_that_dies_over_it_has_let_go(site: Site) -> None:
    async def story() -> None:
        site.workers[1].goes_on.clear()
        giving = asyncio.create_task(site.segments.give(2 * MB))
        while not site.workers[0].done:
            await asyncio.sleep(0.01)
        site.workers[1]._link.hang_up()
        assert await giving == 2 * MB
        assert await site.segments.take(2 * MB) == 2 * MB

    site.run(story)


def test_a_device_without_memory_leaves_the_pool_smaller(site: Site) -> None:
    async def story() -> None:
        await site.segments.give(6 * MB)
        limit = site.keeper.segment

        def full(num_bytes: int) -> int:
            if num_bytes == 2 * MB:
                raise RuntimeError("no segment: out of memory")
            return limit(num_bytes)

        site.keeper.segment = full  # type: ignore[method-assign, assignment]
        assert await site.segments.take(1 << 40) == 4 * MB
        assert gone_segments(site.table) == {5}

    site.run(story)


def test_room_is_made_for_what_is_missing_and_no_more(site: Site) -> None:
    async def story() -> None:
        free = [10 * MB]
        room = DeviceRoom(
            site.segments, lambda: (free[0], 100 * MB), {"a": 13 * MB}, lambda total: total // 100
        )
        await room.reclaim()
        await room.make("a")  # 13 and 1 to keep, of 10: 4 are missing
        assert gone_segments(site.table) == {4, 5}
        free[0] = 16 * MB
        await room.make("a")
        assert gone_segments(site.table) == {4, 5}
        free[0] = 6 * MB
        await room.reclaim()
        assert gone_segments(site.table) == {5}, "one MiB stays free"

    site.run(story)


def test_an_answer_that_nobody_asked_for_ends_the_connection() -> None:
    async def story() -> None:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: Link(lambda told: None, ours.dup()), sock=ours)
        theirs.sendall(encode(SegmentDone(1)))
        async with asyncio.timeout(20):
            await link.closed.wait()
        theirs.close()

    asyncio.run(story())
