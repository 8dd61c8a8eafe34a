"""The sequences that decode in every step, kept so that a step costs what happens in it and not what runs in it.

Per block phase a bucket of those that need a block in steps = phase mod P; per final step a bucket of those that end
there; per TPOT a heap of who is due first.  Steps are numbered by the Batcher and have no gaps.
"""

from collections import Counter
from collections.abc import Collection
from heapq import heapify, heappop, heappush

from sched.sequence import Seq, State

INFINITY = float("inf")
# a decode so many tokens behind its pace holds nobody back any more
LOST_TOKENS = 16
PaceHeap = list[tuple[float, int, int, Seq]]


class Running:
    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.context = 0  # total tokens of all, as of the newest planned step: what the next step reads
        self._seqs: dict[int, Seq] = {}
        self._ring: list[dict[int, Seq]] = [{} for _ in range(block_tokens)]
        self._ends: dict[int, dict[int, Seq]] = {}
        self._end_steps: list[int] = []  # heap of the keys of _ends, and of some that are no longer there
        self._pace: dict[float, PaceHeap] = {}
        self.paces: dict[float, int] = {}  # how many of them have that TPOT

    def __len__(self) -> int:
        return len(self._seqs)

    def rids(self) -> tuple[int, ...]:
        return tuple(self._seqs)

    def start(self, seq: Seq, base: int) -> None:
        """`seq` decodes in every step after `base`, until its last token.  Its counts are exact at `base`."""
        assert seq.remaining > 0, f"request {seq.rid} has nothing to decode: {seq.produced=}"
        seq.state, seq.base = State.RUNNING, base
        seq.epoch += 1
        seq.end = base + seq.remaining
        # step base + 1 + i computes position total - 1 + i, and needs a block where that is a multiple of P
        seq.phase = (base + 1 + (1 - seq.total)) % self.block_tokens
        self.context += seq.total
        self._seqs[seq.rid] = seq
        tpot = seq.request.tpot_s
        self.paces[tpot] = self.paces.get(tpot, 0) + 1
        self._ring[seq.phase][seq.rid] = seq
        bucket = self._ends.get(seq.end)
        if bucket is None:
            bucket = self._ends[seq.end] = {}
            heappush(self._end_steps, seq.end)
        bucket[seq.rid] = seq

    def stop(self, seq: Seq, step: int, state: State) -> None:
        """`step` is the newest planned one, and `seq` is not in those after it."""
        assert self._seqs.get(seq.rid) is seq, f"request {seq.rid} does not run"
        del self._seqs[seq.rid]
        tpot = seq.request.tpot_s
        self.paces[tpot] -= 1
        if not self.paces[tpot]:
            del self.paces[tpot]
        del self._ring[seq.phase][seq.rid]
        bucket = self._ends.get(seq.end)
        if bucket is not None:
            bucket.pop(seq.rid, None)
        seq.produced += step - seq.base
        seq.base = seq.last = step
        seq.state = state
        self.context -= seq.total

    def due(self, step: int) -> Collection[Seq]:
        """Who needs one more block before `step`.  A view: of this moment only."""
        return self._ring[step % self.block_tokens].values()

    def num_due(self, step: int) -> int:
        return len(self._ring[step % self.block_tokens])

    def steps_within(self, blocks: int, step: int, most: int) -> int:
        """Steps from `step` on, at most so many, for which those that decode need no more than `blocks` after the first."""
        ring, P = self._ring, self.block_tokens
        for later in range(1, most):
            blocks -= len(ring[(step + later) % P])
            if blocks < 0:
                return later
        return most

    def growth(self, step: int, ahead: int) -> int:
        """Blocks that those who run after `step` need in the `ahead` steps behind it."""
        laps, rest = divmod(ahead, self.block_tokens)
        needed = laps * len(self._seqs) + sum(self.num_due(step + i) for i in range(1, rest + 1))
        # who ends before then needs less; at most one block each is counted too much
        last = step + ahead
        return needed - sum(
            (last - end) // self.block_tokens * len(s) for end, s in self._ends.items() if end < last
        )

    def tick(self, step: int, steps: int = 1) -> list[Seq]:
        """So many steps up to `step` are planned: everyone is as many tokens longer.  Those whose last token is that of
        `step` stop here; nobody's is before it."""
        self.context += len(self._seqs) * steps
        ended = list(self._ends.pop(step, {}).values())
        while self._end_steps and self._end_steps[0] <= step:
            heappop(self._end_steps)
        for seq in ended:
            self.stop(seq, step, State.ENDING)
        return ended

    def ahead(self, step: int, steps: int) -> tuple[int, int]:
        """Sequences, and the tokens of all, once so many steps after `step`, the newest, were planned.  Nobody ends before the
        last of them; who ends there has left, as by `tick`."""
        gone = self._ends.get(step + steps, {}) if steps else {}
        tokens = sum(seq.request.prompt_tokens + seq.request.max_tokens for seq in gone.values())
        return len(self._seqs) - len(gone), self.context + steps * len(self._seqs) - tokens

    def next_end(self) -> int | None:
        """The step in which the first of them ends."""
        while self._end_steps and not self._ends.get(self._end_steps[0]):
            self._ends.pop(heappop(self._end_steps), None)
        return self._end_steps[0] if self._end_steps else None

    def track(self, seq: Seq) -> None:
        """From now on `seq`, whose first token has come out, counts in `deadline`."""
        assert seq.first_s is not None, f"request {seq.rid} has no first token"
        tpot = seq.request.tpot_s
        heap = self._pace.setdefault(tpot, [])
        if len(heap) > 2 * len(self._seqs) + 64:
            heap[:] = [e for e in heap if self._is_current(e)]
            heapify(heap)
        # its token of step s is due at key + s * tpot, so the order in a heap is the same at every step
        key = seq.first_s + (seq.produced - seq.base - 1) * tpot
        heappush(heap, (key, seq.serial, seq.epoch, seq))

    @property
    def tpot_s(self) -> float:
        """The strictest TPOT of those whose pace counts."""
        return min(self._pace, default=INFINITY)

    def deadline(self, step: int, now: float = -INFINITY) -> float:
        """When the most urgent token of `step` is due.  From then on who is LOST_TOKENS behind at `now` does not count."""
        due = INFINITY
        for tpot in list(self._pace):
            heap = self._pace[tpot]
            lost = now - (step + LOST_TOKENS) * tpot
            while heap and (heap[0][0] < lost or not self._is_current(heap[0])):
                heappop(heap)
            if heap:
                due = min(due, heap[0][0] + step * tpot)
            else:
                del self._pace[tpot]
        return due

    @staticmethod
    def _is_current(entry: tuple[float, int, int, Seq]) -> bool:
        _, _, epoch, seq = entry
        return seq.state is State.RUNNING and seq.epoch == epoch

    def check(self, step: int) -> None:
        """`step` is the newest planned one."""
        P = self.block_tokens
        assert sum(map(len, self._ring)) == len(self._seqs), "the ring and the running set differ"
        assert sum(map(len, self._ends.values())) == len(self._seqs), "the ends and the running set differ"
        assert self._ends.keys() <= set(self._end_steps), "an end is not in the heap"
        context = 0
        for rid, seq in self._seqs.items():
            produced = seq.produced + step - seq.base
            context += seq.request.prompt_tokens + produced
            assert seq.state is State.RUNNING, f"request {rid} runs but is {seq.state}"
            assert seq.end - step == seq.request.max_tokens - produced > 0, f"{rid=} {seq.end=} {produced=}"
            assert self._ends[seq.end][rid] is seq, f"request {rid} is not in its end bucket"
            # positions computed so far: all but the newest token
            computed = seq.request.prompt_tokens + produced - 1
            assert (seq.phase - step - 1 + computed) % P == 0, f"{rid=} {seq.phase=} {computed=}"
            assert self._ring[seq.phase][rid] is seq, f"request {rid} is not in its ring bucket"
            assert len(seq.blocks) == -(-computed // P), (
                f"{rid=} holds {len(seq.blocks)} blocks for {computed}"
            )
        counted = Counter(seq.request.tpot_s for seq in self._seqs.values())
        assert counted == self.paces, f"{counted=} but {self.paces=}"
        assert context == self.context, f"{context=} but {self.context=}"
