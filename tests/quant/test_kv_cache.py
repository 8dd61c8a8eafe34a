"""KV schemes in every spelling, the scales of a layer in every name, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.formats.ct_config import read_config
from quant.formats.kv_cache import SUFFIXES, KvScheme, declared, load, scheme_args

LAYER = "model.layers.0.self_attn"
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
KV_OUTPUTS = {"targets": ["re:.*k_proj", "re:.*v_proj$"], "weights": None, "output_activations": FP8}
ATTENTION = {
    "targets": ["LlamaAttention"],
    "weights": None,
    "input_activations": FP8 | {"strategy": "attn_head"},
}


def ct(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {}} | keys


DECLARED: list[tuple[dict[str, Any] | None, KvScheme | None]] = [
    (None, None),
    (ct(), None),
    (ct(kv_cache_scheme=None), None),
    (ct(kv_cache_scheme=FP8), KvScheme("fp8", True)),
    ({"kv_cache_scheme": FP8}, KvScheme("fp8", True)),
    ({"quantization_config": ct(kv_cache_scheme=FP8), "sparsity_config": {}}, KvScheme("fp8", True)),
    (ct(kv_cache_scheme=FP8 | {"type": "int"}), KvScheme("int8", True)),
    (ct(kv_cache_scheme=FP8 | {"strategy": "attn_head"}), KvScheme("fp8", True)),
    (ct(kv_cache_scheme=FP8 | {"dynamic": True, "strategy": "token"}), KvScheme("fp8", False)),
    (ct(kv_cache_scheme={"num_bits": 4, "dynamic": True}), KvScheme("int4", False)),
    (ct(kv_cache_scheme={"num_bits": 4, "dynamic": True, "symmetric": False}), KvScheme("int4z", False)),
    (ct(config_groups={"g": KV_OUTPUTS}), KvScheme("fp8", True)),
    (ct(config_groups={"g": ATTENTION}), KvScheme("fp8", True)),
    (ct(config_groups={"g": ATTENTION, "h": KV_OUTPUTS}, kv_cache_scheme=FP8), KvScheme("fp8", True)),
    # queries alone
    (ct(config_groups={"g": KV_OUTPUTS | {"targets": ["re:.*q_proj"]}}), None),
    # the inputs of linear layers are theirs
    (ct(config_groups={"g": ATTENTION | {"targets": ["Linear"], "weights": {}}}), None),
    ({"quant_method": "fp8"}, None),
]


@pytest.mark.parametrize(("raw", "scheme"), DECLARED, ids=range(len(DECLARED)))
def test_every_spelling(raw: dict[str, Any] | None, scheme: KvScheme | None) -> None:
    assert declared(raw) == scheme


def test_native_fp8_declares_by_its_tensors() -> None:
    for name in ("k_scale", "kv_scale", "k_proj.output_scale"):
        assert declared({"quant_method": "fp8"}, [f"{LAYER}.{name}"]) == KvScheme("fp8", True)
    assert declared({"quant_method": "fp8"}, [f"{LAYER}.k_proj.weight_scale", f"{LAYER}.q_scale"]) is None
    # elsewhere nothing says whether they are fp8 or int8: they stay tensors that nobody takes
    assert declared(ct(), [f"{LAYER}.k_scale"]) is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    (ct(kv_cache_scheme=FP8 | {"num_bits": 4}), "float4, tensor, symmetric"),
    (ct(kv_cache_scheme=FP8 | {"type": "int", "num_bits": 4}), "int4, tensor"),
    (ct(kv_cache_scheme=FP8 | {"symmetric": False}), "with zero points"),
    (ct(kv_cache_scheme=FP8 | {"strategy": "channel"}), "channel"),
    (ct(kv_cache_scheme=FP8 | {"type": "int", "dynamic": True, "symmetric": False}), "with zero points, dynamic"),
    (ct(kv_cache_scheme="fp8"), "kv_cache_scheme must be an object or null"),
    (ct(kv_cache_scheme=FP8 | {"num_bits": "8"}), "num_bits must be"),
    (ct(kv_cache_scheme=FP8, config_groups={"g": KV_OUTPUTS | {"output_activations": FP8 | {"type": "int"}}}), "one for all layers"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_other_schemes_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="quantization_config: ") as error:
        declared(raw)
    assert message in str(error.value)


NAMES = [
    ("k_scale", "v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("kv_scale", "kv_scale"),
]


@pytest.mark.parametrize(("key", "value"), NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)])
def test_scales_by_every_name(key: str, value: str, shape: tuple[int, ...]) -> None:
    fields = {key: torch.full(shape, 0.5, dtype=torch.bfloat16), value: torch.full(shape, 0.25).bfloat16()}
    # of queries and probabilities: read and dropped
    fields |= {
        "q_scale": torch.ones(1),
        "q_proj.output_scale": torch.ones(1),
        "prob_output_scale": torch.ones(1),
    }
    assert set(fields) <= set(SUFFIXES)
    scales = load(LAYER, fields, 2)
    assert scales.k_G.dtype == torch.float32
    assert scales.k_G.tolist() == [0.25 if key == value else 0.5] * 2
    assert scales.v_G.tolist() == [0.25] * 2


def test_the_pair_of_qserve() -> None:
    assert declared(None, [f"{LAYER}.kv_scale_quant_orig"]) == KvScheme("int8", True)
    pair = torch.tensor([0.5, 0.25], dtype=torch.float16)
    scales = load(LAYER, {"kv_scale_quant_orig": pair}, 2, "int8")
    assert (scales.k_G.tolist(), scales.v_G.tolist()) == ([0.5, 0.5], [0.25, 0.25])
    with pytest.raises(ValueError, match=r"kv_scale_quant_orig must be 2 floats, got torch.float16 \[1\]"):
        load(LAYER, {"kv_scale_quant_orig": pair[:1]}, 2, "int8")


def test_scales_that_the_cache_can_keep_are_taken() -> None:
    for value in (65504.0, 0.013, 2.0**-14 / 1.001, 2.0**-17, 1.3 * 2.0**-17):
        assert load(LAYER, {"k_scale": ONE * value, "v_scale": ONE}, 2).k_G.tolist() == pytest.approx(
            [value] * 2
        )


def test_a_scale_a_head_keeps_its_head() -> None:
    k, v = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1)
    scales = load(LAYER, {"k_scale": k, "v_scale": v}, 3)
    assert (scales.k_G.tolist(), scales.v_G.tolist()) == ([1, 2, 3], [4, 5, 6])


ONE = torch.ones(1)
BAD: list[tuple[dict[str, Tensor], str]] = [
    (
        {},
        "self_attn.k_scale is missing, though the checkpoint declares a static fp8 KV cache: set kv_dtype to fp8",
    ),
    ({"k_scale": ONE}, "self_attn.v_scale is missing"),
    ({"k_scale": torch.ones(3), "v_scale": ONE}, "k_scale must be 1 or 2 floats"),
    ({"k_scale": ONE.int(), "v_scale": ONE}, "k_scale must be 1 or 2 floats, got torch.int32"),
    ({"k_scale": ONE, "v_scale": -ONE}, "v_scale must be finite and above 0, got"),
    ({"k_scale": ONE * float("nan"), "v_scale": ONE}, "k_scale must be finite"),
    (
        {"k_scale": ONE * 1e6, "v_scale": ONE},
        "k_scale must be 8e-06 to 65504, since the cache keeps scales in fp16, got",
    ),
    ({"k_scale": ONE, "v_scale": ONE * 1e-9}, "v_scale must be 8e-06 to 65504"),
    ({"k_scale": ONE, "v_scale": ONE * 2.5 * 2.0**-24}, "v_scale must be 8e-06 to 65504"),
    ({"k_scale": ONE, "v_scale": ONE, "k_zero_point": ONE}, "k_zero_point must be 0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_scales_are_refused(fields: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(LAYER, fields, 2)


def test_what_is_written_is_declared() -> None:
    for fmt in ("fp8", "int8"):
        raw = ct(kv_cache_scheme=scheme_args(fmt))
        assert declared(raw) == KvScheme(fmt, True)
        assert read_config(raw) is not None
    with pytest.raises(ValueError, match="one of fp8, int8, got 'int4'"):
        scheme_args("int4")
