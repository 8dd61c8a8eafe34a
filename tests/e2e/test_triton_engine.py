"""The engine's GPU path without a GPU: everything Triton, interpreted, gives the tokens of the CPU path.

`backend.runs_triton` is all that chooses between the two, so that is what is replaced; where there is a GPU it is used.  A token may differ only where
the CPU's own logits of the two candidates are as close as a tie of TIES says: sums have another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from kernels import backend, launch
from minserve import LLM, SamplingParams
from tests.tiny import write_llama

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
# of the largest logit: rounding of float32; four units in the last place of float16, in which logits leave the model;
# a code of keys, values or rows that lies between two may fall to either side
TIES = {"fp32": 1e-5, "fp16": 4e-3, "codes": 2e-2}
PROMPTS = [[5, 9, 200, 33, 7], list(range(40, 66))]
NEW_TOKENS = 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
# the longest prompt takes several steps, and shares them with decodes
STEPS = {"max_num_batched_tokens": 12, "max_num_seqs": 4, "max_model_len": 64, "pool_bytes": 4 << 20}
ROWS = {"rmsnorm", "silu_mul", "rope", "attn_decode"}
W8, W4 = {"quantization": "w8a8-int8"}, {"quantization": "w4a8-int8"}
CASES: dict[str, Any] = {
    "fp32": ({"dtype": "fp32"}, "fp32", ROWS),
    "w8a8-kv8": ({"dtype": "fp16", **W8, "kv_dtype": "int8"}, "codes", {*ROWS, "w8a8"}),
    "w4a8-kv4": ({"dtype": "fp32", **W4, "kv_dtype": "int4"}, "codes", {*ROWS, "w4a8"}),
}
MORE_CASES: dict[str, Any] = {
    "fp16": ({"dtype": "fp16"}, "fp16", ROWS),
    "bf16-kv8": ({"dtype": "bf16", "kv_dtype": "int8"}, "codes", ROWS),
    "fp16-fp8": ({"dtype": "fp16", "kv_dtype": "fp8"}, "codes", ROWS),
    "w8a8-kv4z": ({"dtype": "fp32", **W8, "kv_dtype": "int4z"}, "codes", {*ROWS, "w8a8"}),
    "w4a8-fp8": ({"dtype": "fp16", **W4, "kv_dtype": "fp8"}, "codes", {*ROWS, "w4a8"}),
    "deterministic": ({"dtype": "fp32", "deterministic": True}, "fp32", ROWS),
    "head-int8": ({"dtype": "fp32", "lm_head": "int8"}, "codes", {*ROWS, "w8a8"}),
    "head-fp8": ({"dtype": "fp16", "lm_head": "fp8"}, "codes", {*ROWS, "w8a8"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return write_llama(tmp_path_factory.mktemp("triton"), seed=33, head_dim=32, **sizes)


@contextmanager
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Within it the engine is on Triton; yields the names of the kernels that ran."""
    names: set[str] = set()
    run, start = InterpretedFunction.run, launch.KernelStarter.__call__

    def interpreted(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    def compiled(self: launch.KernelStarter, *args: Any) -> None:
        names.add(self.kernel.__name__)
        start(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "runs_triton", lambda device: True)
        # persistent grids of a small GPU: most of a large one's programs would find nothing to do
        patch.setitem(launch.ASSUMED, 90, launch.ASSUMED[90]._replace(num_sms=2))
        patch.setattr(InterpretedFunction, "run", interpreted)
        patch.setattr(launch.KernelStarter, "__call__", compiled)
        yield names


def first_difference(a: list[int], b: list[int]) -> int | None:
    assert len(a) == len(b), f"{len(a)} tokens, not {len(b)}"
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def gap(llm: LLM, tokens: list[int], a: int, b: int) -> float:
    """How far apart the logits of two next tokens are, of the largest."""
    row_V = llm.logits(tokens)[-1]
    return ((row_V[a] - row_V[b]).abs() / row_V.abs().max()).item()


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE_CASES)])
def test_triton_answers_as_the_cpu_does(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, tie, kernels = (CASES | MORE_CASES)[case]
    with LLM(folder, device="cpu", **STEPS, **options) as llm:
        want = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
        with on_triton(monkeypatch) as ran, LLM(folder, device=DEVICE, **STEPS, **options) as other:
            got = [o.outputs[0].token_ids for o in other.generate(PROMPTS, GREEDY)]
        for prompt, cpu, triton in zip(PROMPTS, want, got, strict=True):
            at = first_difference(cpu, triton)
            if at is not None:
                apart = gap(llm, [*prompt, *cpu[:at]], cpu[at], triton[at])
                where = f"token {at} after {len(prompt)}: {triton[at]}, not {cpu[at]}"
                assert apart < TIES[tie], f"{where}, {apart:.1e} apart"
    missing = {k for k in kernels if not any(k in name for name in ran)}
    assert not missing, f"no kernel of {sorted(missing)} ran, only {sorted(ran)}"
