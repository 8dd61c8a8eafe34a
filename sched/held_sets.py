"""Slab sets that are leased, and which of their blocks are free: what a BlockPool allocates from."""

from sched.step import MAX_SLOTS, SLOT_BITS, SetSource


class HeldSets:
    """A held set is the current one, open (some blocks free), empty (all free), or full and in none of these."""

    def __init__(self, source: SetSource, slots: int) -> None:
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"slots must be in [1, {MAX_SLOTS}], got {slots}")
        self.source = source
        self.slots = slots
        self.num_free = 0
        self._free: dict[int, list[int]] = {}  # set -> its free blocks, for every set held
        self._urgent: set[int] = set()
        self._current: int | None = None
        self._current_free: list[int] = []
        self._open: dict[int, list[int]] = {}
        self._empty: list[int] = []

    @property
    def num_sets(self) -> int:
        return len(self._free)

    @property
    def num_empty_sets(self) -> int:
        return len(self._empty)

    def trim(self, keep: int = 0) -> None:
        """Give back every empty set but `keep`."""
        while len(self._empty) > keep:
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

    def _lease(self, leased: list[int], *, urgent: bool) -> bool:
        set_id = self.source.lease(urgent=True) if urgent else self.source.lease()
        if set_id is None:
            return False
        if urgent:
            self._urgent.add(set_id)
        assert set_id not in self._free, f"set {set_id} was leased twice"
        first = set_id << SLOT_BITS
        self._free[set_id] = list(range(first + self.slots - 1, first - 1, -1))
        self._empty.append(set_id)
        self.num_free += self.slots
        leased.append(set_id)
        return True

    def _give_back(self, set_id: int) -> None:
        assert len(self._free[set_id]) == self.slots, f"set {set_id} still holds blocks"
        del self._free[set_id]
        self._empty.remove(set_id)
        self._urgent.discard(set_id)
        self.num_free -= self.slots
        self.source.give_back(set_id)
