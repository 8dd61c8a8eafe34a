"""safetensors folders: read back exactly, and every malformed header, shard and index is one clear ValueError.

Files are written byte by byte here, without the safetensors package, which serves only to cross-check good ones.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minserve.checkpoint import DTYPES, Checkpoint
from minserve.model_config import MAX_HEADER_BYTES, MAX_INDEX_BYTES
from minserve.tensor_names import tensor_names

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
GOOD = {"a": A, "b": B}
DATA = bytes(range(32))
INDEX = "model.safetensors.index.json"


def file_bytes(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A safetensors file; `header` is an object to dump or the header's own bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    """GOOD with tensor b changed; a value of `...` removes the key."""
    return {"a": A, "b": {k: v for k, v in (B | changes).items() if v is not ...}}


def headers() -> Iterator[tuple[str, bytes, str]]:
    """(id, the file's bytes, what the message must hold)."""
    good = file_bytes(GOOD)
    yield "empty", b"", "empty"
    for n in (1, 4, 7):
        yield f"only {n} bytes", good[:n], "too short"
    for n in (8, 9, 20, 60, len(good) - 33):
        yield f"cut at {n}", good[:n], "header length"
    for n in (1, 2, 8, 24, 31, 32):
        yield f"data cut by {n}", good[:-n], "truncated"
    for n in (1, 4, 100):
        yield f"{n} bytes too many", good + b"\0" * n, "no tensor owns"
    size = len(good) - 8 - 32
    for n in (0, 1, size - 1, size + 1, size + 31):
        yield f"length {n} for {size}", file_bytes(GOOD, length=n), "header"
    for n in (size + 33, 2**31, MAX_HEADER_BYTES + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1):
        yield f"length {n}", file_bytes(GOOD, length=n), "header length must be at most"
    yield from json_headers()
    yield from entries()
    yield from layouts()


def json_headers() -> Iterator[tuple[str, bytes, str]]:
    dumped = json.dumps(GOOD).encode()
    texts = {
        "not JSON": (b"hello", "not valid JSON"),
        "an empty header": (b"", "not valid JSON"),
        "a list": (b"[]", "must hold a JSON object"),
        "null": (b"null", "must hold a JSON object"),
        "a number": (b"17", "must hold a JSON object"),
        "a string": (b'"a"', "must hold a JSON object"),
        "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
        "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not valid JSON"),
        "NaN in a shape": (dumped.replace(b"[4]", b"[NaN]"), "NaN is not JSON"),
        "Infinity in an offset": (dumped.replace(b"32]", b"Infinity]"), "Infinity is not JSON"),
        "a number of 5000 digits": (dumped.replace(b"32]", b"3" * 5000 + b"]"), "an integer of 5000 digits"),
        "100000 brackets": (b"[" * 100_000, "not valid JSON"),
        "deep nesting": (b'{"a":' * 40 + b"1" + b"}" * 40, "nests deeper"),
        "a duplicate tensor": (dumped.replace(b'"b"', b'"a"'), "duplicate key 'a'"),
        "a duplicate key in an entry": (dumped.replace(b'"shape": [4]', b'"shape": [4], "shape": [4]'), "duplicate key 'shape'"),
        "a trailing comma": (dumped[:-1] + b",}", "not valid JSON"),
        "a NUL after it": (dumped + b"\0", "not valid JSON"),
        "two objects": (dumped + dumped, "not valid JSON"),
        "a pickle": (b"\x80\x04\x95\x10", "not valid JSON"),
        "a zip": (b"PK\x03\x04" + b"\0" * 20, "not valid JSON"),
    }  # fmt: skip
    for name, (raw, text) in texts.items():
        yield name, file_bytes(raw), text
    empty = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(70_000)}
    yield "70,000 empty tensors", file_bytes(empty), "more than the 400000 allowed"
    yield (
        "lists without end",
        file_bytes(b'{"a": [' + b"[]," * 300_000 + b"[]]}"),
        "more than the 400000 allowed",
    )
    for value in (1, "x", [], None, {"format": 1}, {"format": None}, {"a": {}}, {"a": ["pt"]}):
        yield f"metadata {value!r}", file_bytes({"__metadata__": value} | GOOD), "__metadata__"


