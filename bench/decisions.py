"""What a decision costs: a plan with 256 requests running and 1,000 waiting, by policy, a turn of the quotas, the simulator.

    python -m bench.decisions          # two minutes; --quick: half a minute

The Batcher is the one that serves: blocks from leased sets of a shared pool (quota on), prefix cache on with a chain of
keys for every prompt, a cost model that predicts.  A new request comes for each that ends.  Decided are admission, chunks,
blocks of those that run and what is published; beside it stands the time of adding a request and of advancing a step.
Times are of the CPU, as other work on the machine would be part of those on the wall; it still shares the caches, so `alone`
is the p99 of the least that each step took in REPEATS runs of the same steps.  FineServe's rule takes 427 ms for 1,000
waiting in its own code (arXiv 2509.06261, artifact).  The simulator runs 8 models on 4 devices, three loads.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.scheduling_tables import decisions_table
from bench.slabs_paths import quantile
from minserve.kv_share import KvShare
from minserve.loop import COLLECT_AFTER
from minserve.pool import LeasedSets, SlabPool
from minserve.quota_writer import QuotaWriter
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.policies import POLICIES, make_policy
from sched.prefix import KeyChain, root_key
from sched.pressure import demand, preempt_for
from sched.simulated_replica import Arrival, Replica
from sched.simulator import Simulation
from sched.slabs import ModelShape, PoolPlan, solve
from sched.step import Request

RUNNING, WAITING, MODELS, REPEATS = 256, 1000, 32, 3
P, LAYERS, SLAB = 32, 32, 1 << 16
RESULT = Path(__file__).parent / "results" / "decisions.json"
# requests, requests a second, tokens of prompts and of answers
SIMULATED = {
    "long prompts": (6000, 60.0, (1, 2000), (1, 500)),
    "long answers": (4000, 40.0, (20, 600), (50, 1000)),
    "reasoning": (1000, 8.0, (20, 600), (500, 5000)),
}
COST = StepCost(base_s=8e-3, per_decode_s=3e-5, per_prefill_token_s=1.5e-5, per_context_token_s=2e-8)


def plan_of(models: int, sets: int) -> PoolPlan:
    shapes = [
        ModelShape(name=f"m{i}", layers=LAYERS, block_bytes=SLAB // 16, block_tokens=P, max_model_len=4096, reserve_tokens=0)
        for i in range(models)
    ]  # fmt: skip
    return solve(shapes, sets * LAYERS * SLAB, min_sets=1, max_slab_bytes=SLAB)


class Load:
    """Requests without end: prompts of 64 to 2,000 tokens, a quarter of them begin alike."""

    def __init__(self, seed: int) -> None:
        self.rng, self.rid = random.Random(seed), 0
        self.common = [self.rng.randrange(32_000) for _ in range(512)]

    def next(self, now: float) -> Request:
        self.rid += 1
        length = self.rng.randint(64, 2000)
        tokens = [self.rng.randrange(32_000) for _ in range(length)]
        if self.rng.random() < 0.25:
            tokens = (self.common + tokens)[:length]
        keys = KeyChain(root_key(""), P).extend(tokens)
        ttft = self.rng.choice((0.5, 5.0, 60.0))
        return Request(rid=self.rid, prompt_tokens=length, max_tokens=self.rng.randint(16, 400), arrival_s=now, ttft_s=ttft, tpot_s=0.1, keys=keys)  # fmt: skip


class Steps(NamedTuple):
    """Of a run: microseconds of plans, adds and advances; how many ran and waited at each plan."""

    plans: list[float]
    adds: list[float]
    advances: list[float]
    running: list[int]
    waiting: list[int]


def run_steps(name: str, steps: int, seed: int) -> Steps:
    load, now = Load(seed), 0.0
    limits = Limits(max_running=RUNNING, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=4096, max_waiting=1 << 20)  # fmt: skip
    options = {"batch": RUNNING} if name == "fixed" else None
    pool = SlabPool.create(plan_of(2, 1200))
    try:
        sets = LeasedSets(pool, "m0")
        policy = make_policy(name, limits, COST, options)
        batcher = Batcher(BlockPool(sets, sets.shape.slots, sets.shape.block_tokens), limits, COST, policy)
        share = KvShare(sets, batcher.blocks, lambda ahead: demand(batcher, now, ahead), lambda n: preempt_for(batcher, n), lambda: now + 1.0)  # fmt: skip
        found = Steps([], [], [], [], [])
        warm = steps // 2 + RUNNING
        for step in range(warm + steps):
            while batcher.num_waiting < WAITING:
                request = load.next(now)
                start = time.thread_time_ns()
                batcher.add(request)
                found.adds.append((time.thread_time_ns() - start) / 1e3)
            start = time.thread_time_ns()
            plan = batcher.plan(now)
            planned = time.thread_time_ns()
            now += max(plan.seconds, 1e-3)
            if not plan.empty:
                begun = time.thread_time_ns()
                batcher.advance(plan, 1, now)
                if step >= warm:
                    found.advances.append((time.thread_time_ns() - begun) / 1e3)
            share.turn()
            if step >= warm:
                found.plans.append((planned - start) / 1e3)
                found.waiting.append(batcher.num_waiting)
                found.running.append(batcher.num_running)
    finally:
        pool.close()
    return found


def time_plans(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Microseconds of a plan, an add and an advance, while that many run and wait: of all runs, and of each step's least."""
    runs = [run_steps(name, steps, seed) for _ in range(REPEATS)]
    plans, adds, advances, running, waiting = (
        [x for values in of for x in values] for of in zip(*runs, strict=True)
    )
    alone = [min(of) for of in zip(*(r.plans for r in runs), strict=True)]
    return {
        "tag": "measured", "policy": name, "plan_p50_us": statistics.median(plans), "plan_p99_us": quantile(plans, 0.99),
        "alone_p99_us": quantile(alone, 0.99), "add_p50_us": statistics.median(adds),
        "advance_p50_us": statistics.median(advances), "advance_p99_us": quantile(advances, 0.99),
        "running": statistics.mean(running), "waiting": statistics.mean(waiting), "steps": steps,
    }  # fmt: skip


