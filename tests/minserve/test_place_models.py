"""`python -m minserve.place CONFIG`: a plan that simulate runs, what does not fit and why, and mistakes in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from minserve import place_output, simulate
from minserve.config import load_config
from minserve.place import main
from minserve.place_output import max_num_seqs
from minserve.place_problem import MEMORY, Options, plan_of, problem_of
from minserve.step_profile import Profile
from sched.latency import StepCost
from sched.placement import Replica, check
from sched.slowdown import PHASES
from sched.step_time import Fitted
from tests.minserve.test_place import LLAMA_8B

HEAD = "model,qformat,tp,mps_percentage,batch_size,input_len,output_len,seq_len,prefill_time,decode_time,ttft,tpot,e2e"
SLO = {"ttft_ms": 800, "tpot_ms": 60}
FAST = ("--simulate", "4", "--budget", "150")


def config(folder: Path, models: list[dict[str, Any]], gpus: int = 2, **gpu: Any) -> str:
    """A file with models of 8B (no weights are there), one node."""
    (folder / "llama").mkdir(exist_ok=True)
    (folder / "llama" / "config.json").write_text(json.dumps(LLAMA_8B))
    entries = [{"path": "llama", "slo": SLO, "max_num_seqs": 64} | m for m in models]
    nodes = [{"name": "n", "gpus": [{"device": "cuda:0", "kind": "h100"} | gpu for _ in range(gpus)]}]
    (folder / "config.yaml").write_text(json.dumps({"nodes": nodes, "models": entries}))
    return str(folder / "config.yaml")


def placed(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> tuple[str, dict[str, Any]]:
    """The text for people, and the object of the last line."""
    assert main([*args]) == status
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main([*args]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    return said.err


def test_a_placement_is_written_that_simulate_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, [
        {"name": "a", "rate": 4.0}, {"name": "b", "rate": 2.0, "quantization": "w8a8", "kv_dtype": "int8"},
        {"name": "c", "rate": 1.0, "quantization": "w4a8-int8"},
    ])  # fmt: skip
    out = str(tmp_path / "elsewhere.yaml")
    text, said = placed(capsys, file, "--out", out, "--seed", "3", *FAST)
    assert placed(capsys, file, "--out", out, "--seed", "3", *FAST) == (text, said)
    assert [m["name"] for m in said["models"]] == ["a", "b", "c"]
    assert said["out"] == out
    assert said["does_not_fit"] == []
    assert min(m["attained"] for m in said["models"]) >= 0.9
    assert said["simulated"]["joint"] > 0.9
    got = load_config(out)
    got.check_here()  # as it is served
    problem = problem_of(got, Options(kind="h100"))
    check(problem, plan_of(got, problem))
    for entry, m in zip(got.models, said["models"], strict=True):
        assert list(entry.placement) == [g for r in m["replicas"] for g in r["gpus"]]
        assert entry.max_num_seqs <= 64
        assert entry.path == str(tmp_path / "llama")
    for gpu in got.gpus:
        assert gpu.pool_bytes is None or 0 < gpu.pool_bytes < MEMORY["h100"]
    requests = [
        {"rid": i, "model": "abc"[i % 3], "arrival_s": 0.2 * i, "prompt_tokens": 50, "output_tokens": 9}
        for i in range(9)
    ]
    workload = tmp_path / "w.jsonl"
    write_workload(workload, requests)
    assert simulate.main([out, str(workload), "--gpu", "h100"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["completed"] == 9


def write_workload(path: Path, requests: list[dict[str, Any]]) -> None:
    from sched.workload import Request, Workload, ordered, to_lines

    load = Workload(ordered(Request(**r) for r in requests), duration_s=2.0)
    path.write_text("".join(line + "\n" for line in to_lines(load)))


def test_two_ranks_where_one_does_not_hold_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, [{"name": "a", "rate": 1.0, "reserve_tokens": 1024}], memory_bytes="20 GB")
    out = str(tmp_path / "placed.yaml")
    _, said = placed(capsys, file, "--out", out, "--gpu", "h100", *FAST)
    (replica,) = said["models"][0]["replicas"]
    assert replica["tp"] == 2
    assert replica["gpus"] == ["gpu0", "gpu1"]
    got = load_config(out)
    assert (got.models[0].tp, got.models[0].placement) == (2, ("gpu0", "gpu1"))
    with pytest.raises(
        ValueError, match=r"models\[0\].tp must be 1 to be served: place and simulate take more, got 2"
    ):
        got.check_here()
    write_workload(tmp_path / "w.jsonl", [
        {"rid": i, "model": "a", "arrival_s": 0.1 * i, "prompt_tokens": 300, "output_tokens": 20} for i in range(8)
    ])  # fmt: skip
    assert simulate.main([out, str(tmp_path / "w.jsonl"), "--gpu", "h100"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["completed"] == 8
    assert list(done["simulated"]["steps"]) == ["a@gpu0+gpu1"]


def test_what_does_not_fit_is_said_and_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [{"name": "a", "rate": 1.0}, {"name": "huge", "rate": 1.0, "reserve_tokens": 0}]
    file = config(tmp_path, models, gpus=1, memory_bytes="30 GB")
    out = tmp_path / "placed.yaml"
    text, said = placed(capsys, file, "--out", str(out), *FAST, status=1)
    assert not out.exists()
    assert "is not written: there is no place for" in text
    (short,) = said["does_not_fit"]
    assert short["reason"].startswith("memory: beside the others")
    assert {"memory", "gpus"} <= {c["what"] for c in short["changes"]}
    assert f"smallest change: {short['changes'][0]['words']}" in text


@pytest.mark.parametrize("pins", [{"replicas": 3}, {"placement": ["gpu0", "gpu1"]}])
def test_fewer_replicas_than_asked_are_said_and_not_written(
    pins: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three on two GPUs, or one where the first GPU is full of a model that is pinned there."""
    models = [{"name": "a", "rate": 1.0} | pins, {"name": "b", "rate": 1.0, "placement": ["gpu0"]}]
    has, wanted = (2, 3) if "replicas" in pins else (1, 2)
    file = config(tmp_path, models, memory_bytes="80 GB" if wanted == 3 else "30 GB")
    out = tmp_path / "placed.yaml"
    text, said = placed(capsys, file, "--out", str(out), "--explain", "0", *FAST, status=1)
    short = [s for s in said["does_not_fit"] if s["replicas"] is not None]
    assert [(s["model"], s["replicas"]) for s in short if s["model"] == "a"] == [("a", [has, wanted])]
    assert f"does not fit: {has} of {wanted} replicas of a have a place" in text
    assert f"a ({has} of {wanted} replicas)" in text
    assert not out.exists()


