"""Nothing is compiled while serving: whatever kernel variants 200 random steps launch, warm-up has launched before."""

import dataclasses
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton import knobs

from minserve import LLM
from minserve.warmup import SAMPLINGS, CompileMonitor, Sizes, compile_monitor, step_shapes, token_counts
from tests.source import ROOT
from tests.tiny import write_llama

FEW: tuple[dict[str, Any], ...] = (
    {
        "dtype": "bf16",
        "quantization": "w4a8-fp8",
        "kv_dtype": "int4",
        "fp8_prefill": True,
        "fp8_queries": True,
    },
    {"dtype": "bf16", "quantization": "w4a8-int8", "kv_dtype": "int4", "int8_qk": True},
)
SMALL, LARGE = (40, 300, 500), (64, 2048, 2500)
MANY: tuple[dict[str, Any], ...] = (
    {"dtype": "fp32"},
    {"dtype": "bf16"},
    {"dtype": "fp16", "kv_dtype": "int4z"},
    {"dtype": "fp16", "kv_dtype": "int8", "int8_qk": True},
    {"dtype": "fp16", "quantization": "w8a8-int8", "kv_dtype": "int8"},
    {"dtype": "fp16", "quantization": "w8a8-int8", "kv_dtype": "fp8", "fp8_prefill": True},
    {"dtype": "bf16", "quantization": "w4a8-int8", "kv_dtype": "int4"},
    {"dtype": "bf16", "kv_dtype": "fp8", "deterministic": True},
    {"dtype": "bf16", "quantization": "w8a8-int8", "deterministic": True},
    {"dtype": "fp16", "quantization": "w4a8-int8", "kv_dtype": "fp8"},
    {"dtype": "bf16", "kv_dtype": "int8", "lm_head": "int8"},
    {"dtype": "fp16", "lm_head": "fp8"},
)


@pytest.mark.parametrize(
    ("models", "sizes"),
    [
        pytest.param(FEW, SMALL, id="few"),
        pytest.param(MANY, SMALL, id="many", marks=pytest.mark.slow),
        pytest.param(FEW, LARGE, id="large", marks=pytest.mark.slow),
    ],
)
def test_random_steps_need_no_kernel_that_warm_up_has_not_launched(
    tmp_path: Path, models: tuple[dict[str, Any], ...], sizes: tuple[int, int, int]
) -> None:
    shape = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "head_dim": 64,
        "num_hidden_layers": 3,
        "max_position_embeddings": 4096,
    }
    folder = write_llama(tmp_path / "model", seed=2, **shape)
    arguments = [json.dumps({"folder": str(folder), "sizes": sizes} | m) for m in models]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.minserve.launch_keys", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(models)
    for model, line in zip(models, found, strict=True):
        assert line["warmed"] >= 10, f"{model}: only {line['warmed']} kernels"
        assert not line["late"], f"{model}: " + "\n".join(f"{k} ({v})" for k, v in line["late"].items())


@pytest.mark.parametrize(("running", "tokens", "length"), [(1, 1, 1), (4, 7, 3), (300, 2048, 4096)])
def test_steps_keep_within_their_sizes(running: int, tokens: int, length: int) -> None:
    seen = set()
    for shape in step_shapes(Sizes(running, tokens, length), 16):
        counts = [1] * len(shape.decodes) + [n for _, n in shape.chunks]
        assert len(counts) <= running
        assert 0 < sum(counts) <= tokens
        assert max((*shape.decodes, *(start + n for start, n in shape.chunks))) <= length
        assert min((*shape.decodes, *counts)) > 0
        assert min((start for start, _ in shape.chunks), default=0) >= 0
        seen.add(len(shape.decodes))
    assert {1, min(running, tokens)} <= seen
    assert token_counts(tokens)[-1] == tokens


def test_a_late_compile_is_counted_and_its_kernel_named_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    monitor = compile_monitor()
    assert compile_monitor() is monitor is knobs.runtime.jit_post_compile_hook
    with caplog.at_level(logging.WARNING):
        monitor(repr="early", key="")
        assert not caplog.records
        monitor.serving = True
        for variant in (
            "_gemm_kernel[num_warps=4]",
            "_gemm_kernel[num_warps=8]",
            "_copy_kernel[num_warps=4]",
        ):
            monitor(repr=variant, key="")
    assert (monitor.compiles, monitor.late) == (4, 3)
    said = [(r.levelname, r.getMessage().partition(" was")[0]) for r in caplog.records]
    assert said == [("WARNING", "kernel _gemm_kernel"), ("WARNING", "kernel _copy_kernel")]
    assert isinstance(monitor, CompileMonitor)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [*FEW, *MANY])
def test_serving_compiles_nothing(tmp_path: Path, model: dict[str, Any]) -> None:
    folder = write_llama(tmp_path / "model", seed=2, hidden_size=256, intermediate_size=512, head_dim=64)
    r = random.Random(0)
    late = compile_monitor().late
    with LLM(
        folder, device="cuda:0", pool_bytes=64 << 20, max_num_seqs=40, max_num_batched_tokens=300, **model
    ) as llm:
        assert compile_monitor().serving
        for _ in range(8):
            prompts = [[r.randrange(290) for _ in range(r.randint(1, 150))] for _ in range(r.randint(1, 60))]
            params = [
                dataclasses.replace(r.choice(SAMPLINGS), max_tokens=r.randint(1, 30), ignore_eos=True)
                for _ in prompts
            ]
            llm.generate(prompts, params)
    assert compile_monitor().late == late
