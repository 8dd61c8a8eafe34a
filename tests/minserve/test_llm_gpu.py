"""The engine on a GPU: the same answers as on a CPU, and a host that never waits for the step that runs."""

from pathlib import Path

import pytest
import torch

from minserve import LLM, SamplingParams
from minserve.engine import EngineRequest
from tests.tiny import write_llama

PROMPTS = [[5, 9, 200, 33, 7], list(range(100)), [1]]

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gpu"), seed=21)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kv_dtype", ["fp32", "fp8", "int8", "int4", "int4z"])
def test_a_gpu_answers_as_the_cpu_does(folder: Path, kv_dtype: str, overlap: bool) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    found = []
    for device in ("cpu", "cuda:0"):
        with LLM(folder, device=device, kv_dtype=kv_dtype, pool_bytes=8 << 20, overlap=overlap) as llm:
            answers = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params)]
            found.append((llm.logits(PROMPTS[1]), answers))
    (cpu_TV, want), (gpu_TV, got) = found
    # a code on the edge between two may fall to either side
    allowed = 1e-4 if kv_dtype == "fp32" else 0.05
    assert (gpu_TV - cpu_TV).abs().max() <= allowed * cpu_TV.abs().max()
    assert kv_dtype != "fp32" or got == want


def test_enqueueing_a_step_does_not_wait_for_the_device(folder: Path) -> None:
    with LLM(folder, device="cuda:0", pool_bytes=8 << 20) as llm:
        params = SamplingParams(
            temperature=0.7, top_p=0.9, max_tokens=8, ignore_eos=True, logit_bias={3: 1.0}
        )
        llm.generate(PROMPTS, params)  # compiles
        execute = llm.engine.runner.execute

        def watched(*args: object) -> object:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return execute(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        llm.engine.runner.execute = watched
        assert [len(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params)] == [8, 8, 8]


def test_the_host_is_one_step_ahead_and_no_more(folder: Path) -> None:
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    with LLM(folder, device="cuda:0", pool_bytes=8 << 20, **small) as llm:
        llm.engine.add(EngineRequest(rid=1, prompt=tuple(range(100)), params=SamplingParams()))
        llm.engine.step()
        ((plan, handle),) = llm.engine._flights
        assert not plan.chunks[0].samples
        assert handle._pending.result().event is not None