@pytest.mark.parametrize("case", [(3, 60, 45.0, {"replicas": 2}), (4, 40, 20.0, {})])
def test_what_is_written_is_what_was_judged(
    case: tuple[int, int, float, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of these the best plans that are known mix degrees, which a file cannot say."""
    gpus, memory, rate, more = case
    models = [{"name": "a", "rate": rate} | more, {"name": "b", "rate": 40.0 if more else 10.0}]
    file = config(tmp_path, models, gpus=gpus, memory_bytes=f"{memory} GB")
    for seed in range(3):
        out = str(tmp_path / f"placed{seed}.yaml")
        assert main(
            [file, "--out", out, "--simulate", "0", "--explain", "0", "--budget", "600", "--seed", str(seed)]
        ) in (0, 1)
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        got = load_config(out)
        problem = problem_of(got, Options(kind="h100", free=True))
        told = {
            (m["name"], *r["gpus"], r["tp"], r["sm_share"]) for m in said["models"] for r in m["replicas"]
        }
        assert told == {
            (problem.models[r.model].name, *(problem.gpus[g].name for g in r.gpus), r.tp, r.sm)
            for r in plan_of(got, problem)
        }


def test_a_plan_that_a_file_cannot_say_is_not_written(tmp_path: Path) -> None:
    file = config(tmp_path, [{"name": "a", "rate": 1.0}], gpus=3)
    given = load_config(file)
    problem = problem_of(given, Options(kind="h100"))
    assert problem.alike
    out = tmp_path / "placed.yaml"
    raw = json.loads(Path(file).read_text())
    for plan, read in (
        ((Replica(0, (0,)), Replica(0, (1, 2))), False),
        ((Replica(0, (0,)), Replica(0, (2,))), True),
    ):
        values = place_output.placed(raw, tmp_path, given, problem, plan)
        if read:
            place_output.write(out, values, problem, plan)
            continue
        with pytest.raises(
            ValueError,
            match=r"is not written: it would say gpu0 .* what was judged is gpu0 with .* gpu1\+gpu2",
        ):
            place_output.write(out, values, problem, plan)
        assert {f.name for f in tmp_path.iterdir()} == {"llama", "config.yaml"}
    assert plan_of(load_config(out), problem) == plan


def test_what_is_simulated_follows_the_policy_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = {"rate": 14.0, "slo": {"ttft_ms": 200, "tpot_ms": 40}}
    found = []
    for own in ({}, {"policy": "slack"}, {"policy": "fcfs"}, {"policy_options": {"shed": "hopeless"}}):
        file = config(tmp_path, [{"name": n} | tight | own for n in "ab"], gpus=1)
        _, said = placed(
            capsys, file, "--burst", "4", "--explain", "0", "--simulate", "8", "--budget", "20", status=1
        )
        found.append([m["simulated"] for m in said["models"]])
    unsaid, slack, fcfs, shed = found
    assert unsaid == slack
    assert sum(fcfs) < sum(slack) - 0.1
    assert shed != slack


def test_the_simulator_has_the_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tight = {"rate": 10.0, "slo": {"ttft_ms": 200, "tpot_ms": 40}}
    args = ("--explain", "1", "--simulate", "8", "--budget", "20")
    file = config(tmp_path, [{"name": "a", "policy": "fcfs"} | tight, {"name": "b", "rate": 1.0}], gpus=1)
    text, said = placed(capsys, file, *args, "--burst", "8", "--target", "0.75", status=1)
    short, a = next(s for s in said["does_not_fit"] if s["model"] == "a"), said["models"][0]
    assert (short["simulated"], short["estimated"]) == (a["simulated"], a["attained"])
    assert a["simulated"] < 0.75 < a["attained"]
    assert (
        f"does not fit: a, {a['simulated']:.1%} simulated, {a['attained']:.1%} by the estimate, 75% wanted: "
        in text
    )
    assert short["changes"] == []
    assert "they are judged by the estimate, for which it fits as it is" in text
    placed(capsys, file, *args, "--burst", "8", "--target", "0.75", "--simulate", "0")
    # and the other way round
    file = config(tmp_path, [{"name": "a"} | tight, {"name": "b", "rate": 1.0}], gpus=1)
    text, said = placed(capsys, file, *args, "--burst", "4")
    a = said["models"][0]
    assert a["attained"] < 0.9 < a["simulated"]
    assert said["does_not_fit"] == []
    assert f"a fits, {a['simulated']:.1%} simulated, though the estimate says {a['attained']:.1%}" in text
    placed(capsys, file, *args, "--burst", "4", "--simulate", "0", status=1)


def test_too_many_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, [{"name": "a", "rate": 60.0}], gpus=1)
    text, said = placed(capsys, file, "--simulate", "0", "--budget", "20", "--explain", "0", status=1)
    assert "changes were not looked for" in text
    text, said = placed(capsys, file, "--simulate", "0", "--budget", "20", status=1)
    (short,) = said["does_not_fit"]
    assert "rate" in {c["what"] for c in short["changes"]}
    assert "requests/s in place of 60" in text
    assert said["simulated"] is None


def test_placements_of_the_file_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [{"name": n, "rate": 3.0, "placement": ["gpu1"]} for n in "ab"] + [{"name": "c", "rate": 0.1}]
    _, said = placed(capsys, config(tmp_path, models), *FAST)
    assert [m["replicas"][0]["gpus"] for m in said["models"]][:2] == [["gpu1"], ["gpu1"]]
    assert said["models"][2]["replicas"][0]["gpus"] == ["gpu0"]


def test_replanning_names_what_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        {"name": n, "rate": 0.2, "replicas": 1, "placement": [f"gpu{i // 2}"]} for i, n in enumerate("abcd")
    ]
    file = config(tmp_path, models)
    text, said = placed(capsys, file, "--replan", file, *FAST)
    assert "no replica moves" in text
    assert said["moves"] == []
    (tmp_path / "hot").mkdir()
    hot = config(tmp_path / "hot", [m | {"rate": 25.0 if m["name"] in "ab" else 0.2} for m in models])
    text, said = placed(capsys, hot, "--replan", file, "--simulate", "0", "--budget", "300")
    assert {m["what"] for m in said["moves"]} == {"load", "remove"}
    assert "requests lost on the way" in text
    hosts = {m["name"]: m["replicas"][0]["gpus"] for m in said["models"]}
    assert hosts["a"] != hosts["b"]


@pytest.mark.parametrize("name", ["round-robin", "fineserve", "exhaustive"])
def test_baselines(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, [{"name": n, "rate": 2.0} for n in "abc"])
    _, said = placed(capsys, file, "--baseline", name, "--simulate", "0")
    assert said["by"] == name
    assert all(m["replicas"] for m in said["models"])


def test_costs_of_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"m,q,{tp},100,{b},{n},256,512,{0.008 * -(-b * n // 2048) + b * n * 2e-5 / tp},0,0,{0.008 + b * 1e-4},0" for tp in (1, 2) for b in (1, 8, 32) for n in (256, 512)]  # fmt: skip
    (tmp_path / "costs.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    file = config(tmp_path, [{"name": "a", "rate": 2.0}])
    costs = ("--costs", str(tmp_path / "costs.csv"))
    _, said = placed(capsys, file, *costs, "--use", "a=m/q", "--simulate", "0", "--max-tp", "1")
    assert 8 < said["models"][0]["replicas"][0]["tpot_ms"] < 12
    assert "names no row for tp 1" in refused(capsys, file, *costs, "--use", "a=m/x", "--max-tp", "1")
    assert "--use must be NAME=" in refused(capsys, file, *costs, "--use", "a")
    assert "names ['b']" in refused(capsys, file, *costs, "--use", "b=m/q")


def test_a_share_that_is_not_planned_with_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"m,q,1,50,{b},{n},256,512,{b * n * 3e-5},0,0,{0.008 + b * 1e-4},0" for b in (1, 8, 32) for n in (256, 512)]  # fmt: skip
    (tmp_path / "costs.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    models = [{"name": "a", "rate": 2.0, "sm_share": 50}, {"name": "b", "rate": 2.0}]
    file = config(tmp_path, models, sharing="mps")
    common = (file, "--simulate", "0", "--max-tp", "1")
    text, _ = placed(capsys, *common)
    assert "sm_share of a is not planned with: --costs and --use name no rows of it" in text
    text, said = placed(capsys, *common, "--costs", str(tmp_path / "costs.csv"), "--use", "a=m/q")
    assert "not planned with" not in text
    assert said["models"][0]["replicas"][0]["sm_share"] == 50


def test_what_was_measured_of_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, [{"name": n, "rate": 6.0} for n in "ab"], gpus=1)
    fitted = Fitted(StepCost(base_s=0.02, per_prefill_token_s=2e-5), 0.03)
    means = []
    for slow in (0.1, 1.0):
        slowdown = {(own, other): slow for own in PHASES for other in PHASES}
        Profile(dict.fromkeys("ab", fitted), slowdown, {}).write(tmp_path / "profile.json")
        _, said = placed(
            capsys, file, "--profile", str(tmp_path / "profile.json"), "--simulate", "0", "--target", "0.5"
        )
        means.append(said["models"][0]["replicas"][0]["tpot_ms"])
    assert 20 < means[0] < 25 < 35 < means[1]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, [{"name": "a", "rate": 2.0}])
    for args, said in (
        ((str(tmp_path / "none.yaml"),), "cannot be read"),
        ((file, "--max-tp", "9"), "--max-tp must be a number in [1, 8], got 9"),
        ((file, "--target", "2"), "--target must be a number in [0, 1], got 2"),
        ((file, "--replan", file, "--baseline", "prism"), "--replan goes with the search"),
        ((file, "--memory", "--out", "x"), "--memory plans pools alone, without --out"),
        ((file, "--costs", str(tmp_path / "none.csv")), "cannot be read"),
        ((file, "--replan", str(tmp_path / "none.yaml")), "cannot be read"),
    ):
        assert said in refused(capsys, *args)
    bad = config(tmp_path, [{"name": "a", "tp": 2, "placement": ["gpu0"]}])
    assert "placement must name 2 GPUs for each replica, as tp says, got 1" in refused(capsys, bad)
    bad = config(tmp_path, [{"name": "a", "replicas": 3, "placement": ["gpu0"]}])
    assert "replicas must be the 1 that its placement has, or auto, got 3" in refused(capsys, bad)
    write_workload(
        tmp_path / "w.jsonl",
        [{"rid": 0, "model": "a", "arrival_s": 0.0, "prompt_tokens": 5, "output_tokens": 2}],
    )
    bad = config(tmp_path, [{"name": "a", "tp": 2, "placement": ["gpu0"]}], pool_bytes="8 GiB")
    assert simulate.main([bad, str(tmp_path / "w.jsonl")]) == 2
    assert "must name 2 GPUs" in capsys.readouterr().err


def test_a_batch_limit_is_above_what_is_predicted() -> None:
    assert max_num_seqs(256, []) == 256
    assert max_num_seqs(4, []) == 4
