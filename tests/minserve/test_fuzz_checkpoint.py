"""Damaged checkpoints through the loading path itself: a ValueError that says something, or a model whose every tensor
lies inside its file.  Seeded; each must take under five seconds.

The damage: values of config.json, of a file's header or of the index exchanged, removed or doubled, and bytes of them
changed, cut off or added.  What tensors hold is left alone: any bytes are numbers.
"""

import copy
import json
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minserve.checkpoint import Checkpoint
from minserve.config import ModelEntry
from minserve.loading import load_model
from minserve.resolve import resolve_model
from quant.formats.compressed_tensors import config_object, save
from quant.rtn import quantize
from quant.scheme import FP8_ROWS, Activations, QuantWeight, Scheme
from tests.tiny import write_llama

SECONDS = 5.0
INDEX = "model.safetensors.index.json"
STATIC = Scheme(8, activations=Activations(dynamic=False, symmetric=False))
SHARDS = ("one.safetensors", "two.safetensors")
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 8, 16, 31, 128, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, "", "x", "4", "int", "float",
    "re:(", "re:.*", "re:(x+x+)+y", "Linear", "fp8", "gptq", "awq", "tensor", "group", "block", "token", "I8", "F32", "F8_E4M3",
    "one.safetensors", "../x.safetensors", [], [[]], [0], [-1, 2], [2**40, 2**40], [128, 128], {}, {"a": {}},
    {"num_bits": 4}, "\u0000", "é" * 300,
)  # fmt: skip


def _modules(plain: Path) -> tuple[dict[str, Tensor], list[str]]:
    tensors = load_file(plain / "model.safetensors")
    return tensors, [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]


def _replaced(
    plain: Path, fields: Callable[[Tensor], dict[str, Tensor]], quantization: dict[str, Any], out: Path
) -> dict[str, Tensor]:
    """Writes config.json; returns all tensors, those of linear layers as `fields` makes them."""
    tensors, modules = _modules(plain)
    for module in modules:
        made = fields(tensors.pop(f"{module}.weight"))
        tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in made.items()}
    out.mkdir()
    config = json.loads((plain / "config.json").read_text()) | quantization
    (out / "config.json").write_text(json.dumps(config))
    return tensors


