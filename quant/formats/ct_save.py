"""What compressed-tensors' own writer would have written: the tensors of one layer, and the config of a checkpoint.

`container` is for integer codes: 'packed' (nibbles in int32 words, which vLLM wants) or 'int8' (a byte each); fp8
weights are stored as they are.  Activation order with groups and progressive steps have no place in this format.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.pack import pack
from quant.scheme import BLOCK, Activations, QuantWeight, Scheme

CONTAINERS = {"packed": "pack-quantized", "int8": "int-quantized"}


def save(weight: QuantWeight, container: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer by suffix; ValueError where the format cannot hold them exactly."""
    _check_container(container)
    scheme = weight.scheme
    fields = {"weight_scale": _exactly(weight.scale_NQ, scale_dtype, "scales")}
    if scheme.activations and not scheme.activations.dynamic:
        scale = torch.tensor([weight.input_scale])
        fields["input_scale"] = _exactly(scale, scale_dtype, "the input scale")
        if weight.input_zero is not None:
            fields["input_zero_point"] = torch.tensor([weight.input_zero], dtype=torch.int8)
    if scheme.values == "fp8":
        return fields | {"weight": weight.codes_NK}
    codes_NK, zero_NQ = _in_order(weight), weight.zero_NQ
    if container == "int8":
        return fields | {"weight": codes_NK} | ({} if zero_NQ is None else {"weight_zero_point": zero_NQ})
    fields["weight_packed"] = pack(codes_NK, scheme.bits)
    fields["weight_shape"] = torch.tensor(codes_NK.shape)
    if zero_NQ is not None:
        fields["weight_zero_point"] = pack(zero_NQ, scheme.bits, dim=0)
    return fields


def _check_container(container: str) -> None:
    if container not in CONTAINERS:
        raise ValueError(f"container must be one of {', '.join(CONTAINERS)}, got {container!r}")


def _exactly(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    stored = values.to(dtype)
    if not torch.equal(stored.float(), values.float()):
        raise ValueError(f"{what} do not fit {dtype}: quantize with scale_dtype={dtype}")
    return stored


def _in_order(weight: QuantWeight) -> Tensor:
    """Codes with the columns of x.  An order without groups is none."""
    if weight.scheme.progressive:
        raise ValueError(f"compressed-tensors has no progressive weights, got {weight.scheme}")
    if weight.order_K is None:
        return weight.codes_NK
    if weight.num_groups > 1:
        raise ValueError(
            f"compressed-tensors has no order of columns in groups any more, got {weight.scheme} with one"
        )
    codes_NK = torch.empty_like(weight.codes_NK)
    codes_NK[:, weight.order_K] = weight.codes_NK
    return codes_NK


def config_object(
    groups: Mapping[Scheme, list[str]],
    container: str,
    ignore: list[str],
    kv_cache: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose modules have these schemes; `kv_cache` as `kv_cache.scheme_args`."""
    _check_container(container)
    config_groups = {
        f"group_{i}": {
            "targets": targets,
            "weights": _weight_args(scheme),
            "input_activations": _row_args(scheme.activations),
            "output_activations": None,
            "format": _format(scheme, container),
        }
        for i, (scheme, targets) in enumerate(groups.items())
    }
    formats = {_format(scheme, container) for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignore,
        "kv_cache_scheme": None if kv_cache is None else dict(kv_cache),
    }


def _format(scheme: Scheme, container: str) -> str:
    return "float-quantized" if scheme.values == "fp8" else CONTAINERS[container]


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    strategy = "block" if scheme.block else "channel" if scheme.group_size is None else "group"
    args = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.values == "fp8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return args | ({"block_structure": [BLOCK, BLOCK]} if scheme.block else {})


def _row_args(rows: Activations | None) -> dict[str, Any] | None:
    if rows is None:
        return None
    return {
        "num_bits": 8,
        "type": "float" if rows.dtype == "fp8" else "int",
        "symmetric": rows.symmetric,
        "strategy": "group" if rows.block else "token" if rows.dynamic else "tensor",
        "group_size": BLOCK if rows.block else None,
        "dynamic": rows.dynamic,
    }
