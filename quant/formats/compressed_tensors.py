"""compressed-tensors layers: int8, int4 and fp8 weights with their activations' constants, tensors in and out.

Detected by tensors first: the container is what lies in the file (int8 or e4m3 `weight`, or int32 `weight_packed`), and
a layer with a float `weight` alone is plain whatever the config says.  Where both speak (bits, groups, symmetry) they
must agree; only the config knows the activations.  Layouts: int8 or e4m3 [N, K] | words of 8 nibbles along K,
offset-binary; zero points packed along N; `weight_g_idx` [K] the group of each column.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.formats import ct_config
from quant.formats.ct_config import SUPPORTED, CtConfig
from quant.formats.ct_save import config_object, save
from quant.formats.scales import block_scales, input_constants, row_scales
from quant.pack import num_words, unpack
from quant.rtn import FP8_MAX
from quant.scheme import FP8, Activations, QuantWeight, Scheme

# every tensor a writer of this format may put beside a linear layer, its bias and what belongs to the KV cache apart
SUFFIXES: tuple[str, ...] = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
REFUSED = {"weight_global_scale", "input_global_scale"}  # of FP4
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAME = "compressed-tensors"
read_config = ct_config.read_config
__all__ = ["NAME", "SUFFIXES", "config_object", "detect", "load", "read_config", "save", "targets"]


def detect(infos: Mapping[str, Any], raw: Mapping[str, Any] | None) -> bool:
    """Where it says so itself, or in the tensor that no other format has."""
    said = raw is not None and raw.get("quant_method") == NAME
    return said or any(name.endswith(".weight_packed") for name in infos)


def load(
    module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int, config: CtConfig | None
) -> QuantWeight:
    """The layer `module` from its tensors by suffix; each of them is used, or named in the error."""
    shape = (out_features, in_features)
    _check_fields(fields)
    declared = _declared(module, config)
    if "weight" in fields and fields["weight"].dtype not in (torch.int8, FP8):
        fields = {**fields, "weight": _rounded(fields, shape, declared)}
    values = "fp8" if "weight" in fields and fields["weight"].dtype == FP8 else "int"
    if declared is not None and declared.values != values:
        raise ValueError(f"tensors hold {values} weights, but the config says {declared}")
    rows = declared.activations if declared else _rows_of(fields, values)
    constants = input_constants(fields, rows)
    if values == "fp8":
        return _load_fp8(fields, shape, declared, rows, constants)
    scale_NQ = row_scales("weight_scale", fields["weight_scale"], shape)
    Q = scale_NQ.shape[1]
    codes_NK, bits = _codes(fields, shape, Q, declared)
    zero_NQ = _zeros(fields, (out_features, Q), bits, declared)
    scheme = Scheme(bits, None if Q == 1 else in_features // Q, zero_NQ is None, rows)
    want_Q = 1 if declared is None or declared.group_size is None else in_features / declared.group_size
    if declared and (want_Q != Q or declared.bits != bits):
        raise ValueError(f"tensors hold {scheme}, but the config says {declared}")
    order_K = _order(fields["weight_g_idx"], Q, in_features) if "weight_g_idx" in fields else None
    if order_K is not None:
        codes_NK = codes_NK[:, order_K]
    return QuantWeight(scheme, codes_NK, scale_NQ, zero_NQ, order_K=order_K, **constants).check()


def targets(module: str, config: CtConfig | None) -> bool:
    """Whether the config says that `module` is quantized."""
    return config is not None and config.match(module) is not None


def _check_fields(fields: Mapping[str, Tensor]) -> None:
    found = ", ".join(f"{s} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for s, t in fields.items())
    weight, packed = fields.get("weight"), fields.get("weight_packed")
    good = set(fields) <= set(SUFFIXES) - REFUSED and "weight_scale" in fields
    good &= (weight is None) != (packed is None)
    if weight is not None:
        good &= weight.dtype in (torch.int8, FP8, *FLOATS) and "weight_shape" not in fields
    if packed is not None:
        good &= packed.dtype == torch.int32 and "weight_shape" in fields
    if not good:
        raise ValueError(f"found tensors {found or 'none'}; {SUPPORTED}")


def _declared(module: str, config: CtConfig | None) -> Scheme | None:
    """None without a config: then the tensors alone decide."""
    if config is None:
        return None
    group = config.match(module)
    if group is None:
        why = "ignores it" if config.ignores(module) else "has no group with weights for it"
        raise ValueError(f"its tensors are quantized, but the config {why}")
    return group.scheme


def _rows_of(fields: Mapping[str, Tensor], values: str) -> Activations:
    """What the tensors say of the activations where no config does: 8 bits, static where they bring a scale."""
    dtype = "fp8" if values == "fp8" else "int8"
    return Activations(dtype, "input_scale" not in fields, not _any(fields.get("input_zero_point")))


def _load_fp8(
    fields: Mapping[str, Tensor],
    shape: tuple[int, int],
    declared: Scheme | None,
    rows: Activations | None,
    constants: dict[str, Any],
) -> QuantWeight:
    """e4m3 weights with scales by tensor, channel or block."""
    if "weight_g_idx" in fields or _any(fields.get("weight_zero_point")):
        raise ValueError(f"found weight_g_idx or zero points beside fp8 weights; {SUPPORTED}")
    _check_shape(fields["weight"], shape)
    scale = fields["weight_scale"]
    by_channel = scale.numel() == 1 or scale.shape in ((shape[0], 1), (shape[0],))
    by_block = declared.block if declared else not by_channel
    if by_block and declared is None and not constants:
        rows = Activations("fp8", block=True)
    scheme = Scheme(8, activations=rows, values="fp8", block=by_block)
    scale_NQ = (block_scales if by_block else row_scales)("weight_scale", scale, shape)
    return QuantWeight(scheme, fields["weight"], scale_NQ, **constants).check()


def _rounded(fields: Mapping[str, Tensor], shape: tuple[int, int], declared: Scheme | None) -> Tensor:
    """The codes of float weights beside their scales: a checkpoint that was frozen and not compressed.

    They are rounded with those scales, as its writer's forward pass rounds them.
    """
    if declared is None or declared.block or "weight_g_idx" in fields:
        raise ValueError(
            f"found a float weight beside weight_scale, but the config says {declared or 'nothing'}"
        )
    weight = fields["weight"].float()
    _check_shape(weight, shape)
    scale_NQ = row_scales("weight_scale", fields["weight_scale"], shape)
    if not bool((scale_NQ > 0).all()) or not bool(torch.isfinite(weight).all()):
        raise ValueError("float weights must be finite and their scales positive to be rounded")
    codes_NQg = weight.view(*scale_NQ.shape, -1) / scale_NQ[..., None]
    if declared.values == "fp8":
        return codes_NQg.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(shape)
    if "weight_zero_point" in fields:
        zero_NQ = fields["weight_zero_point"]
        _check_shape(zero_NQ, (scale_NQ.shape[0], scale_NQ.shape[1]), "weight_zero_point")
        codes_NQg += zero_NQ.float()[..., None]
    return codes_NQg.round().clamp(declared.low, declared.high).to(torch.int8).view(shape)


def _check_shape(value: Tensor, shape: tuple[int, int], name: str = "weight") -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")


def _codes(
    fields: Mapping[str, Tensor], shape: tuple[int, int], num_groups: int, declared: Scheme | None
) -> tuple[Tensor, int]:
    """Codes [N, K] and their bits, which an int8 container leaves to the config or to the groups."""
    N, K = shape
    if "weight" in fields:
        _check_shape(fields["weight"], shape)
        return fields["weight"], declared.bits if declared else 8 if num_groups == 1 else 4
    words, stated = fields["weight_packed"], fields["weight_shape"].flatten().tolist()
    if stated != [N, K]:
        raise ValueError(f"weight_shape must be {[N, K]}, got {stated}")
    # the words say the bits themselves, save in rows of four codes or fewer
    fitting = [b for b in (4, 8) if words.shape == (N, num_words(K, b))]
    if not fitting:
        raise ValueError(
            f"weight_packed must be {[N, num_words(K, 4)]} (4 bits) or {[N, num_words(K, 8)]} (8 bits), "
            f"got {list(words.shape)}"
        )
    bits = declared.bits if declared and declared.bits in fitting else fitting[0]
    return unpack(words, bits, K), bits


def _zeros(
    fields: Mapping[str, Tensor], shape: tuple[int, int], bits: int, declared: Scheme | None
) -> Tensor | None:
    """int8 [N, Q], or None for symmetric weights, of which old writers store zeros too."""
    if "weight_zero_point" not in fields:
        if declared and not declared.symmetric:
            raise ValueError(f"weight_zero_point is missing, which {declared} needs")
        return None
    zero, (N, Q) = fields["weight_zero_point"], shape
    if (
        not _any(zero)
        and (zero.numel() == 1 or zero.shape == shape)
        and (declared is None or declared.symmetric)
    ):
        return None
    if "weight_packed" in fields:
        want, dtype = [num_words(N, bits), Q], torch.int32
    else:
        want, dtype = [N, Q], torch.int8
    if list(zero.shape) != want or zero.dtype != dtype:
        raise ValueError(f"weight_zero_point must be {dtype} {want}, got {zero.dtype} {list(zero.shape)}")
    zero_NQ = unpack(zero, bits, N, dim=0) if dtype == torch.int32 else zero
    if declared is None or declared.symmetric:
        if declared and _any(zero_NQ):
            raise ValueError(f"weight_zero_point is not zero, but the config says {declared}")
        return zero_NQ if _any(zero_NQ) else None
    return zero_NQ


def _any(value: Tensor | None) -> bool:
    return value is not None and bool(value.float().any())


def _order(group_K: Tensor, num_groups: int, in_features: int) -> Tensor | None:
    """Columns in the order of their groups, from the group of each (old activation order); None where they lie so."""
    K, size = in_features, in_features // num_groups
    if group_K.shape != (K,) or group_K.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"weight_g_idx must be int32 {[K]}, got {group_K.dtype} {list(group_K.shape)}")
    group_K = group_K.long()
    in_line = torch.arange(K, device=group_K.device) // size
    # writers start it at -1 and leave it there without an order
    if bool((group_K == -1).all()) or torch.equal(group_K, in_line):
        return None
    order_K = group_K.argsort(stable=True)
    if not torch.equal(group_K[order_K], in_line):
        raise ValueError(f"weight_g_idx must name each of {num_groups} groups {size} times")
    return order_K
