"""compressed-tensors layers and configs by hand, from the byte layouts."""

import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quant.formats import compressed_tensors
from quant.formats.catalog import Reader
from quant.formats.ct_config import CtConfig
from quant.scheme import QuantWeight

N, K = 24, 64
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def load(
    module: str, fields: Mapping[str, Tensor], rows: int, columns: int, ct: CtConfig | None
) -> QuantWeight:
    return Reader(compressed_tensors, ct).load(module, fields, rows, columns)


def config(
    bits: int = 8,
    strategy: str | None = "channel",
    group_size: int | None = None,
    *,
    rows: dict[str, Any] | None = TOKEN,
    targets: Sequence[str] = ("Linear",),
    **weights: Any,
) -> dict[str, Any]:
    """`rows` are changes to dynamic int8 activations by token; None means none."""
    args = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
    }
    inputs = None if rows is None else TOKEN | rows
    group = {"targets": list(targets), "weights": args | weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def random_codes(bits: int, rows: int = N, columns: int = K, seed: int = 0) -> list[list[int]]:
    r = random.Random(seed)
    return [[r.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(columns)] for _ in range(rows)]


def nibble_words(rows: list[list[int]], order: range = range(8), offset: int = 8) -> Tensor:
    """int32 words from bytes written one by one: the first code of a row is the low nibble of its first byte."""
    out = []
    for row in rows:
        row = row + [-offset] * (-len(row) % 8)
        data = bytearray()
        for i in range(0, len(row), 8):
            nibbles = [row[i + j] + offset & 15 for j in order]
            data += bytes(nibbles[j] | nibbles[j + 1] << 4 for j in range(0, 8, 2))
        out.append(struct.unpack(f"<{len(data) // 4}i", bytes(data)))
    return torch.tensor(out, dtype=torch.int32)


def scales(groups: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(N, groups, generator=torch.Generator().manual_seed(7)) + 0.5).to(dtype)


def packed(codes: list[list[int]], groups: int, **extra: Tensor) -> dict[str, Tensor]:
    shape = torch.tensor([N, K])
    return {
        "weight_packed": nibble_words(codes),
        "weight_scale": scales(groups),
        "weight_shape": shape,
        **extra,
    }
