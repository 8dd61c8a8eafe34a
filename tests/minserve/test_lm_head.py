"""An output projection of 8 bits: logits within the bound of the quantization, the demo's tokens mostly the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from kernels.gemm_w8a8 import FP8, W8Weight
from kernels.launch import ASSUMED
from minserve import LLM, prepare
from minserve.linear import Linear
from minserve.load_report import LoadReport
from minserve.weights import WeightSource
from tests.minserve.test_demo import ASKED, DEMO
from tests.minserve.test_quantized_models import kl

D, V = 96, 300
DTYPES = {"int8": torch.int8, "fp8": FP8}


def normal(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def read_head(folder: Path, lm_head: str, tied: bool) -> tuple[Linear, Tensor, LoadReport]:
    weight_VD = normal(V, 1)
    save_file(
        {"norm": torch.ones(D)} if tied else {"lm_head.weight": weight_VD}, folder / "model.safetensors"
    )
    with WeightSource(folder, dtype=torch.float32, lm_head=lm_head) as source:
        if tied:
            source.tensor("norm", (D,))
        head = source.head("lm_head", weight_VD if tied else torch.zeros(V, D), tied=tied)
        return head, weight_VD, source.finish()


def error_of(x: Tensor, lm_head: str) -> Tensor:
    """What rounding to codes may take off each element, at most: half a quantum of its row."""
    scale = x.abs().amax(-1, keepdim=True)
    if lm_head == "int8":
        return (scale / 254).expand_as(x)
    # e4m3: 3 bits behind the leading one, and 2^-9 of the scale for the smallest
    return (x.abs() / 16).maximum(scale / 448 / 1024)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lm_head", DTYPES)
def test_logits_are_within_the_bound_of_the_quantization(lm_head: str, tied: bool, tmp_path: Path):
    head, w_VD, report = read_head(tmp_path, lm_head, tied)
    x_TD = normal(7, 2)
    part = head.parts[0]
    assert isinstance(part, W8Weight)
    assert head.wants == part.row_dtype == DTYPES[lm_head]
    assert head(x_TD.bfloat16()).dtype == torch.float32, "logits are not rounded to the model's dtype"
    error = (head(x_TD).double() - x_TD.double() @ w_VD.double().t()).abs()
    ex, ew = error_of(x_TD.double(), lm_head), error_of(w_VD.double(), lm_head)
    bound = ex @ w_VD.double().abs().t() + x_TD.double().abs() @ ew.t() + ex @ ew.t()
    assert (error <= 1.001 * bound).all(), f"{(error / bound).max()=}"
    assert (error > bound / 50).any(), "nothing was quantized"
    assert f"lm_head {lm_head} (channel, symmetric): 1 layers, kernel gemm_w8a8" in "".join(report.lines())


def demo_logits(lm_head: str) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    keys = {"dtype": "fp32", "lm_head": lm_head, "pool_bytes": 16 << 20, "max_model_len": 128}
    with LLM(str(DEMO), device="cpu", **keys) as llm:
        parts = []
        for question, answer in ASKED:
            chat = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + answer
            parts.append(llm.logits(tokenizer(text, add_special_tokens=False)["input_ids"]))
        return torch.cat(parts)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return demo_logits("auto")


@pytest.mark.parametrize(
    ("lm_head", "measured_kl", "measured_share"), [("int8", 5.0e-5, 1.0), ("fp8", 1.4e-3, 0.988)]
)
def test_the_demo_says_the_same(lm_head: str, measured_kl: float, measured_share: float, plain: Tensor):
    """KL in nats a token, bounded by three times what was measured; the share of positions with the same best token."""
    quantized = demo_logits(lm_head)
    distance = kl(plain, quantized)
    assert 1e-7 < distance < 3 * measured_kl, f"KL {distance:.1e}"
    same = (plain.argmax(-1) == quantized.argmax(-1)).float().mean()
    assert same >= 1 - 3 * max(1 - measured_share, 0.002), f"{same=}"


def test_a_head_of_its_own_type_is_left_alone(tmp_path: Path):
    head, w_VD, _ = read_head(tmp_path, "auto", tied=False)
    assert head.wants is None
    x_TD = normal(3, 2)
    torch.testing.assert_close(head(x_TD), x_TD @ w_VD.t())


def test_what_a_head_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="lm_head must be one of auto, int8, fp8, got 'int3'"):
        WeightSource(tmp_path, dtype=torch.float32, lm_head="int3")
    monkeypatch.setattr(prepare, "gpu_facts", lambda device: ASSUMED[80])
    with pytest.raises(ValueError, match="lm_head must be without fp8 on a GPU before sm_89"):
        WeightSource(tmp_path, dtype=torch.float32, device="cuda:0", lm_head="fp8")
    save_file({"lm_head.weight": torch.full((V, D), float("nan"))}, tmp_path / "model.safetensors")
    with (
        WeightSource(tmp_path, dtype=torch.float32, lm_head="int8") as source,
        pytest.raises(ValueError, match="lm_head must be finite"),
    ):
        source.head("lm_head", torch.zeros(V, D), tied=False)
