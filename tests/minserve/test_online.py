"""What the keys of a model make of its layers: overrides, group sizes, the KV format and scales that a file declares."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.gemm_w4a8 import W4Weight
from kernels.gemm_w8a8 import FP8, W8Weight
from kernels.kv_write_triton import NO_SCALES, KvScales
from kernels.linear import PreparedLinear
from minserve.config import ModelEntry
from minserve.loading import LoadedModel, load_model
from minserve.overrides import OnlineScheme, Overrides, matches
from minserve.resolve import resolve_model
from quant.formats.compressed_tensors import config_object, save
from quant.formats.kv_scheme import scheme_args
from quant.rtn import quantize
from quant.scheme import Scheme
from tests.tiny import write_llama

W4A16 = Scheme(4, 32, activations=None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("plain"), hidden_size=128, intermediate_size=256)


def load(folder: Path, **keys: Any) -> LoadedModel:
    entry = ModelEntry.read({"name": "m", "path": str(folder), "dtype": "fp32"} | keys)
    return load_model(resolve_model(entry, "cpu"), "cpu")


def copied(plain: Path, out: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """`plain` with these tensors beside its own, and these keys in its config."""
    out.mkdir()
    save_file(load_file(plain / "model.safetensors") | tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(json.loads((plain / "config.json").read_text()) | config))
    return out


def test_the_first_match_decides_and_the_rest_is_the_default(plain: Path) -> None:
    overrides = {
        "model.layers.0.self_attn.q_proj": "w8a8-fp8",
        "model.layers.0.*": "none",
        "re:.*down_proj": "w8a8-int8",
        "re:.*o_proj$": "w4a8-int8-channel",
    }
    model = load(plain, quantization="w4a8", quantization_group_size=64, quantization_overrides=overrides)
    first, second = model.llama.blocks
    assert [type(p) for p in first.qkv.parts] == [W8Weight, PreparedLinear, PreparedLinear]
    assert [part.row_dtype for part in first.qkv.parts[:1] if isinstance(part, W8Weight)] == [FP8]
    assert isinstance(first.down.parts[0], PreparedLinear)
    assert isinstance(second.down.parts[0], W8Weight)
    assert second.down.wants == second.qkv.wants == torch.int8
    kinds = [
        part.kind for linear in (second.qkv, second.o) for part in linear.parts if isinstance(part, W4Weight)
    ]
    assert kinds == ["group", "channel"]
    lines = "\n".join(model.report.lines())
    assert "w4a8-int8 (group 64, symmetric): 2 layers, kernel gemm_w4a8" in lines
    assert "dynamic int8 rows x int4 weights, int32 sums within groups of 64, float32 over them" in lines
    assert "w8a8-fp8 (channel, symmetric): 1 layers, kernel gemm_w8a8" in lines
    assert "dynamic fp8 rows x fp8 weights, float32 sums" in lines


def test_a_group_of_its_own_beats_the_default_one(plain: Path) -> None:
    model = load(
        plain,
        quantization_group_size="channel",
        quantization_overrides=[["re:.*", "w4a8-fp8-g32"], ["*", "w4a8"]],
    )
    (row,) = (row for row in model.report.rows.values() if row.kernel == "gemm_w4a8")
    assert (row.scheme, row.layers) == ("w4a8-fp8 (group 32, symmetric)", 8)
    channel = load(plain, quantization="w4a8", quantization_group_size=-1)
    assert any(row.scheme == "w4a8-int8 (channel, symmetric)" for row in channel.report.rows.values())


def test_what_matches_no_layer_is_an_error(plain: Path) -> None:
    overrides = {"model.layers.0.*": "w8a8", "model.layers.7.*": "none", "lm_head": "w8a8"}
    with pytest.raises(ValueError, match=r"got 'model\.layers\.7\.\*', 'lm_head', which match none"):
        load(plain, quantization_overrides=overrides)


def test_patterns_match_as_compressed_tensors_has_it() -> None:
    name = "model.layers.10.mlp.down_proj"
    good = (
        name,
        "*",
        "*.down_proj",
        "model.layers.1*.mlp.*",
        "re:model",
        "re:.*down",
        r"re:model\.layers\.\d+\.mlp",
    )
    assert all(matches(pattern, name) for pattern in good)
    bad = ("down_proj", "re:down_proj", "model.layers.1.*", "MODEL*", "re:model$", "model.layers.1?.mlp")
    assert not any(matches(pattern, name) for pattern in bad)
    rules = Overrides((("a", "none"), ("*", "w4a8-g16")))
    assert rules.find("a") == OnlineScheme("none")
    assert rules.find("b") == OnlineScheme("w4a8-int8", 16)
    with pytest.raises(ValueError, match="'w4a8-g17'"):
        Overrides((("a", "w4a8-g17"),))


def test_each_layer_is_in_the_debug_log(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="minserve"):
        model = load(plain, quantization="w8a8")
    layers = [r.getMessage() for r in caplog.records if r.name == "minserve.load_report"]
    assert len(layers) == 9 == sum(row.layers for row in model.report.rows.values())
    assert layers[0].startswith(
        "model.layers.0.self_attn.q_proj|k_proj|v_proj: w8a8-int8 (channel, symmetric), kernel gemm_w8a8"
    )
    assert "bits per weight" in layers[0]
    stored = sum(part.nbytes for block in model.llama.blocks for part in block.qkv.parts)
    assert (
        sum(int(m.split(" bytes")[0].rsplit(" ", 1)[1]) for m in layers if "qkv" in m or "q_proj" in m)
        == stored
    )


def weight_only(plain: Path, out: Path, ignored: str = "lm_head") -> Path:
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for name, value in tensors.items():
        if not name.endswith("_proj.weight") or ignored in name:
            stored[name] = value
            continue
        fields = save(quantize(value, W4A16, torch.float32), "packed", torch.float32)
        stored |= {f"{name.removesuffix('.weight')}.{k}": v.contiguous() for k, v in fields.items()}
    out.mkdir()
    save_file(stored, out / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = config_object({W4A16: ["Linear"]}, "packed", [f"re:.*{ignored}"])
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_weight_only_checkpoint_runs_as_it_is_or_with_rows_in_8_bits(plain: Path, tmp_path: Path) -> None:
    folder = weight_only(plain, tmp_path / "w4a16")
    stored = load(folder)
    (row,) = (r for r in stored.report.rows.values() if r.scheme.startswith("w4a16"))
    assert (row.kernel, row.nbytes * 8 / row.weights) == ("linear", 32)
    assert row.note == "weight-only: dequantized to float32 at load"
    for name, wants in (("w4a8-int8", torch.int8), ("w4a8-fp8", FP8)):
        linear = load(folder, quantization=name).llama.blocks[0].qkv
        assert linear.wants == wants
        assert isinstance(linear.parts[0], W4Weight)
    mixed = load(folder, quantization_overrides={"*mlp*": "w4a8"}).llama.blocks[0]
    assert (mixed.qkv.wants, mixed.down.wants) == (None, torch.int8)
    with pytest.raises(
        ValueError,
        match="must be auto or w4a8-int8 or w4a8-fp8 for this checkpoint, got 'w8a8-int8'",
    ):
        load(folder, quantization="w8a8")
    with pytest.raises(
        ValueError, match=r"got 'none': model\.layers\.0\.self_attn\.q_proj is stored as w4a16"
    ):
        load(folder, quantization_overrides={"*": "none"})


def test_layers_that_a_quantized_checkpoint_left_plain_stay_plain(plain: Path, tmp_path: Path) -> None:
    folder = weight_only(plain, tmp_path / "w4a16", "down_proj")
    block = load(folder, quantization="w4a8").llama.blocks[0]
    assert (block.qkv.wants, block.down.wants) == (torch.int8, None)
    assert (
        load(folder, quantization_overrides={"*.down_proj": "w8a8"}).llama.blocks[0].down.wants == torch.int8
    )


def with_kv(plain: Path, out: Path, k: Tensor, v: Tensor, leave_out: str = "", **config: Any) -> Path:
    scales = {
        f"model.layers.{i}.self_attn.{name}": s * (i + 1)
        for i in range(2)
        for name, s in (("k_scale", k), ("v_scale", v))
    }
    scales.pop(leave_out, None)
    return copied(plain, out, scales, **config)


def declares(fmt: str) -> dict[str, Any]:
    scheme = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme_args(fmt)}
    return {"quantization_config": scheme}


K_SCALE, V_SCALE = torch.tensor([0.5]), torch.tensor([0.25])


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
def test_auto_is_what_the_checkpoint_declares(fmt: str, plain: Path, tmp_path: Path) -> None:
    model = load(with_kv(plain, tmp_path / "m", K_SCALE, V_SCALE, **declares(fmt)))
    assert model.resolved.layout.fmt == fmt
    assert [b.kv for b in model.llama.blocks] == [KvScales(static=(0.5, 0.25)), KvScales(static=(1.0, 0.5))]
    assert (
        f"KV cache: constant {fmt} scales of the checkpoint, one a layer, in fp16 as the cache keeps them"
        in model.report.lines()
    )


def test_a_named_kv_format_overrides_and_makes_its_own_scales(plain: Path, tmp_path: Path) -> None:
    folder = with_kv(plain, tmp_path / "m", K_SCALE, V_SCALE, **declares("fp8"))
    for fmt in ("int4", "fp32", "fp8"):
        model = load(folder, kv_dtype=fmt)
        assert model.resolved.layout.fmt == fmt
        assert {b.kv for b in model.llama.blocks} == {NO_SCALES}
        assert (
            f"KV cache: {fmt} with scales made at run time; those of the checkpoint are not used"
            in model.report.lines()
        )


def test_scales_a_head_are_made_at_run_time(plain: Path, tmp_path: Path) -> None:
    heads = torch.tensor([0.5, 0.25]).view(2, 1, 1)
    model = load(with_kv(plain, tmp_path / "m", heads, V_SCALE, **declares("fp8")))
    assert {b.kv for b in model.llama.blocks} == {NO_SCALES}
    assert any("scales a head give way" in line for line in model.report.lines())


def test_kv_scales_are_accounted_for(plain: Path, tmp_path: Path) -> None:
    missing = with_kv(
        plain, tmp_path / "a", K_SCALE, V_SCALE, "model.layers.1.self_attn.v_scale", **declares("fp8")
    )
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_scale is missing"):
        load(missing)
    # what a message proposes can be chosen
    for dtype in ("fp32", "bf16"):
        with pytest.raises(
            ValueError, match=f"set kv_dtype to fp8 for .*, or to {dtype} for no quantization"
        ):
            load(missing, dtype=dtype)
        assert load(missing, dtype=dtype, kv_dtype=dtype).resolved.layout.fmt == dtype
    undeclared = with_kv(plain, tmp_path / "b", K_SCALE, V_SCALE)
    with pytest.raises(
        ValueError,
        match=r"4 tensors .* belong to nothing in the model: 'model\.layers\.0\.self_attn\.k_scale'",
    ):
        load(undeclared)
    with pytest.raises(ValueError, match=r"k_scale must be finite and above 0"):
        load(with_kv(plain, tmp_path / "c", K_SCALE * 0, V_SCALE, **declares("fp8")))
