"""What a request may name: a model, one with several replicas, or a group of models; and what became of those that did.

A Served is one worker with all that the front end knows of it, its pace included.  A Target is a name, with one Served or
with several and a router between them.  A Passage is one sequence on its way through a Served.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minserve.config import Config, ModelEntry
from minserve.host import Host
from minserve.slab_table import SlabTable
from minserve.text import Tokenizer
from minserve.wire import TokenEvent
from sched.observed import Observed
from sched.router import MARK_TOKENS, Recent, ReplicaState, Router, Tiers, least_ttft

Memory = Callable[[], tuple[int, int] | None]


class Slo(NamedTuple):
    """Seconds: until the first token, and of each further one in the mean."""

    ttft_s: float
    tpot_s: float


@dataclass(slots=True)
class Outcomes:
    """Sequences that ended, save those whose client left or whose prompt could never run.

    One has attained its SLO, or has missed its TTFT, its TPOT or both, or was given up by the policy (shed), or failed.
    """

    requests: int = 0
    attained: int = 0
    missed_ttft: int = 0
    missed_tpot: int = 0
    shed: int = 0
    failed: int = 0

    def add(self, names: Sequence[str]) -> None:
        self.requests += 1
        for name in names:
            setattr(self, name, getattr(self, name) + 1)


class Served:
    """A worker that requests may be handed to; without a tokenizer only where it failed.  `memory`: tokens of its KV that are
    free and held, None where they are not known."""

    def __init__(
        self, entry: ModelEntry, host: Host, tokenizer: Tokenizer | None, memory: Memory = lambda: None
    ) -> None:
        self.entry, self.host, self.tokenizer, self._memory = entry, host, tokenizer, memory
        self.slo = Slo(entry.slo.ttft_ms / 1000, entry.slo.tpot_ms / 1000)
        self.waiting_tokens = 0
        self.pace, self.recent, self.outcomes = Observed(), Recent(), Outcomes()
        self._life: object = None

    @property
    def busy(self) -> int:
        return self.host.num_requests

    @property
    def full(self) -> bool:
        """More requests than may run at once."""
        return self.busy > self.entry.max_num_seqs

    def state(self, now: float, takes: bool) -> ReplicaState:
        if self.host.state != "ready" or self.host.loaded is not self._life:
            self._life = self.host.loaded
            self.recent.clear()  # its cache went with its process, or with its sleep
        return self.pace.state(
            self.entry.name, self.entry.tier, now, open_=self.busy, most_running=self.entry.max_num_seqs,
            recent=self.recent, memory=self._memory(), takes=takes,
        )  # fmt: skip


class Target:
    """A name and its `members`.  `outcomes`: of requests by this name, by member, where there are several."""

    def __init__(self, name: str, members: Sequence[Served], route: Router = least_ttft) -> None:
        self.name, self.members, self.route = name, tuple(members), route
        # whoever names no SLO gets that of the best precision, whichever answers then
        self.slo = min(self.members, key=lambda s: s.entry.tier).slo
        several = members if len(members) > 1 else ()
        self.outcomes = {s.entry.name: Outcomes() for s in several}
        self.chosen = dict.fromkeys(self.outcomes, 0)

    @property
    def several(self) -> bool:
        return len(self.members) > 1


@dataclass(slots=True)
class Passage:
    """One sequence of `prompt_tokens`, `queued` of them believed to be computed, until `over`; it came at `arrival_s`."""

    target: Target
    served: Served
    slo: Slo
    arrival_s: float
    prompt_tokens: int
    queued: int
    num_tokens: int = 0
    first_s: float | None = None
    _over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.served.waiting_tokens += self.prompt_tokens

    def begin(self, now: float) -> None:
        """It is handed to the worker."""
        self.served.pace.came(self.queued, now)

    def heard(self, event: TokenEvent, now: float) -> None:
        pace = self.served.pace
        if self.first_s is None:
            self.first_s = now
            self.served.waiting_tokens -= self.prompt_tokens
            computed = max(0, self.prompt_tokens - event.cached_tokens)
            pace.first(self.queued, now, computed=computed, full=self.served.full)
        else:
            pace.stepped(now)

    def over(self, now: float, why: str = "") -> None:
        """It has ended: `why` shed or failed, gone where nobody wants to know, "" as it should.  Once is enough."""
        if self._over:
            return
        self._over = True
        if self.first_s is None:
            self.served.waiting_tokens -= self.prompt_tokens
            self.served.pace.gone(self.queued, now)
        else:
            self.served.pace.ended(now)
        if why != "gone":
            names = (why,) if why else self._judged(now)
            self.served.outcomes.add(names)
            if self.target.several:
                self.target.outcomes[self.served.entry.name].add(names)

    def _judged(self, now: float) -> tuple[str, ...]:
        first_s = now if self.first_s is None else self.first_s
        tpot_s = (now - first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0
        missed: tuple[str, ...] = ("missed_ttft",) if first_s - self.arrival_s > self.slo.ttft_s else ()
        missed += ("missed_tpot",) if tpot_s > self.slo.tpot_s else ()
        return missed or ("attained",)


def cold_tokens(prompt_tokens: int, sample: int, caches: bool) -> int:
    """What the `sample`-th answer to one prompt makes the worker compute: the first sample leaves the others its blocks."""
    return prompt_tokens if sample == 0 or not caches else min(prompt_tokens, MARK_TOKENS)


def targets_of(config: Config, models: Mapping[str, Served]) -> dict[str, Target]:
    """Every name that a request may have: models, their aliases, single replicas, groups.  `config` has an entry a replica."""
    entries: dict[str, list[ModelEntry]] = {}
    for m in config.models:
        entries.setdefault(m.model, []).append(m)
    found = {name: Target(name, [models[m.name] for m in of]) for name, of in entries.items()}
    for of in entries.values():
        found |= {m.name: Target(m.name, [models[m.name]]) for m in of if m.name not in found}
    found |= {alias: found[name] for name, of in entries.items() for alias in of[0].aliases}
    for group in config.groups:
        members = [models[m.name] for m in config.models if m.group == group.name]
        tiers = Tiers(group.policy, group.margin, group.hysteresis)
        found[group.name] = Target(group.name, members, tiers)
    return found


def check_groups(config: Config, tokenizers: Mapping[str, Tokenizer | None]) -> None:
    """ValueError where models of a group would read the same text as different tokens: a prompt is tokenized once."""
    for group in config.groups:
        first: tuple[str, bytes] | None = None
        for m in config.models:
            tokenizer = tokenizers.get(m.name)
            if m.group != group.name or tokenizer is None:
                continue
            mark = tokenizer.fingerprint()
            if first is not None and mark != first[1]:
                raise ValueError(
                    f"models of the group {group.name} must have the same tokenizer and chat template, "
                    f"got others for {first[0]} and {m.name}"
                )
            first = first or (m.name, mark)


def memory_of(table: SlabTable, name: str) -> Memory:
    """How a pool stands for one of its models, read without a lock: what it holds without need, and what it may lease."""
    shape, owner = table.plan.models[name], table.owner_of(name)

    def read() -> tuple[int, int]:
        held, live = table.held(owner), table.said(owner, "live_blocks") * shape.block_tokens
        quota = table.quotas.quota(owner)
        # whoever holds more than its quota gives way once somebody asks
        more = max(table.num_free, 0 if quota is None else quota - held)
        sets = (held + max(0, more)) // shape.layers
        return max(0, sets * shape.set_tokens - live), live

    return read
