"""compressed-tensors layers: W8A8 int8 and W4A8 int4, tensors in and out.

Detected by tensors first: the container is what lies in the file (int8 `weight`, or int32 `weight_packed`), and a
layer with a float `weight` alone is plain whatever the config says.  Where both speak (bits, group size, symmetry)
they must agree.  Layouts: int8 [N, K] | words of 8 nibbles along K, offset-binary; zero points packed along N.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.formats import ct_config
from quant.formats.ct_config import SUPPORTED, CtConfig
from quant.pack import num_words, pack, unpack
from quant.scheme import QuantWeight, Scheme

# every tensor a writer of this format may put beside a linear layer, its bias apart
SUFFIXES: tuple[str, ...] = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale",
)  # fmt: skip
NAME = "compressed-tensors"
read_config = ct_config.read_config
CONTAINERS = {"packed": "pack-quantized", "int8": "int-quantized"}


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
    group = config.match(module) if config else None
    declared = group.scheme if group else None
    scale_NQ = _scales(fields["weight_scale"], shape)
    codes_NK, bits = _codes(fields, shape, scale_NQ.shape[1], declared)
    zero_NQ = _zeros(fields, scale_NQ.shape, bits)
    if zero_NQ is None and declared and not declared.symmetric and "weight_zero_point" not in fields:
        raise ValueError(f"weight_zero_point is missing, which {declared} needs")
    if zero_NQ is not None and declared and declared.symmetric:
        raise ValueError(f"weight_zero_point is not zero, but the config says {declared}")
    Q = scale_NQ.shape[1]
    scheme = Scheme(bits, None if Q == 1 else shape[1] // Q, zero_NQ is None)
    want_Q = 1 if declared is None or declared.group_size is None else shape[1] / declared.group_size
    if declared and (want_Q != Q or declared.bits != bits):
        raise ValueError(f"tensors hold {scheme}, but the config says {declared}")
    return QuantWeight(scheme, codes_NK, scale_NQ, zero_NQ).check()


def _check_fields(fields: Mapping[str, Tensor]) -> None:
    found = ", ".join(f"{s} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for s, t in fields.items())
    weight, packed = fields.get("weight"), fields.get("weight_packed")
    known = {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}
    good = not set(fields) - known and (weight is None) != (packed is None) and "weight_scale" in fields
    good &= weight is None or (weight.dtype == torch.int8 and "weight_shape" not in fields)
    good &= packed is None or (packed.dtype == torch.int32 and "weight_shape" in fields)
    if not good:
        raise ValueError(f"found tensors {found or 'none'}; {SUPPORTED}")


def _codes(
    fields: Mapping[str, Tensor], shape: tuple[int, int], num_groups: int, declared: Scheme | None
) -> tuple[Tensor, int]:
    """Codes [N, K] and their bits, which an int8 container leaves to the config or to the groups."""
    N, K = shape
    if "weight" in fields:
        codes = fields["weight"]
        if codes.shape != shape:
            raise ValueError(f"weight must be {[N, K]}, got {list(codes.shape)}")
        return codes, declared.bits if declared else 8 if num_groups == 1 else 4
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


def _scales(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """float32 [N, Q]; one scale for the whole tensor is repeated a row."""
    N, K = shape
    if not scale.dtype.is_floating_point:
        raise ValueError(f"weight_scale must be a float tensor, got {scale.dtype}")
    if scale.numel() == 1 and scale.ndim <= 1:
        return scale.float().reshape(1, 1).repeat(N, 1)
    if scale.ndim != 2 or scale.shape[0] != N or not scale.shape[1] or K % scale.shape[1]:
        raise ValueError(
            f"weight_scale must be [1], [{N}, 1] or [{N}, groups of {K}], got {list(scale.shape)}"
        )
    return scale.float()


def _zeros(fields: Mapping[str, Tensor], shape: torch.Size, bits: int) -> Tensor | None:
    """int8 [N, Q], or None where there are none or all are zero (old writers store them for symmetric layers)."""
    if "weight_zero_point" not in fields:
        return None
    zero, (N, Q) = fields["weight_zero_point"], shape
    if "weight_packed" in fields:
        want, dtype = [num_words(N, bits), Q], torch.int32
    else:
        want, dtype = [N, Q], torch.int8
    if zero.numel() == 1 and N * Q > 1 and not zero.any():
        return None
    if list(zero.shape) != want or zero.dtype != dtype:
        raise ValueError(f"weight_zero_point must be {dtype} {want}, got {zero.dtype} {list(zero.shape)}")
    zero_NQ = unpack(zero, bits, N, dim=0) if dtype == torch.int32 else zero
    return zero_NQ if bool(zero_NQ.any()) else None


def save(weight: QuantWeight, container: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer by suffix; `container` is 'packed' or 'int8'."""
    if container not in CONTAINERS:
        raise ValueError(f"container must be one of {', '.join(CONTAINERS)}, got {container!r}")
    scale_NQ, bits = weight.scale_NQ.to(scale_dtype), weight.scheme.bits
    if not torch.equal(scale_NQ.float(), weight.scale_NQ):
        raise ValueError(f"scales do not fit {scale_dtype}: quantize with scale_dtype={scale_dtype}")
    fields = {"weight_scale": scale_NQ}
    if container == "int8":
        fields["weight"] = weight.codes_NK
        if weight.zero_NQ is not None:
            fields["weight_zero_point"] = weight.zero_NQ
        return fields
    fields["weight_packed"] = pack(weight.codes_NK, bits)
    fields["weight_shape"] = torch.tensor(weight.codes_NK.shape)
    if weight.zero_NQ is not None:
        fields["weight_zero_point"] = pack(weight.zero_NQ, bits, dim=0)
    return fields


def config_object(groups: Mapping[Scheme, list[str]], container: str, ignore: list[str]) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose modules have these schemes."""
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config_groups = {}
    for i, (scheme, targets) in enumerate(groups.items()):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        config_groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
            "format": CONTAINERS[container],
        }
    return {
        "quant_method": "compressed-tensors",
        "format": CONTAINERS[container],
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