def entries() -> Iterator[tuple[str, bytes, str]]:
    for key in ("dtype", "shape", "data_offsets"):
        yield f"no {key}", file_bytes(entry(**{key: ...})), "its entry must hold"
        for value in (None, 1, {}, True):
            yield f"{key} {value!r}", file_bytes(entry(**{key: value})), "tensor 'b'"
    yield "an extra key", file_bytes(entry(stride=[1])), "its entry must hold"
    for value in (None, 1, "x", [], [1, 2]):
        yield f"entry {value!r}", file_bytes({"a": A, "b": value}), "its entry must hold"
    for dtype in (
        "f32",
        "FP32",
        "F4",
        "I4",
        "F8_E8M0",
        "C64",
        "U16",
        "U64",
        "float32",
        "",
        "BF16 ",
        ["BF16"],
    ):
        yield f"dtype {dtype!r}", file_bytes(entry(dtype=dtype)), "dtype must be one of"
    for dtype in ("F32", "F64", "I8", "BOOL", "U8", "I32", "I64", "F8_E4M3"):
        yield f"dtype {dtype} of another size", file_bytes(entry(dtype=dtype)), "data_offsets must span"
    for shape in (["4"], [4.0], [-4], [True], [None], [[4]], "4", [2**62], [2**63], [-1, -4], [1] * 8 + [4]):
        yield f"shape {shape!r}", file_bytes(entry(shape=shape)), "shape must be"
    for shape in ([], [3], [5], [2, 3], [0], [4, 0], [2**31, 2**31], [2**61, 2**61, 2**61], [2**61, 8]):
        yield f"shape {shape!r} of another size", file_bytes(entry(shape=shape)), "data_offsets must span"
    for at in (
        [24],
        [],
        [24, 32, 40],
        ["24", "32"],
        [24.0, 32.0],
        [32, 24],
        [-8, 0],
        [24, 2**63],
        [True, 32],
        "24-32",
        [None, 32],
    ):
        yield f"offsets {at!r}", file_bytes(entry(data_offsets=at)), "data_offsets must be"
    for at in ([24, 31], [24, 33], [24, 24], [0, 32], [24, 2**61]):
        yield f"offsets {at!r} of another size", file_bytes(entry(data_offsets=at)), "data_offsets must span"


def layouts() -> Iterator[tuple[str, bytes, str]]:
    for at in (0, 1, 8, 16, 23):
        yield f"overlap at {at}", file_bytes(entry(data_offsets=[at, at + 8])), "overlaps"
    for at in (25, 28, 32, 40, 2**40, 2**61):
        yield f"hole before {at}", file_bytes(entry(data_offsets=[at, at + 8])), "leaves a hole"
    yield "hole at the start", file_bytes({"b": B}), "leaves a hole after 'the header'"
    yield "no tensors but data", file_bytes({}), "no tensor owns"
    yield "the same bytes twice", file_bytes({"a": A, "b": B, "c": B}), "overlaps"
    yield (
        "one inside another",
        file_bytes({"a": A, "b": B, "c": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}}),
        "overlaps",
    )
    yield (
        "nothing inside a tensor",
        file_bytes({"a": A, "b": B, "c": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]}}),
        "overlaps",
    )
    long = "x" * 100_000
    yield "a name of 100000 letters", file_bytes({long: A | {"shape": [7]}}), "data_offsets must span"
    yield "a name of control characters", file_bytes({"\x1b[2J\n": A | {"shape": [7]}}), r"'\x1b[2J\n'"
    yield "a lone surrogate as name", file_bytes(b'{"\\ud800": 1}', b""), r"'\ud800'"


HEADERS = list(headers())


