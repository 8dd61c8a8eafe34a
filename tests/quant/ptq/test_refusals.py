"""What `python -m quant` refuses: at once, in one line, and leaving nothing behind."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from quant.__main__ import main
from tests.quant.ptq.ground import SMALL
from tests.tiny import write_llama, write_tokenizer

BAD = {
    "--scheme must be one of w8a8-int8": ["--scheme", "w3"],
    "method must be one of best, rtn, .* got 'magic'": ["--method", "magic"],
    "step must be one of rtn, rotate, .* got 'spin'": ["--steps", "spin"],
    "option of clip must be one of measure": ["--steps", "clip(x=1)"],
    r"clip\(points\) must be a whole number from 1 to 1000, got 'many'": ["--steps", "clip(points=many)"],
    r"gptq\(actorder\) must be true or false": ["--steps", "gptq(actorder=1)"],
    "step rotate must stand before gptq": ["--steps", "gptq; rotate"],
    "step clip may stand once": ["--steps", "clip; clip"],
    "a step must read name or name": ["--steps", "clip(("],
    "--method or --steps, not both": ["--method", "rtn", "--steps", "clip"],
    "--group-size must be one of 128": ["--group-size", "99"],
    "--weights must be one of symmetric": ["--weights", "round"],
    "--kv must be one of fp32": ["--kv", "int3"],
    "--format must be one of compressed-tensors": ["--format", "gguf"],
    "--container must be one of packed, int8": ["--container", "tar", "--method", "rtn"],
    "--samples must be at least 1": ["--samples", "0"],
    "needs calibration text: give --calib": ["--method", "gptq", "--calib", ""],
    "too few for one window": ["--length", "250", "--calib", "short"],
    "--length must be at least 2 and at most 256, the model's max_position_embeddings, got 257": [
        "--length",
        "257",
    ],
    r"smooth\(pairs\) must be qkv": ["--steps", "smooth(pairs=all)"],
    "has no progressive weights: give --format qserve": ["--weights", "progressive", "--method", "rtn"],
    "--batch must be at least 1 and at most 4096": ["--batch", "1" + "0" * 23],
    "--steps-report needs held-back windows": ["--judged", "0", "--steps-report", ""],
    "--steps-report needs held-back windows: .* more text": ["--calib", "short", "--steps-report", ""],
    r"format fireq holds symmetric int4 in groups of 128 for fp8 rows .* got w4a8-int8": [
        "--method",
        "fireq",
    ],
    r"format fireq holds .* got w4a8-fp8 \(group 64": [
        "--method",
        "fireq",
        "--scheme",
        "w4a8-fp8",
        "--group-size",
        "64",
    ],
    r"format fireq holds .* got w4a8-fp8 \(channel": [
        "--method",
        "fireq",
        "--scheme",
        "w4a8-fp8",
        "--group-size",
        "channel",
    ],
    "format fireq holds .* got w8a8-fp8": ["--method", "fireq", "--scheme", "w8a8-fp8"],
    "need the format fireq, got compressed-tensors": ["--method", "fireq", "--format", "compressed-tensors"],
    r"format qserve holds .* got w4a8-int8 \(group 64": ["--method", "qoq", "--group-size", "64"],
    "format qserve holds int8 rows .* got w4a8-fp8": ["--method", "qoq", "--scheme", "w4a8-fp8"],
    "--container is of compressed-tensors, and the format is qserve": [
        "--method",
        "qoq",
        "--container",
        "int8",
    ],
    "--container is for integer codes, and those of w8a8-fp8 are floats": [
        "--scheme",
        "w8a8-fp8",
        "--container",
        "packed",
    ],
    r"scale_keys\(top_k\) must be at most head_dim = 32, got 40": ["--steps", "scale_keys(top_k=40)"],
    r"grid\(multiples=true\) is for progressive weights": ["--steps", "grid(multiples=true)"],
    r"clip\(sides=true\) is for weights with zero points": ["--steps", "clip(sides=true)"],
    "divisor must be one of 7.0, .* for symmetric int4": [
        "--steps",
        "grid(divisor=7)",
        "--scheme",
        "w8a8-int8",
    ],
    r"format fireq stores e4m3 scales: write grid\(e4m3=true\)": [
        "--steps",
        "grid",
        "--format",
        "fireq",
        "--scheme",
        "w4a8-fp8",
    ],
    r"equalize\(gate_up\) must be a number from 1e-05 to 10": ["--steps", "equalize(gate_up=1e38)"],
    "a recipe needs at least one step": ["--steps", ";"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_one_line(
    message: str, plain: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--scheme": "w4a8-int8", "--calib": str(text), "--out": str(tmp_path / "out")}
    changed = BAD[message]
    given |= dict(zip(changed[::2], changed[1::2], strict=True))
    if given["--calib"] == "short":
        given["--calib"] = str(tmp_path / "short.txt")
        (tmp_path / "short.txt").write_text("the rain in spain falls " * 3)
    flags = [x for pair in given.items() if pair[1] for x in pair] + ["--steps-report"] * (
        "--steps-report" in given
    )
    sizes = [
        x for pair in zip(SMALL[:-1:2], SMALL[1:-1:2], strict=True) if pair[0] not in given for x in pair
    ]
    assert main([str(plain), *flags, *sizes, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert {p.name for p in tmp_path.iterdir()} <= {"short.txt"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--scheme", "w4a8-fp8", "--method", "fireq"], "format fireq needs inputs in multiples of its groups of 128, and self_attn.q_proj has 160"),
        (["--scheme", "w4a8-int8", "--method", "qoq"], "format qserve needs inputs in multiples of its groups of 128, and self_attn.q_proj has 160"),
        (["--scheme", "w4a8-int8", "--method", "qoq", "--group-size", "channel"], "in multiples of 32, and self_attn.k_proj has 80 x 160"),
        (["--scheme", "w8a8-int8", "--calib-tokens", "IDS"], r"at least 2 tokens, \[S, T\], got \[9, 1\]"),
        (["--scheme", "w8a8-int8", "--out", "LINK"], "is a link to nothing"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_have_is_known_before_any_work(
    given: list[str], words: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_llama(model, hidden_size=160, intermediate_size=328, num_attention_heads=4, head_dim=40)
    write_tokenizer(model)
    np.save(tmp_path / "ids.npy", np.ones((9, 1), dtype=np.int64))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(p.name for p in tmp_path.iterdir())
    places = {"IDS": str(tmp_path / "ids.npy"), "LINK": str(tmp_path / "link")}
    flags = [places.get(x, x) for x in given]
    flags += [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    flags += [] if "--calib-tokens" in flags else ["--calib", str(text)]
    assert main([str(model), *flags, *SMALL]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_groups_that_do_not_fit_and_packed_zeros_are_told(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_llama(model, hidden_size=160, intermediate_size=328, num_attention_heads=4, head_dim=40)
    given = ["--scheme", "w4a8-int8", "--method", "rtn", "--quiet"]
    assert main([str(model), *given, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().err
    assert "groups of 128 do not divide the inputs everywhere: self_attn.q_proj 32, " in said
    assert "mlp.down_proj one scale a channel" in said
    assert (
        main(
            [str(plain), *given, "--weights", "zeros", "--container", "packed", "--out", str(tmp_path / "b")]
        )
        == 0
    )
    assert "does not load packed zero points" in capsys.readouterr().err
    assert main([str(plain), *given, "--weights", "zeros", "--out", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().err == ""
    with safe_open(tmp_path / "c" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.layers.1.mlp.down_proj.weight").get_dtype() == "I8"


def test_help_tells_every_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "points=40: a whole number from 1 to 1000" in said
    assert "pairs=o+down: o, down, one or several joined by +" in said
    assert "steps, joined by ';', with options as name(option=value, ...)" in said


def test_never_overwrites(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("")
    assert main([str(plain), "--scheme", "w8a8-int8", "--method", "rtn", "--out", str(out)]) == 2
    assert "out must not exist yet or be an empty folder" in capsys.readouterr().err
    (out / "precious").unlink()
    assert main([str(plain), "--scheme", "w8a8-int8", "--method", "rtn", "--out", str(out), "--quiet"]) == 0
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert "model.layers.1.mlp.down_proj.weight_scale" in file.keys()  # noqa: SIM118  the handle is not a mapping
