"""Runs of `python -m quant`: what is reported, what a run that ended early leaves, and what stands in its way."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.__main__ import main
from quant.ptq import command
from quant.ptq.spent import Spent
from quant.ptq.state import Work, key_of, locked
from quant.ptq.tensor_file import save_tensors, write_bytes
from quant.ptq.write import write_json
from tests.quant.ptq.ground import SMALL

Capture = pytest.CaptureFixture[str]


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "quantization_report.json").read_text())


def test_report_has_every_step(
    plain: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    steps = "rotate; clip; gptq(actorder=true)"
    given = ["--scheme", "w4a8-int8", "--steps", steps, "--steps-report", "--calib", str(text)]
    assert main([str(plain), "--out", str(out), *given, *SMALL]) == 0
    report = report_of(out)
    assert [s["recipe"] for s in report["steps"]] == ["rtn", "rotate", "rotate; clip"]
    assert report["recipe"] == steps
    assert report["quality"]["kl"] < report["steps"][0]["quality"]["kl"]
    assert report["quality"]["tokens"] == 2 * 24
    rows = [row for layer in report["layers"] for row in layer["linears"].values()]
    assert len(rows) == 14
    for name in ("weight_error", "output_error", "total_error"):
        assert name in report["meaning"]
        assert all(0 < row[name] < 0.1 for row in rows)
        assert report[name] == pytest.approx(sum(row[name] for row in rows) / len(rows))
        assert all(0 < step[name] < 0.1 for step in report["steps"])
    # what a matrix loses is less than what it loses with all that was lost before it
    assert report["output_error"] < report["total_error"]
    assert report["output_error"] < report["steps"][0]["output_error"]
    said = capsys.readouterr().out
    kl = [line for line in said.splitlines() if line.startswith("  KL ")]
    assert [line.partition("%): ")[2] for line in kl] == ["rtn", "rotate", "rotate; clip", steps]
    below = any(
        s["quality"]["perplexity"] < s["quality"]["plain_perplexity"] for s in [*report["steps"], report]
    )
    assert ("is no gain" in said) == below
    assert f"python -m minserve.serve --model {out}" in said
    assert "perplexity" in said
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (tmp_path / "out.work").exists()


def test_token_ids_instead_of_text(plain: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (9, 30))
    np.save(tmp_path / "ids.npy", ids)
    given = ["--scheme", "w8a8-int8", "--method", "gptq", "--calib-tokens", str(tmp_path / "ids.npy")]
    assert main([str(plain), "--out", str(tmp_path / "out"), *given, *SMALL]) == 0
    report = report_of(tmp_path / "out")
    assert report["calibration_tokens"] == 6 * 24


def test_a_killed_run_goes_on_to_the_same_bytes(
    plain: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = [
        str(plain),
        "--scheme",
        "w4a8-int8",
        "--steps",
        "smooth; match; clip; gptq",
        "--calib",
        str(text),
        *SMALL,
    ]
    command = [sys.executable, "-m", "quant", *given, "--out", str(broken)]
    # as many threads as here: sums are added in an order that depends on it
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for _ in range(5):
        run = subprocess.Popen(command, env=environment)
        while not list(tmp_path.glob("broken.work/*/streams.safetensors")):
            assert run.poll() is None, "it ended without a sign"
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.wait()
        if not broken.exists():
            break
        # a busy machine let it end first
        shutil.rmtree(broken)
    assert main([*given, "--out", str(broken)]) == 0
    assert "going on after layer 0" in capsys.readouterr().out
    assert main([*given, "--out", str(whole)]) == 0
    files = [p.name for p in whole.iterdir() if p.name != "quantization_report.json"]
    assert files
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in files)


def test_other_inputs_start_anew(plain: Path, text: Path, tmp_path: Path) -> None:
    """Half a run with other options must not be taken up."""
    keys = {key_of(a=1, b=torch.ones(2)), key_of(a=1, b=torch.zeros(2)), key_of(a=2, b=torch.ones(2))}
    assert len(keys) == 3
    work = Work(tmp_path / "w", "one")
    work.finish_layer(0, {"x": torch.ones(1)}, {"f": 1}, {"calib": [torch.ones(2), torch.zeros(2)]})
    again = Work(tmp_path / "w", "one")
    assert again.next_layer == 1
    assert [x.tolist() for x in again.streams["calib"]] == [[1, 1], [0, 0]]
    assert again.figures(0) == {"f": 1}
    assert Work(tmp_path / "w", "two").next_layer == 0


def test_every_method_has_output_errors(plain: Path, text: Path, tmp_path: Path) -> None:
    """Also those that look at no inputs; and without held-back text those of the calibration, where there is one."""
    for method, judged, known in (("rtn", "2", True), ("gptq", "0", True), ("rtn", "0", False)):
        out = tmp_path / f"{method}{judged}"
        given = [
            "--scheme",
            "w4a8-int8",
            "--method",
            method,
            "--calib",
            str(text),
            *SMALL,
            "--judged",
            judged,
        ]
        assert main([str(plain), "--out", str(out), *given]) == 0
        report = report_of(out)
        assert (report["output_error"] is not None) == known
        assert (report["total_error"] is not None) == (judged == "2")


def stop_at(monkeypatch: pytest.MonkeyPatch, layer: int, after: bool) -> None:
    """Ctrl-C, before or after this layer is on disk."""
    finish = Work.finish_layer

    def stopping(self: Work, i: int, *args: Any) -> None:
        if after or i != layer:
            finish(self, i, *args)
        if i == layer:
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, "finish_layer", stopping)


def test_an_interrupted_run_says_how_to_go_on_and_counts_both_legs(
    plain: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    given = [
        str(plain),
        "--scheme",
        "w4a8-int8",
        "--method",
        "gptq",
        "--calib",
        str(text),
        "--out",
        str(out),
        *SMALL,
    ]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 0, after=False)
        assert main(given) == 130
        assert "no layer was finished, and nothing is left" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 0, after=True)
        assert main(given) == 130
    said = capsys.readouterr().err
    assert f"interrupted; 1 of 2 layers are kept in {out}.work: the same command goes on" in said
    state = next(tmp_path.glob("out.work/*/streams.safetensors"))
    spent = Work(state.parent.parent, state.parent.name).spent
    assert spent is not None
    assert spent["legs"] == 1
    assert main(given) == 0
    report = report_of(out)
    assert report["legs"] == 2
    assert report["seconds"]["round"] > spent["seconds"]["round"]
    assert report["wall_seconds"] > spent["wall"]
    assert report["peak_extra_bytes"] >= spent["peak"] > 0
    assert "seconds over 2 legs: " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_memory_is_that_of_the_run_alone() -> None:
    """Neither what the process held before nor what is free again at the end is overlooked or counted."""
    before = torch.ones(50 << 20)
    del before
    spent = Spent(memory=True)
    during = torch.ones(16 << 20)
    del during
    assert spent.peak_extra_bytes is not None
    assert 60e6 < spent.peak_extra_bytes < 120e6
    spent.add_before({"seconds": {"round": 1.0}, "legs": 2, "wall": 9.0, "peak": 1 << 33})
    assert spent.peak_extra_bytes == 1 << 33
    assert (spent.legs, spent.seconds) == (3, {"round": 1.0})


def test_what_is_not_ours_stays(plain: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    """A folder OUT.part of the user's, and what other runs left in OUT.work."""
    out = tmp_path / "out"
    other = tmp_path / "out.work" / ("0123456789abcdef" * 2)[:24]
    for folder in (tmp_path / "out.part", other):
        folder.mkdir(parents=True)
        (folder / "precious").write_text("")
    assert main([str(plain), "--scheme", "w8a8-int8", "--method", "rtn", "--out", str(out), "--quiet"]) == 0
    assert (tmp_path / "out.part" / "precious").exists()
    assert (other / "precious").exists()
    assert (
        f"holds 1 unfinished of other options, models or texts: delete what you will not go on with ({other.name})"
        in capsys.readouterr().err
    )
    assert sorted(p.name for p in (tmp_path / "out.work").iterdir()) == [other.name]


