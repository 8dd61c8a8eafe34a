"""Plots of results, where matplotlib is there (`pip install minserve[bench]`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]
TARGET = 0.9


def save(path: Path, draw: Callable[[Any], Any]) -> str:
    """Keeps the figure that `draw` makes of pyplot and says where; or says why there is none."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no plot: matplotlib is not installed"
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = draw(plt)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"plot: {path}"


def draw_scheduling(result: Result, path: Path) -> str:
    """A colour for what each arm reaches of the cell's best goodput."""
    rates = {(r["arm"], r["cell"]): r["mean"] for r in result["rows"]}
    arms, cells = (list(dict.fromkeys(key[i] for key in rates)) for i in (0, 1))
    grid = np.array([[rates[a, c] for c in cells] for a in arms])
    part = grid / np.maximum(grid.max(0), 1e-9)

    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots(
            figsize=(2 + 0.7 * len(cells), 1.5 + 0.3 * len(arms)), layout="constrained"
        )
        shown = axis.imshow(part, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set_yticks(range(len(arms)), arms)
        axis.set_xticks(range(len(cells)), cells, rotation=60, ha="right")
        for i, j in np.ndindex(*grid.shape):
            color = "white" if part[i, j] < 0.6 else "black"
            axis.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
        axis.set_title("goodput, requests/s; colour: part of the cell's best")
        figure.colorbar(shown)
        return figure

    return save(path, draw)


def draw_headline(result: Result, path: Path) -> str:
    """Attainment over the rate, a panel for each load and SLO; points fixed in advance are larger."""
    panels: dict[tuple[str, bool], list[Result]] = {}
    for row in result["rows"]:
        if row["running"] == result["rows"][0]["running"]:
            panels.setdefault((row["load"], row["joint"]), []).append(row)

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), sharey=True, squeeze=False,
                                    layout="constrained")  # fmt: skip
        for axis, ((load, joint), rows) in zip(axes[0], panels.items(), strict=True):
            rows = sorted(rows, key=lambda r: r["scale"])
            scales = [r["scale"] for r in rows]
            for name in rows[0]["arms"]:
                shares = [r["arms"][name]["attained"] for r in rows]
                (line,) = axis.plot(scales, shares, label=name)
                sizes = [40 if "over" in r else 10 for r in rows]
                axis.scatter(scales, shares, s=sizes, color=line.get_color())
            axis.plot(scales, [r["most_attained"] for r in rows], "k:", label="time for")
            axis.axhline(TARGET, color="grey", linewidth=0.5)
            axis.set(
                title=f"{load}, {'TTFT and TPOT' if joint else 'TTFT'}",
                xscale="log",
                xlabel="rate scale",
                ylim=(0, 1.02),
            )
        axes[0][0].set_ylabel("share of requests that attain")
        axes[0][-1].legend()
        return figure

    return save(path, draw)


def draw_placement(rows: list[Result], path: Path) -> str:
    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
        ordered = sorted(rows, key=lambda r: r["of_optimum"][0])
        for offset, key, color in ((-0.2, "of_optimum", "#2a7"), (0.2, "sim_of_optimum", "#47b")):
            there = [(i, r) for i, r in enumerate(ordered) if key in r]
            axis.barh([i + offset for i, _ in there], [r[key][0] for _, r in there], 0.4, color=color,
                      label="by the estimate" if key == "of_optimum" else "simulated")  # fmt: skip
        axis.set_yticks(range(len(ordered)), [r["arm"] for r in ordered])
        axis.set(xlim=(0, 1.05), xlabel="of the best placement")
        axis.legend(loc="lower right")
        return figure

    return save(path, draw)
