"""The recipes' bench on the demo model: a checkpoint made, judged, and taken apart into what weights and rows cost."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import recipes
from bench.variants import FACTOR, OUTLIERS, weights_alone, with_folds, with_outliers
from examples.demo_corpus import corpus
from minserve import LLM
from quant.ptq.model import read_shape
from quant.ptq.recipe import Recipe, parse
from quant.ptq.rotate import hadamard
from quant.rtn import quantize
from quant.scheme import ONLINE

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
IDS = [5, 300, 17, 42, 900, 8, 77, 301, 64, 3]


def logits(folder: Path) -> torch.Tensor:
    with LLM(folder, dtype="fp32", device="cpu", max_model_len=32, pool_bytes=32 << 20) as llm:
        return llm.logits(IDS)


def test_the_rows_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calib, text, out = tmp_path / "calib.txt", tmp_path / "text.txt", tmp_path / "quality.json"
    calib.write_text(corpus(1, 12, 1.0))
    text.write_text(corpus(2, 2, 1.0))
    old = dict.fromkeys(recipes.KEY, "") | {"model": "other", "outliers": False}
    stale = {
        "model": "demo",
        "outliers": False,
        "weights": "w8a8-int8",
        "method": "rtn",
        "kv": "fp32",
        "kl": 1.0,
    }
    out.write_text(json.dumps({"rows": [old, stale]}))
    texts = ["--calib", str(calib), "--text", str(text), "--window", "32", "--stride", "16", "--samples", "4"]
    command = [
        "recipes",
        str(DEMO),
        *texts,
        "--only",
        "w8a8-int8 rtn",
        "--outliers",
        "too",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--work", str(tmp_path / "work"), "--json", str(out)])
    recipes.main()
    other, eight, plain, plain_spread, spread = json.loads(out.read_text())["rows"]
    assert other == old
    assert [r["method"] for r in (plain, eight, plain_spread, spread)] == ["", "rtn", "", "rtn"]
    assert plain["kl"] == plain_spread["kl"] == plain["above"] == 0
    # the rows of activations cost more than weights of 8 bits, and with outliers everything
    assert 0 < eight["kl_weights"] < eight["kl"] < 2e-3
    assert spread["kl"] > 20 * eight["kl"]
    assert plain_spread["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)

    weights_alone(tmp_path / "work" / "demo-w8a8-int8-rtn", tmp_path / "alone", read_shape(DEMO))
    stored, alone = load_file(DEMO / "model.safetensors"), load_file(tmp_path / "alone" / "model.safetensors")
    assert {n for n in alone if n != "lm_head.weight"} == set(stored)
    name = "model.layers.3.mlp.down_proj.weight"
    rounded = quantize(stored[name].float(), ONLINE["w8a8-int8"], torch.float16)
    assert torch.equal(alone[name], rounded.dequantize())


def test_outliers_are_in_every_norm(tmp_path: Path) -> None:
    with_outliers(DEMO, tmp_path)
    plain, spread = load_file(DEMO / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for name in (n for n in plain if n.endswith("norm.weight")):
        ratio_D = spread[name] / plain[name].float()
        assert int((ratio_D - FACTOR).abs().lt(1e-2).sum()) == OUTLIERS
        assert int((ratio_D - 1).abs().lt(1e-4).sum()) == len(ratio_D) - OUTLIERS


def test_folds_are_made_for_the_cache_that_judges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched for int4 and judged as int4z they would be another method's."""
    calib, text, out = tmp_path / "calib.txt", tmp_path / "text.txt", tmp_path / "quality.json"
    calib.write_text(corpus(1, 12, 1.0))
    text.write_text(corpus(2, 2, 1.0))
    made: list[tuple[Path, str]] = []

    def folds(model: Path, folder: Path, recipe: Recipe, calib_ST: torch.Tensor, kv: str) -> None:
        made.append((folder, kv))
        with_folds(model, folder, recipe, calib_ST, kv)

    monkeypatch.setattr(recipes, "with_folds", folds)
    texts = ["--calib", str(calib), "--text", str(text), "--window", "32", "--stride", "16", "--samples", "4"]
    command = ["recipes", str(DEMO), *texts, "--only", "none SmoothAttention, searched", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--work", str(tmp_path / "work"), "--json", str(out)])
    recipes.main()
    assert [kv for _, kv in made] == ["int4", "int4z"]
    assert len({folder for folder, _ in made}) == 2
    rows = json.loads(out.read_text())["rows"]
    assert [(r["method"], r["kv"]) for r in rows[1:]] == [
        ("SmoothAttention, searched", kv) for kv in ("int4", "int4z")
    ]


def test_folds_turn_as_their_recipe_says(tmp_path: Path) -> None:
    """Without signs the rotation is the plain Hadamard matrix."""
    ids_ST = torch.tensor([IDS])
    for name in ("signs", "plain"):
        recipe = parse(f"rotate(residual=false, signs={str(name == 'signs').lower()})")
        with_folds(DEMO, tmp_path / name, recipe, ids_ST, "int4")
    v = "model.layers.0.self_attn.v_proj.weight"
    stored, signs, plain = (
        load_file(f / "model.safetensors")[v].float() for f in (DEMO, tmp_path / "signs", tmp_path / "plain")
    )
    heads, K = read_shape(DEMO).kv_heads, read_shape(DEMO).head_dim
    turned = hadamard(K).float().T / K**0.5 @ stored.view(heads, K, -1)
    torch.testing.assert_close(plain, turned.reshape(stored.shape), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, signs, atol=1e-3)


def test_folds_alone_leave_the_function_as_it_is(tmp_path: Path) -> None:
    ids_ST = torch.tensor([IDS, IDS[::-1]])
    # in a float cache, where keys are not divided after RoPE
    with_folds(DEMO, tmp_path / "folded", parse("rotate(residual=false); scale_keys"), ids_ST, "int4")
    torch.testing.assert_close(logits(tmp_path / "folded"), logits(DEMO), atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="folds alone, got gptq"):
        with_folds(DEMO, tmp_path / "no", parse("gptq"), ids_ST, "int4")
