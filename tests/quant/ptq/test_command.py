"""`python -m quant` from end to end on a tiny model: what it writes loads in our engine and in transformers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minserve import LLM, SamplingParams
from quant.__main__ import main
from quant.formats import fireq
from quant.formats.catalog import recognise
from quant.ptq import fake
from quant.ptq.folding import Target
from quant.ptq.grid import Rounding
from quant.ptq.layerwise import Runs
from quant.ptq.model import EMBED, forward, logits, read_shape
from quant.ptq.state import Work, key_of
from quant.scheme import ONLINE, Activations
from tests.quant.test_foreign_models import IDS, kl, our_logits
from tests.tiny import write_llama, write_tokenizer

# transformers divides rows by 127.5 where the kernels have 127, and fp8 rows by 448 in another order
THEIR_KL = 5e-3
OUR_KL = 1e-5
WORDS = [
    "the",
    "rain",
    "in",
    "spain",
    "falls",
    "on",
    "a",
    "plain",
    "roof",
    "and",
    "some",
    "trees",
    "near",
    "there",
    "were",
    "told",
    "to",
    "run",
    "home",
]
SMALL = ["--samples", "6", "--length", "24", "--judged", "2", "--batch", "4", "--quiet"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of 128 divide it; biases, and two query heads to a KV head."""
    folder = write_llama(
        tmp_path_factory.mktemp("ptq") / "plain",
        seed=6,
        hidden_size=128,
        intermediate_size=256,
        attention_bias=True,
        num_attention_heads=4,
        head_dim=32,
    )
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def text(plain: Path) -> Path:
    g = torch.Generator().manual_seed(1)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (900,), generator=g).tolist()]
    path = plain.parent / "calib.txt"
    path.write_text("".join(w + ("\n" if i % 9 == 8 else " ") for i, w in enumerate(words)))
    return path


def dequantized(out: Path) -> tuple[LlamaForCausalLM, set[Activations | None]]:
    """The written model in float32 by the readers' weights, and what its rows are rounded to."""
    raw = json.loads((out / "config.json").read_text())
    stored = load_file(out / "model.safetensors")
    reader = recognise(stored, raw.pop("quantization_config", None))
    config = LlamaConfig(**raw)
    model = LlamaForCausalLM(config)
    weights: dict[str, Tensor] = {}
    rows: set[Activations | None] = set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        fields = {s: stored[f"{name}.{s}"] for s in reader.fields(name, stored)}
        if fields:
            loaded = reader.load(name, fields, *module.weight.shape)
            weights[f"{name}.weight"] = loaded.dequantize()
            rows.add(loaded.scheme.activations)
            if f"{name}.bias" in stored:
                factor = float(fields["per_tensor_scale_inv"]) if "per_tensor_scale_inv" in fields else 1.0
                weights[f"{name}.bias"] = stored[f"{name}.bias"].float() * factor
            module.register_forward_pre_hook(
                lambda _, given, rows=loaded.scheme.activations: (fake.rows(given[0], rows),)
            )
    weights = {name: stored[name].float() for name in stored if name in model.state_dict()} | weights
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model, rows


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


CASES = {
    "w8a8-int8": ["--method", "smoothquant"],
    "w8a8-fp8": ["--method", "gptq"],
    "w4a8-int8": ["--method", "best"],
    "w4a8-fp8": ["--method", "awq", "--container", "int8"],
    "zeros": ["--steps", "smooth_attention(alpha=auto); clip(sides=true); gptq", "--weights", "zeros", "--group-size", "64"],
    "channel": ["--method", "rtn", "--group-size", "channel"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_load_everywhere(case: str, plain: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scheme = case if case in ("w8a8-int8", "w8a8-fp8", "w4a8-fp8") else "w4a8-int8"
    assert (
        main([str(plain), "--scheme", scheme, "--calib", str(text), "--out", str(out), *SMALL, *CASES[case]])
        == 0
    )
    model, rows = dequantized(out)
    want = logits_of(model)
    assert {r.dtype for r in rows if r} == {scheme.rpartition("-")[2]}
    near = kl(want, our_logits(out))
    theirs = kl(want, logits_of(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)))
    cost = kl(logits_of(AutoModelForCausalLM.from_pretrained(plain)), want)
    print(f"{case}: KL to ours {near:.1e}, to transformers {theirs:.1e}, to the plain model {cost:.1e}")
    assert near <= OUR_KL
    assert theirs <= THEIR_KL
    assert 1e-7 < cost < 0.5


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("w4a8-fp8", ["--method", "fireq", "--kv", "int4"]),
        ("w4a8-int8", ["--method", "qoq", "--kv", "int4z"]),
        ("w4a8-int8", ["--method", "qoq", "--group-size", "channel"]),
    ],
)
def test_qserve_and_fireq_load_in_the_engine(
    scheme: str, given: list[str], plain: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert (
        main([str(plain), "--scheme", scheme, "--calib", str(text), "--out", str(out), *SMALL, *given]) == 0
    )
    want = logits_of(dequantized(out)[0])
    assert kl(want, our_logits(out)) <= OUR_KL
    assert 1e-7 < kl(logits_of(AutoModelForCausalLM.from_pretrained(plain)), want) < 0.5
    names = list(load_file(out / "model.safetensors"))
    assert any("post_k_smooth" in n for n in names) == (scheme == "w4a8-fp8")


@pytest.mark.parametrize(("method", "kv"), [("fireq", "int4"), ("best", "int4z"), ("rtn", "fp8")])
def test_keys_and_values_are_rounded_as_in_the_engine(
    method: str, kv: str, plain: Path, text: Path, tmp_path: Path
) -> None:
    """Prefill and decode over a quantized cache: FireQ's factors after RoPE, and the tool's own picture of the engine."""
    out = tmp_path / "out"
    given = ["--scheme", "w4a8-fp8", "--method", method, "--calib", str(text), "--kv", kv, "--out", str(out)]
    assert main([str(plain), *given, *SMALL]) == 0
    tensors, shape = dequantized(out)[0].state_dict(), read_shape(plain)
    stored = load_file(out / "model.safetensors")
    target = Target(Rounding(ONLINE["w4a8-fp8"]), kv, torch.float32)
    x_BTD = tensors[EMBED][torch.tensor([IDS])]
    for i in range(shape.layers):
        prefix = f"model.layers.{i}."
        layer = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        attention = f"{prefix}self_attn."
        fields = {s: stored[attention + s] for s in fireq.POST_ROPE if attention + s in stored}
        channel_GK = fireq.load_post_rope(fields, shape.heads, shape.kv_heads, shape.head_dim)
        assert (channel_GK is not None) == (method == "fireq")
        with torch.no_grad():
            x_BTD = forward(layer, shape, x_BTD, Runs(target, channel_GK))
    with torch.no_grad():
        want = logits(tensors, shape, x_BTD)[0]
    assert kl(want, our_logits(out, kv_dtype=kv)) <= OUR_KL
    assert kl(want, our_logits(out)) > 30 * OUR_KL
    sampled = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True)
    with LLM(str(out), device="cpu", dtype="fp32", kv_dtype=kv, pool_bytes=8 << 20, max_model_len=64) as llm:
        decoded = llm.generate([IDS], sampled)[0].outputs[0]
        again = llm.logits([*IDS, *decoded.token_ids])
    assert list(decoded.token_ids) == again[len(IDS) - 1 : -1].argmax(-1).tolist()


