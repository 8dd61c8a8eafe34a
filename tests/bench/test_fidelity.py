"""The fidelity gate fails when it should, its cells are not those that were fitted, and logs are read as they were written."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import fidelity, fidelity_live, profile_steps
from bench.fidelity_cells import BOTH, FIT, JUDGED, SCALES, alone, config_of, workload_of
from bench.fidelity_gate import FIGURES, GATES, Gate, judge, verdict
from bench.fidelity_live import BESIDE, ONE, SOLO, Live, capacity
from bench.step_workers import points_of, ran
from minserve.step_profile import Profile, read_costs, read_profile
from sched.latency import StepCost
from sched.slowdown import complete
from sched.step_time import Fitted, Point
from tests.tiny import write_llama

GATE = Gate(0.15, 4.0)
COST = StepCost(base_s=0.02, per_decode_s=1e-3, per_prefill_token_s=8e-4)


def summary(factor: float = 1.0, attained: float = 0.9, **own: float) -> dict[str, Any]:
    return dict.fromkeys(FIGURES, 100.0 * factor) | {"slo_attainment": attained} | own


def passed(measured: list[dict[str, Any]], simulated: dict[str, Any]) -> dict[str, bool]:
    return {v.figure: v.passed for v in judge(measured, simulated, GATE)}


def test_what_is_within_the_limit_passes() -> None:
    measured = [summary(f) for f in (0.99, 1.0, 1.01)]
    assert all(passed(measured, summary(1.14)).values())
    assert all(passed(measured, summary(0.86)).values())


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("wrong", [84.0, 116.0])
def test_one_figure_that_is_off_fails(figure: str, wrong: float) -> None:
    found = passed([summary(f) for f in (0.99, 1.0, 1.01)], summary(**{figure: wrong}))
    assert [name for name, ok in found.items() if not ok] == [figure]


def test_a_wide_spread_allows_half_as_much_again_and_no_more() -> None:
    measured = [summary(f) for f in (0.9, 1.0, 1.1)]  # a spread of 20 %
    assert all(passed(measured, summary(1.29)).values())
    assert not any(ok for name, ok in passed(measured, summary(1.31)).items() if name in FIGURES)


def test_attainment_is_judged_in_points_whatever_the_spread() -> None:
    measured = [summary(attained=a) for a in (0.7, 0.9, 0.95)]
    assert passed(measured, summary(attained=0.939))["slo_attainment"]
    assert not passed(measured, summary(attained=0.941))["slo_attainment"]
    assert not passed(measured, summary(attained=0.859))["slo_attainment"]


def test_a_run_without_a_figure_is_no_run() -> None:
    with pytest.raises(ValueError, match="p90_tpot_ms must be a number"):
        judge([summary(), summary(p90_tpot_ms=None)], summary(), GATE)  # type: ignore[arg-type]


def test_the_whole_passes_only_with_every_cell_and_enough_of_them() -> None:
    good = judge([summary()] * 3, summary(1.05), GATE)
    bad = judge([summary()] * 3, summary(1.5), GATE)
    cells = {f"cell {i}": good for i in range(12)}
    assert verdict(cells, GATE, 3) == (True, "PASS: all of 12 cells, 3 repeats each")
    assert verdict(cells | {"cell 3": bad}, GATE, 3) == (False, "FAIL: 11 of 12 cells pass, not cell 3")
    assert verdict(cells, GATE, 2)[1].startswith("no verdict")
    assert verdict(dict(list(cells.items())[:11]), GATE, 3)[1].startswith("no verdict")
    assert GATES["cuda"].limit == 0.10
    assert GATES["cuda"].points == 3.0


def test_no_judged_cell_was_fitted() -> None:
    assert len(JUDGED) >= GATES["cpu"].cells
    assert not {str(c.loads) + str(c.cv) for c in JUDGED} & {str(c.loads) + str(c.cv) for c in FIT}
    assert {c.together for c in JUDGED} == {True, False}
    assert any(sum(c.loads.values()) / len(c.loads) > 1.2 for c in JUDGED if c.together), "a saturated pair"
    rates, costs = dict.fromkeys(BOTH, 20.0), dict.fromkeys(BOTH, COST)
    fit = workload_of(FIT[0], SCALES["cpu"], 5.0, rates, costs, 1000)
    judged = workload_of(JUDGED[0], SCALES["cpu"], 5.0, rates, costs, 1500)
    assert fit.requests != judged.requests
    assert judged.requests == workload_of(JUDGED[0], SCALES["cpu"], 5.0, rates, costs, 1500).requests
    first = judged.requests[0]
    ttft, tpot = alone(COST, first.prompt_tokens, first.output_tokens, 256)
    assert first.ttft_slo_s == pytest.approx(5 * ttft, abs=1e-6)
    assert first.tpot_slo_s == pytest.approx(5 * tpot, abs=1e-6)
    # a prompt of two steps
    assert alone(COST, 300, 1, 256)[0] == pytest.approx(2 * 0.02 + 300 * 8e-4)


class Recorder:
    """In place of workers: what was run as what."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []

    async def run(self, what: str, work: Any, drain_s: float) -> list[Any]:
        self.spans.append((what, work))
        return []