@pytest.mark.parametrize(("data", "text"), [c[1:] for c in HEADERS], ids=[c[0][:60] for c in HEADERS])
def test_a_malformed_file_is_one_clear_error(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        Checkpoint(tmp_path)
    message = str(error.value)
    assert text in message, message
    assert len(message) < 800 + len(str(tmp_path)), message
    message.encode()  # printable as UTF-8


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """800 files with a few header bytes changed: a ValueError, or tensors that lie inside the file."""
    r = random.Random(0)
    good = bytearray(file_bytes(GOOD))
    path = tmp_path / "model.safetensors"
    outcomes = {"refused": 0, "read": 0}
    for _ in range(800):
        data = bytearray(good)
        for _ in range(r.choice((1, 1, 2, 4))):
            data[r.randrange(len(data) - 32)] = r.choice(
                (0, 32, 34, 44, 45, 48, 57, 91, 93, 125, 255, r.randrange(256))
            )
        path.write_bytes(data)
        outcomes[_outcome(tmp_path)] += 1
    assert outcomes["refused"] > 500, outcomes


def _outcome(folder: Path) -> str:
    try:
        checkpoint = Checkpoint(folder)
    except ValueError:
        return "refused"
    for name in checkpoint:
        tensor = checkpoint.tensor(name)
        assert tensor.numel() * tensor.element_size() == checkpoint.infos[name].nbytes
    assert sum(i.nbytes for i in checkpoint.infos.values()) == 32
    return "read"


def shards(folder: Path, weight_map: Any, **files: dict[str, Any] | bytes) -> Path:
    """A sharded folder: an index, and the files by name without suffix."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, header in files.items():
        data = header if isinstance(header, bytes) else file_bytes(header, bytes(24 * len(header)))
        (folder / f"{name}.safetensors").write_bytes(data)
    return folder


ONE, TWO = {"a": A}, {"c": A}
MAP = {"a": "one.safetensors", "c": "two.safetensors"}
BAD_INDEX: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a shard missing", lambda p: shards(p, MAP, one=ONE), "two.safetensors is missing"),
    ("all shards missing", lambda p: shards(p, MAP), "one.safetensors is missing"),
    ("a shard empty", lambda p: shards(p, MAP, one=ONE, two=b""), "two.safetensors"),
    ("a shard cut", lambda p: shards(p, MAP, one=ONE, two=file_bytes(TWO)[:60]), "two.safetensors"),
    ("a shard that is a folder", lambda p: (shards(p, MAP, one=ONE), (p / "two.safetensors").mkdir()), "regular file"),
    ("a link to nowhere", lambda p: (shards(p, MAP, one=ONE), (p / "two.safetensors").symlink_to("no")), "missing"),
    ("the index names a tensor too many", lambda p: shards(p, MAP | {"d": "two.safetensors"}, one=ONE, two=TWO), "lacks 'd'"),
    ("ten tensors too many", lambda p: shards(p, MAP | {f"d{i}": "two.safetensors" for i in range(10)}, one=ONE, two=TWO), "and 2 more"),
    ("a shard holds one too many", lambda p: shards(p, {"a": "one.safetensors"}, one={"a": A, "x": A | {"data_offsets": [24, 48]}}), "'x'"),
    ("a tensor in the other shard", lambda p: shards(p, {"a": "two.safetensors", "c": "one.safetensors"}, one=ONE, two=TWO), "which model.safetensors.index.json places"),
    ("a tensor in both shards", lambda p: shards(p, MAP, one=ONE, two={"a": A, "c": A | {"data_offsets": [24, 48]}}), "places 'one.safetensors'"),
    ("no weight_map", lambda p: (p / INDEX).write_text("{}"), "weight_map must be"),
    ("an index that is a list", lambda p: (p / INDEX).write_text("[]"), "must hold a JSON object"),
    ("an index that is not JSON", lambda p: (p / INDEX).write_text("{'a': 1}"), "not valid JSON"),
    ("an empty index", lambda p: (p / INDEX).write_text(""), "not valid JSON"),
    ("an index with a tensor twice", lambda p: (p / INDEX).write_text('{"weight_map": {"a": "x", "a": "x"}}'), "duplicate key"),
    ("an index with NaN", lambda p: (p / INDEX).write_text('{"weight_map": NaN}'), "NaN"),
    ("an index that is a folder", lambda p: (p / INDEX).mkdir(), "regular file"),
    *((f"weight_map {v!r}", lambda p, v=v: shards(p, v), "weight_map must be") for v in (None, [], {}, "x", 3)),
    *((f"file name {v!r:.40}", lambda p, v=v: shards(p, {"a": v}), "a .safetensors file beside it") for v in (
        None, 3, [], "", ".", "..", "one", "one.bin", "/etc/passwd", "../one.safetensors", "/x/one.safetensors",
        "sub/one.safetensors", "./one.safetensors", "one.safetensors/", "pytorch_model.bin", {"f": 1})),
    ("a file name with NUL", lambda p: shards(p, {"a": "a\0.safetensors"}), "beside it must be named, got 'a\\x00"),
    ("a file name that colours a terminal", lambda p: shards(p, {"a": "\x1b[31m.safetensors"}), "got '\\x1b[31m"),
    ("a file name of 5000 letters", lambda p: shards(p, {"a": "a" * 5000 + ".safetensors"}), "beside it must be named"),
    ("files without end", lambda p: shards(p, {f"a{i}": f"{i}.safetensors" for i in range(5000)}), "names 5000 files, more than the 4096 allowed"),
    ("names without end", lambda p: shards(p, {f"a{i}": "one.safetensors" for i in range(500_000)}), "holds up to 500003 values"),
    ("an index too large", lambda p: (p / INDEX).write_bytes(b" " * (MAX_INDEX_BYTES + 1)), "more than the 33554432 allowed"),
    ("an empty folder", lambda p: None, "holds no"),
    ("pickle only", lambda p: (p / "pytorch_model.bin").write_bytes(b"\x80\x04"), "pickled weights ('pytorch_model.bin')"),
    ("pickled shards", lambda p: [(p / f"pytorch_model-{i}.bin").write_bytes(b"") for i in range(3)], "python -m quant convert"),
    ("a .pth", lambda p: (p / "consolidated.00.pth").write_bytes(b""), "pickled weights"),
    ("GGUF only", lambda p: (p / "model-Q4_K_M.gguf").write_bytes(b"GGUF"), "holds only GGUF files ('model-Q4_K_M.gguf')"),
    ("shards without an index", lambda p: [(p / f"m-{i}.safetensors").write_bytes(b"") for i in range(2)], "index.json is missing"),
    ("a folder for a file", lambda p: (p / "model.safetensors").mkdir(), "regular file"),
    ("a dangling link", lambda p: (p / "model.safetensors").symlink_to("nowhere"), "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text"), [c[1:] for c in BAD_INDEX], ids=[c[0] for c in BAD_INDEX])
def test_a_bad_folder_is_one_clear_error(make: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=r"\w") as error:
        Checkpoint(tmp_path)
    assert any(t in str(error.value) for t in text.split("|")), error.value
    assert str(tmp_path) in str(error.value)


def test_count_of_malformed_checkpoints() -> None:
    count = len(HEADERS) + len(BAD_INDEX)
    print(f"malformed checkpoint folders: {count} cases, and 800 damaged at random")
    assert len({c[1] for c in HEADERS}) == len(HEADERS), "a case is there twice"
    assert count >= 200


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    want = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 16), generator=g, dtype=torch.uint8)
        want[name] = raw.view(dtype)
    want["scalar"] = torch.tensor(2.5)
    want["none"] = torch.empty(0, 7)
    save_file(want, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(want)
    for name, tensor in want.items():
        got = checkpoint.tensor(name)
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert torch.equal(got.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    with pytest.raises(ValueError, match="'nothing' is missing"):
        checkpoint.tensor("nothing")


def test_shards_links_unaligned_data_and_one_odd_name(tmp_path: Path) -> None:
    real = tmp_path / "blobs"
    real.mkdir()
    (real / "x").write_bytes(
        file_bytes({"c": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}, struct.pack("<2i", 5, -6))
    )
    folder = tmp_path / "m"
    folder.mkdir()
    shards(folder, MAP, one=ONE)
    (folder / "two.safetensors").symlink_to(real / "x")  # as the hub's cache lays them out
    assert Checkpoint(folder).tensor("c").tolist() == [5, -6]
    odd = tmp_path / "odd"
    odd.mkdir()
    header = {
        "u": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "f": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    (odd / "weights.safetensors").write_bytes(file_bytes(header, b"\7" + struct.pack("<2f", 1.5, -2.0)))
    checkpoint = Checkpoint(odd)
    assert checkpoint.infos["f"].start % 4, "the case is not odd"
    assert checkpoint.tensor("f").data_ptr() % 4 == 0
    assert (checkpoint.tensor("u").tolist(), checkpoint.tensor("f").tolist()) == ([7], [1.5, -2.0])


def test_names_are_picked_out_without_parsing_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*_: Any) -> None:
        raise AssertionError("a header is parsed once, by Checkpoint")

    monkeypatch.setattr("minserve.model_config.json.loads", parsed)
    assert tensor_names(tmp_path) == ()
    (tmp_path / "some.safetensors").write_bytes(file_bytes({"__metadata__": {"format": "pt"}} | GOOD))
    assert {"a", "b"} <= set(tensor_names(tmp_path))
    shards(tmp_path, MAP)
    assert {"a", "c"} <= set(tensor_names(tmp_path))
    (tmp_path / INDEX).write_bytes(b" " * (MAX_INDEX_BYTES + 1))
    with pytest.raises(ValueError, match="its JSON must be 1 to 33554432 bytes, got 33554433"):
        tensor_names(tmp_path)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(GOOD))
    checkpoint = Checkpoint(tmp_path)
    tensor = checkpoint.tensor("a")
    checkpoint.close()
    tensor.fill_(1.0)
    assert tensor.sum() == 6
    assert path.read_bytes() == file_bytes(GOOD)
