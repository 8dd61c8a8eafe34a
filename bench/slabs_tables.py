"""The tables of docs/kv-slabs.md, from what `python -m bench.slabs` recorded."""

from typing import Any


def cell(value: float | None, form: str = ".1%") -> str:
    return "-" if value is None else format(value, form)


def slabs_table(result: dict[str, Any]) -> str:
    """E1: an allocator a line, live bytes at refusal by regime, the parts of what is lost in deep saturation."""
    rows = result["rows"]
    regimes = {r["regime"]: r["load"] for r in rows}
    cells = {(r["regime"], r["arm"]): r for r in rows}
    deep = [r for r in rows if r["regime"] == "deep"]
    others = [name for name in regimes if name != "deep"]
    source = result["trace"] or "a generator like Azure's conversations"
    tags = ", ".join(dict.fromkeys(r["tag"] for r in rows))
    lines = [
        f"Shares of a pool of {result['pool_gib']} GiB at steps in which a request was refused, {tags}, mean of "
        f"{result['seeds']} seeds of {result['seconds']:.0f} s, lengths from {source} (`python -m bench.slabs`). Load: "
        + ", ".join(f"{name} {load:g}" for name, load in regimes.items())
        + ".",
        "",
        "| allocator | deep: live | tokens | tail | partial | steps refused | tok/s | moved | "
        + " | ".join(f"{name}: live | tok/s" for name in others)
        + " |",
        "|---|" + "---:|" * (7 + 2 * len(others)),
    ]
    for r in sorted(deep, key=lambda r: (r["kind"] == "own blocks", -(r["live"] or 2))):
        moved = f"{r['moved_gib']:.1f} GiB" if r["moved_gib"] else "-"
        own = [r["arm"], *(cell(r[k]) for k in ("live", "tokens", "tail", "partial", "refused_steps"))]
        own += [f"{r['tokens_s']:,.0f}", moved]
        for name in others:
            x = cells.get((name, r["arm"]))
            own += [cell(x and x["live"]), "-" if x is None else f"{x['tokens_s']:,.0f}"]
        lines.append("| " + " | ".join(own) + " |")
    lines += ["", *map(comparison, result["comparisons"])]
    return "\n".join(lines)


def comparison(said: dict[str, Any]) -> str:
    """One regime in words."""
    parts = []
    for key in ("best_peer", "packed"):
        if said[f"x_{key}"]:
            x, low, high = said[f"x_{key}"]
            parts.append(f"{x:.3f} x {said[key]} (95 % interval {low:.3f} to {high:.3f})")
    return f"- {said['regime']}: compacted slabs hold " + (
        ", and ".join(parts) if parts else "all there is: nothing was refused"
    )


def slab_paths_table(result: dict[str, Any]) -> str:
    """A path a line, against its target."""
    tags = ", ".join(dict.fromkeys(r["tag"] for r in result["rows"]))
    lines = [
        f"Medians, {tags} on {result['cores']} cores of {result['device']} with Python {result['python']}, {result['date']}, "
        f"beside other work: load {result['load'][0]:g} before and {result['load'][2]:g} after "
        "(`python -m bench.slabs --paths`).",
        "",
        "| path | median | target | |",
        "|---|---:|---:|---|",
    ]
    for r in result["rows"]:
        value = "-" if r["value"] is None else f"{r['value']:,.3g} {r['unit']}"
        bound = ">=" if r["unit"] == "x" else "<="
        target = "" if r["target"] is None else f"{bound} {r['target']:g}"
        lines.append(f"| {r['path']} | {value} | {target} | {r['note']} |")
    return "\n".join(lines)
