"""Layers that the compressed-tensors package wrote, against an oracle that knows the bytes and nothing of ours.

The oracle reads codes, zero points and scales with numpy and multiplies integers in int64: accumulators must be equal,
weights equal to its float64 product rounded once, and to what the package itself makes of them.  Every control reads the
same bytes in a wrong way and must fail the same check.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor

from minserve.linear import Linear
from minserve.prepare import prepare_plain, prepare_quantized
from quant.formats.catalog import recognise
from quant.scheme import QuantWeight
from tests.quant.ct_writer import written_layer

N, K, T = 120, 256, 5  # below what torch splits among threads
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
FLOAT, ASYM = {"type": "float"}, {"symmetric": False}
INT8 = {"num_bits": 8, "strategy": "channel"}
FP8 = INT8 | FLOAT
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
GROUPS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
PACKED, BYTES, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "w8a8": (INT8, TOKEN, BYTES),
    "w8a8-tensor": (INT8 | {"strategy": "tensor"}, TOKEN, BYTES),
    "w8a8-asymmetric-rows": (INT8, TOKEN | ASYM, BYTES),
    "w8a8-static": (INT8, STATIC, BYTES),
    "w8a8-static-asymmetric": (INT8, STATIC | ASYM, BYTES),
    "w8a16": (INT8, None, PACKED),
    "w8a8-fp8": (FP8, TOKEN | FLOAT, FLOATS),
    "w8a8-fp8-static": (FP8 | {"strategy": "tensor"}, STATIC | FLOAT, FLOATS),
    "w8a8-fp8-block": (BLOCK, GROUPS, FLOATS),
    "w4a8": (INT4, TOKEN, PACKED),
    "w4a8-bytes": (INT4, TOKEN, BYTES),
    "w4a8-g128": (INT4 | {"group_size": 128}, TOKEN, PACKED),
    "w4a8-g64-actorder": (INT4 | {"group_size": 64, "actorder": "weight"}, TOKEN, PACKED),
    "w4a8-channel": ({"num_bits": 4, "strategy": "channel"}, TOKEN, PACKED),
    "w4a8-channel-bytes": ({"num_bits": 4, "strategy": "channel"}, TOKEN, BYTES),
    "w4a8-zeros": (INT4 | ASYM, TOKEN, PACKED),
    "w4a8-zeros-bytes": (INT4 | ASYM, TOKEN, BYTES),
    "w4a8-asymmetric-rows": (INT4, TOKEN | ASYM, PACKED),
    "w4a8-static": (INT4, STATIC, PACKED),
    "w4afp8": (INT4, TOKEN | FLOAT, PACKED),
    "w4afp8-bytes": (INT4, TOKEN | FLOAT, BYTES),
    "w4a16": (INT4, None, PACKED),
    "w4a16-zeros": (INT4 | ASYM, None, PACKED),
}
INTEGER = [v for v, (_, rows, _) in VARIANTS.items() if rows is not None and rows["type"] == "int"]


@dataclass(frozen=True)
class Reading:
    """How the oracle reads; the defaults are right."""

    offset: int = 8
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)  # which nibble of a word a code is
    twos_complement: bool = False
    scales_reversed: bool = False


RIGHT = Reading()
WRONG = {
    "no offset": Reading(offset=0),
    "nibbles of a byte exchanged": Reading(order=(1, 0, 3, 2, 5, 4, 7, 6)),
    "nibbles of a word reversed": Reading(order=(7, 6, 5, 4, 3, 2, 1, 0)),
    "scales reversed": Reading(scales_reversed=True),
    "two's complement": Reading(twos_complement=True),
}


@dataclass(frozen=True)
class Oracle:
    """codes and zero points int64, scales float64; all spread over [N, K]."""

    codes_NK: np.ndarray
    zero_NK: np.ndarray
    scale_NK: np.ndarray
    group: int

    @property
    def weight_NK(self) -> np.ndarray:
        return (self.codes_NK - self.zero_NK) * self.scale_NK


def words(packed: Tensor, bits: int, count: int, how: Reading) -> np.ndarray:
    """int64 [rows, count] of rows of int32 words, bit by bit."""
    raw = packed.numpy().view(np.uint32).astype(np.int64)
    nibbles = np.stack([(raw >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)], axis=-1)
    if bits == 4:
        nibbles = nibbles[..., list(how.order)]
    stored = nibbles.reshape(raw.shape[0], -1)[:, :count]
    if how.twos_complement:
        return np.where(stored >= 2 ** (bits - 1), stored - 2**bits, stored)
    return stored - (how.offset if bits == 4 else 128)


def spread(values: np.ndarray, block: bool) -> np.ndarray:
    if block:
        return np.array([[values[i // 128, j // 128] for j in range(K)] for i in range(N)])
    values = values.reshape(-1, 1) if values.ndim == 1 else values
    return np.broadcast_to(values, (N, values.shape[1])).repeat(K // values.shape[1], axis=1)


def oracle(fields: Mapping[str, Tensor], weights: Mapping[str, Any], how: Reading = RIGHT) -> Oracle:
    scale = fields["weight_scale"].double().numpy()
    groups = 1 if scale.ndim < 2 or weights["strategy"] == "block" else scale.shape[1]
    if how.scales_reversed:
        scale = np.flip(scale)
    if "weight_packed" in fields:
        codes = words(fields["weight_packed"], weights["num_bits"], K, how)
    else:
        codes = fields["weight"].double().numpy()
        codes = codes if fields["weight"].is_floating_point() else codes.astype(np.int64)
    zero = np.zeros((N, groups), dtype=np.int64)
    if "weight_zero_point" in fields:
        stored = fields["weight_zero_point"]
        along = replace(how, offset=8)  # an offset that both lack would cancel
        packed = stored.dtype == torch.int32
        zero = words(stored.T.contiguous(), 4, N, along).T if packed else stored.long().numpy()
    return Oracle(codes, spread(zero, False), spread(scale, weights["strategy"] == "block"), K // groups)


@functools.cache
def written(variant: str) -> dict[str, Tensor]:
    weights, rows, fmt = VARIANTS[variant]
    g = torch.Generator().manual_seed(sum(map(ord, variant)))
    # groups of different size and rows of different mean: no two scales or zero points are alike
    w_NK = torch.randn(N, K, generator=g) * torch.rand(N, K // 32, generator=g).add(0.2).repeat_interleave(
        32, 1
    )
    w_NK += 0.3 * torch.rand(N, 1, generator=g)
    return written_layer(w_NK.bfloat16(), inputs(), weights, rows, fmt)


def inputs() -> Tensor:
    g = torch.Generator().manual_seed(3)
    return (torch.randn(T, K, generator=g) + 0.5) * torch.tensor([1.0, 3.0, 0.3, 10.0, 2.0]).view(T, 1)


def loaded(fields: dict[str, Tensor], variant: str) -> QuantWeight:
    """As from a checkpoint, the config written by the package's own types."""
    weights, rows, fmt = VARIANTS[variant]
    args = None if rows is None else QuantizationArgs(**rows)
    group = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=args, format=fmt
    )
    raw = QuantizationConfig(config_groups={"group_0": group}, format=fmt, ignore=["lm_head"]).model_dump(
        mode="json"
    )
    infos = {f"m.{name}": value for name, value in fields.items()}
    reader = recognise(infos, raw)
    assert set(reader.fields("m", infos)) == set(fields)
    return reader.load("m", fields, N, K)


