"""Perplexity, KL and agreement against what transformers and plain sums give."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import quality
from bench.quality import Score, Window, windows

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


def test_windows_hold_what_they_say() -> None:
    assert windows([5, 6, 7], 8, 4) == [Window([5, 6, 7], 2)]
