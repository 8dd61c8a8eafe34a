"""The prefill token of a pool: at most one of its models computes prompts at a time.  No torch, no server.

One word of the slab table's header says who has it and until when, a word of each row since when its model waits.  It
is taken and given under the table's lock, read without.  A holder that died, or was stopped, or takes far longer than
predicted, loses it by the time alone.  Decodes never wait for it: without the token a step has no chunk, that is all.
A model alone in its pool has no token to ask for.
"""

import time
from collections import deque
from collections.abc import Callable

from minserve.slab_table import SlabTable
from minserve.slab_words import H_TURN, H_TURN_FREED, R_STATUS, ROW_WORDS, STATUS
from sched.batching import Batcher
from sched.prefill_turn import (
    LEASE_S,
    LEASE_STEPS,
    NS,
    Neighbour,
    Pace,
    is_next,
    is_silent,
    next_due_s,
    tightest_slack_s,
    wants_prefill,
)
from sched.slack import MIN_PREFILL_TOKENS

# the word: until when (us of the machine's monotonic clock), and the owner + 1
OWNER_BITS = 14
OWNER_MASK = (1 << OWNER_BITS) - 1
OFF = -1
SINCE, HEARD, STEP, DUE = (
    R_STATUS + STATUS.index(name) for name in ("prefill_since_ns", "heartbeat_ns", "step_us", "due_ns")
)
WAITS, WAIT_US, TAKEOVERS = (
    R_STATUS + STATUS.index(name) for name in ("prefill_waits", "prefill_wait_us", "prefill_takeovers")
)


