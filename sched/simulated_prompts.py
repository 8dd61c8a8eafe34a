"""What caches and routers of a simulation know of a workload's prompts: the keys and marks of the tokens a replay sends."""

from collections import Counter
from collections.abc import Callable

from sched.prefix import keys_of, root_key
from sched.router import Marks, marks_of
from sched.simulated_replica import Arrival
from sched.workload import Workload, token_ids

VOCABULARY = 1 << 15  # token ids are drawn below it


class Prompts:
    """Of a workload whose `rid`s are those of the arrivals.  Where no two prompts begin alike there is nothing to find, and
    keys and marks are empty: making them costs more than the rest of the simulation."""

    def __init__(self, workload: Workload) -> None:
        self._requests, self._seed = workload.requests, workload.seed
        several = Counter(r.session for r in workload.requests).most_common(1)
        prefixes = Counter(r.prefix for r in workload.requests if r.prefix_tokens).most_common(1)
        self.share = any(n > 1 for found in (several, prefixes) for _, n in found)
        self._last: tuple[int, list[int]] = (-1, [])

    def tokens(self, rid: int) -> list[int]:
        if self._last[0] != rid:
            self._last = rid, token_ids(self._requests[rid], self._seed, 0, VOCABULARY).tolist()
        return self._last[1]

    def keys(self, block_tokens: int) -> Callable[[Arrival], tuple[bytes, ...]]:
        """For one replica: caches are its own, so all of them may have the same root."""
        root = root_key("simulated")
        return lambda arrival: keys_of(root, self.tokens(arrival.rid), block_tokens) if self.share else ()

    def marks(self, arrival: Arrival) -> Marks:
        return marks_of(self.tokens(arrival.rid)) if self.share else ()
