"""The peers' allocators that E1 compares, each with the rule its code or paper gives; none is made worse than it is.

Where a peer leaves a choice, it gets the better one: all fill their fullest page or slab first, none keeps a reserve for
liveness, and packing by bytes is exact.  Tables that a kernel reads come out of the same pool (`table_bytes`).
"""

from collections.abc import Sequence

from bench.slabs_load import STEP_S, Model
from bench.slabs_replay import Lane
from sched.other_pools import PAGE_BYTES, lcm_slab

ENTRY_BYTES = 4  # of a block table
SLOT_BITS = 20  # of a block id here: the slab of an LCM may hold thousands


class Counted:
    """What all peers share: nothing moves between steps, no one stalls."""

    def __init__(self, models: Sequence[Model], pool_bytes: int) -> None:
        self.models, self.pool_bytes = tuple(models), pool_bytes
        self.moved_bytes = self.leases = 0
        # one entry a block of all layers: what a pool full of the smallest blocks needs
        self.table_bytes = ENTRY_BYTES * (pool_bytes // min(m.whole_bytes for m in models))

    def tick(self, tables: list[Lane]) -> None:
        """Nothing to do between steps."""

    def stalled_s(self, m: int) -> float:
        return 0.0

    def close(self) -> None:
        """Holds nothing beyond this process."""


class Split(Counted):
    """Static split, as several engines with a memory fraction each (vLLM, Dynamo): paged inside, nothing moves between
    models.  `shares` are the models' parts of the pool; with the true mean demand it is the oracle."""

    def __init__(self, models: Sequence[Model], pool_bytes: int, shares: Sequence[float]) -> None:
        super().__init__(models, pool_bytes)
        usable = pool_bytes - self.table_bytes
        self._caps = [int(usable * s) // m.whole_bytes for s, m in zip(shares, models, strict=True)]
        self._used = [0] * len(models)

    def capacity(self, m: int) -> int:
        return self._caps[m]

    def allocate(self, m: int, n: int) -> list[int] | None:
        if self._used[m] + n > self._caps[m]:
            return None
        self._used[m] += n
        return [0] * n

    def release(self, m: int, blocks: list[int]) -> None:
        self._used[m] -= len(blocks)

    def held(self) -> tuple[int, int]:
        return sum(u * m.whole_bytes for u, m in zip(self._used, self.models, strict=True)), 0


class Shared(Counted):
    """One pool from which a block takes `costs[m]` bytes, packed without a gap."""

    def __init__(self, models: Sequence[Model], pool_bytes: int, costs: Sequence[int]) -> None:
        super().__init__(models, pool_bytes)
        self._costs, self._used = tuple(costs), 0
        self._blocks = [0] * len(models)
        self._usable = pool_bytes

    def capacity(self, m: int) -> int:
        return self._usable // self._costs[m]

    def allocate(self, m: int, n: int) -> list[int] | None:
        if self._used + n * self._costs[m] > self._usable:
            return None
        self._used += n * self._costs[m]
        self._blocks[m] += n
        return [0] * n

    def release(self, m: int, blocks: list[int]) -> None:
        self._used -= len(blocks) * self._costs[m]
        self._blocks[m] -= len(blocks)

    def held(self) -> tuple[int, int]:
        live = sum(b * m.whole_bytes for b, m in zip(self._blocks, self.models, strict=True))
        return self._used, self._used - live


def ideal(models: Sequence[Model], pool_bytes: int) -> Shared:
    """No grain and no tables: what refuses here nobody can serve."""
    return Shared(models, pool_bytes, [m.whole_bytes for m in models])


def head_wise(models: Sequence[Model], pool_bytes: int) -> Shared:
    """MuxServe as released: a slot is the keys or the values of one head of one layer, of 16 bits whatever the model's
    precision, and has an entry of its own in the block table."""
    return Shared(models, pool_bytes, [_head_cost(m, 2 * m.P * m.head_dim) for m in models])


def head_wise_packed(models: Sequence[Model], pool_bytes: int) -> Shared:
    """The same with slots as large as each precision needs, packed to the byte: kinder than slots of one size can be."""
    return Shared(models, pool_bytes, [_head_cost(m, m.block_bytes // (2 * m.heads)) for m in models])


def _head_cost(m: Model, slot_bytes: int) -> int:
    return 2 * m.layers * m.heads * (slot_bytes + ENTRY_BYTES)


def one_slot(models: Sequence[Model], pool_bytes: int) -> Shared:
    """One slot size, that of the largest block, for all models: paged attention over a shared tensor, no awareness of
    precision.  Slots of a layer are taken one by one."""
    largest = max(m.block_bytes for m in models)
    arm = Shared(models, pool_bytes, [m.layers * largest for m in models])
    arm._usable -= arm.table_bytes
    return arm


class Units(Counted):
    """Pools of equal parts, from which a model takes units of `parts[m]` parts for `slots[m]` blocks each.

    `pools[m]` says which pool model m draws from.  Blocks come from the fullest unit that has a free one.
    """

    def __init__(
        self,
        models: Sequence[Model],
        pool_bytes: int,
        part_bytes: int,
        *,
        parts: Sequence[int],
        slots: Sequence[int],
        pools: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        super().__init__(models, pool_bytes)
        self._part_bytes, self._parts, self._slots = part_bytes, tuple(parts), tuple(slots)
        self._pools, self._sizes, self._free_parts = tuple(pools), tuple(sizes), list(sizes)
        self._free: list[dict[int, list[int]]] = [{} for _ in models]  # unit -> its free blocks
        self._open: list[dict[int, list[int]]] = [{} for _ in models]  # those with some
        self._ids: list[list[int]] = [[] for _ in models]
        self._next = [0] * len(models)

    def capacity(self, m: int) -> int:
        return self._sizes[self._pools[m]] // self._parts[m] * self._slots[m]

    def allocate(self, m: int, n: int) -> list[int] | None:
        opened, slots = self._open[m], self._slots[m]
        missing = n - sum(map(len, opened.values()))
        if missing > 0 and not self._take(m, -(-missing // slots)):
            return None
        taken: list[int] = []
        while len(taken) < n:
            unit = min(opened, key=lambda u: len(opened[u]))
            free = opened[unit]
            k = min(len(free), n - len(taken))
            taken += free[len(free) - k :]
            del free[len(free) - k :]
            if not free:
                del opened[unit]
        return taken

    def release(self, m: int, blocks: list[int]) -> None:
        free, opened, slots = self._free[m], self._open[m], self._slots[m]
        for block in blocks:
            unit = block >> SLOT_BITS
            own = free[unit]
            own.append(block)
            if len(own) == 1:
                opened[unit] = own
            if len(own) == slots:
                opened.pop(unit, None)
                del free[unit]
                self._ids[m].append(unit)
                self._emptied(m)

    def _take(self, m: int, units: int) -> bool:
        """Takes units from the pool and opens them; False and no change where there are not enough."""
        needed = units * self._parts[m]
        if needed > self._free_parts[self._pools[m]]:
            return False
        self._free_parts[self._pools[m]] -= needed
        self.leases += units
        for _ in range(units):
            self._add_unit(m)
        return True

    def _add_unit(self, m: int) -> None:
        if self._ids[m]:
            unit = self._ids[m].pop()
        else:
            unit, self._next[m] = self._next[m], self._next[m] + 1
        first = unit << SLOT_BITS
        self._free[m][unit] = self._open[m][unit] = list(range(first, first + self._slots[m]))

    def _emptied(self, m: int) -> None:
        self._free_parts[self._pools[m]] += self._parts[m]

    def held(self) -> tuple[int, int]:
        held = tail = 0
        for m, model in enumerate(self.models):
            unit = self._parts[m] * self._part_bytes
            held += len(self._free[m]) * unit
            tail += len(self._free[m]) * (unit - self._slots[m] * model.whole_bytes)
        return held, tail


class Pages(Units):
    """kvcached: pages of 2 MiB, mapped by the driver for K and for V of every layer at once; one pool for all.

    `mapped` brings what its code adds to that: each process keeps 5 to 10 page ids mapped that it does not use (a
    thread maps ahead, freed ones stay), and mapping or unmapping on the way costs time.  Costs are its authors' on an
    A100: 231 us to create, map and allow a page, 26 us to unmap it.
    """

    MAP_S, UNMAP_S, RESERVE = 231e-6, 26e-6, (5, 10)

    def __init__(self, models: Sequence[Model], pool_bytes: int, *, mapped: bool) -> None:
        super().__init__(
            models,
            pool_bytes,
            PAGE_BYTES,
            parts=[2 * m.layers for m in models],
            slots=[PAGE_BYTES // (m.block_bytes // 2) for m in models],
            pools=[0] * len(models),
            sizes=[1],
        )
        self._sizes = (((pool_bytes - self.table_bytes) // PAGE_BYTES),)
        self._free_parts = list(self._sizes)
        self._mapped = mapped
        self._spare = [0] * len(models)
        self._stalls = [0.0] * len(models)
        self._ahead = [0.0] * len(models)

    def tick(self, tables: list[Lane]) -> None:
        """The thread that maps ahead, below the least reserve, as far as a step's time goes."""
        for m in range(len(self.models) if self._mapped else 0):
            cost = self._parts[m] * self.MAP_S
            self._ahead[m] = min(self._ahead[m] + STEP_S, self.RESERVE[0] * cost)
            while (
                self._spare[m] < self.RESERVE[0]
                and self._ahead[m] >= cost
                and self._free_parts[0] >= self._parts[m]
            ):
                self._free_parts[0] -= self._parts[m]
                self._spare[m] += 1
                self._ahead[m] -= cost

    def _take(self, m: int, units: int) -> bool:
        from_spare = min(units, self._spare[m])
        new = (units - from_spare) * self._parts[m]
        if new > self._free_parts[0]:
            return False
        self._spare[m] -= from_spare
        self._free_parts[0] -= new
        if self._mapped:
            self._stalls[m] += new * self.MAP_S
        self.leases += units
        for _ in range(units):
            self._add_unit(m)
        return True

    def _emptied(self, m: int) -> None:
        if self._mapped and self._spare[m] < self.RESERVE[1]:
            self._spare[m] += 1
            return
        self._free_parts[0] += self._parts[m]
        if self._mapped:
            self._stalls[m] += self._parts[m] * self.UNMAP_S

    def stalled_s(self, m: int) -> float:
        stalled, self._stalls[m] = self._stalls[m], 0.0
        return stalled


def depth_pools(
    models: Sequence[Model], rates: Sequence[float], parts: int, units: Sequence[int], least: Sequence[int]
) -> tuple[list[int], list[int]]:
    """FineServe's split: (pool of each model, parts of each pool).

    Models of equal depth share a pool.  Each gets the least its models need (`least` units of `units` parts), and of the
    rest its part of rate x layers, in whole units.  ValueError where the least do not fit.
    """
    depths = sorted({m.layers for m in models})
    pools = [depths.index(m.layers) for m in models]
    floors = [
        sum(n * u for n, u, p in zip(least, units, pools, strict=True) if p == d) for d in range(len(depths))
    ]
    rest = parts - sum(floors)
    if rest < 0:
        raise ValueError(f"{sum(floors)} parts are the least that these models need, the pool has {parts}")
    weights = [
        sum(r * m.layers for r, m, p in zip(rates, models, pools, strict=True) if p == d)
        for d in range(len(depths))
    ]
    sizes = []
    for d, floor in enumerate(floors):
        unit = next(u for u, p in zip(units, pools, strict=True) if p == d)
        sizes.append(floor + int(rest * weights[d] / sum(weights)) // unit * unit)
    return pools, sizes


def lcm_slabs(
    models: Sequence[Model], pool_bytes: int, rates: Sequence[float], *, scales: bool = True
) -> Units:
    """FineServe as published: slabs of 2 x LCM of all blocks, K and V apart, in a pool for each depth.

    Without `scales` in the blocks of 8-bit models, as its fp8 engine registers them, the LCM stays small.
    """
    if not scales:
        models = [m.without_scales() if m.fmt in ("int8", "fp8") else m for m in models]
    halves = [m.block_bytes // 2 for m in models]
    part = lcm_slab(halves)
    slots = [part // half for half in halves]
    units = [2 * m.layers for m in models]
    tables = ENTRY_BYTES * (pool_bytes // min(m.whole_bytes for m in models))
    least = [-(-(2048 // m.P) // s) for m, s in zip(models, slots, strict=True)]
    pools, sizes = depth_pools(models, rates, (pool_bytes - tables) // part, units, least)
    return Units(models, pool_bytes, part, parts=units, slots=slots, pools=pools, sizes=sizes)


def depth_slabs(models: Sequence[Model], pool_bytes: int, rates: Sequence[float], slab_bytes: int) -> Units:
    """Our slab in FineServe's pools by depth: what the static groups alone cost."""
    slots = [slab_bytes // m.block_bytes for m in models]
    units = [m.layers for m in models]
    tables = ENTRY_BYTES * (pool_bytes // min(m.whole_bytes for m in models))
    least = [-(-(2048 // m.P) // s) for m, s in zip(models, slots, strict=True)]
    pools, sizes = depth_pools(models, rates, (pool_bytes - tables) // slab_bytes, units, least)
    return Units(models, pool_bytes, slab_bytes, parts=units, slots=slots, pools=pools, sizes=sizes)