def row_codes(
    x_TK: np.ndarray, rows: Mapping[str, Any], fields: Mapping[str, Tensor]
) -> tuple[np.ndarray, ...]:
    """int64 codes, scale and zero point of each row: 127 steps to the largest value, or 255 from least to largest."""
    if not rows["dynamic"]:
        scale = np.full((T, 1), fields["input_scale"].double().item())
        zero = np.full((T, 1), fields.get("input_zero_point", torch.zeros(1)).double().item())
    elif rows["symmetric"]:
        scale, zero = np.abs(x_TK).max(1, keepdims=True) / 127, np.zeros((T, 1))
    else:
        low, high = np.minimum(x_TK.min(1, keepdims=True), 0), np.maximum(x_TK.max(1, keepdims=True), 0)
        scale = (high - low) / 255
        zero = np.clip(np.round(-128 - low / scale), -128, 127)
    codes = np.clip(np.round(x_TK / scale) + zero, -128, 127)
    return codes.astype(np.int64), scale, zero.astype(np.int64)


def accumulators(x_TK: np.ndarray, w_NK: np.ndarray, group: int) -> np.ndarray:
    """int64 [T, N, groups]: the exact sums of products in every group."""
    x_TQg, w_NQg = x_TK.reshape(T, -1, group), w_NK.reshape(N, -1, group)
    return np.einsum("tqg,nqg->tnq", x_TQg, w_NQg)


def check(variant: str, fields: dict[str, Tensor], weight: QuantWeight, how: Reading = RIGHT) -> None:
    """Fails where `weight` is not what the bytes say, read like `how`."""
    weights, rows, _ = VARIANTS[variant]
    truth = oracle(fields, weights, how)
    if variant in INTEGER and rows is not None:
        x_codes, _, _ = row_codes(inputs().double().numpy(), rows, fields)
        own = weight.codes_NK.long().numpy()
        if weight.zero_NQ is not None:
            own = own - weight.zero_NQ.long().numpy().repeat(truth.group, 1)
        want = accumulators(x_codes, truth.codes_NK - truth.zero_NK, truth.group)
        assert np.array_equal(accumulators(x_codes, own, truth.group), want), "accumulators"
    assert torch.equal(weight.dequantize(), torch.from_numpy(truth.weight_NK).float()), "weights"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_package_and_ours_agree(variant: str) -> None:
    fields, (weights, rows, fmt) = written(variant), VARIANTS[variant]
    weight = loaded(fields, variant)
    check(variant, fields, weight)
    scheme = QuantizationScheme(targets=[], weights=QuantizationArgs(**weights))
    own = BaseCompressor.get_value_from_registry(fmt).decompress(dict(fields), scheme)["weight"]
    # the package multiplies in the type of the scales
    assert torch.equal(weight.dequantize().to(own.dtype), own)
    assert (weight.scheme.activations is None) == (rows is None)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("variant", ["w4a8", "w4a8-zeros", "w4a8-g128", "w4afp8"])
