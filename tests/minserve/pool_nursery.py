"""Forks torch-free workers over one slab table, kills them, and checks the table.  Run as a module by test_pool_kills.

Spawning an interpreter a kill would cost 0.2 s; forking this small process costs about 1 ms.  That is safe here and
only here: it has one thread (asserted), so no lock can be held by a thread that the child lacks; it is never inside
the table's lock when it forks; and a child opens its own descriptions of table and pool after the fork, uses nothing
it inherited, and ends with _exit or SIGKILL.  Prints one line of JSON.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from minserve import shared_memory, slab_quota, slab_rule, slab_table, slab_words
from minserve.slab_table import Lease, OwnershipError, SlabTable
from sched.slabs import PoolPlan
from tests.minserve.pool_compactor import compact_for_ever

LIBC = ctypes.CDLL(None)
CANARY_BROKEN, RULE_BROKEN = 3, 4
SLOTS = 8
TRACED = {module.__file__ for module in (slab_table, slab_rule, slab_words, slab_quota, shared_memory)}


def forked(body: Callable[[], None]) -> int:
    """The pid of a child that runs `body` and leaves; an exception is exit status 1, on stderr."""
    assert threading.active_count() == 1, "fork with threads"
    assert "torch" not in sys.modules, "fork with torch"
    pid = os.fork()
    if pid:
        return pid
    try:
        # no worker outlives the nursery, however that ends (PR_SET_PDEATHSIG)
        LIBC.prctl(1, signal.SIGKILL)
        body()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def wait_killed(pid: int, *, may_end: bool = False) -> bool:
    """Whether `pid` was killed by SIGKILL; a worker that ended by itself had something to say, which is a failure."""
    _, status = os.waitpid(pid, 0)
    if may_end and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return False
    assert os.WIFSIGNALED(status), f"worker left with status {os.waitstatus_to_exitcode(status)}"
    return True


# ---- random kills


def churn(table_fd: int, pool_fd: int, owner: int, seed: int, ops: int | None = None) -> None:
    """Leases, marks, checks and returns: what a pool worker does, without the model.  For ever, or `ops` times and then
    it gives everything back.  Each slot of a slab begins with the generation of its lease: a canary."""
    table, rng = SlabTable.attach(table_fd), random.Random(seed)
    slots = slots_of(table.plan, pool_fd)
    held: list[Lease] = []

    def give_back() -> None:
        lease = held.pop(rng.randrange(len(held)))
        if not (slots[lease.slabs] == lease.generation).all():
            os._exit(CANARY_BROKEN)
        if rng.random() < 0.5:
            table.drain(owner, lease)
        table.free(owner, lease)

    for turn in itertools.count():
        if turn == ops:
            break
        if turn % 16 == 0:
            table.publish(owner, demand=rng.randrange(0, 20), heartbeat_ns=time.monotonic_ns())
        if held and (rng.random() < 0.5 or len(held) > 30 or table.quotas.excess(owner)):
            give_back()
            continue
        lease = table.lease(owner, rng.randrange(1, 40), urgent=rng.random() < 0.2)
        if lease is not None:
            if not table.holds(owner, lease):
                os._exit(RULE_BROKEN)
            slots[lease.slabs] = lease.generation
            held.append(lease)
    while held:
        give_back()


def slots_of(plan: PoolPlan, pool_fd: int) -> np.ndarray:
    """[slab, slot]: the first word of each of SLOTS slots, in shared memory."""
    pool = np.memmap(f"/proc/self/fd/{pool_fd}", np.int64, "r+")
    return pool.reshape(plan.num_slabs, SLOTS, -1)[:, :, 0]


def operations(table_fd: int, pool_fd: int, ops: int, seed: int, corrupt: bool) -> dict[str, float]:
    """`ops` random operations by one process a model, while the quotas change under them.  `corrupt`: one slot of
    somebody's slab is overwritten in the middle."""
    table, rng, began = SlabTable.attach(table_fd), random.Random(seed), time.perf_counter()
    owners, slots = range(len(table.names)), slots_of(table.plan, pool_fd)
    share = ops // len(owners)
    workers = {forked(lambda o=o: churn(table_fd, pool_fd, o, seed + o, share)): o for o in owners}
    statuses: dict[int, int] = {}
    while workers:
        table.quotas.write(random_division(table.plan, rng), strict=rng.random() < 0.2)
        time.sleep(0.002)
        table.check()
        if corrupt and table.counts().leases > share // 4:
            held = np.flatnonzero(slab_words.state_of(table._words) == slab_words.LIVE)
            slots[held, rng.randrange(SLOTS)] = -1
            corrupt = False
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[workers.pop(pid)] = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    assert CANARY_BROKEN not in statuses.values(), f"a slot was overwritten: workers ended with {statuses}"
    assert set(statuses.values()) == {0}, f"workers ended with {statuses}"
    table.check()
    counts = table.counts()
    return {"operations": share * len(owners), "seconds": seconds, "leases": counts.leases, "refused": counts.refused,
            "leaked": counts.mapped - counts.free, "repairs": counts.repairs}  # fmt: skip


