"""Slack: TTFT and TPOT together.  The rules and their equations are in docs/scheduling.md.

Decodes first; then prompts in the order of their deadlines, as many tokens as the most urgent decode has slack for; of
prompts that cannot all be in time, the largest set that can (Moore and Hodgson).  `pace` is what steps take over what was
predicted: models beside this one, or a wrong cost model.  Who cannot be in time any more is late: served, by priority and age,
when nobody in time wants the room, and of the admitted prompts one token in `late_share` in any case, so it waits for at
most (late_share - 1) x (tokens of the late before it + its own) tokens of others.  Or, with `shed` hopeless, it is given up.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from operator import itemgetter

from sched.latency import StepCost
from sched.limits import Limits
from sched.policy import INFINITY, Load, Policy, Took, pick_shortest
from sched.sequence import Seq, State
from sched.step import Request

# rows of prefill a step has room for even when many decodes are late already: arrivals must not starve
MIN_PREFILL_TOKENS = 64
LATE_SHARE = 8
# a decode may fall behind by what it makes good in so many tokens: what counts is the mean of all of them
DEBT_TOKENS = 16
FEW = 32  # decodes: so many and more fall behind by no more than that
LOOK = 64  # of those that wait, how many are weighed against each other
FIRST = 8  # of those that wait, and of different TPOTs, how many are looked at for the one to keep
MARGIN = (
    1.1  # prompts are expected to take longer than predicted by so much: one that is late by a little is late
)
PACE_WEIGHT, PACE_MOST = 0.1, 8.0
STEP_WEIGHT = 0.01
SHED = ("never", "hopeless")
Entry = tuple[int, float, int, Seq, int]  # priority, deadline, serial number, tokens of the prompt


class Slack(Policy):
    """ValueError for a `shed` that is none of SHED, a `late_share` below 2, a `debt` below 0.  `follow` false: pace stays 1."""

    def __init__(
        self,
        limits: Limits,
        cost: StepCost | None,
        *,
        shed: str = "never",
        late_share: int = LATE_SHARE,
        debt: int = DEBT_TOKENS,
        follow: bool = True,
    ) -> None:
        super().__init__(limits, cost)
        if shed not in SHED:
            raise ValueError(f"shed must be one of {', '.join(SHED)}, got {shed!r}")
        if late_share < 2:
            raise ValueError(f"late_share must be at least 2, got {late_share}")
        if debt < 0:
            raise ValueError(f"debt must be 0 tokens or more, got {debt}")
        self.shed, self.late_share, self.debt, self.follow = shed, late_share, debt, follow
        self.pace = self._pace = 1.0
        self._step_s = 0.0  # of late, prompts included
        self._token_s = 0.0
        if cost is not None:
            self.recost(cost)
        self.steady = shed == "never"
        self._timely: list[Entry] = []  # sorted
        self._short: list[tuple[int, int, int, Entry]] = []  # the same by length, sorted
        self._shortest: list[Entry] = []  # of those the first so many, by deadline
        # heap of the same by deadline, whatever their priority
        self._due: list[tuple[float, int, Entry]] = []
        self._idle = True  # nobody in time wants the room of this step
        self._late: list[tuple[tuple[int, float], int, Seq]] = []  # heap by priority and arrival
        self._chosen: deque[Entry] = deque()
        self._kept_s = INFINITY  # the TPOT that admission keeps
        self._begun_late: set[int] = set()  # rids
        self._passed = 0  # tokens that went before the late
        self._shown: Seq | None = None

    # -- who waits

    def key(self, request: Request) -> float:
        return request.arrival_s + request.ttft_s

    def push(self, seq: Seq) -> None:
        self._num += 1
        r = seq.request
        entry = (r.priority, self.key(r), seq.serial, seq, r.prompt_tokens)
        insort(self._timely, entry)
        short = (r.priority, r.prompt_tokens, seq.serial, entry)
        i = bisect_left(self._short, short)
        self._short.insert(i, short)
        if i < len(self._shortest):
            insort(self._shortest, entry)
        if len(self._due) > 2 * self._num + 64:
            self._due = [(e[1], e[2], e) for e in self._timely]
            heapify(self._due)
        else:
            heappush(self._due, (entry[1], seq.serial, entry))

    def discard(self, seq: Seq) -> None:
        self._num -= 1
        self._shown = None
        self._forget(seq)
        if len(self._late) > 2 * self._num + 64:
            self._late = [entry for entry in self._late if entry[2].state is State.WAITING]
            heapify(self._late)

    def _forget(self, seq: Seq) -> bool:
        """Whether it was among those in time; it is not any more.  Its entries in heaps go when they surface."""
        r = seq.request
        i = bisect_left(self._timely, (r.priority, self.key(r), seq.serial, seq))
        if i < len(self._timely) and self._timely[i][3] is seq:
            entry = self._timely.pop(i)
            i = bisect_left(self._short, (r.priority, r.prompt_tokens, seq.serial))
            del self._short[i]
            if i < len(self._shortest):
                del self._shortest[bisect_left(self._shortest, entry)]
            return True
        return False

    def head(self, load: Load) -> Seq | None:
        if self._shown is None:
            self._shown = self._next()
        return self._shown

    def _next(self) -> Seq | None:
        while self._late and self._late[0][2].state is not State.WAITING:
            heappop(self._late)
        if self._late and self._passed >= (self.late_share - 1) * self._late[0][2].total:
            return self._late[0][2]
        while self._chosen and self._chosen[0][3].state is not State.WAITING:
            self._chosen.popleft()
        if self._chosen:
            # one of a higher priority goes first though it is late
            behind = self._late and self._late[0][0][0] < self._chosen[0][0]
            return self._late[0][2] if behind else self._chosen[0][3]
        if not self._idle:
            return None
        # room that nobody who was chosen wants: for those in time that were too long, then for the late
        if self._short:
            return self._short[0][3][3]
        return self._late[0][2] if self._late else None

    def pop(self) -> None:
        seq = self._shown
        assert seq is not None, "pop without head"
        self._shown = None
        self._num -= 1
        if self._late and self._late[0][2] is seq:
            heappop(self._late)
            self._passed = max(0, self._passed - (self.late_share - 1) * seq.total)
            # its turn has come: nobody who comes later goes before the rest of its prompt
            self._begun_late.add(seq.rid)
        else:
            self._forget(seq)
            if self._late:
                self._passed += seq.total

    def waiting(self) -> Iterable[Seq]:
        return [e[3] for e in self._timely] + [e[2] for e in self._late if e[2].state is State.WAITING]

    def slack(self, now: float) -> tuple[float, float]:
        while self._late and self._late[0][2].state is not State.WAITING:
            heappop(self._late)
        if self._late:
            return self._slack_of(self._late[0][2].request, now)
        return self._slack_of(self._timely[0][3].request, now) if self._timely else (0.0, 0.0)

    # -- a step

    def begin(self, load: Load) -> Sequence[Seq]:
        self._shown = None
        if not self._num:
            return ()
        self._kept_s = self._kept(load)
        late = self._overdue(load.begin_s)
        # whoever is given up on a wrong prediction is lost: as if it had the whole step, and neighbours a quarter of the time
        room, pace = self.limits.max_step_tokens - load.decodes, (3 + self.pace) / 4
        soon_s = self._surely_s(load, room, pace)
        found = [entry for entry in self._timely[:LOOK] if entry[1] < soon_s]
        most = self._tokens_by(load, [e[1] for e in found], room, pace)
        for entry, tokens in zip(found, most, strict=True):
            if entry[4] > tokens:
                self._forget(entry[3])
                late.append(entry)
        shed = [entry[3] for entry in late] if self.shed == "hopeless" else []
        for _, _, serial, seq, _ in () if shed else late:
            heappush(self._late, ((seq.request.priority, seq.request.arrival_s), serial, seq))
        self._choose(load)
        return shed

    def _overdue(self, now: float) -> list[Entry]:
        """Those whose deadline has passed, also behind any number of a higher priority that are in time."""
        late = []
        while self._due and self._due[0][0] < now:
            entry = heappop(self._due)[2]
            if self._forget(entry[3]):
                late.append(entry)
        return late

    def _choose(self, load: Load) -> None:
        """Who is in time if all that are chosen are computed one after another; a wrong prediction only reorders."""
        found = self._timely
        if len(found) > LOOK:
            # too many to weigh all: those that are chosen are short, whatever the others are
            found = self._find_shortest()
        if found and self.cost is not None:
            ahead = load.prefill_tokens
            if found[0][0] == found[-1][0]:
                found = self._largest(load, found, ahead)
            else:
                # each priority among what those before it leave
                chosen: list[Entry] = []
                for _, group in groupby(found, itemgetter(0)):
                    kept = self._largest(load, list(group), ahead)
                    ahead += sum([e[4] for e in kept])
                    chosen += kept
                found = chosen
        self._chosen = deque(found)
        self._idle = not found and not load.prefilling

    def _largest(self, load: Load, found: list[Entry], ahead: int) -> list[Entry]:
        """The most of them, by deadline, that are in time behind so many tokens."""
        room, pace = self._room(load), self.pace * MARGIN
        prompts = [e[4] for e in found]
        [least] = self._tokens_by(load, [found[0][1]], room, pace)
        if sum(prompts) + ahead <= least:
            return found
        most = self._tokens_by(load, [e[1] for e in found], room, pace)
        kept = pick_shortest(prompts, [tokens - ahead for tokens in most], range(len(found)))
        return [found[i] for i in sorted(kept)]

    def _find_shortest(self) -> list[Entry]:
        """LOOK of them, by deadline.  From step to step few come and go."""
        found = self._shortest
        for _, _, _, entry in self._short[LOOK : len(found)]:
            del found[bisect_left(found, entry)]
        for _, _, _, entry in self._short[len(found) : LOOK]:
            insort(found, entry)
        return found

    def _surely_s(self, load: Load, room: float, pace: float) -> float:
        """Whose deadline is then or later is in time alone, however long the prompt."""
        longest = self.limits.max_model_len + 1
        steps = max(1.0, longest / max(room, 1))
        return load.begin_s + (load.decode_s * steps + self._token_s * longest) * pace

    def _tokens_by(self, load: Load, due_s: Sequence[float], room: float, pace: float) -> list[float]:
        """How many tokens of prompts are computed by each of the deadlines, with `room` for them in a step."""
        step_s, token_s, begin_s = load.decode_s * pace, self._token_s * pace, load.begin_s
        first_s = begin_s + step_s
        if not token_s:
            return [INFINITY if due >= first_s else 0.0 for due in due_s]
        many = 1 / (token_s + step_s / max(room, 1))
        return [x if (x := (due - first_s) / token_s) <= room else (due - begin_s) * many for due in due_s]

    def _room(self, load: Load) -> float:
        """Tokens of prompts a step has time for, in the long run, so that decodes keep their pace."""
        most = self.limits.max_step_tokens - load.decodes
        per_token = self._token_s
        if not load.decodes or not per_token:
            return most
        return min(most, max((self._kept_s / self.pace - load.decode_s) / per_token, self._floor(load)))

    def _floor(self, load: Load) -> int:
        """Tokens that a step has room for however late its decodes are: the fewer they are, the less is lost by it."""
        return max(MIN_PREFILL_TOKENS, self.limits.max_step_tokens // (2 * load.decodes))

    def cap(self, load: Load) -> int:
        return self._cap_at(load, self._kept_s if self._num else load.tpot_s)

    def _cap_at(self, load: Load, tpot_s: float) -> int:
        """How many may decode so that a step takes no longer than that."""
        most = self.limits.max_running
        cost, n = self.cost, load.decodes
        if cost is None or not n or tpot_s == INFINITY:
            return most
        most_s, each = tpot_s / self.pace, load.context / n
        if cost.decode_s(most, int(each * most)) <= most_s:
            return most
        low = 1  # somebody decodes in any case
        while low + 1 < most:
            middle = (low + most) // 2
            low, most = (
                (middle, most) if cost.decode_s(middle, int(each * middle)) <= most_s else (low, middle)
            )
        return low

    def _kept(self, load: Load) -> float:
        """The TPOT that decodes are kept at: the strictest that does not turn away more requests than it is kept for.

        Else one request, whose TPOT a batch of two does not keep, has the device to itself for as long as it likes.
        """
        if load.tpot_s == INFINITY:
            return load.tpot_s
        waiting = [e[3] for e in self._timely[:FIRST]] + [e[2] for e in self._late[:FIRST]]
        loosest = max([seq.request.tpot_s for seq in waiting], default=0.0)
        if load.tpot_s >= loosest and len(load.paces) < 2:
            return load.tpot_s
        # stricter ones are lost already
        steps = sorted({*(tpot_s for tpot_s in load.paces if tpot_s >= load.tpot_s), loosest})
        kept_for, room = 0, self._cap_at(load, steps[0])
        for tpot_s, looser in pairwise(steps[:FIRST]):
            kept_for += load.paces.get(tpot_s, 0)
            more = self._cap_at(load, looser)
            if min(more - room, self._num) <= kept_for:
                return tpot_s
            room = more
        return steps[:FIRST][-1]

    def budget(self, load: Load) -> int:
        room = self.limits.max_step_tokens - load.decodes
        per_token = self._token_s * self.pace
        if not per_token:
            return room
        decode_s = load.decode_s * self.pace
        if load.decodes:
            slack = (
                load.due_s
                - load.begin_s
                - decode_s
                + self._debt(load) * max(0.0, load.tpot_s - max(decode_s, self._step_s))
            )
            if slack < room * per_token:
                room = min(room, max(int(slack / per_token), self._floor(load)))
        # all first tokens of a step come out at its end: it ends before the first of them would be late for another's sake
        tokens = 0
        for seq, due_s in self._firsts(load):
            tokens += seq.total - seq.computed
            if tokens > room:
                break
            most = int(((due_s - load.begin_s) / MARGIN - decode_s) / per_token)
            if most >= tokens:
                room = min(room, most)
        return room

    def _debt(self, load: Load) -> float:
        """Tokens: the fewer decodes fall behind for a prompt, the further they may."""
        return self.debt * max(1.0, FEW / load.decodes)

    def _firsts(self, load: Load) -> Iterator[tuple[Seq, float]]:
        for seq in self.order(load.prefilling):
            yield seq, self.key(seq.request)
        for entry in self._chosen:
            yield entry[3], entry[1]

    def order(self, prefilling: Collection[Seq]) -> Iterable[Seq]:
        late = self._begun_late
        if late:
            late.intersection_update([seq.rid for seq in prefilling])
        if len(prefilling) < 2:
            return list(prefilling)
        return sorted(
            prefilling,
            key=lambda seq: (seq.rid not in late, seq.request.priority, self.key(seq.request), seq.serial),
        )

    def victim(self, active: Collection[Seq]) -> Seq:
        """Whose SLO is lost anyway, then whose prompt has the least computed for a block it holds; of equals the youngest."""
        return min(active, key=_loss)

    def observe(self, took: Took) -> None:
        if took.step_s <= 0:
            return
        self._step_s = took.mean(self._step_s or took.step_s, STEP_WEIGHT)
        if self.follow and took.predicted_s > 0:
            ratio = min(max(took.step_s / took.predicted_s, 1 / PACE_MOST), PACE_MOST)
            self._pace += (ratio - self._pace) * (1 - (1 - PACE_WEIGHT) ** took.steps)
            # rounded, so that many steps observed at once decide what the same steps do one by one
            self.pace = round(self._pace, 6)

    def recost(self, cost: StepCost) -> None:
        super().recost(cost)
        most = self.limits.max_step_tokens
        self._token_s = cost.chunk_s(0, most) / most

    def check(self) -> None:
        super().check()
        assert self._timely == sorted(self._timely), "those in time are out of order"
        assert sorted(entry for *_, entry in self._short) == self._timely, "a list has lost one"
        assert self._short == sorted(self._short), "by length they are out of order"
        short = sorted(entry for *_, entry in self._short[: len(self._shortest)])
        assert short == self._shortest, "the shortest are others"
        missing = {entry[2] for entry in self._timely} - {serial for _, serial, _ in self._due}
        assert not missing, f"those with serials {missing} are in time and have no deadline"


def _loss(seq: Seq) -> tuple[bool, float, int]:
    r = seq.request
    lost = seq.first_s is not None and seq.first_s > r.arrival_s + r.ttft_s
    part = seq.computed / max(len(seq.blocks), 1) if seq.state is State.PREFILLING else INFINITY
    return not lost, part, -seq.order
