"""Prefill with both products in e4m3: within what rounding the probabilities alone can do, on queries rounded likewise."""

import pytest
import torch
from torch import Tensor

from kernels import attn_ref
from kernels.attn_prefill import SPEC, attn_prefill
from kernels.attn_ref import attention_ref
from kernels.kv_read import read_kv
from kernels.spec import case

SPANS = {
    "fresh": ((0, 0, 70),),
    "ragged": ((0, 31, 3), (1, 130, 33)),
}


def rounded(q_THK: Tensor) -> Tensor:
    """Queries as the kernel multiplies them: e4m3 over a scale per token and head."""
    scale = q_THK.float().abs().amax(-1, keepdim=True) / 448
    return (q_THK.float() / scale).to(torch.float8_e4m3fn).double() * scale


@pytest.mark.parametrize(("spans", "heads", "K"), [("fresh", 4, 128), ("ragged", 3, 64), ("ragged", 1, 80)])
def test_error_is_that_of_rounding_probabilities(
    spans: str, heads: int, K: int, monkeypatch: pytest.MonkeyPatch
):
    c = case(torch.bfloat16, spans=SPANS[spans], fmt="fp8", H=heads, G=1, K=K)
    q_THK, place_T2, paged, scale, _ = SPEC.make(c, torch.Generator().manual_seed(0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, pool, step, *_ = SPEC.prepare["triton"](q_THK.to(device), place_T2, paged, scale, True)
    out_THK = torch.empty_like(q)
    attn_prefill(out_THK, q, pool, step, 1, scale, fp8=True)

    plain = paged.step(place_T2, triton=False)
    truth = attention_ref(rounded(q_THK), paged.pool, plain, 1, scale)
    off = (out_THK.cpu().double() - truth).abs()
    # half an ulp of 3 mantissa bits is 2^-4 of a probability, so of the mean of |v|, which is below its root mean square;
    # the 2^-8 is the bf16 of the result, and 14-bit sums on a GPU
    monkeypatch.setattr(attn_ref, "read_kv", lambda *args: (read_kv(*args)[0], read_kv(*args)[1] ** 2))
    squares = attention_ref(rounded(q_THK), paged.pool, plain, 1, scale)
    assert (off <= 2**-4 * squares.sqrt() + 2**-8 * truth.abs() + 1e-3).all(), (
        f"{(off / squares.sqrt()).max()=}"
    )
    assert off.square().mean().sqrt() <= 0.03 * squares.mean().sqrt(), "rounding errors are independent"
