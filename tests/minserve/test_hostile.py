"""Configs and headers made to hang or to fill the memory: each is answered within seconds, with a ValueError or a load."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from minserve.config import ModelEntry
from minserve.loading import load_model
from minserve.resolve import resolve_model
from quant.formats.compressed_tensors import config_object
from quant.scheme import Scheme
from tests.tiny import write_llama

SECONDS = 5.0
CT = config_object({Scheme(8): ["Linear"]}, "int8", ["lm_head"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return write_llama(tmp_path_factory.mktemp("plain"), vocab_size=40, num_key_value_heads=1, **small)


def edited(plain: Path, out: Path, **config: Any) -> Path:
    """The model with other keys in its config.json."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(json.loads((plain / "config.json").read_text()) | config))
    (out / "model.safetensors").hardlink_to(plain / "model.safetensors")
    return out


def load(folder: Path) -> str:
    """What came of it, "loaded" or the error, within the time, of which others on the machine take nothing."""
    start = time.process_time()
    entry = ModelEntry.read(
        {"name": "m", "path": str(folder), "max_num_seqs": 2, "max_num_batched_tokens": 32}
    )
    try:
        load_model(resolve_model(entry, "cpu"), "cpu")
        said = "loaded"
    except ValueError as error:
        said = str(error)
    took = time.process_time() - start
    assert took < SECONDS, f"{took:.1f} s: {said}"
    return said


PATTERNS = (
    "(?:.|.)*!",
    ".?" * 31 + "." * 31,
    ".*" * 8 + "!",
    "(.|..)*!",
    "(?:a{1000}){1000}",
    "(" * 500 + ")" * 500,
)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p[:20])
@pytest.mark.parametrize("key", ["ignore", "targets"])
def test_patterns(key: str, pattern: str, plain: Path, tmp_path: Path) -> None:
    raw = json.loads(json.dumps(CT))
    at = raw if key == "ignore" else raw["config_groups"]["group_0"]
    at[key] = [f"re:{pattern}"]
    said = load(edited(plain, tmp_path / "m", quantization_config=raw))
    assert said == "loaded" or "bad pattern" in said, said


@pytest.mark.parametrize("name", ["re:a{}", "a{}"])
def test_many_names(name: str, plain: Path, tmp_path: Path) -> None:
    many = [name.format(i) for i in range(390_000 if name[0] == "a" else 20_000)]
    said = load(edited(plain, tmp_path / "m", quantization_config=CT | {"ignore": many}))
    assert "must be at most 200000 names, 512 of them patterns" in said


POSITIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_position_embeddings": 1 << 22}, "missing"),
    ({"max_position_embeddings": 1 << 24}, "missing"),
    ({"max_position_embeddings": 1 << 24, "head_dim": 4096}, "max_model_len must be at most"),
]


@pytest.mark.parametrize(("config", "message"), POSITIONS, ids=range(len(POSITIONS)))
def test_positions_cost_nothing_before_the_weights_are_there(
    config: dict[str, Any], message: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr("minserve.loading.rope_tables", lambda config, length, device: made.append(length))
    monkeypatch.setattr("minserve.loading.host_pool_bytes", lambda: 4 << 30)
    said = load(edited(plain, tmp_path / "m", **config, num_hidden_layers=2))
    assert message in said
    assert made == [1] * ("missing" in message)


def with_header(plain: Path, out: Path, header: bytes) -> Path:
    edited(plain, out)
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return out


def test_large_headers_and_indices(plain: Path, tmp_path: Path) -> None:
    lists = b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"
    assert "more than the 400000 allowed" in load(with_header(plain, tmp_path / "a", lists))
    assert "its JSON must be 1 to" in load(with_header(plain, tmp_path / "b", lists * 6))
    digits = b'{"a":[' + b",".join([b"1" * 4000] * 4000) + b"]}"
    assert "an integer of 4000 digits" in load(with_header(plain, tmp_path / "c", digits))
    empty = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}
    assert "is missing from the checkpoint" in load(
        with_header(plain, tmp_path / "d", json.dumps(empty).encode())
    )
    derived = {f"{i}.rotary_emb.inv_freq": entry for i, entry in enumerate(empty.values())}
    assert "is missing from the checkpoint" in load(
        with_header(plain, tmp_path / "f", json.dumps(derived).encode())
    )
    index = edited(plain, tmp_path / "e") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"t{i}": "model.safetensors" for i in range(200_000)}}))
    assert "places in no file" in load(index.parent)
