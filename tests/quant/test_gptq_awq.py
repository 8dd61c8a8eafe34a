"""GPTQ's and AWQ's words, written here nibble by nibble, are read as the weights they stand for; controls are not."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.gemm_w4a8 import gemm_w4a8, prepare_w4a8
from quant.formats import awq, fireq, gptq, qserve
from quant.formats.catalog import recognise
from quant.scheme import QuantWeight, Scheme, fuse

N, K, GROUP = 24, 64, 16
Q = K // GROUP
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Plain(NamedTuple):
    """Codes and zeros 0..15, one scale a group; g_idx names the group of each input."""

    codes_NK: Tensor
    zero_NQ: Tensor
    scale_NQ: Tensor
    g_idx: Tensor

    def dequantized(self) -> Tensor:
        zero, scale = self.zero_NQ[:, self.g_idx], self.scale_NQ[:, self.g_idx]
        return (self.codes_NK - zero).float() * scale

    def integers(self) -> Tensor:
        return self.codes_NK - self.zero_NQ[:, self.g_idx]


def plain(symmetric: bool = False, scattered: bool = False, groups: int = Q) -> Plain:
    g = torch.Generator().manual_seed(7)
    g_idx = torch.arange(K) // (K // groups)
    if scattered:
        g_idx = g_idx[torch.randperm(K, generator=g)]
    zero = torch.randint(0, 16, (N, groups), generator=g)
    return Plain(
        torch.randint(0, 16, (N, K), generator=g),
        torch.full_like(zero, 8) if symmetric else zero,
        (torch.rand(N, groups, generator=g) + 0.1).half().float(),
        g_idx,
    )


def columns(values: Tensor, order: Any = range(8)) -> Tensor:
    """int32 words along the last axis: nibble i of word c holds place 8 c + order[i]."""
    out = torch.zeros(*values.shape[:-1], values.shape[-1] // 8, dtype=torch.int64)
    for i, place in enumerate(order):
        out |= (values[..., place::8].long() & 15) << (4 * i)
    return out.to(torch.int32)


def gptq_fields(w: Plain, added: int = 1, order: Any = range(8)) -> dict[str, Tensor]:
    return {
        "qweight": columns(w.codes_NK, order).T.contiguous(),
        "qzeros": columns(w.zero_NQ.T - added),
        "scales": w.scale_NQ.T.half().contiguous(),
        "g_idx": w.g_idx.int(),
    }


def awq_fields(w: Plain, order: Any = AWQ_ORDER) -> dict[str, Tensor]:
    return {
        "qweight": columns(w.codes_NK.T, order),
        "qzeros": columns(w.zero_NQ.T, order),
        "scales": w.scale_NQ.T.half().contiguous(),
    }


def gptq_config(**keys: Any) -> dict[str, Any]:
    base = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": True,
        "sym": False,
        "lm_head": False,
    }
    return base | keys


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def read_gptq(fields: dict[str, Tensor], raw: dict[str, Any] | None) -> QuantWeight:
    return gptq.load("m", fields, N, K, gptq.read_config(raw))


def read_awq(fields: dict[str, Tensor], raw: dict[str, Any] | None = None) -> QuantWeight:
    return awq.load("m", fields, N, K, awq.read_config(raw))


def accumulators(weight: QuantWeight, x_TK: Tensor) -> Tensor:
    """What the engine's matmul would add up of int8 rows, before any scale: groups are added in float32, exact here."""
    order = torch.arange(K) if weight.order_K is None else weight.order_K
    w = prepare_w4a8(weight.codes_NK, torch.ones_like(weight.scale_NQ), weight.zero_NQ)
    return gemm_w4a8(x_TK[:, order].contiguous(), torch.ones(len(x_TK)), w, torch.float32).long()


