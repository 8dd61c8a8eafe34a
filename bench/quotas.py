"""Who should hold the KV pool: quotas by marginal value beside first come, equal, static and ADBS, on the same bursts.

    python -m bench.quotas            # 5 seeds, some minutes; --quick: 1 seed, under a minute

Simulated are time and tokens alone: table, sets, blocks, Batchers, quotas and giving way are those that serve.  Four
models (16, 8, 4 and 16 bit) burst out of phase.  A step of each takes 30 ms whatever is in it, so models cost each other
memory and nothing else; a preempted request is prefilled again within its steps' tokens.  A request is in time when its
first token and then the mean of the others are.  A table for people, last one line of JSON.
"""

import argparse
import concurrent.futures
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minserve.kv_share import KvShare
from minserve.pool import LeasedSets, SlabPool
from minserve.quota_writer import TICK_S, QuotaWriter
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.pressure import demand, preempt_for
from sched.quota import POLICIES
from sched.slabs import LayerGroup, PoolPlan, SetShape
from sched.step import Request

STEP_S, TTFT_S, TPOT_S = 0.03, 2.0, 0.1
BLOCK_TOKENS, SLOTS, MAX_LEN, STEP_TOKENS = 16, 8, 2048, 2048
# model: slabs a set, requests a second at load 1
MODELS = {"kv16": (16, 1.0), "kv8": (8, 1.5), "kv4": (4, 2.0), "kv16b": (16, 0.7)}
SLABS = 2400
PERIOD_S, BURST_S, BUSY, QUIET = 40.0, 13.0, 3.0, 0.25
LOADS = (1.0, 3.0, 6.0)


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    model: str
    prompt: int
    answer: int


def arrivals(seed: int, load: float, seconds: float) -> list[Arrival]:
    """Poisson, three times the rate for a third of each period and a quarter else; lengths lognormal."""
    rng, found = random.Random(seed), []
    for i, (name, (_, rate)) in enumerate(MODELS.items()):
        at_s = 0.0
        while at_s < seconds:
            burst = (at_s + i * PERIOD_S / len(MODELS)) % PERIOD_S < BURST_S
            at_s += rng.expovariate(rate * load * (BUSY if burst else QUIET))
            prompt = min(1500, int(rng.lognormvariate(5.8, 0.8)) + 1)
            answer = min(MAX_LEN - prompt, int(rng.lognormvariate(4.8, 0.7)) + 1)
            found.append(Arrival(at_s, name, prompt, answer))
    return sorted(found, key=lambda a: a.at_s)


class Worker:
    """One model; `now` is the clock of all."""

    def __init__(self, pool: SlabPool, name: str, now: list[float]) -> None:
        sets = LeasedSets(pool, name)
        publish = sets.publish
        # heard on the simulated clock
        sets.publish = lambda **said: publish(**said | {"heartbeat_ns": int(now[0] * 1e9)})  # type: ignore[method-assign]
        blocks = BlockPool(sets, SLOTS, BLOCK_TOKENS)
        limits = Limits(
            max_running=256, max_step_tokens=STEP_TOKENS, max_chunk_tokens=STEP_TOKENS, max_model_len=MAX_LEN,
            max_waiting=10**6,
        )  # fmt: skip
        self.batcher = batcher = Batcher(blocks, limits)
        self._share = KvShare(
            sets,
            blocks,
            lambda ahead: demand(batcher, now[0], ahead),
            lambda n: preempt_for(batcher, n),
            lambda: now[0],
        )
        self._now, self.tokens = now, 0
        self.arrived: dict[int, Arrival] = {}
        self.first: dict[int, float] = {}
        self.ended: dict[int, float] = {}

    def add(self, a: Arrival) -> None:
        rid = len(self.arrived)
        self.arrived[rid] = a
        self.batcher.add(
            Request(
                rid=rid,
                prompt_tokens=a.prompt,
                max_tokens=a.answer,
                arrival_s=a.at_s,
                ttft_s=TTFT_S,
                tpot_s=TPOT_S,
            )
        )

    def turn(self) -> None:
        plan, done_s = self.batcher.plan(self._now[0]), self._now[0] + STEP_S
        if not plan.empty:
            for chunk in plan.chunks:
                if chunk.samples:
                    self.first.setdefault(chunk.rid, done_s)
            self.tokens += len(plan.decode)
            self.ended |= dict.fromkeys(self.batcher.advance(plan, 1, done_s), done_s)
            self._share.stepped(STEP_S)
        self._share.turn()

    def in_time(self) -> float:
        """The part of its requests that were in time, those that have not ended by now not among them."""
        good = 0
        for rid, end_s in self.ended.items():
            a, first_s = self.arrived[rid], self.first[rid]
            good += first_s - a.at_s <= TTFT_S and end_s - first_s <= TPOT_S * max(1, a.answer - 1)
        return good / max(1, len(self.arrived))


