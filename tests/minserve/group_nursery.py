"""Forks the two ranks of a group over two slab tables, kills either at any moment, and checks both tables and every step.

The leader plans for random requests and sends each step to the other rank, which applies it to block tables of its own;
what both then have must be the same, and every slot that a request holds must say so on each rank's pool.  A second
group and two models of one pool each are in the way.  No torch; run as a module by test_group_sets.  Prints one line of
JSON.  tests/minserve/pool_nursery.py says why it may fork.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minserve import group_sets
from minserve.group_sets import GroupSets
from minserve.slab_table import SlabTable
from minserve.slab_words import LIVE, owner_of, state_of
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.pressure import preempt_for
from sched.step import SLOT_BITS, Request, StepPlan
from tests.minserve.pool_nursery import (
    CANARY_BROKEN,
    TRACED,
    churn,
    forked,
    kill_at,
    random_division,
    slots_of,
    wait_killed,
)

DIVERGED = 5
LIMITS = Limits(max_running=12, max_step_tokens=64, max_chunk_tokens=48, max_model_len=400, max_waiting=50)
GROUPS, ALONE = ("g", "h"), (("a", 0), ("b", 1))
Pools = Sequence[tuple[int, int]]  # the descriptors of each rank's table and pool


class Rank:
    """What one rank makes of the steps: block tables, rows of slabs, and a stamp in every slot that a request holds."""

    def __init__(self, table: SlabTable, pool_fd: int) -> None:
        self._table, self._owner = table, table.owner_of("g")
        self._slots = slots_of(table.plan, pool_fd)
        self._rows: dict[int, list[int]] = {}
        self._blocks: dict[int, list[int]] = {}

    def apply(self, step: dict[str, Any], rows: dict[str, list[int]]) -> int:
        """The checksum of its block tables afterwards."""
        self._rows |= {int(set_id): row for set_id, row in rows.items()}
        for rid in step["left"]:
            self._blocks.pop(rid, None)
        for source, target in step["moves"]:
            self._at(target)[:] = self._at(source)
        for rid, blocks in step["grants"]:
            self._blocks.setdefault(rid, []).extend(blocks)
        for rid, index, block in step["patches"]:
            self._blocks[rid][index] = block
        for rid, blocks in step["grants"]:
            # the step writes where a block granted in it has been moved to
            for block in self._blocks[rid][-len(blocks) :]:
                self._at(block)[:] = rid + 1
        for rid in step["decode"]:
            for block in self._blocks[rid]:
                if not (self._at(block) == rid + 1).all():
                    os._exit(CANARY_BROKEN)
        return zlib.crc32(json.dumps(sorted(self._blocks.items())).encode())

    def _at(self, block: int) -> Any:
        """The first words of a block, layer by layer; the truth must say that all of its slabs are ours."""
        slabs = np.array(self._rows[block >> SLOT_BITS]) // self._table.plan.slab_bytes
        words = self._table._words[slabs]
        if not ((owner_of(words) == self._owner) & (state_of(words) == LIVE)).all():
            os._exit(CANARY_BROKEN)
        return _View(self._slots, slabs, block & (1 << SLOT_BITS) - 1)


class _View:
    """Scattered words that are read and written like one array."""

    def __init__(self, slots: Any, slabs: Any, slot: int) -> None:
        self._slots, self._slabs, self._slot = slots, slabs, slot

    def __setitem__(self, every: slice, value: Any) -> None:
        self._slots[self._slabs, self._slot] = value._now if isinstance(value, _View) else value

    def __eq__(self, other: object) -> Any:
        return self._now == other

    __hash__ = None  # type: ignore[assignment]

    @property
    def _now(self) -> Any:
        return self._slots[self._slabs, self._slot]


def told(plan: StepPlan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in ("left", "moves", "patches", "grants", "decode")}


def lead(pools: Pools, peer: socket.socket, seed: int, plant: bool) -> None:
    """Rank 0: plans, tells the other, compares, until it is killed.  `plant`: it loses a block of step 20."""
    tables, rng = [SlabTable.attach(fd) for fd, _ in pools], random.Random(seed)
    sets = GroupSets(tables, "g")
    blocks = BlockPool(sets, sets.slots, sets.block_tokens)
    batcher, mine = Batcher(blocks, LIMITS), Rank(tables[0], pools[0][1])
    wire = peer.makefile("rw")
    for turn in itertools.count():
        if batcher.num_waiting < 6:
            prompt = rng.randrange(1, 200)
            batcher.add(Request(rid=turn, prompt_tokens=prompt, max_tokens=rng.randrange(1, 400 - prompt)))
        if rng.random() < 0.05:
            batcher.abort(rng.randrange(turn + 1))
        excess = sets.excess
        if excess and blocks.give_up(excess) < excess and rng.random() < 0.3:
            preempt_for(batcher, excess)
        if rng.random() < 0.1:
            batcher.compactor.ask(2, 100)
        plan = batcher.plan(float(turn))
        changed = sets.take_changed()
        rows = [{str(s): rank[s].tolist() for s in changed} for rank in sets.rows]
        step = told(plan)
        wire.write(json.dumps([step, rows[1]]) + "\n")
        wire.flush()
        if plant and turn == 20:
            step["grants"] = step["grants"][1:]
        found = mine.apply(step, rows[0])
        answer = wire.readline()
        if not answer:
            raise BrokenPipeError
        if int(answer) != found:
            os._exit(DIVERGED)
        if not plan.empty:
            batcher.advance(plan, 1, float(turn))
        sets.publish(demand=batcher.num_waiting, step_us=turn, heartbeat_ns=time.monotonic_ns())
        if turn % 16 == 0:
            sets.check()


def follow(pools: Pools, peer: socket.socket) -> None:
    """Rank 1: applies what it is told."""
    table_fd, pool_fd = pools[1]
    mine, wire = Rank(SlabTable.attach(table_fd), pool_fd), peer.makefile("rw")
    for line in wire:
        step, rows = json.loads(line)
        wire.write(f"{mine.apply(step, rows)}\n")
        wire.flush()


def group_churn(pools: Pools, seed: int) -> None:
    """The other group: leases and returns with a stamp in every slab, behind fences that pass late."""
    tables, rng, passes = [SlabTable.attach(fd) for fd, _ in pools], random.Random(seed), [0]

    def fence() -> Callable[[], bool]:
        at = passes[0] + rng.randrange(4)
        return lambda: passes[0] >= at

    sets = GroupSets(tables, "h", fence=fence)
    slots = [slots_of(table.plan, fd) for table, (_, fd) in zip(tables, pools, strict=True)]
    held: list[int] = []
    while True:
        passes[0] += 1
        sets.publish(demand=rng.randrange(8), heartbeat_ns=time.monotonic_ns())
        if held and (rng.random() < 0.5 or sets.excess):
            set_id = held.pop(rng.randrange(len(held)))
            for rank, row in enumerate(sets.rows):
                if not (slots[rank][row[set_id] // 4096] == -1 - set_id).all():
                    os._exit(CANARY_BROKEN)
            sets.give_back(set_id)
        elif (found := sets.lease(urgent=rng.random() < 0.2)) is not None:
            held.append(found)
            for rank, row in enumerate(sets.rows):
                slots[rank][row[found] // 4096] = -1 - found


def until_alone(run: Callable[[], None]) -> None:
    """The other rank is dead: nothing to go on with."""
    try:
        run()
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


class Nursery:
    """The processes by who they are: the two ranks of "g", the group "h", and the models alone."""

    def __init__(self, pools: Pools, seed: int, plant: bool) -> None:
        self.pools, self.rng, self.plant = pools, random.Random(seed), plant
        self.tables = [SlabTable.attach(fd) for fd, _ in pools]
        self.pids: dict[str, tuple[int, ...]] = {}
        for name in (*GROUPS, "a", "b"):
            self.start(name)

    def start(self, name: str) -> None:
        seed, pools = self.rng.getrandbits(32), self.pools
        if name == "h":
            self.pids[name] = (forked(lambda: group_churn(pools, seed)),)
        elif name == "g":
            ours, theirs = socket.socketpair()

            def rank(run: Callable[[], None], other: socket.socket) -> int:
                return forked(lambda: (other.close(), run())[1])

            self.pids[name] = (
                rank(lambda: until_alone(lambda: lead(pools, ours, seed, self.plant)), theirs),
                rank(lambda: until_alone(lambda: follow(pools, theirs)), ours),
            )
            ours.close()
            theirs.close()
        else:
            at = dict(ALONE)[name]
            owner = self.tables[at].owner_of(name)
            self.pids[name] = (forked(lambda: churn(*pools[at], owner, seed)),)

    @property
    def steps(self) -> int:
        """Of the group "g" in this life."""
        return self.tables[0].status(self.tables[0].owner_of("g"))["step_us"]

    def wait_steps(self, more: int) -> None:
        """A second at most: it may be short of memory, or have died of what it saw."""
        end, target = time.monotonic() + 1.0, self.steps + more
        while self.steps < target and time.monotonic() < end:
            time.sleep(0.0005)

    def kill(self, name: str) -> int:
        """Kills its processes, in any order, and waits for them: a rank that is left alone may end by itself, with 0."""
        pids = list(self.pids[name])
        self.rng.shuffle(pids)
        for i, pid in enumerate(pids):
            if i and self.rng.random() < 0.5:
                time.sleep(self.rng.random() * 0.001)
            os.kill(pid, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        for code in codes:
            assert code in (0, -signal.SIGKILL), f"worker left with status {code}"
        assert any(codes), f"{name} left by itself"
        return codes.count(-signal.SIGKILL)

    def reclaim(self, name: str) -> bool:
        """On every pool where it is; whether it died between the two of a lease or a return."""
        held = []
        for table in self.tables:
            if name in table.names:
                owner = table.owner_of(name)
                held.append(table.reclaim(owner))
                counts = table.counts().models[name]
                assert counts.live == counts.draining == 0, f"{name} has {counts} after reclaim"
        return len(set(held)) > 1

    def check(self) -> None:
        for table in self.tables:
            table.check()


def random_kills(pools: Pools, kills: int, seed: int, plant: bool) -> dict[str, float]:
    nursery = Nursery(pools, seed, plant)
    rng, tables = nursery.rng, nursery.tables
    began, done, between, steps = time.perf_counter(), 0, 0, 0
    while True:
        if rng.random() < 0.8:
            nursery.wait_steps(rng.randrange(40))
        time.sleep(rng.random() * 0.002)
        last = done >= kills
        for table in tables:
            table.quotas.write(random_division(table.plan, rng) if rng.random() < 0.5 else None)
        everybody = list(nursery.pids)
        victims = everybody if last else rng.sample(everybody, rng.randint(1, len(everybody)))
        for name in victims:
            done += nursery.kill(name)
        nursery.check()
        steps += nursery.steps if "g" in victims else 0
        between += sum([nursery.reclaim(name) for name in victims])
        nursery.check()
        if last:
            break
        for name in victims:
            nursery.start(name)
    counts = [table.counts() for table in tables]
    return {"kills": done, "seconds": time.perf_counter() - began, "between": between, "steps": steps,
            "leaked": sum(c.mapped - c.free for c in counts), "repairs": sum(c.repairs for c in counts),
            "refused": sum(c.models["g"].refused for c in counts)}  # fmt: skip


# ---- a kill at every instruction

OPERATIONS: dict[str, Callable[[GroupSets], object]] = {
    "lease": lambda sets: sets.lease(),
    "lease_urgent": lambda sets: sets.lease(urgent=True),
    "free": lambda sets: sets.give_back(0),
    "drain": lambda sets: sets.give_back(1),
    "poll": lambda sets: sets.poll(),
}


def die_in(operation: str, fds: Sequence[int], step: int) -> None:
    passed = [operation == "free"]
    sets = GroupSets([SlabTable.attach(fd) for fd in fds], "g", fence=lambda: lambda: passed[0])
    assert [sets.lease(), sets.lease()] == [0, 1]
    if operation == "poll":
        sets.give_back(0)
        passed[0] = True
    kill_at(step)
    OPERATIONS[operation](sets)
    sys.settrace(None)


def every_instruction(pools: Pools, stride: int) -> dict[str, int]:
    """Kills a leader before each `stride`-th instruction of what it does to both tables."""
    TRACED.add(group_sets.__file__)
    tables = [SlabTable.attach(fd) for fd, _ in pools]
    bystanders = [
        table.lease(table.owner_of(name), 11) for table, (name, _) in zip(tables, ALONE, strict=True)
    ]
    kills, between = dict.fromkeys(OPERATIONS, 0), 0
    for operation in OPERATIONS:
        for step in range(0, 10**6, stride):
            fds = [fd for fd, _ in pools]
            if not wait_killed(forked(lambda: die_in(operation, fds, step)), may_end=True):  # noqa: B023
                break
            kills[operation] += 1
            for table in tables:
                table.check()
            between += len({table.reclaim(table.owner_of("g")) for table in tables}) > 1
            for table, (name, _), lease in zip(tables, ALONE, bystanders, strict=True):
                table.check()
                assert table.holds(table.owner_of(name), lease), f"{operation} at {step} took another's slabs"
                leaked = table.plan.num_slabs - 11 - table.counts().free
                assert leaked == 0, f"{operation} killed at {step}: {leaked} leaked"
        for table in tables:
            table.reclaim(table.owner_of("g"))
    return {**kills, "between": between, "repairs": sum(table.counts().repairs for table in tables)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("random", "instructions"))
    parser.add_argument("fds", type=int, nargs=4, help="table and pool of each rank")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--plant", action="store_true", help="a step that the ranks do not agree on")
    args = parser.parse_args()
    pools = [(args.fds[0], args.fds[1]), (args.fds[2], args.fds[3])]
    if args.what == "random":
        print(json.dumps(random_kills(pools, args.kills, args.seed, args.plant)))
    else:
        print(json.dumps(every_instruction(pools, args.stride)))


if __name__ == "__main__":
    main()