def test_report_has_every_step(
    plain: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    steps = "rotate; clip; gptq(actorder=true)"
    given = ["--scheme", "w4a8-int8", "--steps", steps, "--steps-report", "--calib", str(text)]
    assert main([str(plain), "--out", str(out), *given, *SMALL]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    assert [s["recipe"] for s in report["steps"]] == ["rtn", "rotate", "rotate; clip"]
    assert report["recipe"] == steps
    assert report["quality"]["kl"] < report["steps"][0]["quality"]["kl"]
    assert report["quality"]["tokens"] == 2 * 24
    errors = [row["output_error"] for layer in report["layers"] for row in layer["linears"].values()]
    assert len(errors) == 14
    assert all(0 < e < 0.1 for e in errors)
    said = capsys.readouterr().out
    assert f"python -m minserve.serve --model {out}" in said
    assert "perplexity" in said
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (tmp_path / "out.work").exists()


def test_token_ids_instead_of_text(plain: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (9, 30))
    np.save(tmp_path / "ids.npy", ids)
    given = ["--scheme", "w8a8-int8", "--method", "gptq", "--calib-tokens", str(tmp_path / "ids.npy")]
    assert main([str(plain), "--out", str(tmp_path / "out"), *given, *SMALL]) == 0
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
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


BAD = {
    "--scheme must be one of w8a8-int8": ["--scheme", "w3"],
    "method must be one of best, rtn, .* got 'magic'": ["--method", "magic"],
    "step must be one of rtn, rotate, .* got 'spin'": ["--steps", "spin"],
    "option of clip must be one of measure": ["--steps", "clip(x=1)"],
    r"clip\(points\) must be a whole number, got 'many'": ["--steps", "clip(points=many)"],
    r"gptq\(actorder\) must be true or false": ["--steps", "gptq(actorder=1)"],
    "step rotate must stand before gptq": ["--steps", "gptq; rotate"],
    "step clip may stand once": ["--steps", "clip; clip"],
    "a step must read name or name": ["--steps", "clip(("],
    "--method or --steps, not both": ["--method", "rtn", "--steps", "clip"],
    "--group-size must be one of 128": ["--group-size", "99"],
    "--weights must be one of symmetric": ["--weights", "round"],
    "--kv must be one of fp32": ["--kv", "int3"],
    "--format must be one of compressed-tensors": ["--format", "gguf"],
    "container must be one of packed, int8": ["--container", "tar", "--method", "rtn"],
    "--samples must be at least 1": ["--samples", "0"],
    "needs calibration text: give --calib": ["--method", "gptq", "--calib", ""],
    "too few for one window": ["--length", "100000"],
    "pair must be one of qkv": ["--steps", "smooth(pairs=all)"],
    "progressive": ["--weights", "progressive", "--method", "rtn"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_one_line(
    message: str, plain: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--scheme": "w4a8-int8", "--calib": str(text), "--out": str(tmp_path / "out")}
    changed = BAD[message]
    given |= dict(zip(changed[::2], changed[1::2], strict=True))
    flags = [x for pair in given.items() if pair[1] for x in pair]
    sizes = [
        x for pair in zip(SMALL[:-1:2], SMALL[1:-1:2], strict=True) if pair[0] not in given for x in pair
    ]
    assert main([str(plain), *flags, *sizes, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


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
