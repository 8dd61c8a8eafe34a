"""`python -m minserve.simulate`: a configuration and a workload in, statistics out; the same each time."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from minserve import simulate
from minserve.config import load_config
from minserve.place import plan_memory
from sched.metrics import Slo
from sched.step_time import coefficients
from sched.workload import Request, Workload, ordered, to_lines
from tests.tiny import write_llama

HEAD = "model,qformat,tp,mps_percentage,batch_size,input_len,output_len,seq_len,prefill_time,decode_time,ttft,tpot,e2e"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that share a pool in which not all of their requests have room."""
    folder = tmp_path_factory.mktemp("simulate")
    for name, layers in (("deep", 4), ("flat", 2)):
        write_llama(folder / name, num_hidden_layers=layers)
    models = [{"name": name, "path": name, "max_model_len": 256, "rate": 5.0} for name in ("deep", "flat")]
    gpus = [{"device": "cpu", "pool_bytes": "8 MiB"}]
    path = folder / "config.yaml"
    path.write_text(json.dumps({"nodes": [{"name": "local", "gpus": gpus}], "models": models}))
    return path


def workload(n: int = 300, gap_s: float = 0.004, **slos: Slo) -> Workload:
    requests = [
        Request(rid, ("deep", "flat")[rid % 3 == 0], rid * gap_s, 20 + 7 * rid % 100, 1 + 11 * rid % 130)
        for rid in range(n)
    ]
    return Workload(ordered(requests), duration_s=n * gap_s, slos=slos)


def write(path: Path, w: Workload) -> str:
    path.write_text("".join(line + "\n" for line in to_lines(w)))
    return str(path)


