"""E3: instances are the same by seed, arms are summed as the table says, and the public instances are read strictly."""

import json
from pathlib import Path

import pytest

from bench.placement import main, rounded, summed
from bench.placement_cells import ARMS, KNEE, ONE_EACH, OPTIMUM, OURS, instance, misjudged, plain
from sched.placement_estimate import Estimator
from sched.placement_search import solve


def test_instances_stand_at_the_knee_and_repeat() -> None:
    p = instance(3, 5, 2)
    assert p == instance(3, 5, 2)
    joint = Estimator(p)(solve(p, budget=600).plan).joint
    assert KNEE - 0.01 <= joint < 1
    wrong = misjudged(p, 1)
    parts = [a.rate / b.rate for a, b in zip(p.models, wrong.models, strict=True)]
    assert 1 / max(parts) >= 0.7
    assert 1 / min(parts) <= 1.3
    assert len(set(parts)) == len(parts)
    for m, q in zip(p.models, plain(p).models, strict=True):
        assert q.weight_bytes >= m.weight_bytes
        assert (q.tpot_s, q.rate) == (m.tpot_s, m.rate)


def test_arms_are_parts_of_the_optimum() -> None:
    rows = {n: {"value": 0.5, "worst": 0.4, "seconds": 1.0} for n in ARMS}
    rows[OPTIMUM] = {"value": 1.0, "worst": 0.9, "seconds": 2.0}
    rows[OURS] = rows[OURS] | {"sim_value": 0.9, "sim_joint": 0.95, "sim_worst": 0.8}
    cell = {"arms": rows, "best_simulated": 0.9}
    found = {r["arm"]: r for r in summed([cell, cell])}
    assert found[ONE_EACH]["of_optimum"] == [0.5, 0.5, 0.5]
    assert found[ONE_EACH]["near"] == 0
    assert found[OPTIMUM]["near"] == 1
    assert found[OURS]["sim_of_optimum"][0] == 1.0
    assert "sim_worst" not in found[ONE_EACH]
    mean, low, high = rounded([0.0, 1.0] * 50)
    assert low < mean == 0.5 < high


def test_kvpr_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [{"weights_gb": 10 + i, "rate": 1 + i % 4, "slo": 5 + i % 3} for i in range(6)]
    (tmp_path / "k.json").write_text(
        json.dumps({"cases": [{"gpus": 3, "gpu_memory_gb": 80, "models": models}]})
    )
    assert main(["--kvpr", str(tmp_path / "k.json")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    means = {r["arm"]: r["mean"] for r in said["rows"]}
    assert 1 <= means["ours"] <= min(means.values())
    (tmp_path / "bad.json").write_text('{"cases": [{"gpus": 3}]}')
    assert main(["--kvpr", str(tmp_path / "bad.json")]) == 2
    assert "must hold JSON with cases" in capsys.readouterr().err
