"""What quantization cost, as JSON and as a table: errors of every matrix and layer, KL and perplexity, step by step."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

ERRORS = ("weight_error", "output_error", "total_error")
MEANING = {
    "weight_error": "|W' - W|^2 / |W|^2 of the rounded matrix against the one that was rounded, folds included",
    "output_error": "the same of their outputs on the same rows: of held-back text where there is some, else of the calibration",
    "total_error": "of the rounded matrix's outputs against the plain model's on its own rows: what was lost before is in it, "
    "and what match makes up for",
    "stream_error": "of the residual stream after the layer, against the plain model's",
}


def figures(job: Any, outcome: Any, before: list[tuple[str, Any]]) -> dict[str, Any]:
    """The report as JSON holds it; `before`: shorter recipes and their outcomes."""
    spent = outcome.spent
    return {
        "model": str(job.model),
        "recipe": str(job.recipe),
        "scheme": str(job.target.rounding.scheme),
        "kv": job.target.kv,
        "calibration_tokens": 0 if job.calib_ST is None else job.calib_ST.numel(),
        "calibration_windows": 0 if job.calib_ST is None else len(job.calib_ST),
        "judged_windows": 0 if job.judged_ST is None else len(job.judged_ST),
        "quality": None if outcome.quality is None else asdict(outcome.quality),
        **mean_errors(outcome.layers),
        "steps": [
            {"recipe": name, "quality": asdict(o.quality), **mean_errors(o.layers)} for name, o in before
        ],
        "meaning": MEANING,
        "layers": outcome.layers,
        "seconds": {name: round(s, 2) for name, s in spent.seconds.items()},
        "wall_seconds": round(spent.wall, 2),
        "legs": spent.legs,
        "peak_extra_bytes": spent.peak_extra_bytes,
    }


def mean_errors(layers: list[dict[str, Any]]) -> dict[str, float | None]:
    """Over all matrices of all layers."""
    rows = [row for layer in layers for row in layer["linears"].values()]
    return {name: mean([r[name] for r in rows]) for name in ERRORS}


def table(report: Mapping[str, Any]) -> str:
    """What a person wants to see of it."""
    lines = [
        "layer   weight error   output error    total error   stream error   (squared, relative; mean over the matrices)"
    ]
    for i, layer in enumerate(report["layers"]):
        lines.append(f"{i:5d}" + cells([*mean_errors([layer]).values(), layer["stream_error"]]))
        lines += [
            f"      {name}: {r['note']}, rounded to nearest"
            for name, r in layer["linears"].items()
            if r["note"]
        ]
    rows = [*report["steps"], report]
    lines += [
        "     " + cells([row[name] for name in ERRORS]) + f"{'all':>15}: {row['recipe']}" for row in rows
    ]
    if report["quality"] is not None:
        plain = report["quality"]["plain_perplexity"]
        lines.append(f"held-back text, {report['quality']['tokens']} tokens: plain perplexity {plain:.4f}")
        lines += [f"  {quality_line(row['quality'])}: {row['recipe']}" for row in rows]
        if any(row["quality"]["perplexity"] < plain for row in rows):
            lines.append(
                "  a perplexity below the plain model's (-) is no gain: text that the model does not know well may become "
                "likelier to a model that is wrong; KL says how far it is from the plain one"
            )
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in report["seconds"].items())
    legs = f" over {report['legs']} legs" if report["legs"] > 1 else ""
    return "\n".join([*lines, f"seconds{legs}: {seconds}"])


def cells(errors: list[float | None]) -> str:
    return "".join(f"{'-':>15}" if c is None else f"{c:15.2e}" for c in errors)


def quality_line(q: Mapping[str, Any]) -> str:
    above = 100 * (q["perplexity"] / q["plain_perplexity"] - 1)
    return (
        f"KL {q['kl']:.5f}, top-1 {100 * q['top1']:.2f} %, perplexity {q['perplexity']:.4f} ({above:+.2f} %)"
    )


def mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
