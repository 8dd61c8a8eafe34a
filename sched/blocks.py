"""Blocks of one model: allocated one by one out of leased slab sets, counted by references, and cached by their content.

A block id is set << SLOT_BITS | slot and stands for the KV of `block_tokens` tokens in every layer.  Sets are leased
from the source when the free blocks run out, and given back as they empty, save one that is kept against flutter.
Released means reusable at once: whoever releases must know that no planned step still names the block.

A full block may be published under a key (sched/prefix.py).  When its last reference goes it is idle: still found under
its key, and evicted for whoever needs a block once the source gives no more sets, the one longest out of use first.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from heapq import nsmallest
from itertools import repeat

from sched.held_sets import HeldSets
from sched.recount import check_blocks, check_cache, check_sets
from sched.step import MAX_SLOTS, SLOT_BITS, SetSource

# the key of a cached block, and the step that wrote it
Entry = tuple[bytes, int]
UNKNOWN: Entry = (b"", -1)
# a source that has no sets is asked again when so many idle blocks have been evicted
ASK_AFTER = 64


class BlockPool(HeldSets):
    """A block of a set held is free, live (somebody refers to it) or idle.  `allocate` may lease more sets."""

    def __init__(self, source: SetSource, slots: int, block_tokens: int) -> None:
        super().__init__(source, slots)
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
        self.block_tokens = block_tokens
        self.num_released = 0  # ever: a refusal is worth no second try before it has grown
        self.num_evicted = 0  # ever: idle blocks forgotten for want of a free one
        self.num_revived = 0  # ever: idle blocks that a request took up again, what the cache is worth
        self._live: dict[int, Entry | None] = {}  # None: not cached
        self._shared: dict[int, int] = {}  # references beyond the first, where there are any
        self._by_key: dict[bytes, int] = {}  # the cached blocks, live or idle
        self._idle: OrderedDict[int, Entry] = OrderedDict()  # longest out of use first
        self._idle_in: dict[int, int] = {}  # set -> its idle blocks; none: 0 or not there
        self._spare: dict[int, None] = {}  # sets with idle blocks and no live one, longest out of use first
        self._moved_in: dict[int, int] = {}  # block -> the newest step that moved another here, over or not
        self._ask_at = 0  # num_evicted from which on the source is asked again before something is evicted

    @property
    def num_spare_sets(self) -> int:
        """Sets that `give_up` could give back now."""
        return len(self._empty) + len(self._spare)

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their key, live or idle."""
        return len(self._by_key)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks to be had without a lease: free ones, and idle ones that would be evicted."""
        return self.num_free + len(self._idle)

    @property
    def num_unasked(self) -> int:
        """Blocks that are handed out one by one before the source is asked for a set."""
        return self.num_free + max(0, min(len(self._idle), self._ask_at - self.num_evicted))

    def allocate(self, n: int, *, headroom: int = 0, urgent: bool = False) -> list[int] | None:
        """`n` blocks with one reference each, or None and no change.

        `headroom` blocks must be left available.  `urgent` may lease from the liveness reserve, when nothing is idle.
        """
        if n + headroom > self.num_free and not self._make_room(n, headroom, urgent):
            return None
        if n == 1 and self.num_free and not self._spare:  # what a decode takes
            block = (self._current_free or self._next_set()).pop()
            self._live[block] = None
            self.num_free -= 1
            return [block]
        taken: list[int] = []
        rest = min(n, self.num_free)
        self.num_free -= rest
        while rest:
            free = self._current_free or self._next_set()
            if self._spare and self._current is not None:
                self._spare.pop(self._current, None)
            part = free[-rest:]
            del free[-rest:]
            part.reverse()
            taken += part
            rest -= len(part)
        self._live.update(zip(taken, repeat(None)))
        if len(taken) < n:
            taken += self._take_idle(n - len(taken))
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these blocks, which are live or idle."""
        for block in blocks:
            if block in self._live:
                self._shared[block] = self._shared.get(block, 0) + 1
            elif block in self._idle:
                self.num_revived += 1
                self._live[block] = self._leave_idle(block)
                self._spare.pop(block >> SLOT_BITS, None)
            else:
                raise _not_allocated(block)

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less.  The last one frees the block, and its set may go back to the source; or makes it idle:
        those released first are the first to be evicted."""
        live, shared, free_of, idle, slots = self._live, self._shared, self._free, self._idle, self.slots
        for block in blocks:
            if shared and block in shared:
                if shared[block] > 1:
                    shared[block] -= 1
                else:
                    del shared[block]
                continue
            entry = live.pop(block, UNKNOWN)
            if entry is not None:
                if entry is UNKNOWN:
                    raise _not_allocated(block)
                self.num_released += 1
                self._rest(block, entry)
                continue
            self.num_released += 1
            self.num_free += 1
            free = free_of[block >> SLOT_BITS]
            free.append(block)
            # most change nothing else, and the call would be a third of what a block costs
            if not 1 < len(free) < slots or idle:
                self._settle(block >> SLOT_BITS, free)

    # -- the cache

    def publish(self, blocks: Sequence[int], keys: Sequence[bytes], step: int = -1) -> None:
        """From now on these live blocks are found under their keys; `step` writes them, -1: it has been done.

        Where a key leads to another block already, that one stays.
        """
        live, by_key = self._live, self._by_key
        before = list(map(live.get, blocks, repeat(())))
        if before.count(None) < len(before):
            if () in before:
                raise _not_allocated(blocks[before.index(())])
            new = [i for i, entry in enumerate(before) if entry is None]  # a block keeps the key it has
            blocks, keys = [blocks[i] for i in new], [keys[i] for i in new]
        steps: Iterable[int] = repeat(step)
        if self._moved_in:  # what is written already may be on its way here in a step that has not run
            steps = [max(step, self._moved_in.get(block, -1)) for block in blocks]
        owners = map(by_key.setdefault, keys, blocks)
        live.update(
            (block, entry)
            for block, owner, entry in zip(blocks, owners, zip(keys, steps, strict=False), strict=True)
            if block == owner
        )

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known beginning of `keys`.  They may be gone after the next `allocate`."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def written(self, blocks: Iterable[int]) -> int:
        """The newest step that writes one of these cached blocks, as it was published; -1 for none."""
        found = (self._live.get(block) or self._idle.get(block) for block in blocks)
        return max((entry[1] for entry in found if entry), default=-1)

    def forget(self, since: int = -1) -> None:
        """Blocks that are written in step `since` or later are cached no more: none at all, by default."""
        for block, (key, step) in self.cached().items():
            if step < since:
                continue
            if block in self._idle:
                self._evict(block)
            else:
                self._live[block] = None
                del self._by_key[key]
        self.trim(keep=1)

    def give_up(self, n: int) -> int:
        """Gives back at most `n` sets that no request needs, and says how many: empty ones, then those of idle blocks
        alone, longest out of use first."""
        given = 0
        while given < n and (self._empty or self._spare):
            if not self._empty:
                self._clear(next(iter(self._spare)))
            self._give_back(self._empty[-1])
            given += 1
        return given

    # -- moving

    def num_live_in(self, set_id: int) -> int:
        """Blocks of requests in a set held."""
        return self.slots - len(self._free[set_id]) - self._idle_in.get(set_id, 0)

    def emptiest(self, n: int, but: Collection[int] = ()) -> list[tuple[int, int]]:
        """(live blocks, set) of the `n` sets with the fewest live blocks, but at least one; fewest first."""
        live = ((self.num_live_in(set_id), set_id) for set_id in self._free if set_id not in but)
        return nsmallest(n, (pair for pair in live if pair[0]))

    def evacuate(self, sets: Sequence[int], step: int) -> tuple[dict[int, int], list[int]]:
        """Moves all that is live in `sets` to other sets, the fullest first; idle blocks are evicted, there and for room.

        Returns where each block goes to, in `step`, and all blocks of the sets, each with one reference to be released.
        """
        sources: list[int] = []
        held: list[int] = []
        for set_id in sets:
            self._clear(set_id)
            free, first = self._free[set_id], set_id << SLOT_BITS
            sources += sorted(set(range(first, first + self.slots)) - set(free))
            held += self._take(set_id, len(free))
        targets: list[int] = []
        for _, set_id in sorted((len(free), s) for s, free in self._free.items() if free):
            targets += self._take(set_id, len(sources) - len(targets))
        targets += self._take_idle(len(sources) - len(targets))
        moved = dict(zip(sources, targets, strict=True))
        self.num_released -= len(held) + len(sources)  # they come free for others: no reason to ask again
        for source, target in moved.items():
            self._moved_in[target] = step
            if source in self._shared:
                self._shared[target] = self._shared.pop(source)
            entry, self._live[source] = self._live[source], None
            if entry is not None:
                self._live[target] = entry[0], max(entry[1], step)
                self._by_key[entry[0]] = target
        return moved, held + sources

    def _take(self, set_id: int, n: int) -> list[int]:
        """At most `n` free blocks of this set."""
        free = self._free[set_id]
        taken = free[len(free) - min(n, len(free)) :]
        if not taken:
            return taken
        if len(free) == self.slots:
            self._empty.remove(set_id)
            self._open[set_id] = free
        del free[len(free) - len(taken) :]
        if not free:
            self._open.pop(set_id, None)
        self._spare.pop(set_id, None)
        self._live.update(zip(taken, repeat(None)))
        self.num_free -= len(taken)
        return taken

    def _rest(self, block: int, entry: Entry) -> None:
        """The last reference to a cached block is gone."""
        set_id = block >> SLOT_BITS
        self._idle[block] = entry
        idle = self._idle_in[set_id] = self._idle_in.get(set_id, 0) + 1
        if idle + len(self._free[set_id]) == self.slots:
            self._spared(set_id)

    def _spared(self, set_id: int) -> None:
        """No live block is left in the set, but idle ones are."""
        if set_id in self._urgent:
            self._clear(set_id)
            self._give_back(set_id)
        else:
            self._spare[set_id] = None

    def _clear(self, set_id: int) -> None:
        first = set_id << SLOT_BITS
        for block in range(first, first + self.slots):
            if block in self._idle:
                self._evict(block)

    def _evict(self, block: int) -> None:
        key, _ = self._leave_idle(block)
        del self._by_key[key]
        free = self._free[block >> SLOT_BITS]
        free.append(block)
        self.num_free += 1
        self._settle(block >> SLOT_BITS, free, evicted=True)

    def _leave_idle(self, block: int) -> Entry:
        set_id = block >> SLOT_BITS
        entry = self._idle.pop(block)
        self._idle_in[set_id] -= 1
        return entry

    def _take_idle(self, n: int) -> list[int]:
        """Evicts so many for somebody who takes them at once: they are never free, and no list of a set changes."""
        idle, idle_in, by_key = self._idle, self._idle_in, self._by_key
        evicted = [idle.popitem(last=False) for _ in range(n)]
        taken = [block for block, _ in evicted]
        for _, (key, _) in evicted:
            del by_key[key]
        for block in taken:
            idle_in[block >> SLOT_BITS] -= 1
        self._live.update(zip(taken, repeat(None)))
        if self._spare:
            for block in taken:
                self._spare.pop(block >> SLOT_BITS, None)
        self.num_evicted += n
        return taken

    # -- sets

    def _settle(self, set_id: int, free: list[int], *, evicted: bool = False) -> None:
        """One more of its blocks is free.  `evicted`: an empty set is kept, whoever evicts wants its blocks."""
        count = len(free)
        if count == self.slots:
            self._emptied(set_id)
            if not evicted:
                # what came out of the liveness reserve is not for keeping: another model may need it to move at all
                if set_id in self._urgent:
                    self._give_back(set_id)
                self.trim(keep=1)
            return
        if count == 1 and set_id != self._current:
            self._open[set_id] = free
        if self._idle and not evicted and count + self._idle_in.get(set_id, 0) == self.slots:
            self._spared(set_id)

    def _emptied(self, set_id: int) -> None:
        if set_id == self._current:
            self._current, self._current_free = None, []
        self._open.pop(set_id, None)
        self._spare.pop(set_id, None)
        self._empty.append(set_id)

    def _make_room(self, n: int, headroom: int, urgent: bool) -> bool:
        """So many are free or idle.  Sets are leased as long as there are any, so that what is cached stays."""
        needed = n + headroom - len(self._idle)  # free blocks, were all idle ones to go
        # a full pool is not asked for each block that takes the place of an idle one
        if self.num_free < needed or self.num_evicted >= self._ask_at:
            leased: list[int] = []
            wanted = max(n, needed)
            while self.num_free < wanted and self._lease(leased, urgent=False):
                pass
            if self.num_free < wanted:
                self._ask_at = self.num_evicted + ASK_AFTER
            while urgent and self.num_free < needed and self._lease(leased, urgent=True):
                pass
            if self.num_free < needed:
                for set_id in reversed(leased):
                    self._give_back(set_id)
                return False
        return True

    # -- invariants

    def references(self) -> dict[int, int]:
        """How often each live block is referred to."""
        return {block: 1 + self._shared.get(block, 0) for block in self._live}

    def cached(self) -> dict[int, Entry]:
        """Block -> its key, and the step that wrote it."""
        entries = [*self._live.items(), *self._idle.items()]
        return {block: entry for block, entry in entries if entry is not None}

    def check(self) -> None:
        """Recounts everything.  Raises AssertionError where the structures disagree."""
        check_blocks(self._free, self.slots, self.num_free, self._live.keys() | self._idle.keys())
        assert self._shared.keys() <= self._live.keys(), (
            f"{self._shared.keys() - self._live.keys()} are shared but free"
        )
        check_sets(self._free, self.slots, self._current, self._open, self._empty, self._urgent)
        check_cache(self._by_key, self.cached(), self._live, self._idle, self._idle_in)
        spare = {
            s for s, count in self._idle_in.items() if count and count + len(self._free[s]) == self.slots
        }
        assert spare == self._spare.keys(), f"{spare=} {self._spare=}"
        assert not spare & self._urgent, f"{spare & self._urgent} are kept, but are of the liveness reserve"


def _not_allocated(block: int) -> ValueError:
    where = f"set {block >> SLOT_BITS}, slot {block & (MAX_SLOTS - 1)}"
    return ValueError(f"block {block} ({where}) is not allocated: freed twice or foreign")
