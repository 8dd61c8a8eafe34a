"""Recipes are spelled, read back and ordered; calibration text is cut into windows; the judge's sums are right."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quant.ptq.calibration import from_array, from_text, split
from quant.ptq.judge import Judge
from quant.ptq.model import LINEARS, PLAIN
from quant.ptq.recipe import BEST, FOLDS, RECIPES, STEPS, parse, recipe
from quant.ptq.stats import collect
from quant.ptq.steps import described
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


@pytest.mark.parametrize("name", STEPS)
def test_every_option_is_held_to_its_range(name: str) -> None:
    """NaN, infinities, what no number is and what lies beyond the ends: refused with the choices."""
    for key, option in STEPS[name].options.items():
        odd = [
            "nan",
            "inf",
            "-inf",
            "1e38",
            "-1",
            "9" * 30,
            "true?",
            "",
            "foo",
            "qkv+foo",
            "True",
            "o+o",
        ]
        for text in odd:
            with pytest.raises(ValueError, match=rf"{name}\({key}\) must be .*, got"):
                parse(f"{name}({key}={text})")
        assert parse(f"{name}({key}={option.spelled(option.default)})") == parse(name)
        ends = (option.low, option.high) if isinstance(option.default, float) else ()
        for end in ends:
            assert parse(str(parse(f"{name}({key}={end!r})"))).steps[0].options[key] == end


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs at least one step of rtn"),
        (" ;; ", "needs at least one step"),
        ("rtn; gptq", "cannot stand beside gptq"),
        ("scale_values(factor=1e-40)", "from 0.01 to 100"),
        ("refine(sweeps=-1)", "a whole number from 1 to 100, got '-1'"),
        ("grid(divisor=9)", "7, 7.5, 8, or auto, got '9'"),
        ("awq(pairs=)", r"qkv, o, gate_up, down, one or several joined by \+, got ''"),
    ],
)
def test_recipes_that_say_nothing_or_too_much(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_the_help_of_the_steps_is_whole() -> None:
    text = described()
    for name, kind in STEPS.items():
        assert f"  {name}: {kind.help}" in text
    assert "pairs=qkv+gate_up: qkv, o, gate_up, down, one or several joined by +" in text
    assert "sweeps=2: a whole number from 1 to 100" in text


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
    few = split(windows_ST[:4], 9, 3)
    assert few.judged_ST is None
    assert few.described() == "4 windows of 16 tokens (64) to calibrate on, 0 held back to judge on"
    assert few.lacking(9, 3) == [
        "the text has 4 windows to calibrate on, of 9 asked for (--samples)",
        "0 windows are held back, of 3 asked for (--judged): no KL and no perplexity will be reported",
    ]
    assert split(windows_ST, 2, 1).lacking(2, 1) == []
    np.save(tmp_path / "flat.npy", np.arange(50, dtype=np.int32))
    assert from_array(tmp_path / "flat.npy", 20, 50).tolist() == [list(range(20)), list(range(20, 40))]
    for bad, message in (
        (np.ones((5, 1), dtype=int), r"at least 2 tokens, \[S, T\], got \[5, 1\]"),
        (np.ones((2, 4)), "must hold integers"),
        (np.full((2, 4), 50), r"ids in \[0, 50\)"),
    ):
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
        judge.quantized_layer(two, one, plain.shape, PLAIN)
    assert judge.stream_error(None) > 0.1
    quality = judge.finish(plain.outer, other.outer, plain.shape)
    p, q = (m.run(ids_BT).log_softmax(-1) for m in (plain, other))
    assert quality.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert quality.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    losses = [float(F.nll_loss(x[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())) for x in (p, q)]
    assert quality.plain_perplexity == pytest.approx(np.exp(losses[0]), rel=1e-4)
    assert quality.perplexity == pytest.approx(np.exp(losses[1]), rel=1e-4)


def test_the_judge_compares_the_outputs_of_every_matrix() -> None:
    """`output`: on the same rows; `total`: on the plain model's own, which differ; from the inputs themselves."""
    model, ids_BT = random_model(seed=0), token_ids(3, 40)
    layer, shape = model.layers[0], model.shape
    rounded = {
        n: x + 0.01 * torch.randn_like(x) if n.endswith("proj.weight") else x for n, x in layer.items()
    }
    judge = Judge(ids_BT, batch=2)
    judge.start(model.outer, {name: x + 0.1 * torch.randn_like(x) for name, x in model.outer.items()})
    seen: list[dict[str, torch.Tensor]] = []
    for x_BTD, weights in ((judge.plain[0], layer), (judge.quantized[0], rounded)):
        stats = collect(weights, shape, [x_BTD], hessian=None, sample=1000)
        seen.append({name: s.sample_TK for name, s in stats.inputs.items() if s.sample_TK is not None})
    judge.plain_layer(layer, shape)
    errors = judge.quantized_layer(rounded, layer, shape, PLAIN)
    assert set(errors) == set(LINEARS)
    for name in LINEARS:
        r_TK, x_TK = (s[name] for s in seen)
        w_NK, q_NK = layer[f"{name}.weight"], rounded[f"{name}.weight"]
        same, total = x_TK @ w_NK.T, r_TK @ w_NK.T
        for got, meant in ((errors[name].output, same), (errors[name].total, total)):
            want = (x_TK @ q_NK.T - meant).square().sum() / meant.square().sum()
            assert got == pytest.approx(float(want), rel=1e-6)
        assert errors[name].output < errors[name].total
