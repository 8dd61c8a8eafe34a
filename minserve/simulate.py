"""`python -m minserve.simulate CONFIG.yaml WORKLOAD.jsonl`: what the configuration would do with the workload.

Batchers, pools, slab tables, quotas and compaction are those that serve, on a clock that jumps (sched/simulator.py); only
the time of a step is a model of it: a profile's where --costs names one, else a roofline of the model's bytes and
operations on --gpu.  A table for people, last one JSON object with the keys of a replay.  --trace writes every step in
Chrome's format (chrome://tracing, ui.perfetto.dev).  The same inputs give the same bytes.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from minserve.config import Config, TiB, load_config
from minserve.group_sets import GroupSets
from minserve.kv_moves import KvMoves
from minserve.kv_share import KvShare
from minserve.place_memory import PlannedPool, plan_memory
from minserve.pool import LeasedSets, SlabPool
from minserve.quota_writer import TICK_S, QuotaWriter
from minserve.resolve import ResolvedModel
from minserve.schema import At, size
from minserve.simulate_requests import arrivals_of, records_of, routes_of, slos_of
from minserve.step_profile import Profile, read_costs, read_profile
from minserve.workload_saved import load_workload
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.metrics import Record, summarize, table
from sched.policies import make_policy
from sched.pressure import demand, offer, preempt_for
from sched.router import ROUTERS
from sched.simulated_prompts import Prompts
from sched.simulated_replica import Replica
from sched.simulator import TIME_SLICED, Simulation, Turn
from sched.slowdown import complete
from sched.step_time import DEVICES, Work, roofline
from sched.workload import Workload

WEIGHT_BITS = {"w8a8-int8": 8, "w8a8-fp8": 8, "w4a8-int8": 4, "w4a8-fp8": 4}
SUM_S = 15e-6  # of one sum over the ranks of a few rows: NVLink's latency, and two launches
COPY_S = 0.001  # of a step, for compaction, on a device that copies at half of what it reads


def cost_of(model: ResolvedModel, gpu: str, tp: int = 1) -> StepCost:
    """A roofline of the model on a kind of GPU; of one of `tp` ranks that sum up twice a layer, as which `model` is stored."""
    c = model.config
    products = c.num_layers * (
        c.hidden_size * (2 * c.q_size + 2 * c.kv_size) + 3 * c.hidden_size * c.intermediate_size
    )
    head = c.vocab_size * c.hidden_size
    bits = WEIGHT_BITS.get(model.quantization, 16)
    kv = model.shape.block_bytes * c.num_layers / model.layout.block_tokens
    work = Work(
        weight_bytes=(products * bits / 8 + head * 2) / tp,
        parameters=(products + head) / tp,
        kv_token_bytes=kv,
        bits=8 if bits < 16 else 16,
        pair_flops=4.0 * c.num_layers * c.q_size / tp,
    )
    cost = roofline(work, DEVICES[gpu])
    return cost if tp == 1 else dataclasses.replace(cost, base_s=cost.base_s + 2 * c.num_layers * SUM_S)


class SimulatedPool:
    """One GPU's pool.  The bytes are a sparse file that nobody touches."""

    def __init__(self, planned: PlannedPool, config: Config) -> None:
        self.name, self.planned = planned.gpu.name or "pool", planned
        self.pool = SlabPool.create(planned.plan)
        rates = {m.name: m.rate for m in config.models if m.rate is not None}
        self.writer = QuotaWriter(self.pool.table, planned.gpu.quota, rates)

    def check(self) -> None:
        self.pool.table.check()


def replicas_of(
    made: Sequence[SimulatedPool], costs: dict[str, StepCost], now: "Now", prompts: Prompts
) -> list[Replica]:
    """Those of each model on its pools, in the order of its placement; with `tp` each takes so many of them."""
    found = []
    # as one pool after the other has them
    models = {m.entry.name: m for pool in made for m in pool.planned.models}
    for model in models.values():
        named = {pool.name: pool for pool in made if model.entry.name in pool.planned.plan.models}
        pools = [named[name] for name in model.entry.placement] or list(named.values())
        tp = model.entry.tp or 1
        if len(pools) % tp:
            raise ValueError(
                f"models[{model.entry.name}].placement must name {tp} GPUs for each replica, as tp says, got {len(pools)}"
            )
        found += [
            make_replica(model, pools[i : i + tp], costs[model.entry.name], now, prompts)
            for i in range(0, len(pools), tp)
        ]
    return found


