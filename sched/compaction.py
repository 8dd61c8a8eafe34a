"""Compaction: live blocks of half-empty sets are copied together, so that whole sets can go back to the pool.

Only the owner moves its blocks, as part of a step: the copies run behind the step before, which may still write to the
sources, and ahead of the layers, which find the blocks by patched tables.  The sources come free with that step.  What
is moved at a time is whole sets: the smallest thing that another model can take.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from sched.blocks import BlockPool
from sched.flights import Flights
from sched.sequence import Seq
from sched.step import SLOT_BITS, Move, Patch

# sets emptied in one step, and looked for
MOST_SETS = 8


class Vacated(NamedTuple):
    """`held`: all blocks of the emptied sets, each with one reference, to be released when the step is over."""

    moves: tuple[Move, ...]
    patches: tuple[Patch, ...]
    held: list[int]


NOTHING = Vacated((), (), [])


def choose(
    pool: BlockPool, most_sets: int, most_blocks: int, headroom: int = 0, but: Collection[int] = ()
) -> list[int]:
    """Sets to empty, at most so many, none in `but`: those with the fewest live blocks, as far as the other sets have
    room for these and for `headroom` blocks more.

    `most_blocks` may be moved; one set may exceed that, or a slow device would never move any.
    """
    if pool.num_available < pool.slots:
        return []
    emptiest = pool.emptiest(most_sets, but)
    room = pool.num_available - headroom
    chosen: list[int] = []
    moved = 0
    for live, set_id in emptiest:
        # the set leaves with all its slots, whoever is in them
        room -= pool.slots
        moved += live
        if room < 0 or (chosen and moved > most_blocks):
            break
        chosen.append(set_id)
    return chosen


def vacate(pool: BlockPool, seqs: Iterable[Seq], sets: Sequence[int], step: int) -> Vacated:
    """Empties `sets` as part of `step`, and patches the block tables of `seqs`: of all that hold blocks, save those whose
    blocks wait for a step to end (`choose` is told the sets of these)."""
    if not sets:
        return NOTHING
    moved, held = pool.evacuate(sets, step)
    patches: list[Patch] = []
    for seq in seqs:
        for i, block in enumerate(seq.blocks):
            if block in moved:
                seq.blocks[i] = moved[block]
                seq.last = max(seq.last, step)  # it may not be in the step, but its blocks are
                patches.append(Patch(seq.rid, i, moved[block]))
    return Vacated(tuple(Move(*pair) for pair in moved.items()), tuple(patches), held)


class Compactor:
    """The Batcher's part: what is asked for between two steps is made in the next one."""

    def __init__(self, pool: BlockPool, flights: Flights) -> None:
        self._pool, self._flights = pool, flights
        self._sets, self._most_blocks = 0, -1

    def ask(self, sets: int, most_blocks: int) -> None:
        """The next step empties at most so many sets, and moves at most so many blocks."""
        self._sets, self._most_blocks = sets, most_blocks

    def make(self, active: Mapping[int, Seq], step: int) -> Vacated:
        """What was asked for, as part of `step`, which names somebody; `active` are all that hold blocks."""
        sets, self._sets = self._sets, 0
        if not sets:
            return NOTHING
        # the others grow; and what leaves with a step under way is in no table any more
        chosen = choose(self._pool, sets, self._most_blocks, len(active) // 8, sets_of(self._flights.held()))
        return vacate(self._pool, active.values(), chosen, step)


def sets_of(tables: Iterable[Iterable[int]]) -> set[int]:
    return {block >> SLOT_BITS for blocks in tables for block in blocks}


class Holding(NamedTuple):
    """What one model says of itself, for the others to see.  `vacatable`: sets it could empty by moving blocks, 0 while
    it makes no steps; `cost`: the share of live blocks in the first of them; `demand`: slabs it wants and has not got;
    `step_slabs`: those that one step may ask for, 0 while it has nothing to do."""

    layers: int
    vacatable: int
    cost: float
    demand: int
    step_slabs: int


def sets_to_vacate(me: int, models: Sequence[Holding], free_slabs: int) -> int:
    """Sets that model `me` is to empty for the others, at most those it can.

    Slabs are short while fewer are free than the others want, or than their next steps may ask for: a refusal costs
    more than a copy.  Whoever frees a byte for the fewest bytes moved begins; the others see the sets come back.
    """
    own = models[me]
    if not own.vacatable:
        return 0
    others = [m for i, m in enumerate(models) if i != me]
    missing = sum(m.demand + m.step_slabs for m in others) - free_slabs
    if missing <= 0:
        return 0
    cheapest = min((m.cost, i) for i, m in enumerate(models) if m.vacatable)
    return min(own.vacatable, -(-missing // own.layers)) if cheapest[1] == me else 0
