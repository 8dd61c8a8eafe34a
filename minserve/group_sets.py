"""The slab sets of a model on several GPUs: one id a set, slabs on every rank's pool, on all of them or on none.

Block tables hold set ids, so they are the same on all ranks; the rows of slab offsets are each rank's own.  The leading
rank's process leases and returns in all the tables: they are shared memory, nobody is asked.  A rank that dies takes its
group along: the agent reclaims on all pools once all ranks have been waited for.  No torch.
"""

import heapq
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from minserve.slab_table import Lease, SlabTable
from minserve.slab_words import R_REFUSED, ROW_WORDS, Int64s


@dataclass(slots=True)
class _Draining:
    set_id: int
    leases: tuple[Lease, ...]
    passed: Callable[[], bool]


def _passed() -> bool:
    return True


class GroupSets:
    """The Batcher's SetSource, as LeasedSets is of one GPU.  `tables` in the order of the ranks.

    `slots` blocks fit into a set on every rank.  `fence()` is the leader's: a step ends with a sum over the ranks, so what
    the leader has done behind that, no rank still reads.
    """

    def __init__(
        self,
        tables: Sequence[SlabTable],
        model: str,
        *,
        fence: Callable[[], Callable[[], bool]] | None = None,
    ) -> None:
        """ValueError where the ranks do not agree on layers or on the tokens of a block, or share a pool."""
        self.tables, self.model = tuple(tables), model
        self.owners = tuple(table.owner_of(model) for table in tables)
        shapes = [table.plan.models[model] for table in tables]
        for what in ("layers", "block_tokens"):
            found = [getattr(shape, what) for shape in shapes]
            if len(set(found)) != 1:
                raise ValueError(f"{model} must have the same {what} on all ranks, got {found}")
        self._order = lock_order(self.tables)
        self.layers, self.block_tokens = shapes[0].layers, shapes[0].block_tokens
        self.slots = min(shape.slots for shape in shapes)
        self._places = [
            np.array(shape.places or [(layer, 0) for layer in range(shape.layers)], np.int64).T
            for shape in shapes
        ]
        num_sets = min(table.plan.max_sets(model) for table in tables)
        # [set, layer] of each rank: the byte offset of that layer's blocks in the rank's pool, 0 where nothing is leased
        self.rows = tuple(np.zeros((num_sets, places.shape[1]), np.int64) for places in self._places)
        self._fence = fence or (lambda: _passed)
        self._leases: dict[int, tuple[Lease, ...]] = {}
        self._draining: deque[_Draining] = deque()
        self._ids = list(range(num_sets))
        self._changed: set[int] = set()

    def lease(self, *, urgent: bool = False) -> int | None:
        """A set id, or None when one of the pools refuses; then no pool has changed."""
        self.poll()
        leases = lease_together(self.tables, self._order, self.owners, self.layers, urgent=urgent)
        if leases is None:
            return None
        set_id = heapq.heappop(self._ids)
        self._leases[set_id] = leases
        for rank, lease in enumerate(leases):
            self.rows[rank][set_id] = self._offsets(rank, lease)
        self._changed.add(set_id)
        return set_id

    def give_back(self, set_id: int) -> None:
        """The set is empty and no planned step names it; what the GPUs may still be doing, the fence covers."""
        leases = self._leases.pop(set_id, None)
        if leases is None:
            raise ValueError(f"set {set_id} is not leased by {self.model}; leased are {sorted(self._leases)}")
        passed = self._fence()
        if passed():
            self._free(set_id, leases)
        else:
            for table, owner, lease in zip(self.tables, self.owners, leases, strict=True):
                table.drain(owner, lease)
            self._draining.append(_Draining(set_id, leases, passed))

    def poll(self) -> None:
        """Frees the draining sets whose fence has passed, oldest first."""
        while self._draining and self._draining[0].passed():
            done = self._draining.popleft()
            self._free(done.set_id, done.leases)

    def _free(self, set_id: int, leases: tuple[Lease, ...]) -> None:
        for rank, (table, lease) in enumerate(zip(self.tables, leases, strict=True)):
            table.free(self.owners[rank], lease)
            self.rows[rank][set_id] = 0
        heapq.heappush(self._ids, set_id)

    def _offsets(self, rank: int, lease: Lease) -> Int64s:
        slab_L, byte_L = self._places[rank]
        offsets: Int64s = lease.slabs[slab_L] * self.tables[rank].plan.slab_bytes + byte_L
        return offsets

    def take_changed(self) -> list[int]:
        """The rows that every rank has to be told with the next step: sets leased since the last call."""
        changed = sorted(self._changed & self._leases.keys())
        self._changed.clear()
        return changed

    def inherited(self, set_id: int, rank: int) -> Int64s:
        """The slabs of a set that hold another model's bytes: for a rank that wipes them."""
        return self._leases[set_id][rank].inherited

    @property
    def excess(self) -> int:
        """Sets to give back: as many as the rank must where most are missing."""
        pairs = zip(self.tables, self.owners, strict=True)
        return max(-(-table.quotas.excess(owner) // self.layers) for table, owner in pairs)

    def publish(self, **status: int) -> None:
        """Words of `slab_words.STATUS`, the same on every pool."""
        for table, owner in zip(self.tables, self.owners, strict=True):
            table.publish(owner, **status)

    @property
    def num_leased(self) -> int:
        return len(self._leases)

    @property
    def num_draining(self) -> int:
        return len(self._draining)

    def close(self, timeout_s: float = 60.0) -> None:
        """Gives everything back, and waits until the GPUs have done all that could touch it."""
        for set_id in list(self._leases):
            self.give_back(set_id)
        end = time.monotonic() + timeout_s
        while self._draining and time.monotonic() < end:
            self.poll()
            time.sleep(0.0001)
        assert not self._draining, f"{len(self._draining)} sets of {self.model} are still draining at close"

    def check(self) -> None:
        """AssertionError unless every set is held on every rank, and every row shows the rank's slabs."""
        held = [(s, leases, True) for s, leases in self._leases.items()]
        held += [(d.set_id, d.leases, False) for d in self._draining]
        for set_id, leases, live in held:
            for rank, (table, lease) in enumerate(zip(self.tables, leases, strict=True)):
                where = f"set {set_id} of {self.model} on rank {rank}"
                assert table.holds(self.owners[rank], lease), f"{where} has lost its slabs"
                same = not live or (self.rows[rank][set_id] == self._offsets(rank, lease)).all()
                assert same, f"the row of {where} names other slabs"
        for rank, (table, owner) in enumerate(zip(self.tables, self.owners, strict=True)):
            found, said = table.held(owner), len(held) * self.layers
            assert found == said, (
                f"rank {rank} holds {found} slabs of {self.model}, the group knows of {said}"
            )
        ids = sorted([*self._ids, *(set_id for set_id, _, _ in held)])
        assert ids == list(range(len(self.rows[0]))), f"set ids of {self.model} are lost or twice: {ids}"


def lock_order(tables: Sequence[SlabTable]) -> tuple[int, ...]:
    """The order in which everybody locks several tables: that of their files.  ValueError where two are the same."""
    files = [os.fstat(table.fd).st_ino for table in tables]
    if len(set(files)) < len(files):
        raise ValueError(f"each rank must have a pool of its own, got the files {files}")
    return tuple(sorted(range(len(files)), key=files.__getitem__))


def lease_together(
    tables: Sequence[SlabTable], order: Sequence[int], owners: Sequence[int], n: int, *, urgent: bool = False
) -> tuple[Lease, ...] | None:
    """`n` slabs of every table, or None when one refuses; then nothing has changed.  `order`: their `lock_order`.

    A group draws on a liveness reserve only while nobody else has one of its pools': two groups would wait for each other.
    """
    with ExitStack() as locks:
        for i in order:
            locks.enter_context(tables[i]._lock)
        for table in tables:
            table._repair()
        pairs = list(zip(tables, owners, strict=True))
        draws = [table.rule.draws(owner, n, urgent) for table, owner in pairs]
        if any(draws):
            draws = [None if t.rule.held_by_another(o) else d for (t, o), d in zip(pairs, draws, strict=True)]
        for (table, owner), draw in zip(pairs, draws, strict=True):
            table._rows[owner * ROW_WORDS + R_REFUSED] += draw is None
        if None in draws:
            return None
        return tuple(t._take(o, n, bool(d)) for (t, o), d in zip(pairs, draws, strict=True))
