"""Segments of a pool whose memory is given back at run time, and taken again: their slabs in the slab table.  No torch.

The order that makes it safe: the free slabs of a segment are withdrawn, so that nobody leases them; its other slabs come
free one by one and are withdrawn too; when none is anybody's the segment is gone by a bit in the table, and only then
every process unmaps it and its memory is released.  Back the other way round: memory, mapping, bit, slabs.  A slab that
is away is a state of its owner word, so whoever dies in a change, the next holder of the lock finds it whole.
The first segment stays: rows of sets that are not leased name slab 0, and a kernel may look there.
"""

import numpy as np

from minserve.slab_table import SlabTable
from minserve.slab_words import (
    AWAY,
    DRAINING,
    FREE,
    GONE_BITS,
    GONE_WORDS,
    H_AWAY,
    H_DIRTY,
    H_GONE,
    H_LIVENESS,
    H_TOP,
    H_UNFILLED,
    LIVE,
    NOBODY,
    OWNER_BITS,
    STATE_BITS,
    STATE_MASK,
    generation_of,
    state_of,
)

MAX_SEGMENTS = GONE_WORDS * GONE_BITS


def num_away(table: SlabTable) -> int:
    """Slabs without memory, or about to be."""
    return table._head[H_AWAY]


def gone_segments(table: SlabTable) -> frozenset[int]:
    """Segments that nobody may map."""
    words = [table._head[H_GONE + i] for i in range(GONE_WORDS)]
    return frozenset(
        i * GONE_BITS + bit for i, word in enumerate(words) for bit in range(GONE_BITS) if word >> bit & 1
    )


class SlabSegments:
    """The segments of a table's pool, each `segment_bytes` but the last.  One process moves them: the agent."""

    def __init__(self, table: SlabTable, segment_bytes: int) -> None:
        self._table, self._segment_bytes = table, segment_bytes
        self.num = -(-table.plan.pool_bytes // segment_bytes)
        if self.num > MAX_SEGMENTS:
            raise ValueError(
                f"segment_bytes must be at least a {MAX_SEGMENTS}th of the pool, got {segment_bytes}"
            )

    def slabs(self, segment: int) -> tuple[int, int]:
        """[first, last) of the slabs that have a byte in it; those at its ends may lie in two."""
        if not 0 <= segment < self.num:
            raise ValueError(f"segment must be in [0, {self.num}), got {segment}")
        slab, at = self._table.plan.slab_bytes, segment * self._segment_bytes
        return at // slab, min(self._table.plan.num_slabs, -(-(at + self._segment_bytes) // slab))

    def held(self, segment: int) -> int:
        """Slabs of it that are somebody's."""
        first, last = self.slabs(segment)
        states = state_of(self._table._words[first:last])
        return int(((states == LIVE) | (states == DRAINING)).sum())

    def emptiest(self) -> int | None:
        """The one to give back: the fewest slabs to wait for, then the highest.  None: no other may go."""
        here = set(range(1, self.num)) - gone_segments(self._table)
        return min(here, key=lambda i: (self.held(i), -i), default=None)

    def withdraw(self, segment: int) -> int:
        """Takes its free slabs away, and says how many are left: ask again until there are none.

        ValueError, and nothing changes, where the pool would be too small for its reserves without the segment.
        """
        table, (first, last) = self._table, self.slabs(segment)
        if segment == 0:
            raise ValueError(
                f"segment must be in [1, {self.num}) to be given back, got 0: the first one stays"
            )
        head = table._head
        with table._lock:
            table._repair()
            states = state_of(table._words[first:last])
            reserved = sum(max(0, r) for r in table._reserves) + head[H_LIVENESS]
            left = table.plan.num_slabs - head[H_AWAY] - int((states != AWAY).sum())
            if left < reserved:
                raise ValueError(
                    f"segment {segment} must stay: without it {left} slabs would be left, {reserved} are reserved"
                )
            # what is promised stays free until its owner has come with slabs of its own
            spare = max(0, head[H_TOP] - head[H_UNFILLED] - head[H_LIVENESS])
            free = first + np.flatnonzero(states == FREE)[:spare]
            generations = generation_of(table._words[free])
            head[H_DIRTY] = 1
            table._words[free] = generations << STATE_BITS + OWNER_BITS | NOBODY << STATE_BITS | AWAY
            self._settle()
            return int((state_of(table._words[first:last]) != AWAY).sum())

    def leave(self, segment: int) -> None:
        """The segment is gone: from now on no process may touch it.  Only when `withdraw` has left nothing."""
        table, (first, last) = self._table, self.slabs(segment)
        with table._lock:
            table._repair()
            left = int((state_of(table._words[first:last]) != AWAY).sum())
            if left:
                raise ValueError(
                    f"segment {segment} must be empty to be given back, {left} slabs are not away"
                )
            table._head[H_GONE + segment // GONE_BITS] |= 1 << segment % GONE_BITS

    def restore(self, segment: int) -> None:
        """The segment is mapped everywhere, or was never unmapped: its slabs are anybody's again."""
        table, (first, last) = self._table, self.slabs(segment)
        with table._lock:
            table._repair()
            table._head[H_GONE + segment // GONE_BITS] &= ~(1 << segment % GONE_BITS)
            gone = gone_segments(table)
            # a slab at an end stays away while the neighbour is
            first = max(first, self.slabs(segment - 1)[1]) if segment - 1 in gone else first
            last = min(last, self.slabs(segment + 1)[0]) if segment + 1 in gone else last
            words = table._words[first:last]
            back = np.flatnonzero(state_of(words) == AWAY)
            table._head[H_DIRTY] = 1
            words[back] &= ~STATE_MASK
            self._settle()

    def _settle(self) -> None:
        """The end of a change: what is derived from the owner words, and the dirty word."""
        table = self._table
        table._rebuild()
        table._head[H_AWAY] = int((state_of(table._words) == AWAY).sum())
        table._head[H_DIRTY] = 0
