"""Blocks of one model: allocated one by one out of leased slab sets, counted by references.

A block id is set << SLOT_BITS | slot and stands for the KV of `block_tokens` tokens in every layer.  Sets are leased
from the source when the free blocks run out, and given back as they empty, save one that is kept against flutter.
Released means reusable at once: whoever releases must know that no planned step still names the block.
"""

from collections.abc import Iterable

from sched.step import MAX_SLOTS, SLOT_BITS, SetSource


class BlockPool:
    """`num_free` counts free blocks in the sets held now; `allocate` may lease more."""

    def __init__(self, source: SetSource, slots: int, block_tokens: int) -> None:
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"slots must be in [1, {MAX_SLOTS}], got {slots}")
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
        self.source = source
        self.slots = slots
        self.block_tokens = block_tokens
        self.num_free = 0
        self.num_released = 0  # ever: a refusal is worth no second try before it has grown
        self._free: dict[int, list[int]] = {}  # set -> its free blocks, for every set held
        self._live: set[int] = set()
        self._shared: dict[int, int] = {}  # references beyond the first, where there are any
        self._urgent: set[int] = set()
        # a held set is the current one, open (some blocks free), empty (all free), or full and in none of these
        self._current: int | None = None
        self._current_free: list[int] = []
        self._open: dict[int, list[int]] = {}
        self._empty: list[int] = []

    @property
    def num_sets(self) -> int:
        return len(self._free)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def allocate(self, n: int, *, headroom: int = 0, urgent: bool = False) -> list[int] | None:
        """`n` blocks with one reference each, or None and no change.

        `headroom` free blocks must be left over.  `urgent` may lease from the liveness reserve.
        """
        if n + headroom > self.num_free and not self._lease_for(n + headroom, urgent):
            return None
        taken: list[int] = []
        while n:
            free = self._current_free or self._next_set()
            part = free[-n:]
            del free[-n:]
            part.reverse()
            taken += part
            n -= len(part)
        self._live.update(taken)
        self.num_free -= len(taken)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these live blocks."""
        for block in blocks:
            if block not in self._live:
                raise _not_allocated(block)
            self._shared[block] = self._shared.get(block, 0) + 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less; the last one frees the block, and its set may go back to the source."""
        for block in blocks:
            if block not in self._live:
                raise _not_allocated(block)
            extra = self._shared.pop(block, 0)
            if extra > 1:
                self._shared[block] = extra - 1
            elif not extra:
                self._free_block(block)

    def trim(self) -> None:
        """Give back every empty set."""
        while self._empty:
            self._give_back(self._empty[-1])

    def _free_block(self, block: int) -> None:
        set_id = block >> SLOT_BITS
        free = self._free[set_id]
        free.append(block)
        self._live.remove(block)
        self.num_free += 1
        self.num_released += 1
        if len(free) == self.slots:
            self._emptied(set_id)
        elif len(free) == 1 and set_id != self._current:
            self._open[set_id] = free

    def _emptied(self, set_id: int) -> None:
        if set_id == self._current:
            self._current, self._current_free = None, []
        self._open.pop(set_id, None)
        self._empty.append(set_id)
        # what came out of the liveness reserve is not for keeping: another model may need it to move at all
        if set_id in self._urgent:
            self._give_back(set_id)
        while len(self._empty) > 1:
            self._give_back(self._empty[-1])

    def _next_set(self) -> list[int]:
        """The current set is used up (or none): go on with the one opened last, else with an empty one."""
        if self._open:
            self._current, self._current_free = self._open.popitem()
        else:
            assert self._empty, f"{self.num_free=} but no set has a free block"
            self._current = self._empty.pop()
            self._current_free = self._free[self._current]
        return self._current_free

    def _lease_for(self, wanted: int, urgent: bool) -> bool:
        leased: list[int] = []
        while self.num_free < wanted:
            set_id = self.source.lease()
            if set_id is None and urgent:
                set_id = self.source.lease(urgent=True)
                if set_id is not None:
                    self._urgent.add(set_id)
            if set_id is None:
                for set_id in reversed(leased):
                    self._give_back(set_id)
                return False
            self._take(set_id)
            leased.append(set_id)
        return True

    def _take(self, set_id: int) -> None:
        assert set_id not in self._free, f"set {set_id} was leased twice"
        first = set_id << SLOT_BITS
        self._free[set_id] = list(range(first + self.slots - 1, first - 1, -1))
        self._empty.append(set_id)
        self.num_free += self.slots

    def _give_back(self, set_id: int) -> None:
        assert len(self._free[set_id]) == self.slots, f"set {set_id} still holds blocks"
        del self._free[set_id]
        self._empty.remove(set_id)
        self._urgent.discard(set_id)
        self.num_free -= self.slots
        self.source.give_back(set_id)

    def check(self) -> None:
        """Recounts everything.  Raises AssertionError where the structures disagree."""
        free_blocks = {block for free in self._free.values() for block in free}
        all_blocks = {s << SLOT_BITS | slot for s in self._free for slot in range(self.slots)}
        assert self.num_free == sum(map(len, self._free.values())) == len(free_blocks), f"{self.num_free=}"
        assert not free_blocks & self._live, f"{free_blocks & self._live} are both free and held"
        assert free_blocks | self._live == all_blocks, (
            f"{free_blocks ^ self._live ^ all_blocks} are lost or foreign"
        )
        assert self._shared.keys() <= self._live, f"{self._shared.keys() - self._live} are shared but free"
        for set_id, free in self._free.items():
            assert {block >> SLOT_BITS for block in free} <= {set_id}, (
                f"foreign blocks in set {set_id}: {free}"
            )
            places = [set_id == self._current, set_id in self._open, set_id in self._empty]
            assert sum(places) == 1 or not (free or any(places)), f"set {set_id}: {len(free)=} {places=}"
            assert (len(free) == self.slots) == places[2], f"set {set_id}: {len(free)=} {places=}"
        assert all(self._free[s] is free and free for s, free in self._open.items()), "a full set is open"
        assert len(set(self._empty)) == len(self._empty), f"{self._empty=}"
        assert self._urgent <= self._free.keys(), f"{self._urgent=} not held"
        assert set(self._open) <= self._free.keys(), "open sets not held"


def _not_allocated(block: int) -> ValueError:
    where = f"set {block >> SLOT_BITS}, slot {block & (MAX_SLOTS - 1)}"
    return ValueError(f"block {block} ({where}) is not allocated: freed twice or foreign")