def run(policy: str, load: float, seed: int, seconds: float) -> dict[str, float]:
    """Bursts for `seconds`, then half as long without arrivals."""

    def shape(slabs: int) -> SetShape:
        longest = MAX_LEN // (BLOCK_TOKENS * SLOTS)
        return SetShape(slabs, (LayerGroup(0, slabs, 512),), SLOTS, BLOCK_TOKENS, 4, longest, 0.0)

    liveness = max(slabs for slabs, _ in MODELS.values()) * (MAX_LEN // (BLOCK_TOKENS * SLOTS) - 4)
    pool = SlabPool.create(PoolPlan(4096, SLABS, {n: shape(s) for n, (s, _) in MODELS.items()}, liveness))
    now, ticked = [0.0], -1.0
    workers = {name: Worker(pool, name, now) for name in MODELS}
    writer = QuotaWriter(pool.table, policy, {name: rate for name, (_, rate) in MODELS.items()})
    coming, tokens = arrivals(seed, load, seconds)[::-1], 0
    while now[0] < 1.5 * seconds:
        while coming and coming[-1].at_s <= now[0]:
            a = coming.pop()
            workers[a.model].add(a)
        if now[0] - ticked >= TICK_S:
            ticked = now[0]
            writer.tick(now[0])
        for worker in workers.values():
            worker.turn()
        if now[0] < seconds:
            tokens = sum(w.tokens for w in workers.values())
        now[0] += STEP_S
    pool.table.check()
    total = sum(len(w.arrived) for w in workers.values())
    found = {
        "in_time": sum(w.in_time() * len(w.arrived) for w in workers.values()) / total,
        "worst_model": min(w.in_time() for w in workers.values()),
        "tokens_per_s": tokens / seconds,
        "preemptions": sum(w.batcher.num_preemptions for w in workers.values()) / total,
    }
    pool.close()
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """Means over the seeds; `preemptions` a request."""

    load: float
    policy: str
    in_time: float
    worst_model: float
    tokens_per_s: float
    preemptions: float


def measure(loads: Sequence[float], seeds: Sequence[int], seconds: float) -> list[Row]:
    cases = [(p, load, s, seconds) for load in loads for p in POLICIES for s in seeds]
    with concurrent.futures.ProcessPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(run, *zip(*cases, strict=True)))
    rows = []
    for at in range(0, len(cases), len(seeds)):
        each = found[at : at + len(seeds)]
        means: dict[str, Any] = {k: sum(f[k] for f in each) / len(each) for k in each[0]}
        rows.append(Row(cases[at][1], cases[at][0], **means))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quotas", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 40 s of bursts")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    args = parser.parse_args(argv)
    seeds, seconds = (1, PERIOD_S) if args.quick else (5, 3 * PERIOD_S)
    rows = measure(LOADS, range(args.seed, args.seed + seeds), seconds)
    print(f"{'load':>4} {'policy':12} {'in time':>8} {'worst model':>12} {'tok/s':>7} {'preempted':>10}")
    for r in rows:
        best = " *" if r.in_time == max(o.in_time for o in rows if o.load == r.load) else ""
        print(
            f"{r.load:4.0f} {r.policy:12} {r.in_time:8.1%} {r.worst_model:12.1%} {r.tokens_per_s:7,.0f} "
            f"{r.preemptions:9.2f}x{best}"
        )
    print(json.dumps({"seeds": seeds, "seconds": seconds, "rows": [asdict(r) for r in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
