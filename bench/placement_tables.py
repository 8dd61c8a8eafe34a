"""The tables of placement in docs/scheduling.md, from what `python -m bench.placement` recorded."""

from typing import Any


def tags(rows: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(r["tag"] for r in rows))


def placement_table(result: dict[str, Any]) -> str:
    """E3: an arm a line, as parts of the best placement."""
    rows = result["rows"]
    large, rates = result["large"], result["rates_30_percent_wrong"]
    lines = [
        f"{result['instances']} instances ({', '.join(result['by_size'])} models x GPUs), {tags(rows)} (`python -m bench.placement`). "
        f"Parts of the value of the best placement with one replica a model (the estimate, all instances) and of the best "
        f"known (the simulator, requests that no arm has seen, {rows[0]['simulated']} instances); 95 % bootstrap intervals.",
        "",
        "| arm | estimate: mean | worst | >= 95 % | worst model | simulated: mean | worst | >= 95 % | worst model | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: -r["sim_of_optimum"][0]):
        cells = []
        for pre in ("", "sim_"):
            mean, low, high = r[f"{pre}of_optimum"]
            cells += [
                f"{mean:.3f} ({low:.3f} to {high:.3f})", f"{r[f'{pre}worst']:.3f}", f"{r[f'{pre}near']:.0%}",
                f"{r[f'{pre}worst_model']:.1%}",
            ]  # fmt: skip
        lines.append(f"| {r['arm']} | {' | '.join(cells)} | {r['seconds']:.3f} |")
    lines += [
        "",
        f"{large['models']} models on {large['gpus']} GPUs, {large['budget']:,} plans looked at in {large['seconds']:.1f} s on one "
        "core, by the estimate (requests that attain, worst model): "
        + "; ".join(f"{name} {v['joint']:.1%}, {v['worst']:.1%}" for name, v in large["values"].items())
        + ".",
        "",
        "Planned with rates up to 30 % wrong, part of the best placement that knows them, by the estimate: "
        + "; ".join(f"{name} {v[0]:.3f}" for name, v in sorted(rates.items(), key=lambda pair: -pair[1][0]))
        + ".",
        "",
        *(f"{what}: {'met' if met else 'MISSED'}" for what, met in result["targets"].items()),
    ]
    return "\n".join(lines)


def kvpr_table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    lines = [
        f"The {result['instances']} public instances of Prism's placement problem, {tags(rows)} (`python -m bench.placement --kvpr "
        "PATH`): the largest KV pressure ratio over the lower bound, all of rate / SLO over all memory that weights leave.",
        "",
        "| rule | mean | worst | s in all |",
        "|---|---:|---:|---:|",
    ]
    return "\n".join(
        [*lines, *(f"| {r['arm']} | {r['mean']:.3f} | {r['worst']:.3f} | {r['seconds']:.2f} |" for r in rows)]
    )
