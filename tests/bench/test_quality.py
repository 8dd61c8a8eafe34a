"""Perplexity, KL and agreement against what transformers and plain sums give."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import quality
from bench.quality import Score, Window, windows
from bench.variants import is_quantized
from quant.__main__ import main as quantize

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


@pytest.mark.parametrize(
    ("count", "width", "stride"), [(2, 8, 7), (8, 8, 4), (9, 8, 4), (57, 16, 5), (40, 10, 1)]
)
def test_every_token_but_the_first_is_scored_once(count: int, width: int, stride: int) -> None:
    ids, seen = list(range(count)), []
    for i, w in enumerate(windows(ids, width, stride)):
        assert len(w.ids) <= width
        assert 0 < w.scored < len(w.ids)
        seen += w.ids[-w.scored :]
        # context is never less than the window leaves room for
        assert i == 0 or len(w.ids) == width
    assert seen == ids[1:]


def test_bad_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="stride must be at least 1 and less than the window of 8, got 8"):
        windows([1, 2, 3], 8, 8)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        windows([1], 8, 4)


def test_scores_are_the_plain_sums() -> None:
    p, q = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7).log_softmax(-1)
    target = torch.tensor([0, 6, 3, 3, 1])
    score = Score()
    score.add(q[:2], p[:2], target[:2])
    score.add(q[2:], p[2:], target[2:])
    found = score.figures()
    nll = -sum(float(q[i, t]) for i, t in enumerate(target)) / 5
    kl = float((p.exp() * (p - q)).sum()) / 5
    assert found["perplexity"] == pytest.approx(2.718281828**nll, rel=1e-5)
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
    assert found["top1"] == sum(int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)) / 5


def test_the_table_of_a_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a happy rabbit named Ruby. Ruby liked plums. " * 4)
    out = tmp_path / "quality.json"
    command = [
        "quality",
        str(DEMO),
        "--text",
        str(text),
        "--window",
        "32",
        "--stride",
        "16",
        "--dtype",
        "fp32",
    ]
    keys = ["--weights", "none", "w4a8-int8", "--kv", "auto", "int4", "--json", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, *keys])
    quality.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    plain, kv4, w4, both = result["rows"]
    assert [(r["weights"], r["kv"]) for r in result["rows"]] == [
        ("none", "fp32"), ("none", "int4"), ("w4a8-int8", "fp32"), ("w4a8-int8", "int4")
    ]  # fmt: skip
    assert plain["kl"] == 0
    assert plain["top1"] == 1
    assert plain["above"] == 0
    assert 0 < kv4["kl"] < both["kl"]
    assert w4["kl"] > 0
    assert all(r["tag"] == "measured" for r in result["rows"])

    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(DEMO)(text.read_text())["input_ids"]
    nll, count = 0.0, 0
    for w in windows(ids, 32, 16):
        with torch.inference_mode():
            logits = model(torch.tensor([w.ids])).logits[0, -w.scored - 1 : -1]
        nll += float(F.cross_entropy(logits, torch.tensor(w.ids[-w.scored :]), reduction="sum"))
        count += w.scored
    assert count == len(ids) - 1 == plain["tokens"]
    assert plain["perplexity"] == pytest.approx(2.718281828 ** (nll / count), rel=1e-4)


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("  \n")
    args = quality.argparse.Namespace(text=tmp_path / "t.txt", models=[DEMO], tokens=10)
    with pytest.raises(ValueError, match="must hold text"):
        quality.read_ids(args)


WRITERS = {
    "bytes": ["w8a8-int8"],
    "floats": ["w8a8-fp8"],
    "packed": ["w4a8-int8"],
    "zeros": ["w4a8-int8", "--weights", "zeros"],
    "fireq": ["w4a8-fp8", "--steps", "grid(e4m3=true)", "--format", "fireq"],
    "qserve": ["w4a8-int8", "--format", "qserve"],
    "qserve-channel": ["w4a8-int8", "--format", "qserve", "--group-size", "channel"],
    "qserve-w8a8": ["w8a8-int8", "--format", "qserve"],
}


def bench(monkeypatch: pytest.MonkeyPatch, *given: str) -> object:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["quality", *given])
    try:
        quality.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_checkpoints_of_every_writer_are_read_as_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FireQ's and QServe's files say nothing in config.json."""
    assert not is_quantized(DEMO)
    for name, given in WRITERS.items():
        recipe = [] if "--steps" in given else ["--method", "rtn"]
        assert (
            quantize([str(DEMO), "--out", str(tmp_path / name), "--quiet", *recipe, "--scheme", *given]) == 0
        )
        assert is_quantized(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a happy rabbit named Ruby. Ruby liked plums. " * 4)
    fixed = ["--text", str(text), "--window", "32", "--stride", "16", "--dtype", "fp32", "--device", "cpu"]
    judged = ("fireq", "qserve")
    folders = [str(tmp_path / name) for name in judged]
    assert bench(monkeypatch, str(DEMO), *folders, *fixed, "--weights", "none", "--kv", "auto") == 0
    plain, *rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert plain["kl"] == 0
    assert [(r["model"], r["weights"]) for r in rows] == [(name, "auto") for name in judged]
    assert all(1e-6 < r["kl"] < 0.2 for r in rows)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--window", "32", "--stride", "32"],
            "--stride must be at least 1 and less than --window 32, got 32",
        ),
        (["--window", "1025"], "--window must be at most 1024, the positions of"),
        (["--tokens", "0"], "--tokens must be at least 2, got 0"),
        (["--json", "/nowhere/at/all.json"], "--json must name a file in a folder that can be written to"),
        (["--text", "BYTES"], "--text must be a UTF-8 text file"),
        (["--text", "EMPTY"], "--text must hold text"),
    ],
)
def test_what_is_wrong_is_one_line_at_the_start(
    given: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "text").write_text("some text " * 40)
    flags = [str(tmp_path / x) if x.isupper() else x for x in given]
    flags += [] if "--text" in given else ["--text", str(tmp_path / "text")]
    assert bench(monkeypatch, str(DEMO), *flags) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert quality.HEAD not in said.out


def test_windows_hold_what_they_say() -> None:
    assert windows([5, 6, 7], 8, 4) == [Window([5, 6, 7], 2)]
