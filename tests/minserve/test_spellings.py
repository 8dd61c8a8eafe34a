"""One checkpoint under several names: native fp8, old compressed-tensors keys and KV names, columns in activation order.

Where the tensors are the same, logits must be equal to the bit, whatever the config calls them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.formats.compressed_tensors import config_object, save
from quant.rtn import quantize
from quant.scheme import Scheme
from tests.minserve.test_package_models import ALL, CASES, KV_FP8, MORE, our_logits, package_config
from tests.minserve.test_quantized_models import IDS, kl
from tests.quant.ct_writer import write_model
from tests.tiny import write_llama

Tensors = dict[str, Tensor]
SCHEMES = CASES | MORE


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("plain"), seed=5, hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def originals(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """A checkpoint of the package by the name of its scheme, and our logits of it; each is made once."""
    logger.disable("compressed_tensors")
    made: dict[str, tuple[Path, Tensor]] = {}

    def get(case: str) -> tuple[Path, Tensor]:
        if case not in made:
            path = tmp_path_factory.mktemp("original") / case
            write_model(plain, path, package_config(*SCHEMES[case]), IDS)
            made[case] = path, our_logits(path)
        return made[case]

    return get


def renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    found = [old for old in names if any(name.endswith(old) for name in tensors)]
    assert found == list(names), f"of {list(names)} there are {found}"
    ends = {n: next((old for old in names if n.endswith(old)), "") for n in tensors}
    return {n.removesuffix(end) + names.get(end, ""): tensors[n] for n, end in ends.items()}


def native(raw: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config of a native fp8 checkpoint."""
    group = raw["config_groups"]["group_0"]
    scheme = "dynamic" if group["input_activations"]["dynamic"] else "static"
    block = group["weights"].get("block_structure")
    return {
        "quant_method": "fp8",
        "activation_scheme": scheme,
        "weight_block_size": block,
        "ignored_layers": ["lm_head"],
    }


def frozen(raw: dict[str, Any]) -> dict[str, Any]:
    return raw | {"quantization_status": "frozen"}


def cached_outputs(raw: dict[str, Any]) -> dict[str, Any]:
    """The KV scheme as outputs of the projections, nested beside the sparsity, with a regex for a class."""
    kv = {"targets": ["re:.*k_proj", "re:.*v_proj"], "weights": None, "output_activations": KV_FP8}
    layers = raw["config_groups"]["group_0"] | {"targets": ["re:model.layers.*proj"]}
    inner = raw | {"config_groups": {"group_0": layers, "cache": kv}, "kv_cache_scheme": None}
    return {"sparsity_config": {"format": "dense"}, "quantization_config": inner}


NEW, OLD = "quantization_config", "compression_config"
OUTPUTS = {
    "self_attn.k_scale": "self_attn.k_proj.output_scale",
    "self_attn.v_scale": "self_attn.v_proj.output_scale",
}
SPELLINGS: dict[str, tuple[str, str, Callable[[dict[str, Any]], dict[str, Any]], dict[str, str]]] = {
    "native static fp8 with KV scales": ("w8a8-fp8-static-kv", NEW, native, {}),
    "native dynamic fp8": ("w8a8-fp8", NEW, native, {}),
    "native fp8 in blocks": ("w8a8-fp8-block", NEW, native, {".weight_scale": ".weight_scale_inv"}),
    "old key, frozen": ("w4a8-zeros", OLD, frozen, {}),
    "outputs of projections": ("w8a8-fp8-static-kv", OLD, cached_outputs, OUTPUTS),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_change_no_bit(
    spelling: str, originals: Callable[[str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    case, key, change, names = SPELLINGS[spelling]
    path, logits = originals(case)
    config = json.loads((path / "config.json").read_text())
    config[key] = change(config.pop(NEW))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(renamed(load_file(path / "model.safetensors"), names), tmp_path / "model.safetensors")
    assert torch.equal(our_logits(tmp_path), logits)


def test_scales_of_queries_and_probabilities_are_passed_over(
    originals: Callable[[str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    path, logits = originals("w8a8-fp8-static-kv")
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        tensors |= {f"{at}.q_scale": torch.ones(1), f"{at}.prob_output_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    assert torch.equal(our_logits(tmp_path), logits)


def int8_rows(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    scale = args[0].abs().amax(-1, keepdim=True) / 127
    return ((args[0] / scale).round() * scale,)


def ordered(plain: Path, out: Path) -> Tensor:
    """Columns in 32 of a group, chosen at random, stored where they were; returns transformers' logits, rows rounded."""
    scheme, model = Scheme(4, 32), AutoModelForCausalLM.from_pretrained(plain)
    stored = load_file(plain / "model.safetensors")
    for name in [n for n in stored if n.endswith("_proj.weight")]:
        module, w = name.removesuffix(".weight"), stored.pop(name)
        order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(len(name)))
        weight = quantize(w[:, order], scheme)
        back = order.argsort()
        weight.codes_NK.copy_(weight.codes_NK[:, back])
        fields = save(weight, "packed", torch.float32) | {"weight_g_idx": (back // 32).int()}
        stored |= {f"{module}.{suffix}": value.contiguous() for suffix, value in fields.items()}
        scale = weight.scale_NQ[:, back // 32]
        model.get_submodule(module).weight.data.copy_(weight.codes_NK.float() * scale)
        model.get_submodule(module).register_forward_pre_hook(int8_rows)
    out.mkdir()
    save_file(stored, out / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config[OLD] = config_object({scheme: list(ALL)}, "packed", ["lm_head"])
    config[OLD]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (out / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def test_columns_in_activation_order(plain: Path, tmp_path: Path) -> None:
    theirs = ordered(plain, tmp_path / "q")
    distance = kl(theirs, our_logits(tmp_path / "q"))
    # the control: groups of neighbours, as if there were no order
    stored = load_file(tmp_path / "q" / "model.safetensors")
    kept = {name: value for name, value in stored.items() if not name.endswith("g_idx")}
    save_file(kept, tmp_path / "q" / "model.safetensors")
    far = kl(theirs, our_logits(tmp_path / "q"))
    print(f"KL {distance:.1e}, without the order {far:.1e}")
    assert distance < 5e-4  # a row whose code flips on the way costs 6e-5
    assert far > 0.05