def groups_with_zeros(plain: Path, out: Path) -> Path:
    """int4 in groups with zero points, packed; fp8 KV with constant scales; two shards."""
    scheme = Scheme(4, 32, symmetric=False)
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    raw = config_object({scheme: ["re:.*_proj"]}, "packed", ["lm_head"], kv)
    made = _replaced(
        plain, lambda w: save(quantize(w, scheme), "packed", torch.float32), {"quantization_config": raw}, out
    )
    made |= {f"model.layers.0.self_attn.{kind}_scale": torch.tensor([0.05]) for kind in "kv"}
    names = sorted(made)
    halves = {SHARDS[0]: names[::2], SHARDS[1]: names[1::2]}
    for file, held in halves.items():
        save_file({name: made[name] for name in held}, out / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return out


def static_rows(plain: Path, out: Path) -> Path:
    """int8 with constant scales and zero points of the inputs, in the old key."""

    def fields(w: Tensor) -> dict[str, Tensor]:
        return save(replace(quantize(w, STATIC), input_scale=0.0625, input_zero=-9), "int8", torch.float32)

    raw = config_object({STATIC: ["Linear"]}, "int8", ["lm_head"])
    save_file(_replaced(plain, fields, {"compression_config": raw}, out), out / "model.safetensors")
    return out


def native_fp8(plain: Path, out: Path) -> Path:
    scheme = Scheme(8, activations=FP8_ROWS, values="fp8")

    def fields(w: Tensor) -> dict[str, Tensor]:
        weight: QuantWeight = quantize(w, scheme)
        return {"weight": weight.codes_NK, "weight_scale": weight.scale_NQ[:1, 0]}

    raw = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
    save_file(_replaced(plain, fields, {"quantization_config": raw}, out), out / "model.safetensors")
    return out


BASES = (groups_with_zeros, static_rows, native_fp8)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    at = tmp_path_factory.mktemp("bases")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = write_llama(at / "plain", seed=1, vocab_size=40, num_key_value_heads=1, **small)
    return [make(plain, at / make.__name__) for make in BASES]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        found += [(value, key), *places(child)]
    return found


def change_values(value: Any, r: random.Random) -> Any:
    """One to three values exchanged, removed, doubled or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        held, key = r.choice(places(value) or [({"": value}, "")])
        match r.randrange(6):
            case 0:
                del held[key]
            case 1 if isinstance(held, dict):
                held[f"{key}{r.choice(('_', 'x', '.weight'))}"] = held[key]
            case 2 if isinstance(held[key], int) and not isinstance(held[key], bool):
                held[key] += r.choice((-1, 1, 7, -(2**20), 2**33))
            case 3:
                other, at = r.choice(places(value))
                held[key] = copy.deepcopy(other[at])
            case _:
                held[key] = copy.deepcopy(r.choice(ODD))
    return value


def change_bytes(data: bytes, r: random.Random) -> bytes:
    raw = bytearray(data)
    match r.randrange(5):
        case 0:
            return bytes(raw[: r.randrange(len(raw))])
        case 1:
            return bytes(raw) + r.randbytes(r.choice((1, 8, 100)))
        case 2:
            at = r.randrange(len(raw))
            return bytes(raw[:at] + raw[at : at + r.randrange(1, 40)] * 2 + raw[at:])
        case _:
            for _ in range(r.choice((1, 1, 2, 8))):
                raw[r.randrange(len(raw))] = r.choice(
                    (0, 32, 34, 44, 45, 48, 57, 91, 93, 123, 125, 255, r.randrange(256))
                )
            return bytes(raw)


def damaged(data: bytes, is_tensors: bool, r: random.Random) -> bytes:
    """Another config, index, or header of a file whose tensors stay as they are."""
    if not is_tensors:
        return (
            change_bytes(data, r)
            if r.random() < 0.3
            else json.dumps(change_values(json.loads(data), r)).encode()
        )
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    match r.randrange(8):
        case 0:
            return change_bytes(data[: 8 + length], r) + rest
        case 1:
            return change_bytes(data, r)
        case 2:
            odd = r.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1))
            return struct.pack("<Q", odd) + data[8:]
        case _:
            header = json.dumps(change_values(json.loads(header), r)).encode()
            return struct.pack("<Q", len(header)) + header + rest


def load(folder: Path) -> str:
    """What came of it.  Whatever is not a ValueError passes through and fails the test."""
    entry = ModelEntry.read(
        {
            "name": "m",
            "path": str(folder),
            "max_model_len": 32,
            "max_num_seqs": 2,
            "max_num_batched_tokens": 32,
        }
    )
    try:
        load_model(resolve_model(entry, "cpu"), "cpu")
    except ValueError as error:
        message = str(error)
        assert 10 < len(message) < 8000, message
        message.encode()
        return "refused"
    for info in Checkpoint(folder).infos.values():
        assert 0 <= info.start <= info.end <= info.file.stat().st_size, info
    return "loaded"


def fuzz(bases: list[Path], at: Path, count: int, seed: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for i in range(count):
        r = random.Random(f"{seed}/{i}")
        base = r.choice(bases)
        folder = at / "damaged"
        folder.mkdir()
        files = sorted(base.iterdir())
        victim = r.choice(files)
        for file in files:
            if file != victim:
                os.link(file, folder / file.name)
        (folder / victim.name).write_bytes(damaged(victim.read_bytes(), victim.suffix == ".safetensors", r))
        start = time.perf_counter()
        try:
            outcome = load(folder)
        except Exception as error:
            raise AssertionError(f"case {seed}/{i}, {base.name}/{victim.name}: {error!r:.300}") from error
        took = time.perf_counter() - start
        assert took < SECONDS, f"case {seed}/{i}, {base.name}/{victim.name}: {took:.1f} s"
        outcomes[outcome] += 1
        outcomes[f"{outcome} {victim.suffix}"] += 1
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return outcomes


def test_the_bases_load(bases: list[Path]) -> None:
    assert [load(base) for base in bases] == ["loaded"] * len(bases)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred bytes gain nothing from a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_damage_is_a_clear_error_or_no_harm(bases: list[Path], tmp_path: Path) -> None:
    outcomes = fuzz(bases, tmp_path, 1000, seed=1)
    print(outcomes)
    assert outcomes["refused"] > 500, outcomes
    assert outcomes["loaded"] > 50, outcomes


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_damage_many_times(bases: list[Path], tmp_path: Path) -> None:
    outcomes = fuzz(bases, tmp_path, 10_000, seed=2)
    print(outcomes)
    assert outcomes["refused"] > 5000, outcomes