def last_json(text: str) -> dict[str, Any]:
    found = json.loads(text.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_a_run_ends_every_request_and_is_the_same_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Slo(ttft_s=3600.0, tpot_s=3600.0)
    file = write(tmp_path / "w.jsonl", workload(deep=slow, flat=slow))
    said = []
    for _ in range(2):
        assert simulate.main([str(config), file]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    found = last_json(said[0])
    assert found["completed"] == 300
    assert found["slo_attainment"] == 1.0
    assert found["simulated"]["tokens"] >= sum(r.output_tokens for r in workload().requests)
    assert "deep" in said[0].splitlines()[0]


def test_memory_that_is_short_moves_between_the_models(config: Path) -> None:
    """Quotas, compaction and preemption are at work in it, as in a server."""
    settled = load_config(str(config))
    pools = plan_memory(settled)
    costs = {name: simulate.cost_of(m, "h100") for p in pools for m in p.models for name in [m.entry.name]}
    simulation, records, summary = simulate.simulate(settled, workload(900, 0.001), costs, pools)
    assert simulation.num_open == 0
    assert all(r.completed for r in records)
    done = summary["simulated"]
    assert sum(done["preemptions"].values()) + sum(done["sets_emptied"].values()) > 0
    for name, sets in done["sets_emptied"].items():
        assert (done["blocks_moved"][name] > 0) == (sets > 0)
    # the same pool with all the time in the world: nobody waits
    _, _, calm = simulate.simulate(settled, workload(60, 1.0), costs, pools)
    assert calm["p99_ttft_ms"] < summary["p99_ttft_ms"] / 5
    assert sum(calm["simulated"]["preemptions"].values()) == 0


def test_prompts_that_begin_alike_find_their_prefix(config: Path) -> None:
    asked = [Request(0, "deep", 0.5 * i, 100, 10, prefix=0, prefix_tokens=64, priority=i) for i in range(5)]
    shared = Workload(ordered(asked), duration_s=3.0)
    found = []
    for caching in (True, False):
        settled = load_config(str(config))
        models = tuple(dataclasses.replace(m, enable_prefix_caching=caching) for m in settled.models)
        settled = dataclasses.replace(settled, models=models)
        pools = plan_memory(settled)
        costs = {m.entry.name: simulate.cost_of(m, "h100") for p in pools for m in p.models}
        block = pools[0].models[0].layout.block_tokens
        simulation, _, summary = simulate.simulate(settled, shared, costs, pools)
        found.append(summary["cached_tokens"])
        assert [r.arrival.priority for r in simulation.records.values()] == [0, 1, 2, 3, 4]
    assert found == [4 * (64 // block * block), 0]


def test_a_day_without_a_request_takes_no_time(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    days = [Request(i, "deep", 86400.0 * i, 20, 10) for i in range(3)]
    file = write(tmp_path / "w.jsonl", Workload(ordered(days), duration_s=3 * 86400.0))
    assert simulate.main([str(config), file]) == 0
    found = last_json(capsys.readouterr().out)
    assert found["completed"] == 3
    assert found["simulated"]["seconds"] > 2 * 86400
    assert found["simulated"]["events"] < 100


def test_a_trace_holds_every_step(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace = write(tmp_path / "w.jsonl", workload(30)), tmp_path / "trace.json"
    assert simulate.main([str(config), file, "--trace", str(trace)]) == 0
    steps = last_json(capsys.readouterr().out)["simulated"]["steps"]
    events = json.loads(trace.read_text())["traceEvents"]
    assert len(events) == sum(steps.values())
    assert {e["tid"].split("@")[0] for e in events} == {"deep", "flat"}
    by_row: dict[str, list[dict[str, Any]]] = {}
    for e in events:
        by_row.setdefault(e["tid"], []).append(e)
    for row in by_row.values():
        for a, b in itertools.pairwise(row):
            assert b["ts"] >= a["ts"] + a["dur"] - 1e-3, "two steps of a replica at once"


def profile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "costs.csv"
    path.write_text(text)
    return str(path)


def row(batch: int, prompt: int, prefill_s: float, tpot_s: float) -> str:
    return f"llama,org,1,100,{batch},{prompt},256,{prompt + 256},{prefill_s},1,1,{tpot_s},1"


def test_a_profile_replaces_the_roofline(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [HEAD] + [row(b, n, 0.01 + 2e-5 * b * n, 0.01 + 1e-4 * b) for b in (1, 2, 4) for n in (256, 512)]
    costs = profile(tmp_path, "\n".join(lines) + "\n")
    cost, error = simulate.read_costs(costs)["llama/org/1/100"]
    assert error < 0.01
    assert coefficients(cost)[:3] == pytest.approx((0.01, 1e-4, 2e-5), rel=0.05)
    file = write(tmp_path / "w.jsonl", workload(10, 1.0))
    assert simulate.main([str(config), file, "--costs", costs, "--use", "deep=llama/org/1/100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("deep: profile llama/org/1/100, off by 0.")
    assert last_json(out)["models"]["deep"]["median_tpot_ms"] == pytest.approx(10.1, rel=0.05)
    assert last_json(out)["models"]["flat"]["median_tpot_ms"] < 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--use", "deep"], "NAME=model"),
        (["--use", "other=llama/org/1/100"], "['deep', 'flat']"),
        (["--use", "deep=llama/org/1/50"], "is not in the profile"),
        (["--costs", "/nowhere.csv"], "cannot be read"),
        (["--trace", "/nowhere/t.json"], "--trace must be a file that can be written, got '/nowhere/t.json': No such"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    file = write(tmp_path / "w.jsonl", workload(3))
    assert simulate.main([str(config), file, *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [("a,b\n1,2\n", "lacks the columns"), (HEAD + "\n" + "x," * 12 + "x\n", "row 1: tp must be an integer")],
)
def test_a_profile_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate.read_costs(profile(tmp_path, text))


def test_a_model_that_nobody_serves_is_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "w.jsonl", Workload(ordered([Request(0, "third", 0.0, 5, 5)]), 1.0))
    assert simulate.main([str(config), file]) == 2
    assert "asks for ['third']" in capsys.readouterr().err


def test_a_group_is_routed_by_its_tiers(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = json.loads(config.read_text())
    for tier, m in enumerate(given["models"]):
        m |= {"path": str(config.parent / m["path"]), "group": "any", "tier": tier}
    chosen = {}
    for policy in ("best", "cheapest", "slo"):
        path = tmp_path / f"{policy}.yaml"
        path.write_text(json.dumps(given | {"groups": [{"name": "any", "policy": policy}]}))
        requests = [dataclasses.replace(r, model="any") for r in workload(100, gap_s=0.001).requests]
        slos = {"any": Slo(ttft_s=0.05, tpot_s=0.05)}
        file = write(tmp_path / "w.jsonl", Workload(ordered(requests), duration_s=0.1, slos=slos))
        assert simulate.main([str(path), file, "--gpu", "a100"]) == 0
        found = last_json(capsys.readouterr().out)
        assert found["completed"] == 100
        assert list(found["models"]) == ["any"]
        chosen[policy] = found["simulated"]["chosen"]["any"]
    assert chosen["best"] == {"deep": 100}
    assert chosen["cheapest"] == {"flat": 100}
    assert set(chosen["slo"]) <= {"deep", "flat"}
    assert sum(chosen["slo"].values()) == 100
