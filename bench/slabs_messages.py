"""The messages that E1's peers pay for memory, as baselines: a pickled pipe, and FineServe's form of a call.

FineServe's engines ask their manager over a ZeroMQ REQ socket on TCP, a manager's asyncio loop answers, and both sides
pickle (multiprocessing and pyzmq do that themselves).  The manager here pops the ids from a list and does nothing else.
pyzmq is no dependency: without it that row says so.
"""

import asyncio
import importlib.util
import multiprocessing
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

from bench.slabs_load import Model
from bench.slabs_replay import Arm, Lane

BLOCKS = 32  # that one message asks for: FineServe's refill
SPAWN = multiprocessing.get_context("spawn")
# of FineServe's engine: it asks for at least this many, keeps up to that many, and then gives back so many at once
REFILL, KEEP, GIVE_BACK = 32, 64, 16


def has_zmq() -> bool:
    return importlib.util.find_spec("zmq") is not None


def answer(free: list[int], message: tuple[int, str, Any]) -> tuple[list[int], int]:
    """What a manager does with (engine, verb, arguments)."""
    _, verb, value = message
    if verb == "alloc":
        taken = [free.pop() for _ in range(value)]
        return taken, len(free)
    free.extend(value)
    return [], len(free)


def pipe_manager(pipe: Connection) -> None:
    free = list(range(4096))
    while (message := pipe.recv()) is not None:
        pipe.send(answer(free, message))


def zmq_manager(pipe: Connection) -> None:
    """Says its port down the pipe, then answers until it is asked to stop."""
    import zmq
    import zmq.asyncio

    async def serve() -> None:
        free = list(range(4096))
        with zmq.asyncio.Context() as context, context.socket(zmq.REP) as socket:
            pipe.send(socket.bind_to_random_port("tcp://127.0.0.1"))
            while (message := await socket.recv_pyobj()) is not None:
                await socket.send_pyobj(answer(free, message))
            await socket.send_pyobj(None)

    asyncio.run(serve())


def time_pipe(n: int) -> list[float]:
    """Microseconds of `n` round trips, every second one an allocation."""
    ours, theirs = SPAWN.Pipe()
    manager = SPAWN.Process(target=pipe_manager, args=(theirs,), daemon=True)
    manager.start()

    def call(message: tuple[int, str, Any]) -> tuple[list[int], int]:
        ours.send(message)
        found: tuple[list[int], int] = ours.recv()
        return found

    try:
        return _round_trips(call, n)
    finally:
        ours.send(None)
        manager.join(10)


def time_zmq(n: int) -> list[float]:
    """The same in FineServe's form; needs pyzmq."""
    import zmq

    ours, theirs = SPAWN.Pipe()
    manager = SPAWN.Process(target=zmq_manager, args=(theirs,), daemon=True)
    manager.start()
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(f"tcp://127.0.0.1:{ours.recv()}")

        def call(message: tuple[int, str, Any]) -> tuple[list[int], int]:
            socket.send_pyobj(message)
            found: tuple[list[int], int] = socket.recv_pyobj()
            return found

        try:
            return _round_trips(call, n)
        finally:
            socket.send_pyobj(None)
            socket.recv_pyobj()
            manager.join(10)


def _round_trips(call: Any, n: int) -> list[float]:
    found = []
    for i in range(n + 100):
        began = time.perf_counter_ns()
        taken, _ = call((0, "alloc", BLOCKS))
        middle = time.perf_counter_ns()
        call((0, "free", taken))
        if i >= 100:  # the first ones start threads and connections
            found += [(middle - began) / 1e3, (time.perf_counter_ns() - middle) / 1e3]
    return found[:n]


class CountedCalls:
    """An arm that also counts: blocks handed out, and the calls that FineServe's engines would make for them.

    One call for each step of an engine with work (the manager's free count), one for each refill of its spare blocks,
    one for each lot that it gives back.
    """

    def __init__(self, arm: Arm) -> None:
        self._arm = arm
        self.models: tuple[Model, ...] = arm.models
        self.pool_bytes = arm.pool_bytes
        self.blocks = self.tokens = self.calls = 0
        self._spare: list[int] = [0] * len(arm.models)
        self._lanes: deque[Lane] = deque()

    @property
    def moved_bytes(self) -> int:
        return self._arm.moved_bytes

    @property
    def leases(self) -> int:
        return self._arm.leases

    def capacity(self, m: int) -> int:
        return self._arm.capacity(m)

    def allocate(self, m: int, n: int) -> list[int] | None:
        taken = self._arm.allocate(m, n)
        if taken is not None:
            self.blocks += n
            self.tokens += n * self.models[m].P
            if self._spare[m] < n:
                self.calls += 1
                self._spare[m] += max(n, REFILL)
            self._spare[m] -= n
        return taken

    def release(self, m: int, blocks: list[int]) -> None:
        self._arm.release(m, blocks)
        self._spare[m] += len(blocks)
        if self._spare[m] > KEEP:
            self.calls += 1
            self._spare[m] -= GIVE_BACK

    def tick(self, tables: list[Lane]) -> None:
        self._arm.tick(tables)
        self.calls += sum(bool(lane.running) for lane in tables)

    def stalled_s(self, m: int) -> float:
        return self._arm.stalled_s(m)

    def held(self) -> tuple[int, int]:
        return self._arm.held()

    def close(self) -> None:
        self._arm.close()
