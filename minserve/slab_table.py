"""Who owns which slab of a pool: one table in shared memory that every process of a GPU works on.  No torch.

Under the lock (an flock: freed when its holder is killed) a change sets the dirty word, writes the owner words and
what is derived from them, and clears the dirty word; whoever finds it set rebuilds the derived part first.  There is
no server to ask and none to lose.  A model holds its slabs until it frees them, or until the agent, after waitpid,
reclaims them: a generation catches a bug, but no word in a table can fence a pointer that a living process has mapped.
"""

import mmap
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from minserve.shared_memory import SharedLock, create_memfd, reopen_memfd
from minserve.slab_counts import PoolCounts, count_pool
from minserve.slab_quota import SlabQuotas
from minserve.slab_rule import LeaseRule
from minserve.slab_words import (
    DRAINING,
    FREE,
    H_BYTES,
    H_DIRTY,
    H_HOLDER,
    H_LIVENESS,
    H_REPAIRS,
    H_SERIAL,
    H_TOP,
    H_UNFILLED,
    HEAD_WORDS,
    LIVE,
    NOBODY,
    OUT,
    R_DRAINING,
    R_LEASES,
    R_LIVE,
    R_REFUSED,
    R_RESERVE,
    R_RETURNS,
    R_STATUS,
    R_WANTED,
    ROW_WORDS,
    STATE_MASK,
    STATUS,
    Int64s,
    Offsets,
    derive,
    encode_table,
    find_fault,
    find_stack_fault,
    generation_of,
    liveness_of,
    misuse,
    owner_of,
    pack,
    planned_reserves,
    read_plan,
    state_of,
)
from sched.slabs import PoolPlan


class OwnershipError(RuntimeError):
    """Slabs handed back that are not the caller's to hand back: double free, foreign free or stale generation."""


@dataclass(slots=True, eq=False)  # frozen, it would take three times as long to make
class Lease:
    """Slabs leased together by `owner`; `before` are their words until then."""

    generation: int
    owner: int
    slabs: Int64s
    before: Int64s

    @property
    def inherited(self) -> Int64s:
        """The slabs that hold another model's bytes, or nobody's yet."""
        inherited: Int64s = self.slabs[owner_of(self.before) != self.owner]
        return inherited


