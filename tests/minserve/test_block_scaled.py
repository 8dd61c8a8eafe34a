"""Layers of a DeepSeek-style checkpoint, from its bytes to its product: exact, for codes and scales that round nowhere."""

import pytest
import torch
from torch import Tensor

from minserve.linear import Linear
from minserve.prepare import prepare_quantized
from quant.formats import fp8
from quant.scheme import BLOCK, FP8, QuantWeight, fuse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAW = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
K = 640


def columns(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(BLOCK, 1)[:, :K]


def stored(N: int, g: torch.Generator) -> tuple[QuantWeight, Tensor]:
    """The layer as read, and W in float64: the scale is a multiplier, whatever its name says."""
    codes_NK = torch.randint(-2, 3, (N, K), generator=g).float()
    scale_PQ = 2.0 ** torch.randint(-3, 1, (-(-N // BLOCK), K // BLOCK), generator=g).float()
    fields = {"weight": codes_NK.to(FP8), "weight_scale_inv": scale_PQ}
    weight = fp8.load("layer", fields, N, K, fp8.read_config(RAW))
    return weight, (codes_NK * columns(scale_PQ.repeat_interleave(BLOCK, 0)[:N])).double()


@pytest.mark.parametrize("outputs", [(256, 128), (200, 128), (128, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_the_product_of_what_the_checkpoint_says(
    outputs: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Matrices that end inside a block cannot be fused with what comes after them, and run one by one."""
    g = torch.Generator().manual_seed(11)
    shards, values = zip(*(stored(N, g) for N in outputs), strict=True)
    fused = fuse(shards)
    assert (fused is None) == bool(outputs[0] % BLOCK)
    bias_N = torch.randint(-50, 51, (sum(outputs),), generator=g).to(dtype)
    biases = bias_N.split(outputs) if fused is None else (bias_N,)
    parts = [
        prepare_quantized(w.to(DEVICE), b.to(DEVICE), dtype).part
        for w, b in zip(shards if fused is None else (fused,), biases, strict=True)
    ]
    linear = Linear(parts, dtype)
    assert linear.wants is None
    assert linear.out_features == sum(outputs)
    codes_TK = torch.randint(-4, 5, (9, K), generator=g).float()
    codes_TK[:, ::BLOCK] = 448
    x_TK = codes_TK * columns(2.0 ** torch.randint(0, 4, (9, K // BLOCK), generator=g).float())
    want = x_TK.double() @ torch.cat(values).t() + bias_N.double()
    for deterministic in (False, True):
        y_TN = linear(x_TK.to(dtype).to(DEVICE), deterministic=deterministic)
        assert torch.equal(y_TN.cpu(), want.to(dtype))


def test_a_small_change_within_a_quantum_changes_nothing() -> None:
    """The rows are truly rounded: 32.5 and 33 are both 32 in a block whose largest is 448, and two values where it is 40."""
    weight, w_NK = stored(128, torch.Generator().manual_seed(3))
    linear = Linear([prepare_quantized(weight.to(DEVICE), None, torch.float32).part], torch.float32)
    x_TK = torch.full((1, K), 33.0)
    x_TK[:, ::BLOCK] = 448.0
    other_TK = x_TK.clone()
    other_TK[:, 1:BLOCK] = 32.5
    y, same = linear(x_TK.to(DEVICE)), linear(other_TK.to(DEVICE))
    assert torch.equal(y, same)
    assert not torch.equal(x_TK.double() @ w_NK.t(), other_TK.double() @ w_NK.t())
    x_TK[:, ::BLOCK] = other_TK[:, ::BLOCK] = 40.0
    assert not torch.equal(linear(x_TK.to(DEVICE)), linear(other_TK.to(DEVICE)))
