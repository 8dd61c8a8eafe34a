"""Native fp8 checkpoints, written by hand: weights, scales by tensor, channel and block, static inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.formats import compressed_tensors, fp8
from quant.formats.catalog import Reader, recognise
from quant.scheme import FP8, FP8_ROWS, Activations, QuantWeight, Scheme
from tests.quant.test_compressed_tensors import Header

N, K = 200, 300
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
BLOCK = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "fmt": "e4m3",
}
PER_TENSOR = Scheme(8, activations=Activations("fp8", dynamic=False), values="fp8")
BY_BLOCK = Scheme(8, activations=Activations("fp8", block=True), values="fp8", block=True)


def codes() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(FP8)


def load(fields: dict[str, Tensor], raw: dict[str, Any] | None) -> QuantWeight:
    return Reader(fp8, fp8.read_config(raw)).load("m", fields, N, K)


def test_static_and_dynamic_scales_by_tensor() -> None:
    fields = {"weight": codes(), "weight_scale": torch.tensor(0.02)}
    q = load(fields, DYNAMIC)
    assert q.scheme == Scheme(8, activations=FP8_ROWS, values="fp8")
    assert torch.equal(q.dequantize(), codes().float() * torch.tensor(0.02))
    # one scale for the tensor, in whatever rank
    for shape in ((), (1,), (1, 1)):
        assert torch.equal(
            load(fields | {"weight_scale": torch.full(shape, 0.02)}, DYNAMIC).scale_NQ, q.scale_NQ
        )
    for raw in (STATIC, None):
        q = load(fields | {"input_scale": torch.tensor([0.5])}, raw)
        assert (q.scheme, q.input_scale) == (PER_TENSOR, 0.5)


def test_block_scales_multiply() -> None:
    inverse = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    for raw in (BLOCK, None):
        q = load({"weight": codes(), "weight_scale_inv": inverse}, raw)
        assert q.scheme == BY_BLOCK
        for i, j in ((0, 0), (127, 255), (128, 256), (199, 299)):
            assert q.dequantize()[i, j] == codes().float()[i, j] * inverse[i // 128, j // 128]


def test_detection_is_by_config_or_by_the_tensor_of_blocks() -> None:
    header = {"m.weight": Header(FP8), "m.weight_scale_inv": Header(torch.float32, (1, 1))}
    assert recognise(header, None).format is fp8
    assert recognise({}, DYNAMIC).format is fp8
    assert (
        recognise({"m.weight": Header(FP8), "m.weight_scale": Header(torch.float32)}, None).format
        is compressed_tensors
    )
    assert (
        recognise(header, {"quant_method": "compressed-tensors", "config_groups": {}}).format
        is compressed_tensors
    )
    assert recognise({}, DYNAMIC).fields("m", header) == ["weight", "weight_scale_inv"]
    assert not recognise({}, DYNAMIC).fields("m", {"m.weight": Header(torch.bfloat16)})


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "qqq", "gguf", "modelopt", "mxfp4", "torchao", "fbgemm_fp8", 7]
)
def test_other_methods_are_refused_with_what_there_is(method: Any) -> None:
    with pytest.raises(
        ValueError, match=r"quant_method must be one of .*fp8.*compressed-tensors.*, got "
    ) as error:
        recognise({"m.weight": Header(FP8)}, {"quant_method": method})
    assert repr(method) in str(error.value)


WEIGHT = {"weight": codes(), "weight_scale": torch.tensor(0.02)}
BLOCKS = {"weight": codes(), "weight_scale_inv": torch.ones(2, 3)}
BAD: list[tuple[dict[str, Tensor], dict[str, Any] | None, str]] = [
    ({"weight": codes()}, DYNAMIC, "found tensors weight float8_e4m3fn"),
    (WEIGHT | {"weight": torch.zeros(N, K, dtype=torch.int8)}, DYNAMIC, "found tensors weight int8"),
    (WEIGHT | BLOCKS, DYNAMIC, "found tensors"),
    (WEIGHT | {"weight": codes().t()}, DYNAMIC, r"weight must be \[200, 300\]"),
    (WEIGHT | {"weight_scale": torch.ones(3)}, DYNAMIC, "weight_scale must be"),
    (WEIGHT | {"weight_scale": torch.tensor(float("inf"))}, DYNAMIC, "finite"),
    (WEIGHT, STATIC, "input_scale is missing"),
    (WEIGHT | {"input_scale": torch.ones(1)}, DYNAMIC, "input_scale is present"),
    (WEIGHT | {"input_scale": torch.ones(3)}, STATIC, "one value for the tensor"),
    (WEIGHT | {"input_scale": torch.zeros(1)}, STATIC, "above 0"),
    (WEIGHT, BLOCK, "found weight_scale, but the config has a weight_block_size"),
    (BLOCKS, DYNAMIC, "found weight_scale_inv, but the config has no weight_block_size"),
    (BLOCKS | {"input_scale": torch.ones(1)}, None, "block scales need dynamic activations"),
    (BLOCKS | {"weight_scale_inv": torch.ones(3, 2)}, BLOCK, r"weight_scale_inv must be \[2, 3\]"),
    (BLOCKS | {"weight_scale_inv": -torch.ones(2, 3)}, BLOCK, "not negative"),
]


@pytest.mark.parametrize(("fields", "raw", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_tensors_are_refused(fields: dict[str, Tensor], raw: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(fields, raw)
    assert str(error.value).startswith("m: ")


BAD_CONFIGS: list[tuple[str, Any]] = [
    ("activation_scheme", "sometimes"),
    ("activation_scheme", []),
    ("weight_block_size", [64, 64]),
    ("weight_block_size", "128x128"),
    ("fmt", "e5m2"),
    ("scale_fmt", {}),
    ("ignored_layers", "lm_head"),
    ("modules_to_not_convert", [1]),
]


@pytest.mark.parametrize(("key", "value"), BAD_CONFIGS, ids=[f"{k}={v!r}" for k, v in BAD_CONFIGS])
def test_bad_configs_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"quantization_config: {key} must be"):
        fp8.read_config(DYNAMIC | {key: value})
    with pytest.raises(ValueError, match="dynamic with weight_block_size"):
        fp8.read_config(BLOCK | {"activation_scheme": "static"})
