"""How each GPU's KV pool is cut for its models, before anything runs: `python -m minserve.place CONFIG.yaml --memory`.

The same solver plans the pools that are served.  Beside it stands what the same models would take at a time from
FineServe's slab of 2 x LCM and from pages of 2 MiB.  Needs config.json of the models, no weights.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from minserve.agent import pool_bytes
from minserve.config import Config, GpuConfig, pick_device
from minserve.resolve import ResolvedModel, plan_pool, resolve_model, settle_blocks
from sched.other_pools import Grain, depth_groups, half_block, lcm_grains, lcm_slab, page_grains
from sched.slabs import MAX_TAIL, PoolPlan, heads_per_rank

MiB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedPool:
    """A GPU's pool, and the models that share it with the blocks they are given."""

    gpu: GpuConfig
    device: str
    models: tuple[ResolvedModel, ...]
    plan: PoolPlan


def rank_of(model: ResolvedModel, tp: int) -> ResolvedModel:
    """The model as one of `tp` ranks stores it."""
    heads = heads_per_rank(model.layout.num_kv_heads, tp)
    layout, *layouts = (
        dataclasses.replace(layout, num_kv_heads=heads) for layout in (model.layout, *model.layouts)
    )
    return dataclasses.replace(model, layout=layout, layouts=tuple(layouts))


def plan_memory(config: Config, *, tp: int = 1, given: int | None = None) -> list[PlannedPool]:
    """A plan for every GPU that has models, a rank each (of `tp`, where a model names none); `given` bytes where a pool
    names none.

    ValueError for models that cannot be resolved or do not fit.
    """
    planned = []
    for gpu in config.gpus:
        entries = [m for m in config.models if gpu.name in (m.placement or (config.gpus[0].name,))]
        if not entries:
            continue
        device = pick_device(gpu.device)
        models = [rank_of(resolve_model(m, device), m.tp or tp) for m in entries]
        total = gpu.pool_bytes or given or pool_bytes(gpu, device, models)
        models = settle_blocks(models, gpu, total)
        planned.append(PlannedPool(gpu, device, tuple(models), plan_pool(models, gpu, total)))
    return planned


def grain_json(grain: Grain, pool: int) -> dict[str, Any]:
    return {
        "unit_bytes": grain.unit_bytes,
        "unit_tokens": grain.unit_tokens,
        "tail": round(grain.tail, 5),
        "units": pool // grain.unit_bytes,
    }


def model_json(model: ResolvedModel, pool: PlannedPool) -> dict[str, Any]:
    name, layout = model.entry.name, model.layout
    shape, shapes = pool.plan.models[name], [m.shape for m in pool.models]
    ours = Grain(shape.layers * pool.plan.slab_bytes, shape.set_tokens, shape.tail_waste)
    return {
        "name": name,
        "layers": model.config.num_layers,
        "kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "kv_dtype": model.kv_formats,
        "block_tokens": shape.block_tokens,
        "block_bytes": model.shape.block_bytes,
        "scale_bytes": (layout.scale_bytes + layout.zero_bytes) * layout.num_kv_heads,
        "slots": shape.slots,
        "max_model_len": model.max_model_len,
        "reserve_sets": shape.reserve_sets,
        "set": grain_json(ours, pool.plan.pool_bytes),
        "lcm": grain_json(lcm_grains(shapes)[name], pool.plan.pool_bytes),
        "pages": grain_json(page_grains(shapes)[name], pool.plan.pool_bytes),
    }


def pool_json(pool: PlannedPool) -> dict[str, Any]:
    plan, shapes = pool.plan, [m.shape for m in pool.models]
    return {
        "name": pool.gpu.name,
        "device": pool.device,
        "pool_bytes": plan.pool_bytes,
        "slab_bytes": plan.slab_bytes,
        "num_slabs": plan.num_slabs,
        "reserved_slabs": plan.reserved_slabs,
        "liveness_slabs": plan.liveness_slabs,
        "lcm_slab_bytes": lcm_slab(map(half_block, shapes)),
        "lcm_pools": [list(names) for names in depth_groups(shapes).values()],
        "models": [model_json(m, pool) for m in pool.models],
    }


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def mib(value: int) -> str:
    return f"{value / MiB:,.1f}" if value < 1000 * MiB else f"{value / MiB:,.0f}"


def describe(pool: dict[str, Any]) -> list[str]:
    """The table of one pool of `pool_json`."""
    plan = [["model", "KV", "heads", "dim", "layers", "P", "slots", "reserved", "sets", "tail"]]
    units = [["taken at a time, MiB (tokens)", "a set", "", "2 x LCM", "", "2 MiB pages", "", "their tail"]]
    for m in pool["models"]:
        cells = (m["kv_heads"], m["head_dim"], m["layers"], m["block_tokens"], m["slots"], m["reserve_sets"])
        tail = f"{m['set']['tail']:.2%}"
        plan.append([m["name"], m["kv_dtype"], *map(str, cells), f"{m['set']['units']:,}", tail])
        row = [m["name"]]
        for kind in ("set", "lcm", "pages"):
            row += [mib(m[kind]["unit_bytes"]), f"({m[kind]['unit_tokens']:,})"]
        units.append([*row, f"{m['pages']['tail']:.2%}"])
    lines = [
        f"pool {pool['name']}: {pool['pool_bytes'] / MiB:,.0f} MiB on {pool['device']}, {pool['num_slabs']:,} slabs of "
        f"{pool['slab_bytes'] / 1024:,.0f} KiB, {pool['reserved_slabs'] / pool['num_slabs']:.1%} of them reserved"
    ]
    lines += [f"  {line}" for line in (*columns(plan), *columns(units))]
    worst = max(m["set"]["tail"] for m in pool["models"])
    if worst > MAX_TAIL:
        lines.append(
            f"  a tail of {worst:.1%} is the least that any slab and block leave in a pool of this size"
        )
    lines.append(f"  FineServe's slab: 2 x LCM = {mib(pool['lcm_slab_bytes'])} MiB{groups_line(pool)}")
    return lines


def groups_line(pool: dict[str, Any]) -> str:
    groups = pool["lcm_pools"]
    return "" if len(groups) == 1 else "; pools apart: " + " | ".join(", ".join(names) for names in groups)
