"""Whole QServe, FireQ, GPTQ and AWQ checkpoints through the engine, against transformers on their dequantized weights.

Each is written byte by byte from its layout; the reference rounds the inputs of its linear layers as the scheme says.
The control of each is the same file with one thing written otherwise: its logits must be far off.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minserve import LLM
from tests.quant import test_fireq as fireq_bytes
from tests.quant import test_gptq_awq as word_bytes
from tests.quant import test_qserve as qserve_bytes
from tests.tiny import write_llama

IDS = [3, 200, 17, 45, 45, 99, 250, 7, 12, 180, 61, 5, 290, 33, 8, 140]
# 5e-3 is allowed; the same rounding of the rows gives 1e-13, none at all 1e-4 and more
MOST_KL = 1e-6
FP8 = torch.float8_e4m3fn
Fields = dict[str, Tensor]
LAYERS = 2
KV_HEADS, HEAD_DIM = 2, 32


class Written(NamedTuple):
    """One layer's tensors, those of the control, and the weight they stand for."""

    fields: Fields
    wrong: Fields
    weight: Tensor


def asymmetric(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15, zeros and fp16 scales of a matrix, to the nearest."""
    w_NQg = w.view(len(w), -1, group)
    low, high = w_NQg.amin(2).clamp(max=0), w_NQg.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    codes = (w_NQg / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes.view(w.shape).long(), zero.long(), scale


def qoq_groups(w: Tensor) -> Written:
    scale = (w.abs().amax(1) / 119).half().float()
    wide = (w / scale[:, None]).round().clamp(-119, 119).view(len(w), -1, 128)
    step = ((wide.amax(2) - wide.amin(2)) / 15).round().clamp(min=1)
    zero = (-wide.amin(2) / step).round().clamp(0, 15)
    codes = (wide / step[..., None] + zero[..., None]).round().clamp(0, 15).view(w.shape)
    made = qserve_bytes.Groups(codes.long(), step.long(), (-zero * step).long(), scale)
    wrong = qserve_bytes.written(made) | {"s1_scales": scale.half().flip(0)}
    return Written(qserve_bytes.written(made, "packer"), wrong, made.integers() * scale[:, None])


def qoq_channel(w: Tensor) -> Written:
    codes, zero, scale = asymmetric(w, w.shape[1])
    fields = {
        "qweight": qserve_bytes.nibbles(codes),
        "s1_scales": scale[:, 0].half(),
        "s1_szeros": (zero * scale)[:, 0].half(),
    }
    wrong = fields | {"qweight": qserve_bytes.nibbles(codes, swapped=True)}
    return Written(fields, wrong, (codes - zero) * scale)


def qoq_w8a8(w: Tensor) -> Written:
    scale = (w.abs().amax(1) / 127).half()
    codes = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    fields = {"weight": codes, "dequant_scale": scale}
    return Written(fields, fields | {"dequant_scale": scale.flip(0)}, codes * scale.float()[:, None])


def fireq(w: Tensor) -> Written:
    factor = 64.0
    scale = (w.view(len(w), -1, 128).abs().amax(2) * factor / 7).to(FP8)
    spread = scale.float().repeat_interleave(128, 1) / factor
    codes = (w / spread).round().clamp(-8, 7).to(torch.int8)
    good = fireq_bytes.written(codes, scale, factor)
    return Written(good, fireq_bytes.written(codes, scale, factor, offset=8), codes * spread)


def fireq_rounded(w: Tensor) -> Written:
    """What FireQ multiplies: the products, rounded to e4m3, under the inverse of the matrix's factor."""
    made, factor = fireq(w), 64.0
    return made._replace(weight=(made.weight * factor).to(FP8).float() / factor)


def gptq(w: Tensor) -> Written:
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(w.shape[1]))
    codes, zero, scale = asymmetric(w[:, order], 32)
    g_idx, stored = torch.empty_like(order), torch.empty_like(codes)
    g_idx[order] = torch.arange(len(order)) // 32
    stored[:, order] = codes
    made = word_bytes.Plain(stored, zero, scale, g_idx)
    return Written(word_bytes.gptq_fields(made), word_bytes.gptq_fields(made, added=-2), made.dequantized())


