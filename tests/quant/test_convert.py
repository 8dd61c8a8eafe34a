"""`python -m quant convert`: what it writes holds the same tensors, and what it refuses leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minserve.checkpoint import Checkpoint
from quant.__main__ import main
from quant.convert import INDEX, convert
from tests.quant import test_foreign_models as foreign
from tests.tiny import write_llama

SHARDS = {
    "pytorch_model-00001-of-00002.bin": {
        "a": torch.arange(12, dtype=torch.int8).view(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(4, 3).t(),
    },
    "pytorch_model-00002-of-00002.bin": {
        "d": torch.randn(3, 2).half(),
        "e": torch.randn(8)[2:5],
        "f": torch.randn(2).to(torch.float8_e4m3fn),
        "g": torch.empty(0),
    },
}


def folder(path: Path, shards: dict[str, Any], index: bool = True, zipped: bool = True) -> Path:
    path.mkdir()
    for name, tensors in shards.items():
        torch.save(tensors, path / name, _use_new_zipfile_serialization=zipped)
    if index:
        where = {t: name for name, tensors in shards.items() for t in tensors}
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer.model").write_bytes(b"\0\1")
    (path / "modeling.py").write_text("raise SystemExit")
    return path


def silent(line: str) -> None:
    assert line


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_shards_become_safetensors_with_an_index(
    tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture
) -> None:
    shards = {name: dict(tensors) for name, tensors in SHARDS.items()}
    if not zipped:
        # torch itself cannot read 8-bit floats of that time
        del shards["pytorch_model-00002-of-00002.bin"]["f"]
    source = folder(tmp_path / "bin", shards, zipped=zipped)
    out = tmp_path / "new" / "safe"
    assert main(["convert", str(source), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors: 3 tensors" in told
    assert "copied config.json, tokenizer.json, tokenizer.model\n" in told
    read = Checkpoint(out)
    assert set(read) == {name for tensors in shards.values() for name in tensors}
    for tensors in shards.values():
        assert all(same(read.tensor(name), value) for name, value in tensors.items())
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "new"]


def test_one_file_with_tied_tensors(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    tensors = {"embed": shared, "head": shared, "part": shared[1:3], "p": torch.nn.Parameter(shared + 1)}
    source = folder(tmp_path / "bin", {"pytorch_model.bin": tensors}, index=False)
    (source / "training_args.bin").write_bytes(b"no tensors")
    convert(source, tmp_path / "safe", silent)
    read = load_file(tmp_path / "safe" / "model.safetensors")
    assert set(read) == set(tensors)
    assert all(same(read[name], value.detach()) for name, value in tensors.items())


class Harmful:
    """Its pickle calls what it likes when opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def edit_index(source: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((source / INDEX).read_text())
    edit(raw)
    (source / INDEX).write_text(json.dumps(raw))


def first(source: Path) -> Path:
    return source / "pytorch_model-00001-of-00002.bin"


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code in a pickle": (
        lambda s: torch.save({"a": Harmful(s.parent / "run")}, first(s)),
        "not a file of plain tensors: it would call getattr, which no file of tensors needs",
    ),
    "a truncated file": (lambda s: first(s).write_bytes(first(s).read_bytes()[:-200]), "not a file of plain tensors"),
    "no file at all": (lambda s: first(s).write_bytes(b""), "not a file of plain tensors: it is empty"),
    "a list": (lambda s: torch.save([torch.ones(1)], first(s)), "must hold a dictionary of tensors, got list"),
    "a number": (lambda s: torch.save(SHARDS[first(s).name] | {"a": 3}, first(s)), "'a' must be a tensor, got int"),
    "sparse": (lambda s: torch.save(SHARDS[first(s).name] | {"a": torch.eye(3).to_sparse()}, first(s)), "dense tensor"),
    "a tensor repeated over its memory": (
        lambda s: torch.save(SHARDS[first(s).name] | {"a": torch.ones(1).expand(1 << 40)}, first(s)),
        "larger than the memory it views",
    ),
    "a tensor the index lacks": (lambda s: edit_index(s, lambda i: i["weight_map"].pop("b")), "'b' is only in one of"),
    "a tensor the file lacks": (
        lambda s: edit_index(s, lambda i: i["weight_map"].update(z=first(s).name)),
        "'z' is only in one of",
    ),
    "a shard outside": (
        lambda s: edit_index(s, lambda i: i["weight_map"].update(a="../x.bin")),
        "must lie in a .bin file beside it, got '../x.bin'",
    ),
    "a shard missing": (lambda s: first(s).unlink(), "missing or not a regular file"),
    "no index": (lambda s: (s / INDEX).unlink(), "index.json is missing beside the 2 files"),
    "an index that is none": (lambda s: (s / INDEX).write_text("[]"), "is not an index"),
    "an empty index": (lambda s: (s / INDEX).write_text("{}"), "weight_map must be an object"),
    "no config": (lambda s: (s / "config.json").unlink(), "config.json is missing"),
    "safetensors already": (lambda s: (s / "model.safetensors").touch(), "needs no conversion"),
    "a target in the way": (lambda s: (s.parent / "safe").touch(), "exists: name a folder that does not"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "bin", SHARDS)
    spoil, message = BAD[case]
    spoil(source)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "safe", silent)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert not (tmp_path / "run").exists()


