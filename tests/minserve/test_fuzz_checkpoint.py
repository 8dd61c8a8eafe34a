"""Damaged checkpoints through the loading path itself: a ValueError that says something, or a model whose every tensor
lies inside its file and that answers three tokens.  Seeded; each must take under five seconds.

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
from pathlib import Path
from typing import Any

import pytest

from minserve import LLM
from minserve.checkpoint import Checkpoint
from tests.minserve.checkpoint_bases import NAMES, write_bases

SECONDS = 5.0
LENGTHS = (32, 32, 8, 1000, None)  # max_model_len, None: what the config says
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 8, 16, 31, 128, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, "", "x", "4", "int", "float",
    "re:(", "re:.*", "re:(x+x+)+y", "Linear", "fp8", "gptq", "awq", "tensor", "group", "block", "token", "I8", "F32", "F8_E4M3",
    1 << 22, 1 << 24, "re:(?:.|.)*!", "re:" + ".?" * 31 + "." * 31, "re:" + ".*" * 8 + "!", ["re:(?:a{1000}){1000}"], ["x"] * 1000,
    "one.safetensors", "../x.safetensors", [], [[]], [0], [-1, 2], [2**40, 2**40], [128, 128], {}, {"a": {}},
    {"num_bits": 4}, "\u0000", "é" * 300,
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


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


def load(folder: Path, max_model_len: int | None = 32) -> str:
    """What came of it, with the logits of three tokens if it loads.  Whatever is not a ValueError fails the test."""
    options = {"max_model_len": max_model_len, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    try:
        with LLM(str(folder), device="cpu", pool_bytes=4 << 20, **options) as llm:
            logits = llm.logits([1, 3, 2])
            assert logits.shape == (3, llm._local.resolved.config.vocab_size), logits.shape
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
        start = time.process_time()
        try:
            outcome = load(folder, r.choice(LENGTHS))
        except Exception as error:
            raise AssertionError(f"case {seed}/{i}, {base.name}/{victim.name}: {error!r:.300}") from error
        took = time.process_time() - start
        assert took < SECONDS, f"case {seed}/{i}, {base.name}/{victim.name}: {took:.1f} s"
        outcomes[outcome] += 1
        outcomes[f"{outcome} {victim.suffix}"] += 1
        outcomes[f"{outcome} {base.name}"] += 1
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return outcomes


def test_the_bases_load(bases: list[Path]) -> None:
    assert {base.name: load(base) for base in bases} == dict.fromkeys(NAMES, "loaded")


def test_damage_is_a_clear_error_or_no_harm(bases: list[Path], tmp_path: Path) -> None:
    outcomes = fuzz(bases, tmp_path, 1000, seed=1)
    print(outcomes)
    assert outcomes["refused"] > 500, outcomes
    assert outcomes["loaded"] > 50, outcomes
    # every format has its share of both
    assert all(outcomes[f"loaded {name}"] > 2 and outcomes[f"refused {name}"] > 10 for name in NAMES), (
        outcomes
    )


@pytest.mark.slow
def test_damage_many_times(bases: list[Path], tmp_path: Path) -> None:
    outcomes = fuzz(bases, tmp_path, 10_000, seed=2)
    print(outcomes)
    assert outcomes["refused"] > 5000, outcomes