def awq(w: Tensor) -> Written:
    codes, zero, scale = asymmetric(w, 64)
    made = word_bytes.Plain(codes, zero, scale, torch.arange(w.shape[1]) // 64)
    return Written(word_bytes.awq_fields(made), word_bytes.awq_fields(made, range(8)), made.dequantized())


def int8_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def fp8_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(FP8).float() * scale


class Case(NamedTuple):
    write: Callable[[Tensor], Written]
    rows: Callable[[Tensor], Tensor] | None = None
    config: dict[str, Any] | None = None
    online: str = "auto"


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
CASES = {
    "qserve-g128": Case(qoq_groups, int8_rows, {"quant_method": "qoq", "wbits": 4, "group_size": 128}),
    "qserve-channel": Case(qoq_channel, int8_rows),
    "qserve-w8a8": Case(qoq_w8a8, int8_rows),
    "fireq": Case(fireq, fp8_rows),
    "fireq-products": Case(fireq_rounded, fp8_rows, None, "w8a8-fp8"),
    "gptq-desc-act": Case(gptq, None, GPTQ),
    "gptq-online-int8": Case(gptq, int8_rows, GPTQ, "w4a8-int8"),
    "gptq-online-fp8": Case(gptq, fp8_rows, GPTQ, "w4a8-fp8"),
    "awq": Case(awq, None, AWQ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("plain"),
        seed=6,
        hidden_size=128,
        intermediate_size=256,
        attention_bias=True,
        num_hidden_layers=LAYERS,
    )


def folder(path: Path, plain: Path, tensors: Fields, config: dict[str, Any] | None) -> Path:
    path.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    raw = json.loads((plain / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | ({"quantization_config": config} if config else {})))
    return path


def written(plain: Path, case: Case) -> tuple[Fields, Fields, Fields]:
    """The checkpoint, its control, and the float weights it stands for."""
    good, wrong, weights = {}, {}, load_file(plain / "model.safetensors")
    for name, value in list(weights.items()):
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            good[name] = wrong[name] = value
            continue
        layer = case.write(value)
        good |= {f"{module}.{s}": t for s, t in layer.fields.items()}
        wrong |= {f"{module}.{s}": t for s, t in layer.wrong.items()}
        weights[name] = layer.weight.float()
    if case.write in (fireq, fireq_rounded):
        for stored in (good, wrong):
            for name in [n for n in stored if n.endswith(".bias")]:
                stored[name] = stored[name] / stored[name.replace(".bias", ".per_tensor_scale_inv")].float()
    return good, wrong, weights


def reference(plain: Path, weights: Fields, rows: Callable[[Tensor], Tensor] | None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.load_state_dict(weights)
    for name, module in model.named_modules():
        if name.endswith("_proj") and rows is not None:
            module.register_forward_pre_hook(lambda _, given, rows=rows: (rows(given[0]),))
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def our_logits(path: Path, online: str = "auto", **options: Any) -> Tensor:
    given: dict[str, Any] = {"kv_dtype": "fp32"} | options
    with LLM(
        str(path),
        device="cpu",
        dtype="fp32",
        quantization=online,
        pool_bytes=8 << 20,
        max_model_len=64,
        **given,
    ) as llm:
        return llm.logits(IDS)


def kl(reference_TV: Tensor, other_TV: Tensor) -> float:
    p, q = reference_TV.double().log_softmax(-1), other_TV.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_means_its_dequantized_weights(case: str, plain: Path, tmp_path: Path) -> None:
    made = CASES[case]
    good, wrong, weights = written(plain, made)
    want = reference(plain, weights, made.rows)
    near = kl(want, our_logits(folder(tmp_path / "good", plain, good, made.config), made.online))
    far = kl(want, our_logits(folder(tmp_path / "wrong", plain, wrong, made.config), made.online))
    print(f"{case}: KL {near:.1e}, of the control {far:.2f}")
    assert near <= MOST_KL
    assert far > 0.1, "the control is read the same: the test cannot tell"


def test_fireq_factors_after_rope_make_4_bit_keys_better(plain: Path, tmp_path: Path) -> None:
    """Two channels of every head, a pair under RoPE, are far larger than the rest: keys times 1/16, queries times 16.

    Read the wrong way round, the factors would make 4-bit keys worse; applied to one side only, all would be off.
    """
    good, _, _ = written(plain, CASES["fireq"])
    large = [head * HEAD_DIM + i for head in range(KV_HEADS) for i in (3, 19)]
    for name in [n for n in good if n.endswith("k_proj.bias")]:
        inverse = good[name.replace(".bias", ".per_tensor_scale_inv")].float()
        good[name] = good[name].index_add(0, torch.tensor(large), 30 / inverse.expand(len(large)))
    base = our_logits(folder(tmp_path / "base", plain, good, None))
    distance = {"none": kl(base, our_logits(tmp_path / "base", kv_dtype="int4"))}
    for name, factor in (("right", 1 / 16), ("inverse", 16.0)):
        for layer in range(LAYERS):
            at = f"model.layers.{layer}.self_attn.post_k_smooth"
            good[f"{at}.smooth"] = torch.full((len(large),), factor).bfloat16()
            good[f"{at}.top_k_indices"] = torch.tensor(large, dtype=torch.int32)
        distance[name] = kl(base, our_logits(folder(tmp_path / name, plain, good, None), kv_dtype="int4"))
    print(f"KL of int4 KV by the factors of channels: {distance}")
    assert distance["right"] < distance["none"] / 3
    assert distance["inverse"] > distance["right"] * 3


def test_int8_kv_scales_of_qserve(plain: Path, tmp_path: Path) -> None:
    good, _, _ = written(plain, CASES["qserve-channel"])
    base = our_logits(folder(tmp_path / "base", plain, good, None))
    scales = torch.tensor([[0.04, 0.05], [0.045, 0.035]])
    for layer in range(LAYERS):
        good[f"model.layers.{layer}.self_attn.kv_scale_quant_orig"] = scales[layer]
    path = folder(tmp_path / "kv", plain, good, None)
    with LLM(str(path), device="cpu", dtype="fp32", pool_bytes=8 << 20, max_model_len=64) as llm:
        near = kl(base, llm.logits(IDS))
        pairs = [b.kv.static for b in llm._local.engine.runner.model.blocks]
    assert pairs == [(float(k), float(v)) for k, v in scales]
    # the scales of the file are what is multiplied with: a tenth of them clips
    for layer in range(LAYERS):
        good[f"model.layers.{layer}.self_attn.kv_scale_quant_orig"] = scales[layer] / 10
    other = folder(tmp_path / "clipped", plain, good, None)
    with LLM(str(other), device="cpu", dtype="fp32", pool_bytes=8 << 20, max_model_len=64) as llm:
        far = kl(base, llm.logits(IDS))
    print(f"KL of int8 KV {near:.2e}, of a tenth of the scales {far:.2e}")
    assert 1e-7 < near < 5e-3 < 0.1 * far
