"""Small checkpoints of every format, for damage: one layer each, of a config, an index where there are shards, and tensors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.formats.compressed_tensors import config_object, save
from quant.rtn import quantize
from quant.scheme import BLOCK, FP8, FP8_ROWS, Activations, QuantWeight, Scheme
from tests.quant.test_foreign_models import CASES, folder, written
from tests.tiny import write_llama

INDEX = "model.safetensors.index.json"
SHARDS = ("one.safetensors", "two.safetensors")
STATIC = Scheme(8, activations=Activations(dynamic=False, symmetric=False))


def _modules(plain: Path) -> tuple[dict[str, Tensor], list[str]]:
    tensors = load_file(plain / "model.safetensors")
    return tensors, [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]


def _replaced(
    plain: Path, fields: Callable[[Tensor], dict[str, Tensor]], quantization: dict[str, Any], out: Path
) -> dict[str, Tensor]:
    """Writes config.json; returns all tensors, those of linear layers as `fields` makes them."""
    tensors, modules = _modules(plain)
    for module in modules:
        made = fields(tensors.pop(f"{module}.weight"))
        tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in made.items()}
    out.mkdir()
    config = json.loads((plain / "config.json").read_text()) | quantization
    (out / "config.json").write_text(json.dumps(config))
    return tensors


def groups_with_zeros(plain: Path, out: Path) -> Path:
    """int4 in groups with zero points, packed; fp8 KV with constant scales; two shards."""
    scheme = Scheme(4, 32, symmetric=False)
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    raw = config_object({scheme: ["re:.*_proj"]}, "packed", ["lm_head"], kv)
    made = _replaced(
        plain, lambda w: save(quantize(w, scheme), "packed", torch.float32), {"quantization_config": raw}, out
    )
    made |= {f"model.layers.0.self_attn.{kind}_scale": torch.tensor([0.05]) for kind in "kv"}
    names = sorted(made)
    halves = {SHARDS[0]: names[::2], SHARDS[1]: names[1::2]}
    for file, held in halves.items():
        save_file({name: made[name] for name in held}, out / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return out


def static_rows(plain: Path, out: Path) -> Path:
    """int8 with constant scales and zero points of the inputs, in the old key."""

    def fields(w: Tensor) -> dict[str, Tensor]:
        return save(replace(quantize(w, STATIC), input_scale=0.0625, input_zero=-9), "int8", torch.float32)

    raw = config_object({STATIC: ["Linear"]}, "int8", ["lm_head"])
    save_file(_replaced(plain, fields, {"compression_config": raw}, out), out / "model.safetensors")
    return out


def native_fp8(plain: Path, out: Path) -> Path:
    scheme = Scheme(8, activations=FP8_ROWS, values="fp8")

    def fields(w: Tensor) -> dict[str, Tensor]:
        weight: QuantWeight = quantize(w, scheme)
        return {"weight": weight.codes_NK, "weight_scale": weight.scale_NQ[:1, 0]}

    raw = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
    save_file(_replaced(plain, fields, {"quantization_config": raw}, out), out / "model.safetensors")
    return out


def fp8_blocks(plain: Path, out: Path) -> Path:
    def fields(w: Tensor) -> dict[str, Tensor]:
        N, K = w.shape
        scale = torch.full((-(-N // BLOCK), -(-K // BLOCK)), float(w.abs().max()) / 448)
        return {"weight": (w / scale[0, 0]).to(FP8), "weight_scale_inv": scale}

    raw = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    save_file(_replaced(plain, fields, {"quantization_config": raw}, out), out / "model.safetensors")
    return out


OURS = (groups_with_zeros, static_rows, native_fp8, fp8_blocks)
FOREIGN = ("qserve-g128", "qserve-channel", "fireq", "gptq-desc-act", "awq")
NAMES = (*(make.__name__ for make in OURS), *FOREIGN, "plain", "tied", "biased")


def write_bases(at: Path) -> list[Path]:
    """All of NAMES below `at`; those of FOREIGN have biases, and widths that their groups divide."""
    small = {"num_hidden_layers": 1, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    plain = write_llama(at / "plain", seed=1, **small)
    tied = write_llama(at / "tied", seed=2, tie_word_embeddings=True, **small)
    biased = write_llama(at / "biased", seed=3, attention_bias=True, mlp_bias=True, **small)
    wide = small | {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    source = write_llama(at / "wide", seed=4, attention_bias=True, **wide)
    foreign = [
        folder(at / name, source, written(source, CASES[name])[0], CASES[name].config) for name in FOREIGN
    ]
    return [*(make(plain, at / make.__name__) for make in OURS), *foreign, plain, tied, biased]