def make_replica(
    model: ResolvedModel, pools: Sequence[SimulatedPool], cost: StepCost, now: "Now", prompts: Prompts
) -> Replica:
    """With a rank on each of `pools`; it takes part in sharing them as a worker does."""
    entry, leader = model.entry, pools[0].pool
    if len(pools) == 1:
        own = LeasedSets(leader, entry.name)
        sets: LeasedSets | GroupSets = own
        owner, slots, block_tokens = own.owner, own.shape.slots, own.shape.block_tokens
    else:
        sets = group = GroupSets([pool.pool.table for pool in pools], entry.name)
        owner, slots, block_tokens = group.owners[0], group.slots, group.block_tokens
    limits = Limits(
        max_running=entry.max_num_seqs,
        max_step_tokens=entry.max_num_batched_tokens,
        max_chunk_tokens=entry.max_num_batched_tokens,
        max_model_len=model.max_model_len,
        max_waiting=entry.max_queued_requests,
    )
    policy = make_policy(entry.policy, limits, cost, dict(entry.policy_options))
    batcher = Batcher(BlockPool(sets, slots, block_tokens), limits, cost, policy)
    shape = leader.plan.models[entry.name]
    block_bytes = sum(group.layers * group.block_bytes for group in shape.groups)
    # bytes are copied no faster than a context is read, and read and written both
    per_block_s = 2 * cost.per_context_token_s * block_tokens
    most = int(COPY_S / per_block_s) if per_block_s else 1 << 30
    moves = KvMoves(
        leader.table,
        owner,
        batcher.compactor,
        lambda: offer(batcher),
        lambda n: batcher.compactor.ask(n, most),
        lambda: batcher.compactor.num_moved * block_bytes,
        now,
    )
    share = KvShare(
        sets,
        batcher.blocks,
        lambda ahead: demand(batcher, now(), ahead),
        lambda n: preempt_for(batcher, n),
        now,
        moves,
    )

    def after(step_s: float | None) -> None:
        if step_s is not None:
            share.stepped(step_s)
        share.turn()

    names = tuple(pool.name for pool in pools)
    keys = prompts.keys(block_tokens) if entry.enable_prefix_caching else None
    replica = Replica(f"{entry.name}@{'+'.join(names)}", entry.name, names, batcher, after, keys=keys)
    replica.move_s = per_block_s
    return replica


class Now:
    """The simulation's clock, for what asks for one."""

    def __init__(self) -> None:
        self.simulation: Simulation | None = None

    def __call__(self) -> float:
        # not 0, which in a row of the table means never
        return 1.0 + (self.simulation.now if self.simulation is not None else 0.0)


def counts_of(simulation: Simulation) -> dict[str, Any]:
    """What it did, in all and by replica."""
    replicas = simulation.replicas
    return {
        "tokens": simulation.tokens,
        "events": simulation.events,
        "seconds": simulation.now,
        "steps": {r.name: r.steps for r in replicas},
        "preemptions": {r.name: r.batcher.num_preemptions for r in replicas},
        "blocks_moved": {r.name: r.batcher.compactor.num_moved for r in replicas},
        "sets_emptied": {r.name: r.batcher.compactor.num_vacated for r in replicas},
    }


def simulate(
    config: Config,
    workload: Workload,
    costs: dict[str, StepCost],
    pools: Sequence[PlannedPool],
    *,
    router: str = "least-ttft",
    slowdown: Mapping[tuple[str, str], float] = TIME_SLICED,
    stretch: bool = True,
    trace: list[dict[str, Any]] | None = None,
) -> tuple[Simulation, list[Record], dict[str, Any]]:
    """The run, its records, and their summary.  ValueError for a model that the configuration does not serve."""
    prompts = Prompts(workload)
    routes, groups = routes_of(config, router, slowdown, prompts)
    served = {m.entry.name for p in pools for m in p.models} | groups.keys()
    if unknown := set(workload.models) - served:
        raise ValueError(
            f"the workload asks for {sorted(unknown)}; the configuration serves {sorted(served)}"
        )
    slos = slos_of(config) | dict(workload.slos)
    now = Now()
    made = [SimulatedPool(p, config) for p in pools]

    def divide(_: float) -> None:
        for pool in made:
            pool.writer.tick(now())

    def draw(replica: Replica, begin_s: float, end_s: float, tokens: int) -> None:
        assert trace is not None
        trace.append({"name": replica.phase, "ph": "X", "pid": "+".join(replica.devices), "tid": replica.name,
                      "ts": begin_s * 1e6, "dur": (end_s - begin_s) * 1e6, "args": {"tokens": tokens}})  # fmt: skip

    simulation = Simulation(
        replicas_of(made, costs, now, prompts),
        arrivals_of(workload, slos),
        route=routes,
        groups=groups,
        slowdown=slowdown,
        turns=[Turn(TICK_S, divide)],
        stretch=stretch and trace is None,
        trace=None if trace is None else draw,
    )
    now.simulation = simulation
    try:
        simulation.run()
        simulation.check()
        for pool in made:
            pool.check()
    finally:
        for pool in made:
            pool.pool.close()
    records = records_of(simulation, workload)
    summary = summarize(records, slos)
    chosen = {name: routes.chosen.get(name, {}) for name in groups}
    summary["simulated"] = counts_of(simulation) | {"chosen": chosen}
    return simulation, records, summary