def random_division(plan: PoolPlan, rng: random.Random) -> list[int]:
    """Sets of each model that together are no more than the pool."""
    parts = [rng.random() for _ in plan.models]
    return [
        int(plan.num_slabs * p / sum(parts)) // m.layers
        for p, m in zip(parts, plan.models.values(), strict=True)
    ]


def compact(table_fd: int, pool_fd: int, owner: int, seed: int) -> None:
    table = SlabTable.attach(table_fd)
    compact_for_ever(table, slots_of(table.plan, pool_fd), owner, seed)


def random_kills(
    table_fd: int, pool_fd: int, kills: int, seed: int, body: Callable[[int, int, int, int], None]
) -> dict[str, float]:
    """Round by round, until `kills` are done: kills some workers at a random instant, waits for them, checks the table
    while their slabs are still theirs, reclaims, checks again, and starts others in their place."""
    table, rng, reclaimed, done, reclaim_s = SlabTable.attach(table_fd), random.Random(seed), 0, 0, 0.0
    owners = range(len(table.names))
    moving = moved = 0

    def start(owner: int) -> int:
        child_seed = rng.getrandbits(31)
        table.publish(owner, vacatable=0, moved_bytes=0)
        return forked(lambda: body(table_fd, pool_fd, owner, child_seed))

    began = time.perf_counter()
    workers = [start(owner) for owner in owners]
    while True:
        time.sleep(rng.random() * 0.003)
        last = done >= kills
        table.quotas.write(random_division(table.plan, rng))
        victims = rng.sample(owners, len(owners) if last else rng.randint(1, len(owners)))
        for owner in victims:
            os.kill(workers[owner], signal.SIGKILL)
        for owner in victims:
            wait_killed(workers[owner])
            moving += table.status(owner)["vacatable"]
            moved += table.status(owner)["moved_bytes"]
        done += len(victims)
        table.check()
        for owner in victims:
            t = time.perf_counter()
            reclaimed += table.reclaim(owner)
            reclaim_s += time.perf_counter() - t
        table.check()
        counts = table.counts()
        left = {i: counts.models[table.names[i]] for i in victims}
        assert all(m.live == m.draining == 0 for m in left.values()), f"{left} after reclaim"
        if last:
            break
        for owner in victims:
            workers[owner] = start(owner)
    return {"kills": done, "seconds": time.perf_counter() - began, "repairs": counts.repairs, "reclaimed": reclaimed,
            "leaked": counts.mapped - counts.free, "leases": counts.leases, "refused": counts.refused,
            "moved": moved, "killed_in_moves": moving, "reclaim_us": reclaim_s / done * 1e6}  # fmt: skip


# ---- a kill at every instruction


def kill_at(step: int) -> None:
    """From now on this process dies before the `step`-th bytecode instruction it runs inside the table's modules."""
    left = [step]

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return trace

    sys.settrace(trace)


def repair_torn(table: SlabTable, live: Lease, draining: Lease) -> None:
    """The process before died inside a change; this one dies in the repair."""
    table._head[slab_words.H_DIRTY] = 1
    table.counts()