class PrefillToken:
    """One model's side.  `wants`: whether its next plan could have a chunk; `due_s`: when its next decoded token is due.

    Called once before each plan (`cap`), after it (`planned`), when its step has ended (`landed`), and while idle.
    """

    def __init__(
        self,
        table: SlabTable,
        owner: int,
        wants: Callable[[], bool],
        due_s: Callable[[], float],
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._table, self._head, self._rows, self._lock = table, table._head, table._rows, table._lock
        self._owner, self._row = owner, owner * ROW_WORDS
        self._wants, self._due_s, self._clock_ns = wants, due_s, clock_ns
        self._pace = Pace()
        self._holds = False
        self._flights: deque[tuple[int, int, bool]] = deque()  # tokens of prompts, begin, cut to the least
        self._landed_ns = 0
        self._pressed = False
        self._give()  # of a life before this one

    # ---- around a step

    def cap(self) -> int | None:
        """Tokens of prompts that the next plan may have; None: as many as it likes."""
        now = self._clock_ns()
        self._publish_due()
        if not self._wants():
            self._stop_waiting(now)
            if self._holds and not self._prefilling:
                self._give()
            return (
                0  # a plan may resume somebody and then admit another: that one's chunk is for the next turn
            )
        if self._holds and self._word_owner() != self._owner:
            self._holds = False  # it took too long: others have taken it
        if not self._holds and not self._take(now):
            if not self._rows[self._row + SINCE]:
                self._rows[self._row + SINCE] = now
                self._rows[self._row + WAITS] += 1
            return 0
        self._stop_waiting(now)
        if self._prefilling and self._others_wait():
            return 0  # one step's chunks are a turn
        slack_s = tightest_slack_s(self._rows[self._row + DUE], self._pace.step_s, self._neighbours(), now)
        tokens = self._pace.chunk(slack_s, now / NS)
        self._pressed = tokens is not None and tokens <= MIN_PREFILL_TOKENS
        return tokens

    def planned(self, tokens: int, runs: bool) -> None:
        """What was planned has so many tokens of prompts; an empty plan does not run."""
        now = self._clock_ns()
        if runs:
            self._flights.append((tokens, now, self._pressed and tokens > 0))
        if not self._holds:
            return
        if tokens:
            self._extend(now)
        elif not self._prefilling and self._others_wait():
            self._give()

    def landed(self) -> None:
        """The oldest step has ended, well or not."""
        tokens, began, pressed = self._flights.popleft()
        now = self._clock_ns()
        seconds = (now - max(began, self._landed_ns)) / NS
        self._landed_ns = now
        self._pace.stepped(tokens, seconds, now / NS, pressed)
        self._publish_due()
        if self._holds and not self._prefilling and self._others_wait():
            self._give()

    def idle(self) -> None:
        """There is no work."""
        self._stop_waiting(self._clock_ns())
        self._rows[self._row + DUE] = 0
        if self._holds:
            self._give()

    @property
    def _prefilling(self) -> int:
        return sum(tokens for tokens, _, _ in self._flights)

    # ---- the words

    def _publish_due(self) -> None:
        due_s = self._due_s()
        self._rows[self._row + DUE] = 0 if due_s == float("inf") else int(due_s * NS)

    def _stop_waiting(self, now: int) -> None:
        since = self._rows[self._row + SINCE]
        if since:
            self._rows[self._row + SINCE] = 0
            self._rows[self._row + WAIT_US] += (now - since) // 1000

    def _neighbours(self) -> list[Neighbour]:
        rows = range(0, len(self._rows), ROW_WORDS)
        return [
            Neighbour(
                self._rows[row + SINCE],
                self._rows[row + HEARD],
                self._rows[row + STEP],
                self._rows[row + DUE],
            )
            for row in rows
            if row != self._row
        ]

    def _others_wait(self) -> bool:
        """One that has stopped, or died, waits for nothing."""
        waiting = [n for n in self._neighbours() if n.since_ns]
        if not waiting:
            return False
        now = self._clock_ns()
        return not all(is_silent(n, now) for n in waiting)

    def _word_owner(self) -> int:
        """Who has the token, expired or not; -1: nobody."""
        return (self._head[H_TURN] & OWNER_MASK) - 1

    def _free_since(self, now: int) -> int | None:
        """None: somebody has it.  A holder whose row was silenced is dead: its slabs were reclaimed."""
        word = self._head[H_TURN]
        owner, until_ns = (word & OWNER_MASK) - 1, (word >> OWNER_BITS) * 1000
        if owner < 0 or owner == self._owner:
            return self._head[H_TURN_FREED]
        if self._rows[owner * ROW_WORDS + HEARD] == 0:
            return min(until_ns, now)
        return until_ns if until_ns < now else None

    def _take(self, now: int) -> bool:
        since = self._rows[self._row + SINCE] or now
        freed = self._free_since(now)
        if freed is None or not is_next(since, self._neighbours(), freed, now):
            return False
        with self._lock:
            # another may have been faster, and the lock may have taken its time
            now = self._clock_ns()
            freed, before = self._free_since(now), self._word_owner()
            if freed is None:
                return False
            if before not in (-1, self._owner):
                self._rows[self._row + TAKEOVERS] += 1
            self._rows[self._row + HEARD] = now  # a row without a sign of life is a dead model's
            self._head[H_TURN] = self._word(now)
        self._holds = True
        return True

    def _word(self, now: int) -> int:
        """One store: a kill leaves the old word or the new one."""
        lease_s = max(LEASE_S, LEASE_STEPS * self._pace.predicted_s(self._prefilling))
        return (now // 1000 + int(lease_s * 1e6)) << OWNER_BITS | self._owner + 1

    def _extend(self, now: int) -> None:
        with self._lock:
            self._holds = self._word_owner() == self._owner
            if self._holds:
                self._head[H_TURN] = self._word(now)

    def _give(self) -> None:
        with self._lock:
            if self._word_owner() == self._owner:
                self._head[H_TURN] = 0
                self._head[H_TURN_FREED] = self._clock_ns()
        self._holds = False


def turn_off(table: SlabTable) -> None:
    """For good, before any worker attaches: every model computes prompts whenever it likes."""
    table._head[H_TURN] = OFF


def prefill_token(table: SlabTable, owner: int, batcher: Batcher) -> PrefillToken | None:
    """None where there is nothing to take turns with."""
    if len(table.names) == 1 or table._head[H_TURN] == OFF:
        return None
    return PrefillToken(table, owner, lambda: wants_prefill(batcher), lambda: next_due_s(batcher))
