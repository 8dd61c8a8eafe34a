"""E1's replay: the models of a GPU step by step against one allocator, without tokens, tensors or compute limits.

Every 30 ms each model computes up to 2,048 prompt tokens, first come first served, and a token for every sequence
beyond its prompt.  A sequence whose next block is refused costs the model its youngest one, which is computed again
later; a prompt that is refused waits, and nothing is admitted for ten steps after a preemption.  All arms get this rule
and the same arrivals.  What is measured is the pool at steps in which somebody was refused: 1 would be perfect.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from bench.slabs_load import CHUNK_TOKENS, STEP_S, Arrival, Model, Workload

WARM = 0.1  # of the time, not counted
PATIENT_S = 2.0
MAX_RUNNING = 256
CALM_STEPS = 10


class Arm(Protocol):
    """An allocator under test.  Blocks are ints; a refusal changes nothing."""

    models: tuple[Model, ...]
    pool_bytes: int
    moved_bytes: int  # by compaction
    leases: int  # units taken from what is shared

    def capacity(self, m: int) -> int:
        """Blocks that model m could hold if the others held none."""

    def allocate(self, m: int, n: int) -> list[int] | None: ...

    def release(self, m: int, blocks: list[int]) -> None: ...

    def tick(self, tables: "list[Lane]") -> None:
        """Between two steps; compaction renames blocks in the sequences of `tables`."""

    def stalled_s(self, m: int) -> float:
        """Seconds that model m has lost to the allocator since the last call."""

    def held(self) -> tuple[int, int]:
        """Bytes of units held by the models, and bytes of those that no block can use."""

    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Seq:
    """`done` of its prompt is computed; once all is, it has had a token in each step since `joined`."""

    arrival: Arrival
    prompt: int
    answer: int
    done: int = 0
    joined: int = -1
    due: int = -1
    end: int = -1
    admitted: bool = False
    blocks: list[int] = field(default_factory=list)


class Lane:
    """One model's sequences."""

    def __init__(self, m: int, model: Model, arm: Arm) -> None:
        self.m, self.model, self.arm = m, model, arm
        self.k = 0  # its own steps: one that waits for the allocator makes none
        self.running: dict[Seq, None] = {}
        self.waiting: deque[Seq] = deque()
        self.prefill: list[Seq] = []
        self.num_blocks = self.finished_tokens = self.finished = self.preempted = self.refused = 0
        self.debt = 0.0
        self.calm_at = 0
        self.waits: list[tuple[float, float]] = []  # arrival, and wait for the first admission
        self._due: defaultdict[int, list[Seq]] = defaultdict(list)
        self._end: defaultdict[int, list[Seq]] = defaultdict(list)
        self._decoding = self._base = self._partial = 0

    @property
    def tokens(self) -> int:
        """Whose keys and values are stored now."""
        return self._base + self._decoding * self.k + self._partial

    def step(self, now_s: float) -> None:
        self.debt += self.arm.stalled_s(self.m) / STEP_S
        if self.debt >= 1:
            self.debt -= 1
            return
        self.k += 1
        for seq in self._end.pop(self.k, ()):
            if seq.end == self.k:
                self._finish(seq)
        for seq in self._due.pop(self.k, ()):
            if seq.due == self.k:
                self._grow(seq)
        self._prompts(now_s)

    def _take(self, n: int) -> list[int] | None:
        blocks = self.arm.allocate(self.m, n)
        if blocks is None:
            self.refused += 1
            return None
        self.num_blocks += n
        return blocks

    def _drop(self, seq: Seq) -> None:
        self.arm.release(self.m, seq.blocks)
        self.num_blocks -= len(seq.blocks)
        seq.blocks = []
        del self.running[seq]
        if seq.joined >= 0:
            self._decoding -= 1
            self._base -= seq.prompt - seq.joined
        else:
            self.prefill.remove(seq)
            self._partial -= seq.done

    def _finish(self, seq: Seq) -> None:
        self._drop(seq)
        self.finished += 1
        self.finished_tokens += seq.arrival.answer
        seq.end = seq.due = -1

    def _preempt(self, seq: Seq) -> None:
        """What it has answered so far is a part of the prompt it comes back with."""
        self._drop(seq)
        if seq.joined >= 0:
            made = self.k - 1 - seq.joined
            seq.prompt, seq.answer = seq.prompt + made, seq.answer - made
        seq.done, seq.joined, seq.due, seq.end = 0, -1, -1, -1
        self.waiting.appendleft(seq)
        self.preempted += 1
        self.calm_at = self.k + CALM_STEPS

    def _grow(self, seq: Seq) -> None:
        blocks = self._take(1)
        while blocks is None:
            youngest = next(reversed(self.running))
            self._preempt(youngest)
            if youngest is seq:
                return
            blocks = self._take(1)
        seq.blocks += blocks
        seq.due += self.model.P
        self._due[seq.due].append(seq)

    def _prompts(self, now_s: float) -> None:
        budget = CHUNK_TOKENS
        for seq in list(self.prefill):
            n = min(budget, seq.prompt - seq.done)
            if not self._chunk(seq, n):
                return
            budget -= n
            if not budget:
                return
        while budget and self.waiting and self.k >= self.calm_at and len(self.running) < MAX_RUNNING:
            seq = self.waiting[0]
            n = min(budget, seq.prompt)
            self.running[seq] = None
            self.prefill.append(seq)
            if not self._chunk(seq, n):
                del self.running[seq]
                self.prefill.pop()
                return
            self.waiting.popleft()
            if not seq.admitted:
                seq.admitted = True
                self.waits.append((seq.arrival.at_s, now_s - seq.arrival.at_s))
            budget -= n

    def _chunk(self, seq: Seq, n: int) -> bool:
        P = self.model.P
        needed = -(-(seq.done + n) // P) - len(seq.blocks)
        if needed > 0:
            blocks = self._take(needed)
            if blocks is None:
                return False
            seq.blocks += blocks
        seq.done += n
        self._partial += n
        if seq.done == seq.prompt:
            self.prefill.remove(seq)
            self._partial -= seq.done
            self._decoding += 1
            seq.joined = self.k
            self._base += seq.prompt - self.k
            seq.due = self.k + len(seq.blocks) * P - seq.prompt + 1
            seq.end = self.k + max(1, seq.answer - 1)
            self._due[seq.due].append(seq)
            self._end[seq.end].append(seq)
        return True


@dataclass(slots=True)
class Tally:
    """Sums over the steps that count.  `at_refusal` are shares of the pool: live, tokens, tail, partial."""

    steps: int = 0
    refused_steps: int = 0
    live: float = 0.0
    peak: int = 0
    at_refusal: list[tuple[float, float, float, float]] = field(default_factory=list)


def replay(arm: Arm, workload: Workload) -> dict[str, float]:
    """One run's figures.  Shares are of `arm.pool_bytes`; live and tokens are counted in the models' own bytes."""
    lanes = [Lane(m, model, arm) for m, model in enumerate(arm.models)]
    tally = Tally()
    steps = int(workload.seconds / STEP_S)
    arrivals: Iterator[Arrival] = iter(workload.arrivals)
    upcoming = next(arrivals, None)
    lost = 0
    for step in range(steps):
        now = step * STEP_S
        while upcoming is not None and upcoming.at_s <= now:
            lane = lanes[upcoming.model]
            most = -(-(upcoming.prompt + upcoming.answer) // lane.model.P)
            if most > arm.capacity(upcoming.model):
                lost += 1
            else:
                lane.waiting.append(Seq(upcoming, upcoming.prompt, upcoming.answer))
            upcoming = next(arrivals, None)
        arm.tick(lanes)
        before = sum(lane.refused for lane in lanes)
        for i in range(len(lanes)):
            lanes[(step + i) % len(lanes)].step(now)
        if step >= WARM * steps:
            _count(tally, arm, lanes, refused=sum(lane.refused for lane in lanes) > before)
    return _figures(tally, arm, lanes, workload, lost)


def _count(tally: Tally, arm: Arm, lanes: list[Lane], *, refused: bool) -> None:
    pool = arm.pool_bytes
    live = sum(lane.num_blocks * lane.model.whole_bytes for lane in lanes) / pool
    tally.steps += 1
    tally.live += live
    tally.peak = max(tally.peak, sum(len(lane.running) for lane in lanes))
    if refused:
        tally.refused_steps += 1
        tokens = sum(lane.tokens * lane.model.token_bytes for lane in lanes) / pool
        held, tail = arm.held()
        tally.at_refusal.append((live, tokens, tail / pool, (held - tail) / pool - live))


def _figures(tally: Tally, arm: Arm, lanes: list[Lane], load: Workload, lost: int) -> dict[str, float]:
    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return sum(values) / len(values) if values else float("nan")

    live, tokens, tail, partial = (mean(r[i] for r in tally.at_refusal) for i in range(4))
    start, end = WARM * load.seconds, load.seconds - PATIENT_S
    asked = sum(start <= a.at_s < end for a in load.arrivals)
    soon = sum(start <= at < end and wait <= PATIENT_S for lane in lanes for at, wait in lane.waits)
    return {
        "live": live,
        "tokens": tokens,
        "tail": tail,
        "partial": partial,
        "refused_steps": tally.refused_steps / max(tally.steps, 1),
        "live_mean": tally.live / max(tally.steps, 1),
        "peak_sequences": tally.peak,
        "preempted": sum(lane.preempted for lane in lanes),
        "soon": soon / max(asked, 1),
        "lost": lost,
        "finished": sum(lane.finished for lane in lanes),
        "tokens_s": sum(lane.finished_tokens for lane in lanes) / load.seconds,
        "moved_gib": arm.moved_bytes / 2**30,
        "leases": arm.leases,
    }