class SlabTable:
    """One process's view of the table.  An owner is the index of a model in `plan.models`; see `owner_of`.

    Reserve rule: a lease leaves the unfilled reserve of every other model free, and the liveness reserve too.  An
    urgent one may eat into the latter, for one model at a time (banker's rule), so that this model can always finish
    its longest sequence and give back.  Who does not take part (`leave`, `enter`) has no reserve and none is kept for it.
    With `timeout_s`, TimeoutError when a stopped process sits on the lock.
    """

    def __init__(self, fd: int, plan: PoolPlan, timeout_s: float | None) -> None:
        """Takes over `fd`, an own description of a valid table: callers use `create` or `attach`."""
        self.fd, self.plan, self.names = fd, plan, tuple(plan.models)
        self._map = mmap.mmap(fd, 0)
        at = Offsets.of(len(self.names), plan.num_slabs)
        # scalars through a memoryview: 40 ns and one 8-byte store, which a kill cannot split
        self._head = memoryview(self._map)[: 8 * HEAD_WORDS].cast("q")
        self._rows = memoryview(self._map)[at.rows : at.words].cast("q")
        self._words: Int64s = np.frombuffer(self._map, np.int64, plan.num_slabs, at.words)
        self._stack: Int64s = np.frombuffer(self._map, np.int64, plan.num_slabs, at.stack)
        self._lock = SharedLock(fd, timeout_s)
        self.quotas = SlabQuotas(self._head, self._rows, plan)
        self.rule = LeaseRule(self._head, self._rows, self.quotas)

    @classmethod
    def create(
        cls, plan: PoolPlan, *, out: Collection[str] = (), timeout_s: float | None = None
    ) -> "SlabTable":
        """A new table, every slab free, where models in `out` take no part.  Others get its `fd` by `pass_fds`."""
        if not 0 < len(plan.models) < NOBODY:
            raise ValueError(f"models must hold 1 to {NOBODY - 1} models, got {len(plan.models)}")
        if plan.reserved_slabs > plan.num_slabs:
            raise ValueError(
                f"num_slabs must be at least the {plan.reserved_slabs} slabs reserved, got {plan.num_slabs}"
            )
        parts = encode_table(plan, out)
        fd = create_memfd("minserve-slab-table", int(np.frombuffer(parts[0][1], np.int64)[H_BYTES]))
        for position, part in parts:
            assert os.pwrite(fd, part, position) == len(part), "memfd took a part of the table"
        table = cls(fd, plan, timeout_s)
        table._rebuild()
        return table

    @classmethod
    def attach(cls, fd: int, *, timeout_s: float | None = None) -> "SlabTable":
        """The table behind a descriptor that was inherited or received, which stays open and the caller's."""
        own, size = reopen_memfd(fd, "slab table")
        try:
            return cls(own, read_plan(own, size, fd), timeout_s)
        except BaseException:
            os.close(own)
            raise

    def owner_of(self, model: str) -> int:
        if model not in self.plan.models:
            raise ValueError(
                f"model {model!r} has no place in this pool, which holds {', '.join(self.names)}"
            )
        return self.names.index(model)

    def close(self) -> None:
        """Lets go of the table.  What this process leased stays leased until somebody reclaims it."""
        self._head.release()
        self._rows.release()
        del self._words, self._stack  # the map cannot be closed under them
        self._map.close()
        os.close(self.fd)

    # ---- what changes the table

    def lease(self, owner: int, n: int, *, urgent: bool = False) -> Lease | None:
        """`n` slabs, or None when the reserve rule or, unless urgent, a quota refuses; then nothing has changed."""
        row = self._row(owner)
        if n <= 0:
            raise ValueError(f"n must be at least 1 slab, got {n}")
        with self._lock:
            if self._head[H_DIRTY]:
                self._repair()
            draws = self.rule.draws(owner, n, urgent)
            if draws is None:
                self._rows[row + R_REFUSED] += 1
                return None
            return self._take(owner, n, draws)

    def drain(self, owner: int, lease: Lease) -> None:
        """live -> draining: the model is done with the slabs, work already enqueued on the GPU may not be."""
        row = self._row(owner)
        with self._lock:
            self._repair()
            self._expect(owner, lease, (LIVE,))
            self._head[H_DIRTY] = 1
            self._words[lease.slabs] = pack(lease.generation, owner, DRAINING)
            self._hold(row, -len(lease.slabs), len(lease.slabs))
            self._head[H_DIRTY] = 0

    def free(self, owner: int, lease: Lease) -> None:
        """live or draining -> free: from now on anybody may lease the slabs."""
        head, row, n = self._head, self._row(owner), len(lease.slabs)
        with self._lock:
            if head[H_DIRTY]:
                self._repair()
            state = self._expect(owner, lease, (LIVE, DRAINING))
            top = head[H_TOP]
            head[H_DIRTY] = 1
            self._words[lease.slabs] = pack(lease.generation, owner, FREE)
            self._stack[top : top + n] = lease.slabs
            head[H_TOP] = top + n
            if state == LIVE:
                self._hold(row, -n, 0)
            else:
                self._hold(row, 0, -n)
            self._rows[row + R_RETURNS] += 1
            head[H_DIRTY] = 0

    def reclaim(self, owner: int) -> int:
        """Frees all that `owner` holds and says how many slabs.  After waitpid of its process, never before."""
        row = self._row(owner)
        with self._lock:
            self._repair()
            held = np.flatnonzero((owner_of(self._words) == owner) & (state_of(self._words) != FREE))
            self._head[H_DIRTY] = 1
            self._words[held] &= ~STATE_MASK
            self._rebuild()
            self._silence(row)
            self._head[H_DIRTY] = 0
            return len(held)

    def _silence(self, row: int) -> None:
        for field in range(R_STATUS, R_STATUS + len(STATUS)):
            self._rows[row + field] = 0

    def enter(self, owner: int) -> bool:
        """The model takes part, with its reserve.  False where slabs are missing: it claims them until it enters or leaves."""
        row = self._row(owner)
        with self._lock:
            self._repair()
            if self._rows[row + R_RESERVE] == OUT:
                reserves = list(self._reserves)
                reserves[owner] = planned_reserves(self.plan)[owner]
                unfilled, liveness = derive(self._words, reserves).unfilled, liveness_of(self.plan, reserves)
                more = unfilled - self._head[H_UNFILLED] + liveness - self._head[H_LIVENESS]
                if more and unfilled + liveness > self._head[H_TOP]:
                    self._rows[row + R_WANTED] = more
                    return False
                self._take_part(row, reserves[owner])
            return True

    def leave(self, owner: int) -> None:
        """The model takes part no more: for the agent.  OwnershipError while slabs are still its own."""
        row = self._row(owner)
        with self._lock:
            self._repair()
            if self.held(owner):
                raise OwnershipError(f"{self.names[owner]} still holds {self.held(owner)} slabs")
            self._silence(row)
            self._take_part(row, OUT)

    def _take_part(self, row: int, reserve: int) -> None:
        self._head[H_DIRTY] = 1
        self._rows[row + R_RESERVE] = reserve
        self._rows[row + R_WANTED] = 0
        self._rebuild()
        self._head[H_DIRTY] = 0

    def publish(self, owner: int, **status: int) -> None:
        """Sets words of STATUS of a model.  Each has one writer: no lock."""
        row = self._row(owner)
        for name, value in status.items():
            if name not in STATUS:
                raise ValueError(f"status word must be one of {', '.join(STATUS)}, got {name!r}")
            self._rows[row + R_STATUS + STATUS.index(name)] = value

    # ---- what reads it

    def status(self, owner: int) -> dict[str, int]:
        at = self._row(owner) + R_STATUS
        return dict(zip(STATUS, self._rows[at : at + len(STATUS)], strict=True))

    def said(self, owner: int, name: str) -> int:
        """One word of STATUS.  No lock."""
        return self._rows[self._row(owner) + R_STATUS + STATUS.index(name)]

    @property
    def _reserves(self) -> tuple[int, ...]:
        return tuple(self._rows[R_RESERVE::ROW_WORDS].tolist())

    def takes_part(self, owner: int) -> bool:
        """Whether the model has its reserve."""
        return self._rows[self._row(owner) + R_RESERVE] != OUT

    def held(self, owner: int) -> int:
        """Slabs that the model holds, live or draining.  No lock: it may be a moment old."""
        row = self._row(owner)
        return self._rows[row + R_LIVE] + self._rows[row + R_DRAINING]

    @property
    def num_free(self) -> int:
        """Slabs that nobody holds.  No lock."""
        return self._head[H_TOP]

    def holds(self, owner: int, lease: Lease) -> bool:
        """Whether the truth says that all slabs of `lease` are `owner`'s.  No lock: one's own words do not move."""
        words = self._words[lease.slabs]
        return any(bool((words == pack(lease.generation, owner, state)).all()) for state in (LIVE, DRAINING))

    def counts(self) -> PoolCounts:
        with self._lock:
            self._repair()
            rows = [self._rows[i : i + ROW_WORDS].tolist() for i in range(0, len(self._rows), ROW_WORDS)]
            free, repairs, deficit = self._head[H_TOP], self._head[H_REPAIRS], self.rule.deficit()
            holder = self.names[self._head[H_HOLDER]] if deficit > 0 else None
        limits = [self.quotas.quota(i) for i in range(len(self.names))]
        return count_pool(self.plan, rows, limits, (free, repairs, holder))

    def check(self) -> None:
        """AssertionError, with the numbers, unless what is derived agrees with the truth and no rule is broken."""
        with self._lock:
            self._repair()
            words, top, serial = self._words.copy(), self._head[H_TOP], self._head[H_SERIAL]
            stack, unfilled = self._stack[: max(top, 0)].copy(), self._head[H_UNFILLED]
            rows = [self._rows[i : i + 2].tolist() for i in range(0, len(self._rows), ROW_WORDS)]
            reserves, liveness = self._reserves, self._head[H_LIVENESS]
        truth = derive(words, reserves)
        fault = find_fault(words, len(self.names), serial) or find_stack_fault(stack, words)
        fault = fault or self.quotas.fault()
        assert fault is None, fault
        for name, reserve, planned in zip(self.names, reserves, planned_reserves(self.plan), strict=True):
            assert reserve in (OUT, planned), (
                f"{name} has a reserve of {reserve} slabs, planned are {planned}"
            )
        assert liveness == liveness_of(self.plan, reserves), (
            f"the liveness reserve is said to be {liveness} slabs"
        )
        assert top == len(truth.free), f"the free stack counts {top} slabs, the truth {len(truth.free)}"
        for name, said, held in zip(self.names, rows, truth.held, strict=True):
            assert said == list(held), (
                f"{name} is said to hold {said} (live, draining) slabs and holds {held}"
            )
        assert unfilled == truth.unfilled, (
            f"{unfilled} slabs of reserves said to be unfilled, {truth.unfilled} are"
        )
        assert unfilled <= top, f"{unfilled} slabs of reserves are promised, {top} are free"

    # ---- inside the lock

    def _repair(self) -> None:
        """Undoes what a holder left that died inside a change: its owner words stand, the rest is derived anew."""
        if self._head[H_DIRTY]:
            self._rebuild()
            self._head[H_REPAIRS] += 1
            self._head[H_DIRTY] = 0

    def _rebuild(self) -> None:
        reserves = self._reserves
        truth = derive(self._words, reserves)
        self._stack[: len(truth.free)] = truth.free[::-1]  # low slabs on top
        self._head[H_TOP] = len(truth.free)
        self._head[H_SERIAL] = max(self._head[H_SERIAL], int(generation_of(self._words).max(initial=0)))
        self._head[H_UNFILLED] = truth.unfilled
        self._head[H_LIVENESS] = liveness_of(self.plan, reserves)
        for i, (live, draining) in enumerate(truth.held):
            self._rows[i * ROW_WORDS + R_LIVE] = live
            self._rows[i * ROW_WORDS + R_DRAINING] = draining

    def _take(self, owner: int, n: int, draws: bool) -> Lease:
        """What `rule` has allowed."""
        head, words, top = self._head, self._words, self._head[H_TOP]
        assert n <= top, f"the reserve rule let {n} slabs go with {top} free"
        slabs = self._stack[top - n : top].copy()
        slabs.setflags(write=False)
        before = words[slabs]
        head[H_DIRTY] = 1
        if draws:  # first: a holder that has drawn nothing is no holder, so a kill right here is harmless
            head[H_HOLDER] = owner
        generation = head[H_SERIAL] = head[H_SERIAL] + 1
        words[slabs] = pack(generation, owner, LIVE)
        head[H_TOP] = top - n
        self._hold(owner * ROW_WORDS, n, 0)
        self._rows[owner * ROW_WORDS + R_LEASES] += 1
        head[H_DIRTY] = 0
        return Lease(generation, owner, slabs, before)

    def _hold(self, row: int, live: int, draining: int) -> None:
        """So many more are live and draining."""
        rows = self._rows
        missing = rows[row + R_RESERVE] - rows[row + R_LIVE] - rows[row + R_DRAINING]
        rows[row + R_LIVE] += live
        rows[row + R_DRAINING] += draining
        after = missing - live - draining
        if missing > 0 or after > 0:
            self._head[H_UNFILLED] += max(0, after) - max(0, missing)

    def _row(self, owner: int) -> int:
        if not 0 <= owner < len(self.names):
            raise ValueError(f"owner must be in [0, {len(self.names)}), got {owner}")
        return owner * ROW_WORDS

    def _expect(self, owner: int, lease: Lease, states: tuple[int, ...]) -> int:
        """The state, one of `states`, that all slabs of `lease` are in; OwnershipError otherwise."""
        slabs, generation = lease.slabs, lease.generation
        ids = sorted(slabs.tolist())
        if not ids or ids[0] < 0 or ids[-1] >= len(self._words):
            raise OwnershipError(f"lease {generation} names slabs outside the pool of {len(self._words)}")
        if len(set(ids)) < len(ids):
            raise OwnershipError(f"double free: lease {generation} names a slab twice")
        words = self._words[slabs]
        found = words.tobytes()  # for 32 slabs bytes are compared in a tenth of the time of an array
        for state in states:
            if found == pack(generation, owner, state).to_bytes(8, sys.byteorder) * len(ids):
                return state
        i = int(np.argmax((generation_of(words) != generation) | (owner_of(words) != owner)))
        raise OwnershipError(misuse(self.names, owner, generation, int(slabs[i]), words[i : i + 1]))
