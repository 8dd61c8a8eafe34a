"""The routers of sched/router.py in a simulation: what a front end would know of a replica, read from its Batcher.

A simulated front end knows the cost model in place of what it saw steps take, and the same queues; of prompts that wait it
does not take off what is cached.  It does not look at how long answers will be.
"""

from collections.abc import Callable, Mapping, Sequence

from sched.latency import StepCost
from sched.router import NOTHING, Marks, Recent, ReplicaState, Router, RouteRequest, least_ttft
from sched.simulated_replica import DECODE, IDLE, PREFILL, Arrival, Replica
from sched.simulator import TIME_SLICED
from sched.step import Chunk

TYPICAL_CHUNK = 512
ENDS_WEIGHT = 0.1


class Routes:
    """A `route` of a Simulation.  `make(name)` gives the router of a name that requests have, `tiers` the tier of each model;
    `slowdown` as the Simulation's; `marks` of a prompt, by which caches are guessed.  `chosen` counts requests by their name and the model that got them."""

    def __init__(
        self,
        make: Callable[[str], Router] = lambda name: least_ttft,
        tiers: Mapping[str, int] | None = None,
        slowdown: Mapping[tuple[str, str], float] = TIME_SLICED,
        marks: Callable[[Arrival], Marks] | None = None,
    ) -> None:
        self._make, self._tiers, self._slowdown, self._marks = make, tiers or {}, slowdown, marks
        self._recent: dict[str, Recent] = {}  # by replica
        self._routers: dict[str, Router] = {}
        self._ends: dict[
            str, tuple[float, int, float]
        ] = {}  # when looked at, how many had ended, seconds of one
        self._token_s: dict[str, tuple[StepCost, float]] = {}
        self.chosen: dict[str, dict[str, int]] = {}

    def __call__(self, arrival: Arrival, replicas: Sequence[Replica], now: float) -> Replica:
        """Where nobody takes the request the first is asked, and says why not."""
        if arrival.model not in self._routers:
            self._routers[arrival.model] = self._make(arrival.model)
        marks = self._marks(arrival) if self._marks is not None else ()
        ask = RouteRequest(arrival.prompt_tokens, arrival.ttft_s, arrival.tpot_s, marks)
        states = [self.state(r, arrival, now) for r in replicas]
        found = self._routers[arrival.model](ask, states)
        chosen = replicas[0] if found is None else replicas[states.index(found)]
        if marks and chosen.keys is not None:
            self._recent.setdefault(chosen.name, Recent()).add(marks)
        counts = self.chosen.setdefault(arrival.model, {})
        counts[chosen.model] = counts.get(chosen.model, 0) + 1
        return chosen

    def state(self, replica: Replica, arrival: Arrival, now: float) -> ReplicaState:
        batcher, cost = replica.batcher, replica.batcher.cost or replica.cost
        limits, plan = batcher.limits, replica.plan
        over = 0 if plan is None else replica.done + replica.steps_until(now) - 1  # steps of a stretch
        decodes, context = batcher._running.ahead(batcher._step - 1, over)
        prefill, decode = self._factor(replica, PREFILL), self._factor(replica, DECODE)
        queued = batcher._queue.num_tokens + sum(s.total - s.computed for s in batcher._prefilling.values())
        step_s = cost.decode_s(0, context)
        beside_s = prefill * cost.decode_s(decodes, context)
        token_s = prefill * self._prompt_token_s(replica, cost)
        # prompts have what is left of each step: all that fits, or what the decodes' TPOT allows
        room_s = limits.max_step_tokens * token_s
        if decodes:
            room_s = min(room_s, max(arrival.tpot_s - beside_s, arrival.tpot_s / 4))
        longest = arrival.prompt_tokens + arrival.output_tokens
        return ReplicaState(
            name=replica.name,
            tier=self._tiers.get(replica.model, 0),
            open=batcher.num_open,
            queued_tokens=queued,
            first_s=beside_s,
            prompt_token_s=token_s * (1 + beside_s / max(room_s, token_s)),
            step_s=decode * step_s,
            decode_s=decode * (cost.decode_s(decodes + 1, context) - step_s) / (decodes + 1),
            most_running=limits.max_running,
            end_s=self._end_s(replica, now),
            recent=self._recent.get(replica.name, NOTHING),
            takes=longest <= limits.max_model_len and batcher._queue.num_new < limits.max_waiting,
        )

    def _prompt_token_s(self, replica: Replica, cost: StepCost) -> float:
        known = self._token_s.get(replica.name)
        if known is None or known[0] is not cost:
            n = min(TYPICAL_CHUNK, replica.batcher.limits.max_chunk_tokens)
            chunk = cost.step_s(0, 0, (Chunk(0, 0, n, True),)) - cost.step_s(0, 0, ())
            known = self._token_s[replica.name] = cost, chunk / n
        return known[1]

    def _factor(self, replica: Replica, phase: str) -> float:
        """How much longer a step takes by who is at work beside it now."""
        more = self._slowdown
        return 1.0 + max(
            sum(more[phase, o.phase] for o in others if o.phase != IDLE) for others in replica.beside
        )

    def _end_s(self, replica: Replica, now: float) -> float:
        """About how often a request ends there, while any is open."""
        batcher = replica.batcher
        ended = batcher._num_added - batcher.num_open
        since, before, end_s = self._ends.get(replica.name, (now, ended, 0.0))
        if ended > before and now > since:
            each = (now - since) / (ended - before)
            end_s += (each - end_s) * (ENDS_WEIGHT if end_s else 1.0)
        if ended > before or not batcher.num_open or replica.name not in self._ends:
            self._ends[replica.name] = now, ended, end_s
        return end_s