def test_two_runs_do_not_work_in_one_folder(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    given = [
        str(plain),
        "--scheme",
        "w8a8-int8",
        "--method",
        "rtn",
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    with locked(tmp_path / "out.work"):
        assert main(given) == 2
        assert f"another run works in {tmp_path / 'out.work'}" in capsys.readouterr().err
    assert main(given) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name, write in (
        ("a", lambda path: write_bytes(path, b"x" * 99)),
        ("b", lambda path: save_tensors(path, {"x": torch.ones(9)}, {})),
    ):
        (tmp_path / f"{name}.part").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as failed:
            write(tmp_path / name)
        assert failed.value.filename == str(tmp_path / name)

    def full(args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/model.safetensors")

    monkeypatch.setattr(command, "run", full)
    assert main(["m", "--scheme", "w8a8-int8", "--out", "o"]) == 2
    assert capsys.readouterr().err == "python -m quant: /there/model.safetensors: No space left on device\n"


def test_inputs_that_tell_nothing_are_named_and_their_matrix_is_rounded(
    plain: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Values of 0 leave the output projection without inputs."""
    model = shutil.copytree(plain, tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    stored["model.layers.1.self_attn.v_proj.weight"].zero_()
    stored["model.layers.1.self_attn.v_proj.bias"].zero_()
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    given = ["--scheme", "w4a8-int8", "--steps", "match; clip; refine", "--calib", str(text), *SMALL]
    assert main([str(model), "--out", str(tmp_path / "out"), *given]) == 0
    assert "self_attn.o_proj: the inputs are all 0, rounded to nearest" in capsys.readouterr().out
    row = report_of(tmp_path / "out")["layers"][1]["linears"]["self_attn.o_proj"]
    assert row["note"] == "the inputs are all 0"
    assert row["weight_error"] < 0.02


def test_a_report_is_json_whatever_became_of_the_numbers(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": (1,)}, indent=1)
    assert json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5],
        "b": {"c": None},
        "d": [1],
    }


def test_few_windows_are_told(plain: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    given = [
        "--scheme",
        "w8a8-int8",
        "--method",
        "gptq",
        "--calib",
        str(text),
        "--samples",
        "999",
        "--length",
        "100",
    ]
    assert main([str(plain), "--out", str(tmp_path / "out"), *given, "--judged", "99", "--quiet"]) == 0
    said, report = capsys.readouterr(), report_of(tmp_path / "out")
    windows, held = report["calibration_windows"], report["judged_windows"]
    assert f"{windows} windows of 100 tokens ({100 * windows}) to calibrate on, {held} held back" in said.out
    assert f"the text has {windows} windows to calibrate on, of 999 asked for" in said.err
    assert (
        f"{held} windows are held back, of 99 asked for (--judged): fewer are a rougher judgement" in said.err
    )