def read_use(pairs: Sequence[str], served: Collection[str]) -> dict[str, str]:
    """Model to key of the profile, as --use gives them."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--use must be NAME=model/qformat/tp/mps, got {wrong[0]!r}")
    found = dict(pair.split("=", 1) for pair in pairs)
    if unknown := found.keys() - set(served):
        raise ValueError(f"--use names {sorted(unknown)}; the configuration serves {sorted(served)}")
    return found


def choose_costs(
    args: argparse.Namespace, pools: Sequence[PlannedPool], own: Profile | None
) -> dict[str, StepCost]:
    """By model; prints where each comes from."""
    profile = read_costs(args.costs) if args.costs else {}
    served = {m.entry.name: m for pool in pools for m in pool.models}
    named = read_use(args.use, served)
    costs = {}
    ignored = [
        name
        for name, model in served.items()
        if model.entry.sm_share is not None
        and named.get(name, "").rpartition("/")[2] != str(model.entry.sm_share)
    ]
    if ignored:
        sys.stdout.write(f"sm_share of {', '.join(ignored)} is not simulated\n")
    for name, model in served.items():
        if name in named:
            if named[name] not in profile:
                choices = ", ".join(sorted(profile)[:12]) or "none: give --costs"
                raise ValueError(
                    f"--use {name}={named[name]!r} is not in the profile; there are {choices} ..."
                )
            costs[name], error = profile[named[name]]
            sys.stdout.write(f"{name}: profile {named[name]}, off by {error:.1%} in the mean\n")
        elif own is not None and name in own.models:
            costs[name], error = own.models[name]
            sys.stdout.write(f"{name}: {args.profile}, off by {error:.1%} in the mean\n")
        else:
            costs[name] = cost_of(model, args.gpu, model.entry.tp or 1)
            sys.stdout.write(f"{name}: roofline on {args.gpu}\n")
    return costs


def check_writable(flag: str, path: str) -> None:
    """ValueError where a file cannot be written: said before a long run.  One that is there stays as it is."""
    try:
        with Path(path).open("a"):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} must be a file that can be written, got {path!r}: {error.strerror}"
        ) from None


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minserve.simulate", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", metavar="CONFIG.yaml", help="see examples/full.yaml")
    parser.add_argument("workload", metavar="WORKLOAD.jsonl", help="of python -m minserve.workload")
    parser.add_argument(
        "--gpu", choices=sorted(DEVICES), default="h200", help="whose bandwidth and speed are assumed"
    )
    parser.add_argument("--costs", metavar="CSV", help="a profile in FineServe's form")
    says = "of python -m bench.profile_steps: step times, and how models on one device slow each other down"
    parser.add_argument("--profile", metavar="JSON", help=says)
    parser.add_argument("--use", metavar="NAME=KEY", action="append", default=[],
                        help="the profile's model/qformat/tp/mps for a model; others have a roofline")  # fmt: skip
    parser.add_argument("--pool-bytes", metavar="SIZE", help="of pools that name none, such as 40GiB")
    parser.add_argument(
        "--router", choices=list(ROUTERS), default="least-ttft", help="among replicas; serve has the default"
    )
    parser.add_argument("--trace", metavar="FILE", help="every step, as JSON for chrome://tracing")
    parser.add_argument(
        "--single-steps",
        action="store_true",
        help="no stretches: slower; what models share is looked at after every step",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    args = read_arguments(argv)
    try:
        given = args.pool_bytes and size(64 << 10, TiB).read(At("--pool-bytes", Path()), args.pool_bytes)
        config = load_config(args.config)
        pools = plan_memory(config, given=given)
        workload = load_workload(Path(args.workload))
        trace: list[dict[str, Any]] | None = [] if args.trace else None
        own = read_profile(args.profile) if args.profile else None
        costs = choose_costs(args, pools, own)
        slowdown = complete(own.slowdown) if own is not None and own.slowdown else TIME_SLICED
        if args.trace:
            check_writable("--trace", args.trace)
        _, _, summary = simulate(
            config,
            workload,
            costs,
            pools,
            router=args.router,
            slowdown=slowdown,
            stretch=not args.single_steps,
            trace=trace,
        )
        if args.trace:
            Path(args.trace).write_text(json.dumps({"traceEvents": trace}))
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2
    sys.stdout.write(table(summary) + "\n")
    sys.stdout.write(json.dumps(summary) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
