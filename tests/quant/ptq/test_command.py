"""`python -m quant` from end to end on a tiny model: what it writes loads in our engine and in transformers."""

import json
from pathlib import Path

import pytest
import torch
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
from quant.scheme import ONLINE, Activations
from tests.quant.clean_reader import Read, read_clean
from tests.quant.ptq.ground import SMALL
from tests.quant.test_foreign_models import IDS, kl, our_logits

# transformers divides rows by 127.5 where the kernels have 127, and fp8 rows by 448 in another order
THEIR_KL = 5e-3
OUR_KL = 1e-5


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
    "zeros-channel": ["--method", "rtn", "--weights", "zeros", "--group-size", "channel"],
    "zeros": ["--steps", "smooth_attention(alpha=auto); clip(sides=true); gptq", "--weights", "zeros", "--group-size", "64"],
    "channel": ["--method", "rtn", "--group-size", "channel"],
}  # fmt: skip


def scheme_of(case: str) -> str:
    return case if case in ("w8a8-int8", "w8a8-fp8", "w4a8-fp8") else "w4a8-int8"


@pytest.fixture(scope="module")
def quantized(plain: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Read]:
    """A folder of CASES, and what transformers makes of each in an interpreter without poison."""
    folder = tmp_path_factory.mktemp("quantized")
    for case, given in CASES.items():
        fixed = ["--scheme", scheme_of(case), "--calib", str(text), "--out", str(folder / case), *SMALL]
        assert main([str(plain), *fixed, *given]) == 0
    return folder, read_clean({case: {"path": folder / case} for case in CASES}, IDS, folder)


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_load_everywhere(case: str, plain: Path, quantized: tuple[Path, Read]) -> None:
    folder, read = quantized
    assert case not in read.errors, read.errors[case]
    out = folder / case
    model, rows = dequantized(out)
    want = logits_of(model)
    assert {r.dtype for r in rows if r} == {scheme_of(case).rpartition("-")[2]}
    near = kl(want, our_logits(out))
    theirs = kl(want, read.logits[case])
    cost = kl(logits_of(AutoModelForCausalLM.from_pretrained(plain)), want)
    print(f"{case}: KL to ours {near:.1e}, to transformers {theirs:.1e}, to the plain model {cost:.1e}")
    assert near <= OUR_KL
    assert theirs <= THEIR_KL
    assert 1e-7 < cost < 0.5


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("w4a8-fp8", ["--method", "fireq", "--kv", "int4", "--fp8-queries"]),
        ("w4a8-int8", ["--method", "qoq", "--kv", "int4z"]),
        ("w4a8-int8", ["--method", "qoq", "--group-size", "channel"]),
    ],
)
def test_qserve_and_fireq_load_in_the_engine(
    scheme: str,
    given: list[str],
    plain: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert (
        main([str(plain), "--scheme", scheme, "--calib", str(text), "--out", str(out), *SMALL, *given]) == 0
    )
    told = capsys.readouterr()
    served = f"python -m minserve.serve --model {out}"
    if "--kv" in given:
        served += f" --kv-dtype {given[3]}" + " --fp8-queries true" * ("--fp8-queries" in given) + "\n"
        assert "as published" not in told.err
    else:
        served += "   (its keys are scaled for 4 bits by smooth_attention: --kv-dtype int4 or int4z)\n"
        assert "qoq as published is --kv int4z" in told.err
    assert served in told.out
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
