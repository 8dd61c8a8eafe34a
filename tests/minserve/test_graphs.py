"""Replayed steps against eager ones, on the Triton path.

Without a GPU that is the interpreter, and a graph that only runs again.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import backend, launch
from minserve import LLM, SamplingParams
from minserve.graphs import Capture, cuda_capture
from minserve.memory import MOST_ROWS, batch_sizes
from tests.minserve import rerun
from tests.tiny import write_llama

GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if GPU else "cpu"
PROMPTS = [[5, 9, 200, 33, 7], list(range(40, 60)), [1]]
STEPS: dict[str, Any] = {
    "dtype": "fp32",
    "max_num_batched_tokens": 16,
    "max_num_seqs": 4,
    "max_model_len": 64,
    "pool_bytes": 4 << 20,
    "cuda_graphs": False,
}
# the second asks for tokens that penalties change and the host samples; the others end one after the other
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, repetition_penalty=1.3, logprobs=2),
    SamplingParams(temperature=0.8, seed=3, top_k=20, max_tokens=2, ignore_eos=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("graphs"), seed=4, num_hidden_layers=1)


def captured() -> Capture:
    return cuda_capture() if GPU else rerun.capture


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)
    # persistent grids of a small GPU: most of a large one's programs would find nothing to do
    monkeypatch.setitem(launch.ASSUMED, 90, launch.ASSUMED[90]._replace(num_sms=2))


@pytest.mark.parametrize(
    ("kv_dtype", "overlap"), [pytest.param("fp32", False, marks=pytest.mark.slow), ("int8", True)]
)
@pytest.mark.usefixtures("on_triton")
def test_replayed_steps_give_the_same_tokens(folder: Path, kv_dtype: str, overlap: bool) -> None:
    found: list[Any] = []
    for sizes in ([], [1, 2, 4]):
        with LLM(folder, device=DEVICE, kv_dtype=kv_dtype, overlap=overlap, **STEPS) as llm:
            runner = llm.engine.runner
            graphs = runner.capture(sizes, captured()) if sizes else None
            answers = [o.outputs[0] for o in llm.generate(PROMPTS, PARAMS)]
            found.append(answers)
            if graphs is not None:
                # with overlap a step runs ahead of every stop
                assert 4 <= graphs.num_replays < llm.engine.counters.steps
                assert runner.rows.tokens[runner.rows.zero_index] == 0
    for eager, replayed in zip(*found, strict=True):
        assert eager.token_ids == replayed.token_ids
        assert (eager.logprobs is None) == (replayed.logprobs is None)
        for a, b in zip(eager.logprobs or [], replayed.logprobs or [], strict=True):
            # another batch size may take another tile: float32 sums in another order
            assert {t: x.logprob for t, x in a.items()} == pytest.approx(
                {t: x.logprob for t, x in b.items()}, abs=1e-4
            )


@pytest.mark.usefixtures("on_triton")
def test_what_no_graph_is_for_runs_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with LLM(folder, device=DEVICE, **STEPS) as llm:
        want = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params)]
        graphs = llm.engine.runner.capture([1, 2], captured())
        # room for one block: the prompt of 20 tokens needs two
        for g in graphs._graphs.values():
            monkeypatch.setattr(g.tables, "blocks", 1)
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params)] == want
        assert graphs.num_replays == 0
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:1], params)] == want[:1]
        assert graphs.num_replays == 2


def test_batch_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(5) == [1, 2, 4, 5]
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert batch_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]
    for n in (256, 1000, 65536):
        sizes = batch_sizes(n)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(n, MOST_ROWS)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
def test_graphs_on_a_gpu_give_the_tokens_of_eager_steps(folder: Path, kv_dtype: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    found = []
    for cuda_graphs in (False, True):
        with LLM(
            folder,
            device="cuda:0",
            dtype="bf16",
            kv_dtype=kv_dtype,
            pool_bytes=8 << 20,
            cuda_graphs=cuda_graphs,
        ) as llm:
            found.append([o.outputs[0].token_ids for o in llm.generate(PROMPTS * 3, params)])
            replays = llm.engine.runner.num_replays
            assert (replays > 0) == cuda_graphs
            assert torch.cuda.current_device() == 0
    same = sum(a == b for a, b in zip(*found, strict=True))
    # another batch size may take another tile, so bf16 may round a near tie to either side
    assert same >= len(found[0]) - 1
