"""A worker's engine asleep: it holds nothing, and awake again it says bit by bit what it said before."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from minserve import offload
from minserve.config import GpuConfig, ModelEntry
from minserve.loading import load_model
from minserve.offload import HostCopy, tensors_of
from minserve.pool import SlabPool
from minserve.resolve import check_planned, plan_pool, resolve_model
from minserve.sampling import SamplingParams
from minserve.wire import Submit
from minserve.worker import EngineServed
from tests.tiny import write_llama

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5)
PROMPTS = (tuple(range(5, 105)), (7, 8, 9), tuple(range(5, 90)))
RIDS = itertools.count(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("sleeper"), seed=5)


def served(folder: Path, device: str = "cpu", **keys: Any) -> tuple[EngineServed, SlabPool]:
    entry = ModelEntry.read({"name": "m", "path": str(folder), "dtype": "fp32", "reserve_tokens": 64} | keys)
    resolved = resolve_model(entry, device)
    pool = SlabPool.create(plan_pool([resolved], GpuConfig(slab_bytes=64 << 10), 16 << 20), device)
    pool.fill()
    return EngineServed(load_model(resolved, device), pool, device), pool


def said(engine: EngineServed) -> list[Any]:
    """Tokens and log probabilities of all prompts, run together."""
    found: dict[int, list[Any]] = {}
    for prompt in PROMPTS:
        rid = next(RIDS)
        found[rid] = []
        engine.add(Submit(rid, prompt, PARAMS))
    while engine.has_work:
        for event in engine.step():
            found[event.rid].append((event.token_ids, event.logprobs, event.finish_reason))
    return list(found.values())


W8: dict[str, Any] = {"quantization": "w8a8-int8", "kv_dtype": "int8"}


@pytest.mark.parametrize(("level", "keys"), [(1, {}), (2, W8)], ids=["1-fp32", "2-w8a8"])
def test_awake_again_it_says_the_same(folder: Path, level: int, keys: dict[str, Any]) -> None:
    engine, pool = served(folder, **keys)
    before = said(engine)
    assert pool.table.held(0) > 0, "nothing is cached, so nothing has to be given back"
    for _ in range(2):
        steps = engine.stats().steps
        assert f"of weights {'dropped' if level == 2 else 'in host memory'}" in engine.sleep(level)
        pool.table.check()
        assert pool.table.counts().free == pool.plan.num_slabs
        assert (engine.has_work, engine.idle(), engine.abort(1)) == (False, None, False)
        with pytest.raises(ValueError, match="the model m is asleep"):
            engine.add(Submit(1, (1,), PARAMS))
        assert (engine.stats().steps, engine.stats().cached_blocks) == (steps, 0)
        pool.fill()  # what others write meanwhile
        engine.wake()
        assert said(engine) == before
        assert engine.stats().steps > steps
    engine.close()


def test_requests_under_way_end_and_their_sets_come_back(folder: Path) -> None:
    engine, pool = served(folder)
    engine.add(Submit(1, PROMPTS[0], PARAMS))
    engine.step()
    engine.sleep(1)
    assert pool.table.counts().free == pool.plan.num_slabs
    engine.wake()
    assert not engine.has_work
    engine.close()


def test_a_model_whose_files_are_gone_sleeps_on(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    engine, pool = served(copy)
    before = said(engine)
    engine.sleep(2)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="safetensors"):
        engine.wake()
    assert not engine.has_work
    assert pool.table.counts().free == pool.plan.num_slabs
    (copy / "model.safetensors").write_bytes(weights)
    engine.wake()
    assert said(engine) == before
    engine.close()


def test_other_files_than_the_pool_was_planned_for_are_refused(folder: Path, tmp_path: Path) -> None:
    def planned(path: Path) -> Any:
        return resolve_model(ModelEntry.read({"name": "m", "path": str(path), "dtype": "fp32"}), "cpu")

    first = planned(folder)
    plan = plan_pool([first], GpuConfig(), 64 << 20)
    check_planned(first, plan)
    deeper = planned(write_llama(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(
        ValueError, match=r"m now has .* \(3, 16, 12288\), .* for \(2, 16, 8192\): restart the server"
    ):
        check_planned(deeper, plan)


def test_storages_go_and_come_back_where_every_view_of_them_finds_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On host tensors: the same moves as on a device, through pieces that cut the storages anywhere."""
    monkeypatch.setattr(offload, "PIECE_BYTES", 1 << 10)
    entry = ModelEntry.read({"name": "m", "path": str(folder), "quantization": "w4a8-int8"})
    llama = load_model(resolve_model(entry, "cpu"), "cpu").llama
    plain = [t for t in tensors_of(llama) if t.layout == torch.strided and t.untyped_storage().resizable()]
    view = plain[0][1:, ::2] if plain[0].dim() > 1 else plain[0][1:]
    tree = [*plain, view]
    before = [t.clone() for t in tree]
    held = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree}.values())
    copy = HostCopy(tree)
    assert copy.nbytes == held > 100 * offload.PIECE_BYTES
    assert all(t.untyped_storage().nbytes() == 0 for t in tree)
    copy.restore()
    assert all(torch.equal(t, b) for t, b in zip(tree, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
def test_on_a_gpu_its_memory_goes_back_to_the_device(folder: Path, level: int) -> None:
    """Graphs are captured anew, at other addresses; what is said stays."""
    engine, pool = served(folder, "cuda:0")
    before, nbytes = said(engine), pool.bytes.nbytes
    for _ in range(2):
        engine.sleep(level)
        held = torch.cuda.memory_allocated() - nbytes
        assert held < 1 << 20, f"{held} bytes are still held beside the pool"
        assert torch.cuda.memory_reserved() - nbytes < 64 << 20
        engine.wake()
        assert said(engine) == before
    engine.close()