ODD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "a name that safetensors has for itself": (
        {"__metadata__": torch.ones(2)},
        "no tensor can be called '__metadata__' in safetensors",
    ),
    "views of one memory": (
        {f"t{i}": whole[i:] for whole in [torch.zeros(200_000)] for i in range(50)},
        "its 50 tensors view 800000 bytes and would take 39995100, more than 4 times as many",
    ),
}


@pytest.mark.parametrize("case", ODD_TENSORS)
def test_tensors_that_safetensors_cannot_or_should_not_hold(case: str, tmp_path: Path) -> None:
    tensors, words = ODD_TENSORS[case]
    source = folder(tmp_path / "bin", {"pytorch_model.bin": tensors}, index=False)
    with pytest.raises(ValueError, match=words):
        convert(source, tmp_path / "safe", silent)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin"]


@pytest.mark.parametrize("zipped", [True, False])
def test_the_refusal_does_not_advise_to_run_the_code(zipped: bool, tmp_path: Path) -> None:
    """torch's own message says how to."""
    source = folder(
        tmp_path / "bin", {"pytorch_model.bin": {"a": Harmful(tmp_path / "run")}}, index=False, zipped=zipped
    )
    with pytest.raises(ValueError, match="it would call") as refused:
        convert(source, tmp_path / "safe", silent)
    assert "weights_only" not in str(refused.value)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n.")
    with pytest.raises(ValueError, match=r"it would call posix\.system") as refused:
        convert(source, tmp_path / "safe", silent)
    assert "weights_only" not in str(refused.value)


def status(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = folder(tmp_path / "bin", SHARDS)
    assert status(["convert", str(source), "--out", str(source)]) == 2
    assert "python -m quant: " in (said := capsys.readouterr().err)
    assert "exists: name a folder that does not" in said


def test_a_folder_without_weights_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \*.bin file"):
        convert(tmp_path / "empty", tmp_path / "safe", silent)
    with pytest.raises(ValueError, match="is not a folder"):
        convert(tmp_path / "none", tmp_path / "safe", silent)


def test_the_loader_names_the_command(tmp_path: Path) -> None:
    source = folder(tmp_path / "bin", SHARDS)
    with pytest.raises(ValueError, match=rf"python -m quant convert {source} --out DST"):
        Checkpoint(source)


def test_a_qserve_file_as_its_authors_publish_it(tmp_path: Path) -> None:
    """Pickled, without a quantization_config, the norms among its tensors: converted, it is what it says."""
    plain = write_llama(tmp_path / "plain", hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    good, _, weights = foreign.written(plain, foreign.CASES["qserve-g128"])
    source = tmp_path / "bin"
    source.mkdir()
    torch.save(good, source / "pytorch_model.bin")
    (source / "config.json").write_bytes((plain / "config.json").read_bytes())
    convert(source, tmp_path / "safe", silent)
    want = foreign.reference(plain, weights, foreign.int8_rows)
    assert foreign.kl(want, foreign.our_logits(tmp_path / "safe")) < foreign.MOST_KL
