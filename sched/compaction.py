"""Compaction: live blocks of half-empty sets are copied together, so that whole sets can go back to the pool.

Only the owner moves its blocks, as part of a step: the copies run behind the step before, which may still write to the
sources, and ahead of the layers, which find the blocks by patched tables.  The sources come free with that step.  What
is moved at a time is whole sets: the smallest thing that another model can take.
"""

import sys
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from sched.blocks import BlockPool
from sched.flights import Flights
from sched.sequence import Seq
from sched.slabs import SetShape
from sched.step import SLOT_BITS, Move, Patch

# sets emptied in one step at most
MOST_SETS = 8
# of a prompt, that a step of another model takes blocks for at once
STEP_TOKENS = 2048


class Vacated(NamedTuple):
    """`held`: all blocks of the emptied sets, each with one reference, to be released when the step is over."""

    moves: tuple[Move, ...]
    patches: tuple[Patch, ...]
    held: list[int]


NOTHING = Vacated((), (), [])


class Offer(NamedTuple):
    """Sets that one model could empty by moving blocks, and the share of live blocks in the first of them."""

    sets: int
    cost: float


NO_OFFER = Offer(0, 1.0)


def choose(
    pool: BlockPool, most_sets: int, most_blocks: int, headroom: int = 0, but: Collection[int] = ()
) -> list[int]:
    """Sets to empty, at most so many, none in `but`: those with the fewest live blocks, as far as the other sets have
    room for these and for `headroom` blocks more.

    `most_blocks` may be moved; one set may exceed that, or a slow device would never move any.
    """
    # an empty set is no room: filling it would free as many sets as it takes
    room = pool.num_available - pool.num_empty_sets * pool.slots - headroom
    if room < pool.slots:
        return []
    emptiest = pool.emptiest(most_sets, but)
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
        self.num_vacated = self.num_moved = 0  # ever: sets emptied, and blocks planned to be moved for it
        self._sets, self._most_blocks = 0, 0
        self._leaving: deque[tuple[int, int]] = deque()  # (step, sets) of the compactions under way

    def ask(self, sets: int, most_blocks: int) -> None:
        """The next step empties at most so many sets, and moves at most so many blocks."""
        self._sets, self._most_blocks = sets, most_blocks

    def give_empty(self) -> None:
        """Sets that no block needs go back, also the one that is kept against flutter: others are short."""
        self._pool.trim()

    def make(self, active: Mapping[int, Seq], step: int) -> Vacated:
        """What was asked for, as part of `step`, which names somebody; `active` are all that hold blocks."""
        sets, self._sets = self._sets, 0
        if not sets:
            return NOTHING
        # the others grow; and what leaves with a step under way is in no table any more
        chosen = choose(self._pool, sets, self._most_blocks, len(active) // 8, self._pinned)
        if chosen:
            self.num_vacated += len(chosen)
            self._leaving.append((step, len(chosen)))
        vacated = vacate(self._pool, active.values(), chosen, step)
        self.num_moved += len(vacated.moves)
        return vacated

    def offer(self, active: int) -> Offer:
        """What could be asked for now, `active` being how many requests hold blocks."""
        sets = choose(self._pool, MOST_SETS, sys.maxsize, active // 8, self._pinned)
        return Offer(len(sets), self._pool.num_live_in(sets[0]) / self._pool.slots) if sets else NO_OFFER

    @property
    def num_leaving(self) -> int:
        """Sets that steps under way are emptying."""
        while self._leaving and self._flights.advanced(self._leaving[0][0]):
            self._leaving.popleft()
        return sum(n for _, n in self._leaving)

    @property
    def _pinned(self) -> set[int]:
        return {block >> SLOT_BITS for blocks in self._flights.held() for block in blocks}


def watermark(shapes: Iterable[SetShape], num_slabs: int) -> int:
    """Slabs that the next steps of these models may ask for without warning: the prompt of one that is not there yet,
    and a set each.  At most a part of the pool: in a tiny one blocks would be moved for nothing else."""
    sizes = [(-(-STEP_TOKENS // shape.set_tokens) * shape.layers, shape.layers) for shape in shapes]
    if not sizes:
        return 0
    return min(num_slabs // 16, max(chunk for chunk, _ in sizes) + sum(layers for _, layers in sizes))


def sets_to_vacate(own: Offer, others: Iterable[Offer], missing_sets: int) -> int:
    """Sets that a model is to empty where the others lack so many of its size, at most those it offers.

    Whoever frees a byte for the fewest bytes moved begins, of equals all; the others see the sets come back.
    """
    if missing_sets <= 0 or any(other.sets and other.cost < own.cost for other in others):
        return 0
    return min(own.sets, missing_sets)
