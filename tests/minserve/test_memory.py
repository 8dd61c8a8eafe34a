"""The bound on a GPU's workspace: what steps really hold stays below it, and pools are planned with it."""

import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from kernels import backend
from kernels.kv_layout import SCRATCH_BYTES
from minserve import loading
from minserve.config import Config, GpuConfig
from minserve.loading import device_pool_bytes, load_model, memory_line
from minserve.memory import GRAPH_BYTES, LOGIT_BYTES, GiB, MiB, activations, prefill_scratch, workspace
from minserve.resolve import ResolvedModel, resolve_model
from minserve.warmup import Shape, Sizes, run_shape, scratch_runner, step_shapes
from tests.tiny import write_llama

TOTAL = 141 * GiB


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that come to life inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet(args, new=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, new=True)
        return out

    def _meet(self, tensors: Any, *, new: bool) -> None:
        for t in tree_leaves(tensors):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self._known:
                storage = t.untyped_storage()
                num_bytes = storage.nbytes() if new else 0
                self._known.add(storage._cdata)
                self.now += num_bytes
                self.peak = max(self.peak, self.now)
                # those from outside too: another storage may come to lie where one of them was
                weakref.finalize(storage, self._gone, storage._cdata, num_bytes)

    def _gone(self, name: int, num_bytes: int) -> None:
        self._known.discard(name)
        self.now -= num_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 4096}
    return write_llama(tmp_path_factory.mktemp("memory"), seed=1, **sizes)


def resolved(folder: Path, **keys: Any) -> ResolvedModel:
    keys = {"max_num_seqs": 8, "max_num_batched_tokens": 600} | keys
    return resolve_model(Config.single(folder, **keys).models[0], "cpu")


KEYS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "int8": {"dtype": "bf16", "kv_dtype": "int8"},
    "int4": {"dtype": "fp32", "kv_dtype": "int4", "quantization": "w8a8-int8"},
    "fp8": {"dtype": "fp16", "kv_dtype": "fp8", "fp8_prefill": True},
    "fireq": {"dtype": "bf16", "kv_dtype": "int4", "fp8_prefill": True, "fp8_queries": True},
    "deterministic": {"dtype": "bf16", "kv_dtype": "int8", "deterministic": True},
}


def test_the_counter_sees_what_lies_where_another_lay() -> None:
    for _ in range(100):
        outside = torch.zeros(1000)
        with Live() as live:
            outside.sum()
            del outside
            made = torch.ones(1000)
            assert live.peak >= made.nbytes


@pytest.mark.parametrize("case", KEYS)
def test_steps_hold_no_more_than_their_bound(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most chunks, decodes and logits there can be, of kernels that compute nothing."""
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    r = resolved(folder, **KEYS[case])
    model, device = load_model(r, "cpu").llama, torch.device("cpu")
    sizes = Sizes(8, 600, r.max_model_len)
    runner = scratch_runner(model, r.layout, sizes, device, deterministic=r.entry.deterministic)
    longest = max(step_shapes(sizes, 64), key=lambda s: sum(start + n for start, n in s.chunks))
    held = {}
    for shape in (longest, Shape((4096,) * 8, ())):
        with Live() as live:
            run_shape(runner, shape)
        tokens = len(shape.decodes) + sum(n for _, n in shape.chunks)
        held[len(shape.chunks)] = live.peak
        logits = len(shape.chunks + shape.decodes) * r.config.vocab_size * LOGIT_BYTES
        # tables count too: this host has a copy of what a GPU is sent
        bound = activations(r, tokens) + prefill_scratch(r) + logits + workspace(r).tables
        assert live.peak <= bound, f"{shape}: {live.peak / bound:.2f} of the bound"
    assert sum(n for _, n in longest.chunks) >= 592
    assert len(longest.chunks) == 8, "the chunks of the longest contexts"
    assert held[8] >= prefill_scratch(r), "the longest chunks fill the scratch"
    assert (prefill_scratch(r) > 0) == (case in ("int8", "int4", "fireq"))


def test_what_the_bound_counts(folder: Path) -> None:
    plain, int8 = (workspace(resolved(folder, dtype="bf16", kv_dtype=kv)) for kv in ("bf16", "int8"))
    assert (plain.scratch, int8.scratch) == (0, 8 * 4096 * 2 * 2 * 64 * 2)
    many = workspace(resolved(folder, dtype="fp32", kv_dtype="int8", max_num_seqs=512))
    assert many.scratch == 2 * SCRATCH_BYTES
    assert many.graphs > 23 * GRAPH_BYTES
    assert workspace(resolved(folder, cuda_graphs=False)).graphs == 0
    tokens = {"dtype": "bf16", "max_num_batched_tokens": 8192}
    cut, whole = (workspace(resolved(folder, deterministic=d, **tokens)).steps for d in (True, False))
    assert cut > whole + 40 * MiB, "a part of 512 keys for each token"
    assert many.total == sum(many) == many.torch_bytes + many.context


def test_a_servers_pool_leaves_each_worker_its_workspace(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minserve import agent  # the server's, like all that it imports

    answer = SimpleNamespace(returncode=0, stdout=f"{100 * GiB} {TOTAL}", stderr="")
    monkeypatch.setattr(agent.subprocess, "run", lambda *args, **kwargs: answer)
    models = [
        resolved(folder, kv_dtype="int8"),
        resolved(folder, deterministic=True, max_num_batched_tokens=4096),
    ]
    weights = 2 * (folder / "model.safetensors").stat().st_size
    left = 100 * GiB - int(TOTAL * (1 - 0.9)) - weights - sum(workspace(m).total for m in models)
    assert agent.gpu_pool_bytes("cuda:0", GpuConfig(memory_fraction=0.9), models) == left
    with pytest.raises(ValueError, match="nothing is left for the pool"):
        agent.gpu_pool_bytes("cuda:0", GpuConfig(memory_fraction=0.3), models)


def test_a_pool_of_ones_own_leaves_what_warm_up_has_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    r = resolved(folder, kv_dtype="int8")
    space, weights = workspace(r), 5 * GiB
    model: Any = SimpleNamespace(resolved=r)
    gpu = GpuConfig(device="cuda:0", memory_fraction=0.9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GiB, TOTAL))
    free = 100 * GiB - int(TOTAL * (1 - 0.9))
    for held, left in (
        (0, space.torch_bytes),
        (space.steps, space.torch_bytes - space.steps),
        (2 * space.total, 0),
    ):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, held=held: weights + held)
        assert device_pool_bytes(model, gpu, weights) == free - left
    own = 50 * GiB
    for held, warned in ((space.torch_bytes, False), (space.torch_bytes + 1, True)):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device, held=held: weights + own + held)
        caplog.clear()
        with caplog.at_level(logging.WARNING, loading.__name__):
            line = memory_line(model, "cuda:0", weights + own)
        assert f"{held / GiB:.2f} GiB held" in line
        assert f"scratch {space.scratch / GiB:.2f}" in line
        assert bool(caplog.records) == warned


@pytest.mark.gpu
@pytest.mark.parametrize("case", KEYS)
def test_a_started_engine_holds_no_more_than_was_planned(case: str, folder: Path) -> None:
    from minserve import LLM

    keys = {"max_num_seqs": 8, "max_num_batched_tokens": 600, "pool_bytes": 64 << 20} | KEYS[case]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with LLM(folder, device="cuda:0", **keys) as llm:
        held = torch.cuda.max_memory_reserved() - before
        # pool and weights, and the allocator takes 2 or 20 MiB at a time
        assert held <= workspace(llm._local.resolved).torch_bytes + 64 * MiB + 64 * MiB