def test_nothing_of_a_judged_cell_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(fidelity_live.asyncio, "sleep", at_once)
    live = Live.__new__(Live)
    live.workers, live._drain_s = Recorder(), 1.0  # type: ignore[assignment]
    for cell in (*FIT, *JUDGED):
        asyncio.run(live.run(cell, cell.name))  # type: ignore[arg-type]
    kinds = {name: what for what, name in live.workers.spans}  # type: ignore[misc]
    assert {kinds[c.name] for c in JUDGED} == {fidelity_live.JUDGED}
    assert {kinds[c.name] for c in FIT if c.together} == {BESIDE}
    assert {kinds[c.name] for c in FIT if not c.together} == {SOLO}
    assert fidelity_live.JUDGED not in (BESIDE, SOLO, ONE), "of which the fit is made"


def test_logs_become_points_and_steps() -> None:
    decode = [(0.02 * (i + 1), 0.02, 1, 2, 0, 50 + 2 * i, 0, 0.02) for i in range(10)]
    log = np.array(
        [*decode, (0.30, 0.05, 1, 2, 40, 110, 1600, 0.05), (0.33, 0.03, 1, 3, 0, 90, 0, 0.03)], float
    )
    points = points_of(log)
    assert [(p.steps, p.decodes, p.prefill_tokens) for p in points] == [
        (8, 16, 0),
        (2, 4, 0),
        (1, 2, 40),
        (1, 3, 0),
    ]
    assert points[0].seconds == pytest.approx(0.16)
    assert points[0].context_tokens == sum(50 + 2 * i for i in range(8))
    steps = ran(log, Fitted(COST, 0.0))
    assert [s.phase for s in steps[-2:]] == ["prefill", "decode"]
    assert steps[-2].alone_s == pytest.approx(Point(0.05, 1, 2, 40, 110, 1600).predicted(COST))


def test_loads_are_parts_of_what_a_simulated_burst_reaches(tmp_path: Path) -> None:
    write_llama(tmp_path / "m", max_position_embeddings=512)
    scale = SCALES["quick"]
    config = config_of(scale, tmp_path / "m", "cpu", None)
    fitted = dict.fromkeys(BOTH, Fitted(COST, 0.0))
    free = capacity(config, scale, Profile(fitted, complete({}), {}))
    halved = capacity(config, scale, Profile(fitted, dict.fromkeys(complete({}), 1.0), {}))
    assert free.together["plain"] == pytest.approx(free.alone["plain"], rel=0.1)
    assert halved.together["plain"] == pytest.approx(free.alone["plain"] / 2, rel=0.1)


@pytest.mark.slow
def test_a_quick_run_reports_every_cell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fidelity.main(["--quick", "--seconds", "1", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert [row["cell"] for row in found["rows"]] == [c.name for c in fidelity.QUICK]
    assert found["verdict"].startswith("no verdict")


@pytest.mark.slow
def test_a_quick_profile_is_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ["--csv", str(tmp_path / "c.csv"), "--json", str(tmp_path / "p.json")]
    assert profile_steps.main(["--quick", *files]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["rows"]) == 6
    assert list(read_costs(files[1])) == ["random/org/1/100"]
    profile = read_profile(files[3])
    assert list(profile.models) == ["random"]
    assert profile.slowdown.keys() == complete({}).keys()