def rows() -> Tensor:
    return torch.randint(-127, 128, (5, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)


@pytest.mark.parametrize("groups", [Q, 1])
@pytest.mark.parametrize("scattered", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
def test_gptq(version: str | None, symmetric: bool, scattered: bool, groups: int) -> None:
    w = plain(symmetric, scattered, groups)
    added = 0 if version == "gptq_v2" else 1
    raw = gptq_config(sym=symmetric, group_size=GROUP if groups > 1 else -1)
    raw |= {"checkpoint_format": version} if version else {}
    got = read_gptq(gptq_fields(w, added), raw)
    assert got.scheme == Scheme(4, GROUP if groups > 1 else None, symmetric, activations=None)
    assert (got.order_K is not None) == (scattered and groups > 1)
    assert torch.equal(got.dequantize(), w.dequantized())
    assert torch.equal(accumulators(got, rows()), rows().long() @ w.integers().T)


def test_gptq_zeros_of_0_survive_being_stored_less_one() -> None:
    w = plain()
    assert (w.zero_NQ == 0).any()
    assert (columns(w.zero_NQ.T - 1) != columns((w.zero_NQ - 1).clamp(min=0).T)).any()


def test_gptq_without_a_config_reads_what_cannot_be_mistaken() -> None:
    w = plain(symmetric=True)
    for added in (0, 1):
        assert torch.equal(read_gptq(gptq_fields(w, added), None).dequantize(), w.dequantized())
        # a config that is silent on the version, too
        assert torch.equal(
            read_gptq(gptq_fields(w, added), gptq_config(sym=True)).dequantize(), w.dequantized()
        )
    with pytest.raises(ValueError, match="no config to say whether they are stored less one"):
        read_gptq(gptq_fields(plain()), None)
    with pytest.raises(ValueError, match=r"qzeros must all mean 8 under sym, got 9\.\.9"):
        read_gptq(gptq_fields(w, 0), gptq_config(sym=True, checkpoint_format="gptq"))


def test_gptqmodel_gives_modules_settings_of_their_own() -> None:
    """`dynamic`: what the outer keys say of groups and symmetry is then not what every layer has."""
    w = plain()
    outer = gptq_config(sym=True, group_size=128, checkpoint_format="gptq")
    for raw in (outer, outer | {"dynamic": None}, outer | {"dynamic": {}}):
        with pytest.raises(ValueError, match=r"under sym|the config says group_size"):
            read_gptq(gptq_fields(w), raw)
    raw = outer | {"dynamic": {"+:.*down_proj": {"group_size": GROUP, "sym": False}, "-:.*o_proj": {}}}
    got = read_gptq(gptq_fields(w), raw)
    assert got.scheme == Scheme(4, GROUP, symmetric=False, activations=None)
    assert torch.equal(got.dequantize(), w.dequantized())


def test_gptq_shards_of_other_orders_are_not_fused() -> None:
    one = read_gptq(gptq_fields(plain(scattered=True)), gptq_config())
    assert one.order_K is not None
    assert fuse([one, one]) is not None
    assert fuse([one, replace(one, order_K=one.order_K.flip(0))]) is None


@pytest.mark.parametrize("groups", [Q, 1])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_awq(symmetric: bool, groups: int) -> None:
    w = plain(symmetric, groups=groups)
    for raw in (AWQ_CONFIG | {"group_size": GROUP if groups > 1 else -1, "version": "GEMM"}, None):
        got = read_awq(awq_fields(w), raw)
        assert got.scheme == Scheme(4, GROUP if groups > 1 else None, symmetric, activations=None)
        assert torch.equal(got.dequantize(), w.dequantized())
        assert torch.equal(accumulators(got, rows()), rows().long() @ w.integers().T)


def controls() -> Iterator[tuple[str, QuantWeight, Plain]]:
    w, scattered = plain(), plain(scattered=True)
    fields, raw = gptq_fields(w), gptq_config()
    yield "gptq z read as z - 1", read_gptq(gptq_fields(w, 0), raw), w
    yield "gptq v1 read as v2", read_gptq(fields, raw | {"checkpoint_format": "gptq_v2"}), w
    yield "gptq nibbles reversed", read_gptq(gptq_fields(w, order=range(7, -1, -1)), raw), w
    yield "gptq two's complement", read_gptq(gptq_fields(w._replace(codes_NK=(w.codes_NK + 8) % 16)), raw), w
    yield "gptq groups reversed", read_gptq(fields | {"scales": fields["scales"].flip(0)}, raw), w
    yield "gptq g_idx ignored", read_gptq(gptq_fields(scattered) | {"g_idx": w.g_idx.int()}, raw), scattered
    yield "awq in plain order", read_awq(awq_fields(w, range(8))), w
    yield "awq interleaved the other way", read_awq(awq_fields(w, [0, 4, 1, 5, 2, 6, 3, 7])), w
    yield "awq zeros less one", read_awq(awq_fields(w._replace(zero_NQ=(w.zero_NQ - 1) % 16))), w
    yield "awq two's complement", read_awq(awq_fields(w._replace(codes_NK=(w.codes_NK + 8) % 16))), w
    yield "awq groups reversed", read_awq(awq_fields(w) | {"scales": awq_fields(w)["scales"].flip(0)}), w


@pytest.mark.parametrize(("name", "got", "w"), list(controls()), ids=[c[0] for c in controls()])
def test_a_wrong_layout_is_not_read_as_the_right_weights(name: str, got: QuantWeight, w: Plain) -> None:
    off = ((got.dequantize() - w.dequantized()).norm() / w.dequantized().norm()).item()
    assert off > 0.1, f"{name} changes the weights by {off:.3f} only: the layout test could not tell"


ODD: list[Any] = [None, [], {}, "x", -1, 0, 4, 8, 4.0, True, [[1]], {"a": []}, 10**400, 1e300]
KEYS = {
    gptq: ("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic", "meta"),
    awq: ("quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version"),
    qserve: ("quant_method", "wbits", "group_size"),
    fireq: ("quant_method",),
}


def outcome(module: Any, raw: dict[str, Any]) -> Tensor | str:
    """The weights under this config, or why it is refused."""
    write = {gptq: gptq_fields, awq: awq_fields}.get(module)
    try:
        config = module.read_config(raw)
        return module.load("m", write(plain()), N, K, config).dequantize() if write else "read"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("module", KEYS, ids=lambda m: m.NAME)
def test_any_value_is_read_or_refused(module: Any) -> None:
    """A config that is read and not contradicted by the tensors leaves the weights what they are."""
    base = {gptq: gptq_config(), awq: AWQ_CONFIG}.get(module, {})
    for key in KEYS[module]:
        for value in ODD:
            got = outcome(module, {k: v for k, v in base.items() if k != key} | {key: value})
            if isinstance(got, str):
                assert len(got) < 400, f"{key}={value!r:.40}: {got}"
            else:
                assert torch.equal(got, plain().dequantized()), f"{key}={value!r:.40} changes the weights"


class Header(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


def headers(fields: dict[str, Tensor]) -> dict[str, Header]:
    return {f"m.{s}": Header(t.dtype, tuple(t.shape)) for s, t in fields.items()}


def test_detection_is_by_the_direction_of_the_words() -> None:
    """The config may even be absent, or name neither."""
    for module, fields in ((gptq, gptq_fields(plain())), (awq, awq_fields(plain()))):
        reader = recognise(headers(fields), None)
        assert reader.format is module
        assert reader.fields("m", headers(fields)) == list(fields)
    square = gptq_fields(plain())
    del square["g_idx"]
    assert recognise(headers(square), None).format is gptq
    assert recognise({}, AWQ_CONFIG).format is awq
    assert recognise({}, gptq_config()).format is gptq


GOOD, RAW = gptq_fields(plain()), gptq_config()
AWQ_GOOD = awq_fields(plain())
BAD: dict[str, tuple[Any, dict[str, Tensor], dict[str, Any] | None, str]] = {
    "no zeros": (gptq, {k: v for k, v in GOOD.items() if k != "qzeros"}, RAW, "qzeros missing; found qweight"),
    "8-bit words": (gptq, GOOD | {"qweight": torch.zeros(K // 4, N, dtype=torch.int32)}, RAW, "other bits are not supp"),
    "transposed": (gptq, GOOD | {"qweight": GOOD["qweight"].T}, RAW, "qweight must be int32"),
    "scales of other rows": (gptq, GOOD | {"scales": torch.ones(3, N)}, RAW, "scales must be floats"),
    "zeros of other groups": (gptq, GOOD | {"qzeros": GOOD["qzeros"][1:]}, RAW, "qzeros must be int32"),
    "g_idx too short": (gptq, GOOD | {"g_idx": GOOD["g_idx"][1:]}, RAW, "g_idx must be integers"),
    "g_idx of uneven groups": (gptq, GOOD | {"g_idx": torch.zeros(K).int()}, RAW, "must name each of 4 groups 16 times"),
    "g_idx out of range": (gptq, GOOD | {"g_idx": GOOD["g_idx"] + 1}, RAW, "must name each"),
    "another group size": (gptq, GOOD, RAW | {"group_size": 32}, "scales hold 4 groups, but the config says"),
    "3 bits": (gptq, GOOD, RAW | {"bits": 3}, "bits must be one of 4 .* got 3"),
    "marlin": (gptq, GOOD, RAW | {"checkpoint_format": "marlin"}, "checkpoint_format must be one of 'gptq', 'gptq_v2'"),
    "a number for sym": (gptq, GOOD, RAW | {"sym": 1}, "sym must be one of"),
    "another method": (gptq, GOOD, RAW | {"quant_method": "awq"}, "quant_method must be one of 'gptq'"),
    "no group size": (gptq, GOOD, RAW | {"group_size": 0}, "group_size must be -1 or above 0"),
    "NaN": (gptq, GOOD | {"scales": torch.full((Q, N), float("nan"))}, RAW, "finite"),
    "awq gemv": (awq, AWQ_GOOD, AWQ_CONFIG | {"version": "gemv"}, "version must be 'gemm'"),
    "awq 8 bits": (awq, AWQ_GOOD, AWQ_CONFIG | {"bits": 8}, "bits must be 4"),
    "awq groups": (awq, AWQ_GOOD, AWQ_CONFIG | {"group_size": 64}, "the config says group_size 64"),
    "awq words along the inputs": (awq, GOOD, AWQ_CONFIG, "qweight must be int32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_and_configs_are_refused(case: str) -> None:
    module, fields, raw, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        module.load("m", fields, N, K, module.read_config(raw))


def test_shapes_that_words_do_not_cover_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8, got 20 x 64"):
        gptq.load("m", GOOD, 20, K, gptq.read_config(RAW))