def test_wrong_readings_fail_the_same_check(variant: str, wrong: str) -> None:
    fields = written(variant)
    with pytest.raises(AssertionError, match=r"accumulators|weights"):
        check(variant, fields, loaded(fields, variant), WRONG[wrong])


@pytest.mark.parametrize("variant", ["w4a8-bytes", "w8a8", "w8a8-fp8-block", "w8a8-fp8"])
def test_reversed_scales_fail_where_nothing_is_packed(variant: str) -> None:
    fields = written(variant)
    with pytest.raises(AssertionError, match="weights"):
        check(variant, fields, loaded(fields, variant), WRONG["scales reversed"])


@pytest.mark.parametrize("variant", INTEGER)
def test_the_product_is_that_of_integers(variant: str) -> None:
    """The engine's operator against int64 sums: what is left is the rounding of float32 over groups."""
    fields, (weights, rows, _) = written(variant), VARIANTS[variant]
    assert rows is not None
    part = prepare_quantized(loaded(fields, variant), None, torch.float32).part
    operator = Linear([part], torch.float32)
    truth, x_TK = oracle(fields, weights), inputs()
    codes, scale, zero = row_codes(x_TK.double().numpy(), rows, fields)
    sums = accumulators(codes - zero, truth.codes_NK - truth.zero_NK, truth.group)
    want = scale * (sums * truth.scale_NK[:, :: truth.group]).sum(-1)
    error = np.abs(operator(x_TK).double().numpy() - want).max(1) / np.abs(want).max(1)
    print(f"{variant}: worst error of a row {error.max():.1e} of its largest value")
    assert error.max() < 3e-6
    a, b = twins(rows, fields)
    assert (a - b).abs().max() > 0.3 * a.abs().max() / 255
    assert torch.equal(operator(a), operator(b)), "rows of one quantum have different products"
    weights_only = Linear([prepare_plain(loaded(fields, variant).dequantize(), None).part], torch.float32)
    assert not torch.equal(weights_only(a), weights_only(b)), "the control cannot tell"


def twins(rows: Mapping[str, Any], fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two inputs of the same codes, whatever the rows' grid, that differ by 0.4 of a step wherever a row's ends are not."""
    codes = torch.randint(-100, 100, (T, K), generator=torch.Generator().manual_seed(1)).double()
    step, zero = fields.get("input_scale", torch.tensor(0.01)).item(), 0.0
    codes[:, 0], codes[:, 1] = -127.0, 127.0
    if not rows["symmetric"]:
        codes[:, 0], zero = -128.0, fields.get("input_zero_point", torch.tensor(-20)).item()
    shift = torch.full((T, K), 0.2, dtype=torch.float64)
    shift[:, :2] = 0
    return tuple(((codes - zero + s) * step).float() for s in (shift, -shift))


FLOAT_ROWS = [v for v, (_, rows, _) in VARIANTS.items() if rows is not None and rows["type"] == "float"]


@pytest.mark.parametrize("variant", FLOAT_ROWS)
def test_the_product_is_that_of_e4m3_rows(variant: str) -> None:
    """The engine's operator against float64 sums of the codes: what is left is the rounding of float32 sums."""
    fields, (weights, rows, _) = written(variant), VARIANTS[variant]
    assert rows is not None
    weight = loaded(fields, variant)
    operator = Linear([prepare_quantized(weight, None, torch.float32).part], torch.float32)
    x_TK = inputs().double()
    x_TBk = x_TK.view(T, -1, 128 if rows["strategy"] == "group" else K)  # what shares a scale
    scale_TB = x_TBk.abs().amax(2) / 448 if rows["dynamic"] else fields["input_scale"].double().expand(T, 1)
    scale = scale_TB.repeat_interleave(x_TBk.shape[2], 1)
    codes = (x_TK / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    want = ((scale * codes) @ torch.from_numpy(oracle(fields, weights).weight_NK).T).numpy()
    error = np.abs(operator(inputs()).double().numpy() - want).max(1) / np.abs(want).max(1)
    print(f"{variant}: worst error of a row {error.max():.1e} of its largest value")
    assert error.max() < 3e-6
    # e4m3 has steps of a sixteenth at the least: within a fiftieth of a code nothing else is near
    near = 1 + 0.02 * torch.sign(x_TK.roll(1, 1))
    near[codes.abs() == 448] = 1  # the largest make the scale
    a, b = (codes * scale).float(), (codes * scale * near).float()
    assert torch.equal(operator(a), operator(b)), "rows of one quantum have different products"
    weights_only = Linear([prepare_plain(weight.dequantize(), None).part], torch.float32)
    assert not torch.equal(weights_only(a), weights_only(b)), "the control cannot tell"
