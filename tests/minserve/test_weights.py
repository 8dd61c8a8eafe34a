"""WeightSource: every tensor taken and every parameter written, or an error that names it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.gemm_w4a8 import W4Weight
from kernels.gemm_w8a8 import W8Weight
from kernels.linear import PreparedLinear
from minserve.linear import Linear
from minserve.load_report import LoadReport
from minserve.weights import WeightSource
from quant.formats.compressed_tensors import config_object, save
from quant.rtn import quantize
from quant.scheme import QuantWeight, Scheme

D, Q_ROWS, KV_ROWS = 64, 32, 16
ATTN = "model.layers.0.self_attn"
QKV = tuple(f"{ATTN}.{p}_proj" for p in "qkv")
ROWS = (Q_ROWS, KV_ROWS, KV_ROWS)


def plain_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{n}.weight": torch.randn(r, D, generator=g).to(dtype) for n, r in zip(QKV, ROWS, strict=True)
    }
    tensors["model.norm.weight"] = torch.rand(D, generator=g).to(dtype)
    return tensors


def folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    return path


def quantized(tensors: dict[str, Tensor], schemes: dict[str, Scheme], container: str) -> dict[str, Tensor]:
    """`tensors` with the modules of `schemes` stored as compressed-tensors does."""
    out = dict(tensors)
    for module, scheme in schemes.items():
        fields = save(
            quantize(out.pop(f"{module}.weight"), scheme, torch.bfloat16), container, torch.bfloat16
        )
        out |= {f"{module}.{k}": v for k, v in fields.items()}
    return out


def read(path: Path, **options: Any) -> tuple[Linear, LoadReport]:
    with WeightSource(path, dtype=options.pop("dtype", torch.bfloat16), **options) as source:
        linear = source.linear(QKV, D, ROWS)
        source.tensor("model.norm.weight", (D,))
        return linear, source.finish()


def ct(scheme: Scheme, container: str = "packed") -> dict[str, Any]:
    return config_object({scheme: ["Linear"]}, container, ["lm_head"])


X = torch.randn(3, D, generator=torch.Generator().manual_seed(9)).bfloat16()


def test_plain_weights_are_fused_and_computed(tmp_path: Path) -> None:
    tensors = plain_tensors()
    linear, report = read(folder(tmp_path / "m", tensors))
    stacked = torch.cat([tensors[f"{n}.weight"] for n in QKV])
    assert len(linear.parts) == 1
    assert linear.wants is None
    torch.testing.assert_close(linear(X), X @ stacked.t(), rtol=2e-2, atol=2e-2)
    assert "bfloat16: 1 layers, kernel linear, 16.00 bits per weight" in report.lines()[0]
    assert report.other_bytes == 2 * D


@pytest.mark.parametrize("container", ["packed", "int8"])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4), Scheme(4, 32), Scheme(4, 32, False)], ids=str)
def test_stored_and_online_quantization_agree(scheme: Scheme, container: str, tmp_path: Path) -> None:
    tensors = plain_tensors()
    path = folder(tmp_path / "q", quantized(tensors, dict.fromkeys(QKV, scheme), container))
    linear, report = read(path, quantization_config=ct(scheme, container))
    assert linear.wants == torch.int8
    assert len(linear.parts) == 1
    dequantized = [quantize(tensors[f"{n}.weight"], scheme, torch.bfloat16).dequantize() for n in QKV]
    rows = X.float()
    step = rows.abs().amax(1, keepdim=True) / 127
    want = ((rows / step).round() * step) @ torch.cat(dequantized).t()
    torch.testing.assert_close(linear(X).float(), want, rtol=1e-2, atol=1e-2)
    kernel = "gemm_w8a8" if scheme.bits == 8 else "gemm_w4a8"
    assert f"{scheme}: 1 layers, kernel {kernel}" in report.lines()[0]


def test_codes_from_a_file_written_byte_by_byte(tmp_path: Path) -> None:
    """One packed W4A8 layer without our saver or the safetensors package; the outputs are exact integers."""
    n, k = 16, 64
    codes = [[(5 * r + 3 * c) % 16 - 8 for c in range(k)] for r in range(n)]
    data = b"".join(
        bytes((row[c] + 8) | (row[c + 1] + 8) << 4 for c in range(0, k, 2)) for row in codes
    )  # the low nibble of the first byte is column 0
    scales = struct.pack(f"<{2 * n}f", *([0.5, 2.0] * n))
    shape = struct.pack("<2q", n, k)
    entries, at = {}, 0
    for name, dtype, dims, raw in (
        ("weight_packed", "I32", [n, k // 8], data),
        ("weight_scale", "F32", [n, 2], scales),
        ("weight_shape", "I64", [2], shape),
    ):
        entries[f"m.{name}"] = {"dtype": dtype, "shape": dims, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    header = json.dumps(entries).encode()
    blob = struct.pack("<Q", len(header)) + header + data + scales + shape
    (tmp_path / "model.safetensors").write_bytes(blob)
    config = {"config_groups": {"g": ct(Scheme(4, 32))["config_groups"]["group_0"]}}
    with WeightSource(tmp_path, dtype=torch.float32, quantization_config=config) as source:
        linear = source.linear(("m",), k, (n,))
        source.finish()
    codes_TK = torch.randint(-127, 128, (7, k), dtype=torch.int8)
    want = (
        codes_TK.double()
        @ (torch.tensor(codes).double() * torch.tensor([0.5, 2.0]).repeat_interleave(32)).t()
    )
    assert torch.equal(linear(codes_TK, torch.ones(7)).double(), want)


def test_shards_of_different_schemes_are_not_fused(tmp_path: Path) -> None:
    tensors = plain_tensors()
    schemes = {QKV[0]: Scheme(8), QKV[1]: Scheme(4, 32)}
    path = folder(tmp_path / "m", quantized(tensors, schemes, "int8"))
    groups = config_object({s: [n] for n, s in schemes.items()}, "int8", [QKV[2]])
    linear, report = read(path, quantization_config=groups)
    assert [type(p) for p in linear.parts] == [W8Weight, W4Weight, PreparedLinear]
    assert linear.wants is None
    assert len(report.rows) == 3
    each = []
    for name, rows in zip(QKV, ROWS, strict=True):
        with WeightSource(path, dtype=torch.bfloat16, quantization_config=groups) as source:
            each.append(source.linear((name,), D, (rows,))(X))
    assert torch.equal(linear(X), torch.cat(each, dim=1))


@pytest.mark.parametrize(("name", "bits"), [("w8a8-int8", 8), ("w8a8", 8), ("w4a8-int8", 4), ("w4a8", 4)])
def test_online_quantization_leaves_norms_and_head(name: str, bits: int, tmp_path: Path) -> None:
    tensors = plain_tensors() | {"lm_head.weight": torch.randn(40, D).bfloat16()}
    path = folder(tmp_path / "m", tensors)
    with WeightSource(path, dtype=torch.bfloat16, quantization=name) as source:
        linear = source.linear(QKV, D, ROWS)
        norm = source.tensor("model.norm.weight", (D,))
        head = source.head("lm_head", torch.zeros(40, D, dtype=torch.bfloat16), tied=False)
        report = source.finish()
    assert isinstance(linear.parts[0], W8Weight if bits == 8 else W4Weight)
    assert norm.dtype == torch.bfloat16
    assert isinstance(head.parts[0], PreparedLinear)
    assert [row.layers for row in report.rows.values()] == [1, 1]
    unpacked = "int4 weights are unpacked to int8 on the CPU"
    assert any(unpacked in line for line in report.lines()) == (bits == 4)


def test_a_biased_layer(tmp_path: Path) -> None:
    tensors = plain_tensors()
    for n, r in zip(QKV, ROWS, strict=True):
        tensors[f"{n}.bias"] = torch.randn(r).bfloat16()
    path = folder(tmp_path / "m", tensors)
    for name in ("auto", "w8a8", "w4a8"):
        with WeightSource(path, dtype=torch.bfloat16, quantization=name) as source:
            linear = source.linear(QKV, D, ROWS, bias=True)
            source.tensor("model.norm.weight", (D,))
            source.finish()
        zero = linear(torch.zeros(1, D, dtype=torch.bfloat16))
        assert torch.equal(zero[0], torch.cat([tensors[f"{n}.bias"] for n in QKV])), name
    with pytest.raises(ValueError, match=r"3 tensors .* belong to nothing in the model: .*q_proj\.bias"):
        read(path)


def test_biases_of_zeros_are_dropped_where_the_config_has_none(tmp_path: Path) -> None:
    """As AutoGPTQ writes them beside every layer."""
    tensors = plain_tensors() | {f"{n}.bias": torch.zeros(r).half() for n, r in zip(QKV, ROWS, strict=True)}
    linear, report = read(folder(tmp_path / "m", tensors))
    plain, _ = read(folder(tmp_path / "plain", plain_tensors()))
    assert torch.equal(linear(X), plain(X))
    assert report.notes == [
        f"3 biases are all zero and dropped, as the config has none: {', '.join(repr(f'{n}.bias') for n in QKV)}"
    ]
    tensors[f"{QKV[1]}.bias"][5] = 0.5
    with pytest.raises(ValueError, match=r"1 tensors .* belong to nothing in the model: '.*k_proj\.bias'$"):
        read(folder(tmp_path / "m", tensors))
    head = {"lm_head.weight": torch.randn(40, D).bfloat16(), "lm_head.bias": torch.zeros(40)}
    with WeightSource(folder(tmp_path / "head", head), dtype=torch.bfloat16) as source:
        source.head("lm_head", torch.zeros(40, D, dtype=torch.bfloat16), tied=False)
        assert "1 biases are all zero" in source.finish().notes[0]


FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128}
# which of q, k and v a config says are quantized
TARGETED: list[tuple[dict[str, Any] | None, str]] = [
    (None, ""),
    (ct(Scheme(8)), "qkv"),
    (ct(Scheme(8)) | {"ignore": ["re:.*k_proj"]}, "qv"),
    (FP8_CONFIG, "qkv"),
    (FP8_CONFIG | {"ignored_layers": [QKV[0]]}, "kv"),
    (FP8_CONFIG | {"modules_to_not_convert": ["self_attn"]}, ""),
    (GPTQ_CONFIG, "qkv"),
    (GPTQ_CONFIG | {"dynamic": {"-:.*": {}}}, ""),
    (AWQ_CONFIG, "qkv"),
    (AWQ_CONFIG | {"modules_to_not_convert": ["v_proj"]}, "qk"),
    ({"quant_method": "qoq", "wbits": 8}, "qkv"),
]


@pytest.mark.parametrize(("config", "targeted"), TARGETED, ids=range(len(TARGETED)))
def test_plain_layers_that_the_config_targets_are_said(
    config: dict[str, Any] | None, targeted: str, tmp_path: Path
) -> None:
    _, report = read(folder(tmp_path / "m", plain_tensors()), quantization_config=config)
    names = [repr(f"{ATTN}.{p}_proj") for p in targeted]
    said = f"{len(names)} layers are plain although the config targets them: {', '.join(names)}"
    assert report.notes == ([said] if names else [])
    assert (report.lines()[-1] == said) == bool(names)


def test_what_is_left_over_is_named(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    _, report = read(folder(tmp_path / "a", plain_tensors() | extra))
    assert report.derived == list(extra)
    more = {f"model.layers.{i}.mlp.odd.weight": torch.ones(1) for i in range(60)}
    with pytest.raises(ValueError, match=r"60 tensors .*'model\.layers\.0\.mlp\.odd\.weight'.* and 10 more"):
        read(folder(tmp_path / "b", plain_tensors() | more))
    scale = {f"{ATTN}.k_scale": torch.ones(1)}
    with pytest.raises(ValueError, match="k_scale"):
        read(folder(tmp_path / "c", plain_tensors() | scale))


@pytest.mark.parametrize("name", [f"{QKV[1]}.weight", "model.norm.weight"])
def test_what_is_missing_is_named(name: str, tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors[name.replace("model.", "transformer.")] = tensors.pop(name)
    with pytest.raises(
        ValueError, match=f"tensor '{name}' is missing from the checkpoint; it holds .*'transformer"
    ):
        read(folder(tmp_path / "m", tensors))


def test_wrong_shapes_and_types_are_named(tmp_path: Path) -> None:
    bad = {
        "shape": ({f"{QKV[0]}.weight": torch.zeros(D, Q_ROWS)}, r"q_proj\.weight must have the shape \[32, 64\], got \[64, 32\]"),
        "norm": ({"model.norm.weight": torch.zeros(D + 1)}, r"model\.norm\.weight must have the shape \[64\], got \[65\]"),
        "integers": ({"model.norm.weight": torch.zeros(D, dtype=torch.int32)}, r"norm\.weight must be a float tensor"),
        "fp8": ({f"{QKV[0]}.weight": torch.zeros(Q_ROWS, D).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        "bare int8": ({f"{QKV[0]}.weight": torch.zeros(Q_ROWS, D, dtype=torch.int8)}, "found tensors weight int8"),
    }  # fmt: skip
    for name, (change, message) in bad.items():
        with pytest.raises(ValueError, match=message):
            read(folder(tmp_path / name, plain_tensors() | change))


def test_float16_overflow_is_an_error(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors["model.norm.weight"][3] = 1e5
    path = folder(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight does not fit float16 .*bfloat16"):
        read(path, dtype=torch.float16)
    read(path, dtype=torch.bfloat16)


def test_float16_overflow_of_what_is_dequantized_is_an_error(tmp_path: Path) -> None:
    scheme = Scheme(4, 32, activations=None)
    stored = quantized(plain_tensors(), dict.fromkeys(QKV, scheme), "packed")
    stored[f"{QKV[1]}.weight_scale"][2] = 60000.0
    path = folder(tmp_path / "m", stored)
    with pytest.raises(
        ValueError, match=r"k_proj.*: the dequantized weight does not fit float16 \(largest .*bfloat16"
    ):
        read(path, dtype=torch.float16, quantization_config=ct(scheme))
    read(path, dtype=torch.bfloat16, quantization_config=ct(scheme))


def test_no_message_proposes_what_is_refused(tmp_path: Path) -> None:
    for bits, group in ((4, 32), (8, None)):
        scheme = Scheme(bits, group, activations=None)
        stored = quantized(plain_tensors(), dict.fromkeys(QKV, scheme), "packed")
        path = folder(tmp_path / f"m{bits}", stored)
        with pytest.raises(ValueError, match="quantization must be auto or w") as error:
            read(path, quantization="none", quantization_config=ct(scheme))
        proposed = str(error.value).split(" for this checkpoint")[0].split("must be ")[1].split(" or ")
        assert len(proposed) > 1
        for name in proposed:
            read(path, quantization=name, quantization_config=ct(scheme))


def test_quantization_that_contradicts_the_checkpoint(tmp_path: Path) -> None:
    stored = quantized(plain_tensors(), dict.fromkeys(QKV, Scheme(8)), "int8")
    path = folder(tmp_path / "m", stored)
    config = ct(Scheme(8), "int8")
    for fine in ("auto", "w8a8", "w8a8-int8"):
        read(path, quantization=fine, quantization_config=config)
    for wrong in ("none", "w4a8", "w4a8-int8"):
        with pytest.raises(ValueError, match="quantization must be auto or w8a8-int8 for this checkpoint"):
            read(path, quantization=wrong, quantization_config=config)
    with pytest.raises(ValueError, match=r"one of auto, none, .*w8a8-fp8, .*w4a8-fp8, got 'int3'"):
        read(path, quantization="int3")
    with pytest.raises(ValueError, match="quant_method"):
        read(path, quantization_config={"quant_method": "nothing-known"})


def test_the_head_may_be_tied(tmp_path: Path) -> None:
    embed = torch.randn(40, D).bfloat16()
    path = folder(tmp_path / "m", {"lm_head.weight": embed})
    with WeightSource(path, dtype=torch.bfloat16) as source:
        source.head("lm_head", embed, tied=True)
        source.finish()
    with (
        WeightSource(path, dtype=torch.bfloat16) as source,
        pytest.raises(ValueError, match="tie_word_embeddings"),
    ):
        source.head("lm_head", embed + 1, tied=True)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32)], ids=str)
def test_a_quantized_head_answers_in_float32(scheme: Scheme, tmp_path: Path) -> None:
    embed = torch.randn(40, D).bfloat16()
    weight = quantize(embed, scheme, torch.bfloat16)
    fields = save(weight, "int8", torch.bfloat16)
    path = folder(tmp_path / "q", {f"lm_head.{k}": v for k, v in fields.items()})
    config = config_object({scheme: ["Linear"]}, "int8", [])
    with WeightSource(path, dtype=torch.bfloat16, quantization_config=config) as source:
        y = source.head("lm_head", embed, tied=False)(X)
        source.finish()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, X.float() @ weight.dequantize().t(), rtol=0, atol=0.3)
    with (
        WeightSource(path, dtype=torch.bfloat16, quantization_config=config, lm_head="int8") as source,
        pytest.raises(ValueError, match="lm_head must be auto for this checkpoint, got 'int8'"),
    ):
        source.head("lm_head", embed, tied=False)


def test_results_own_their_memory(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", plain_tensors())
    with WeightSource(path, dtype=torch.bfloat16) as source:
        norm = source.tensor("model.norm.weight", (D,))
        linear = source.linear((QKV[0],), D, (Q_ROWS,))
    before, y = norm.clone(), linear(X)
    file = path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(b"\xff" * file.stat().st_size)
    assert torch.equal(norm, before)
    assert torch.equal(linear(X), y)


def test_progress_is_shown_on_request_and_never_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "m", plain_tensors())
    read(path)
    assert capsys.readouterr() == ("", "")
    read(path, progress=True)
    shown = capsys.readouterr()
    assert "weights: 100%" in shown.err
    assert shown.out == ""


def test_a_quant_weight_is_what_the_file_said(tmp_path: Path) -> None:
    """Scales and codes survive the fusing, in order."""
    tensors = plain_tensors()
    schemes = dict.fromkeys(QKV, Scheme(4, 32, False))
    path = folder(tmp_path / "m", quantized(tensors, schemes, "packed"))
    source = WeightSource(path, dtype=torch.bfloat16, quantization_config=ct(Scheme(4, 32, False)))
    for name, rows in zip(QKV, ROWS, strict=True):
        got, _ = source._shard(name, D, rows)
        assert isinstance(got, QuantWeight)
        assert torch.equal(
            got.dequantize(), quantize(tensors[f"{name}.weight"], schemes[name], torch.bfloat16).dequantize()
        )
    source.close()
