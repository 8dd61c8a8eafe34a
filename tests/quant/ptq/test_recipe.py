"""Recipes are spelled, read back and ordered; calibration text is cut into windows; the judge's sums are right."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quant.ptq.calibration import from_array, from_text, split
from quant.ptq.model import PLAIN
from quant.ptq.recipe import BEST, FOLDS, RECIPES, STEPS, parse, recipe
from quant.ptq.report import Judge
from tests.quant.ptq.ground import random_model, token_ids
from tests.tiny import write_tokenizer


@pytest.mark.parametrize("text", [*RECIPES.values(), *BEST.values()])
def test_named_recipes_read_back(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


def test_options_have_their_types() -> None:
    steps = parse(
        " smooth( alpha = 0.25, pairs=qkv+down );equalize(gate_up=0.0096,down=auto);clip(points=7,sides=true)"
    ).steps
    assert [s.name for s in steps] == ["smooth", "equalize", "clip"]
    assert steps[0].options == {"alpha": 0.25, "beta": "auto", "pairs": ("qkv", "down")}
    assert (steps[1].options["gate_up"], steps[1].options["down"], steps[1].options["qkv"]) == (
        0.0096,
        "auto",
        0.0,
    )
    assert (steps[2].options["points"], steps[2].options["sides"]) == (7, True)
    assert str(parse("rtn")) == "rtn"
    assert parse("smooth_attention(alpha=auto)").steps[0].options["alpha"] == "auto"
    assert set(FOLDS) < set(STEPS)


def test_best_knows_the_kv_format() -> None:
    names = [
        [s.name for s in recipe("best", None, "w4a8-int8", kv).steps]
        for kv in (None, "int8", "int4", "int4z")
    ]
    assert names[0] == names[1]
    assert names[2] == names[3] == [names[0][0], "smooth_attention", *names[0][1:]]
    with pytest.raises(ValueError, match="either a method or steps"):
        recipe(None, None, "w4a8-int8")


def test_what_a_recipe_wants() -> None:
    assert not parse("rotate; equalize; grid(divisor=7); clip(measure=weight)").wants_data
    assert parse("clip").wants_hessian
    assert not parse("smooth").wants_hessian
    assert parse("smooth").wants_data
    assert [str(p) for p in parse("smooth; clip").prefixes()] == ["rtn", "smooth", "smooth; clip"]


def test_windows(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("some plain words\n" * 40)
    windows_ST = from_text(text, tmp_path, 16)
    assert windows_ST.shape[1] == 16
    calib_ST, judged_ST = split(windows_ST, 5, 3)
    assert len(calib_ST) == 5
    assert judged_ST is not None
    assert torch.equal(judged_ST, windows_ST[-3:])
    assert torch.equal(calib_ST[0], windows_ST[0])
    assert torch.equal(calib_ST[-1], windows_ST[-4])
    assert split(windows_ST[:4], 9, 3).judged_ST is None
    np.save(tmp_path / "flat.npy", np.arange(50, dtype=np.int32))
    assert from_array(tmp_path / "flat.npy", 20, 50).tolist() == [list(range(20)), list(range(20, 40))]
    for bad, message in ((np.ones((2, 4)), "must hold integers"), (np.full((2, 4), 50), r"ids in \[0, 50\)")):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match=message):
            from_array(tmp_path / "bad.npy", 4, 50)
    with pytest.raises(ValueError, match="cannot be read as a"):
        from_array(text, 4, 50)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        from_text(text, tmp_path / "nowhere", 16)
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        from_text(text, tmp_path, 16)


def test_the_judge() -> None:
    """Against whole logits of both models in one piece."""
    plain, other = random_model(seed=0), random_model(seed=1)
    ids_BT = token_ids(5, 300)
    judge = Judge(ids_BT, batch=2)
    judge.start(plain.outer, other.outer)
    for one, two in zip(plain.layers, other.layers, strict=True):
        judge.plain_layer(one, plain.shape)
        judge.quantized_layer(two, plain.shape, PLAIN)
    assert judge.stream_error(None) > 0.1
    quality = judge.finish(plain.outer, other.outer, plain.shape)
    p, q = (m.run(ids_BT).log_softmax(-1) for m in (plain, other))
    assert quality.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert quality.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    losses = [float(F.nll_loss(x[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())) for x in (p, q)]
    assert quality.plain_perplexity == pytest.approx(np.exp(losses[0]), rel=1e-4)
    assert quality.perplexity == pytest.approx(np.exp(losses[1]), rel=1e-4)
