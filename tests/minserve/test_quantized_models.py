"""Whole compressed-tensors checkpoints through the engine, against transformers on the dequantized weights.

The reference multiplies floats, ours quantizes activations: close in KL, not equal.  A layout fault is far off: the
control reads the same checkpoint with the nibbles of each byte exchanged.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minserve import LLM
from quant.formats.compressed_tensors import config_object, save
from quant.rtn import quantize
from quant.scheme import Scheme
from tests.tiny import write_llama

IDS = [3, 200, 17, 45, 45, 99, 250, 7, 12, 180, 61, 5, 290, 33, 8, 140]
CASES = {
    "w8a8": (Scheme(8), "int8"),
    "w8a8-packed": (Scheme(8), "packed"),
    "w4a8-group": (Scheme(4, 32), "packed"),
    "w4a8-group-int8": (Scheme(4, 32), "int8"),
    "w4a8-channel": (Scheme(4), "packed"),
    "w4a8-zeros": (Scheme(4, 32, False), "packed"),
}
KEYS = {"new": "quantization_config", "old": "compression_config"}


def compress(plain: Path, out: Path, scheme: Scheme, container: str, key: str = "new") -> dict[str, Tensor]:
    """Writes `plain` quantized into `out`; returns its weights dequantized again."""
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for name, value in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = value
            continue
        weight = quantize(value, scheme.fit(value.shape[1]))
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{k}": v.contiguous() for k, v in save(weight, container, torch.float32).items()}
        tensors[name] = weight.dequantize()
    out.mkdir()
    save_file(stored, out / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config[KEYS[key]] = config_object({scheme: ["Linear"]}, container, ["lm_head"])
    (out / "config.json").write_text(json.dumps(config))
    return tensors


def kl(reference_TV: Tensor, other_TV: Tensor) -> float:
    p, q = reference_TV.double().log_softmax(-1), other_TV.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def our_logits(path: Path, **options: Any) -> Tensor:
    keys = {"dtype": "fp32", "kv_dtype": "fp32", "pool_bytes": 8 << 20, "max_model_len": 64}
    with LLM(str(path), device="cpu", **keys, **options) as llm:
        return llm.logits(IDS)


def reference(plain: Path, weights: dict[str, Tensor]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("plain"), seed=5, hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_means_its_dequantized_weights(case: str, plain: Path, tmp_path: Path) -> None:
    scheme, container = CASES[case]
    key = "old" if case == "w4a8-channel" else "new"
    weights = compress(plain, tmp_path / "q", scheme, container, key)
    want = reference(plain, weights)
    got = our_logits(tmp_path / "q")
    distance, far = kl(want, got), kl(want, want.roll(1, 0))
    print(f"{case}: KL {distance:.1e}, of logits shifted by a token {far:.1e}")
    assert 1e-9 < distance < 2e-3, (
        f"KL {distance:.1e}: exactly 0 would mean that activations are not quantized"
    )


def test_exchanged_nibbles_are_far_off(plain: Path, tmp_path: Path) -> None:
    weights = compress(plain, tmp_path / "q", Scheme(4, 32), "packed")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for name, value in stored.items():
        if name.endswith("weight_packed"):
            data = value.view(torch.uint8)
            stored[name] = ((data >> 4) | (data << 4)).view(torch.int32)
    save_file(stored, tmp_path / "q" / "model.safetensors")
    assert kl(reference(plain, weights), our_logits(tmp_path / "q")) > 0.2


@pytest.mark.parametrize("quantization", ["w8a8-int8", "w4a8-int8"])
def test_online_quantization_equals_the_stored_one(quantization: str, plain: Path, tmp_path: Path) -> None:
    scheme = Scheme(8) if quantization == "w8a8-int8" else Scheme(4, 128)
    compress(plain, tmp_path / "q", scheme, "packed")
    assert torch.equal(our_logits(plain, quantization=quantization), our_logits(tmp_path / "q"))