# what owner 0 dies in, while it holds a live and a draining lease; owner 1 looks on, owner 2 is dead already
OPERATIONS: dict[str, Callable[[SlabTable, Lease, Lease], object]] = {
    "lease": lambda table, live, draining: table.lease(0, 9),
    "draw_liveness": lambda table, live, draining: table.lease(0, table.plan.liveness_slabs, urgent=True),
    "drain": lambda table, live, draining: table.drain(0, live),
    "free_live": lambda table, live, draining: table.free(0, live),
    "free_draining": lambda table, live, draining: table.free(0, draining),
    "reclaim": lambda table, live, draining: table.reclaim(2),
    "repair": repair_torn,
    "quotas": lambda table, live, draining: table.quotas.write([40, 20, 72]),
    # owner 2 has given back all
    "enter": lambda table, live, draining: table.enter(2),
    "leave": lambda table, live, draining: table.leave(2),
    "publish": lambda table, live, draining: table.publish(0, **dict.fromkeys(slab_words.STATUS, 7)),
}


def die_in(operation: str, table_fd: int, step: int) -> None:
    table = SlabTable.attach(table_fd)
    live, draining = table.lease(0, 5), table.lease(0, 7)
    assert live is not None
    assert draining is not None
    table.drain(0, draining)
    kill_at(step)
    result = OPERATIONS[operation](table, live, draining)
    sys.settrace(None)
    assert result is not None or not operation.startswith(("lease", "draw")), f"{operation} was refused"


def prepare(table: SlabTable, operation: str) -> None:
    """What owner 2 has before the operation, of a table in which all take part and only owner 1 holds slabs."""
    if operation in ("enter", "leave"):
        table.leave(2)
        if operation == "leave":
            assert table.enter(2)
        return
    # for a draw, all that nobody was promised
    most = table.counts().free - table.plan.reserved_slabs
    assert table.lease(2, most if operation == "draw_liveness" else 3) is not None


def every_instruction(plan: PoolPlan, stride: int) -> dict[str, int]:
    """Kills a worker before each `stride`-th instruction of each operation; returns how many kills each one had."""
    table = SlabTable.create(plan)
    bystander = table.lease(1, 11)
    kills = dict.fromkeys(OPERATIONS, 0)
    for operation in OPERATIONS:
        for step in range(0, 10**6, stride):
            prepare(table, operation)
            table.quotas.write(
                [60, 10, 70]
            )  # of 990 slabs; what is written in its place shrinks one and grows two
            if not wait_killed(forked(lambda: die_in(operation, table.fd, step)), may_end=True):  # noqa: B023
                break
            kills[operation] += 1
            table.check()
            assert table.holds(1, bystander), f"{operation} killed at {step} took another model's slabs"
            table.reclaim(0)
            table.reclaim(2)
            assert table.enter(2)
            table.check()
            free = table.counts().free
            assert free == plan.num_slabs - 11, (
                f"{operation} killed at {step}: {plan.num_slabs - 11 - free} leaked"
            )
        table.reclaim(0)
        table.reclaim(2)
        assert table.enter(2)
    return {**kills, "repairs": table.counts().repairs}


# ---- what the checker must catch


def forget_to_repair() -> None:
    """Plants the bug that the dirty word is for: the lock comes free, the torn table is taken for whole."""
    SlabTable._repair = lambda self: self._head.__setitem__(slab_words.H_DIRTY, 0)  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["random", "compaction", "instructions", "operations"])
    parser.add_argument("--table-fd", type=int)
    parser.add_argument("--pool-fd", type=int)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--operations", type=int, default=10**6)
    parser.add_argument("--corrupt", action="store_true")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forget-to-repair", action="store_true")
    args = parser.parse_args()
    if args.forget_to_repair:
        forget_to_repair()
    try:
        if args.mode in ("random", "compaction"):
            body = churn if args.mode == "random" else compact
            out = random_kills(args.table_fd, args.pool_fd, args.kills, args.seed, body)
        elif args.mode == "operations":
            out = operations(args.table_fd, args.pool_fd, args.operations, args.seed, args.corrupt)
        else:
            plan = SlabTable.attach(args.table_fd).plan
            out = every_instruction(plan, args.stride)
    except (AssertionError, OwnershipError) as fault:
        out = {"fault": str(fault)}
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
