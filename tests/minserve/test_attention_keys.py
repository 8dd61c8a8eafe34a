"""int8_qk and fp8_prefill: they reach the kernels, cost what was measured, and are refused where there is no kernel."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import launch
from minserve import LLM
from minserve.config import Config
from minserve.llm import kl_divergence
from minserve.loading import check_kernels
from minserve.resolve import ResolvedModel, resolve_model
from minserve.rows import rounded_in_fp8
from tests.e2e.test_triton_engine import DEVICE, on_triton
from tests.tiny import write_llama

IDS = [(7 * i * i + 3 * i) % 290 for i in range(70)]
# key, KV format, tokens of a step (short chunks take the decode kernel), kernel, KL(without || with) on this model
CASES: list[Any] = [
    ("int8_qk", "int8", 16, "_attn_decode_kernel", 2.8e-5),
    pytest.param("int8_qk", "int4", 16, "_attn_decode_kernel", 2.8e-4, marks=pytest.mark.slow),
    pytest.param("int8_qk", "int4z", 16, "_attn_decode_kernel", 2.8e-4, marks=pytest.mark.slow),
    ("fp8_prefill", "fp8", 70, "_prefill_fp8_kernel", 7.5e-4),
    ("fp8_prefill", "int4", 70, "_kv_to_fp8_kernel", 1.4e-3),
    ("fp8_queries", "int4", 16, "_quant_rows_kernel", 1.1e-3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return write_llama(tmp_path_factory.mktemp("keys"), seed=33, **sizes)


@pytest.mark.parametrize(("key", "kv_dtype", "tokens", "kernel", "measured"), CASES)
def test_a_key_changes_what_the_kernel_multiplies(
    key: str,
    kv_dtype: str,
    tokens: int,
    kernel: str,
    measured: float,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bounded by three times what was measured."""
    steps = {"max_num_batched_tokens": tokens, "max_num_seqs": 4, "max_model_len": 128, "pool_bytes": 4 << 20}
    found = []
    for on in (False, True):
        options = {"dtype": "fp16", "kv_dtype": kv_dtype, "cuda_graphs": False, key: on}
        with on_triton(monkeypatch) as ran, LLM(folder, device=DEVICE, **steps, **options) as llm:
            found.append(llm.logits(IDS[: max(24, tokens)]))
        assert (kernel in ran) == (on or key == "int8_qk")
    assert 1e-6 < kl_divergence(*found) < 3 * measured, f"{kl_divergence(*found):.1e}"


def test_a_cpu_rounds_queries_too(folder: Path) -> None:
    q_THK = torch.randn(3, 2, 16).bfloat16()
    rounded = rounded_in_fp8(q_THK)
    scale = q_THK.float().abs().amax(-1, keepdim=True) / 448
    by_hand = (q_THK.float() / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(rounded.float(), by_hand, rtol=2**-8, atol=0)
    assert not torch.equal(rounded, q_THK)
    options: dict[str, Any] = {"max_model_len": 128, "pool_bytes": 4 << 20, "kv_dtype": "int4"}
    found = []
    for on in (False, True):
        with LLM(folder, device="cpu", fp8_queries=on, **options) as llm:
            found.append(llm.logits(IDS))
    assert 1e-4 < kl_divergence(*found) < 3.3e-3, f"{kl_divergence(*found):.1e}"


def resolved(folder: Path, **keys: Any) -> ResolvedModel:
    return resolve_model(Config.single(folder, **keys).models[0], "cpu")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"int8_qk": True}, "int8_qk must be false unless kv_dtype is int8, int4 or int4z, here fp32"),
        ({"int8_qk": True, "dtype": "bf16", "kv_dtype": "fp8"}, "int8_qk must be false .* here fp8"),
        # the checkpoint is of float32
        ({"int8_qk": True, "kv_dtype": "int8"}, "int8_qk must be false .* dtype not fp32, here fp32"),
        ({"fp8_prefill": True}, "fp8_prefill must be false unless kv_dtype is fp8 or int4, here fp32"),
        ({"fp8_prefill": True, "kv_dtype": "int8"}, "fp8_prefill must be false .* here int8"),
        ({"fp8_prefill": True, "kv_dtype": "fp8", "deterministic": True}, "fp8_prefill .* here true"),
    ],
)
def test_what_has_no_kernel_is_refused(folder: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=rf"^models\[mine\]\.{says}.*, got true$"):
        resolved(folder, name="mine", **keys)


def test_a_device_without_the_kernel_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qk = {"dtype": "bf16", "kv_dtype": "int4", "int8_qk": True}
    fp8 = {"kv_dtype": "fp8", "fp8_prefill": True}
    for keys, name in ((qk, "int8_qk"), (fp8, "fp8_prefill")):
        with pytest.raises(ValueError, match=rf"{name} must be false on cpu: it is a GPU's"):
            LLM(folder, device="cpu", pool_bytes=8 << 20, **keys)
    model = resolved(folder, **fp8)
    with on_triton(monkeypatch):
        check_kernels(resolved(folder, **qk), torch.device("cpu"))
        check_kernels(model, torch.device("cpu"))
        monkeypatch.setitem(launch.ASSUMED, 90, launch.ASSUMED[80])
        with pytest.raises(
            ValueError, match=r"fp8_prefill must be false: it needs sm_89 or later .* got sm_80 and 32"
        ):
            check_kernels(model, torch.device("cpu"))