class Counter:
    """Sets without end, which nobody else wants."""

    def __init__(self) -> None:
        self.free, self.most = [], 0

    def lease(self, *, urgent: bool = False) -> int:
        if not self.free:
            self.free.append(self.most)
            self.most += 1
        return self.free.pop()

    def give_back(self, set_id: int) -> None:
        self.free.append(set_id)


def time_simulator(load: str, seed: int) -> dict[str, Any]:
    """Simulated output tokens a second of CPU time, the most of REPEATS runs."""
    requests, rate, prompts, answers = SIMULATED[load]
    rng, now, asked = random.Random(seed), 0.0, []
    for rid in range(requests):
        now += rng.expovariate(rate)
        asked.append(Arrival(now, rid, f"m{rng.randrange(8)}", rng.randint(*prompts), rng.randint(*answers)))
    limits = Limits(max_running=RUNNING, max_step_tokens=2304, max_chunk_tokens=2048, max_model_len=8192, max_waiting=1 << 20)  # fmt: skip
    best, tokens, steps, events = 0.0, 0, 0, 0
    for _ in range(REPEATS):
        replicas = [
            Replica(f"m{i}", f"m{i}", (f"gpu{i % 4}",), Batcher(BlockPool(Counter(), 16, P), limits, COST))
            for i in range(8)
        ]
        simulation = Simulation(replicas, asked)
        start = time.thread_time_ns()
        simulation.run()
        best = max(best, simulation.tokens / (time.thread_time_ns() - start) * 1e9)
        tokens, steps, events = simulation.tokens, sum(r.steps for r in replicas), simulation.events
    return {
        "tag": "simulated",
        "load": load,
        "tokens_per_s": best,
        "tokens": tokens,
        "steps": steps,
        "events": events,
    }


def time_quota(turns: int) -> dict[str, float]:
    """Milliseconds of a division among MODELS models that all hold sets and want more."""
    pool = SlabPool.create(plan_of(MODELS, 2000))
    try:
        sets = [LeasedSets(pool, f"m{i}") for i in range(MODELS)]
        for i, of in enumerate(sets):
            for _ in range(10 + i):
                of.lease()
        writer = QuotaWriter(pool.table, "marginal", {f"m{i}": 1.0 + i for i in range(MODELS)})
        found = []
        rng = random.Random(0)
        for turn in range(turns):
            for i, of in enumerate(sets):
                of.publish(demand=rng.randint(0, 60), used=5 + i, waiting=rng.randint(0, 40), step_us=20_000, sequence_tokens=800, urgency_milli=rng.randint(500, 4000), heartbeat_ns=int((turn + 1) * 1e9))  # fmt: skip
            start = time.thread_time_ns()
            writer.tick(turn + 1.0)
            found.append((time.thread_time_ns() - start) / 1e6)
    finally:
        pool.close()
    return {"quota_p50_ms": statistics.median(found), "quota_p99_ms": quantile(found, 0.99), "models": MODELS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decisions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, four policies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="keep the result in bench/results")
    args = parser.parse_args(argv)
    gc.set_threshold(COLLECT_AFTER)  # as in a worker
    names = ("slack", "fcfs", "saab", "prism") if args.quick else tuple(POLICIES)
    rows = [time_plans(name, 150 if args.quick else 1000, args.seed) for name in names]
    quota = time_quota(50 if args.quick else 500)
    simulated = [time_simulator(load, args.seed) for load in SIMULATED]
    result = {"bench": "decisions", "seed": args.seed, "rows": rows, **quota, "simulator": simulated}
    if args.record:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(decisions_table(result) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
