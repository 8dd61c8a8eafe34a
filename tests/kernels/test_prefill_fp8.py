"""Prefill with both products in e4m3, beyond its cases in the SPEC: queries of zeros, small values, where a chunk is cut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.kernels import verify
from kernels import attn_prefill
from kernels.attn_prefill import SPEC
from kernels.kv_case import Paged
from kernels.kv_layout import SLOT_BITS
from kernels.rope_kv_write import rope_kv_write_cpu
from kernels.spec import Case, case
from tests.close import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Args = tuple[Tensor, Tensor, Paged, float, bool]


def fp8(*spans: tuple[int, int, int], heads: int = 2, K: int = 64) -> Case:
    return case(torch.bfloat16, spans=spans, fmt="fp8", H=heads, G=1, K=K, fp8=True)


def made(c: Case) -> Args:
    return SPEC.make(c, torch.Generator().manual_seed(0))


def run(args: Args) -> Tensor:
    return SPEC.bind("triton", (args[0].to(DEVICE), *args[1:]))().cpu()


def test_queries_of_zeros_see_what_is_before_them() -> None:
    c = fp8((0, 0, 40))
    q_THK, *rest = made(c)
    args = (torch.zeros_like(q_THK), *rest)
    bound = SPEC.bound(c, args)
    assert bound is not None
    assert_within(run(args), bound)


def test_small_values_keep_their_precision_beside_lanes_that_nobody_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their scales are not held against one of 1."""

    def smaller(qkv_TX: Tensor, *rest: object) -> Tensor:
        third = qkv_TX.shape[1] // 3
        return rope_kv_write_cpu(torch.cat((qkv_TX[:, : 2 * third], qkv_TX[:, 2 * third :] / 1024), 1), *rest)

    monkeypatch.setattr(attn_prefill, "rope_kv_write_cpu", smaller)
    c = fp8((0, 0, 20))
    args = made(c)
    bound = SPEC.bound(c, args)
    assert bound is not None
    assert bound.truth.abs().max() < 0.01
    out = run(args)
    assert (out.double() - bound.truth).square().mean().sqrt() <= bound.rms


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_a_row_does_not_see_where_its_chunk_is_cut(heads: int) -> None:
    """Nor the values of its future, whose scales are a hundred times its own."""
    c = fp8((0, 70, 90), heads=heads)
    q_THK, place_T2, paged, *rest = made(c)
    whole = run((q_THK, place_T2, paged, *rest))
    for low, high in ((0, 1), (0, 41), (41, 90), (58, 60), (3, 89)):
        part = run((q_THK[low:high], place_T2[low:high], paged, *rest))
        assert torch.equal(part, whole[low:high]), f"{low}..{high}"
    P, first = paged.layout.block_tokens, 140
    block = int(paged.block_table_BN[0, first // P])
    at = int(paged.slab_table_SL[block >> SLOT_BITS, 1])
    at += (block & (1 << SLOT_BITS) - 1) * paged.layout.block_bytes
    pool = paged.pool.clone()
    scales = pool[at + 2 * P * 64 : at + paged.layout.block_bytes].view(torch.float16).view(P, 2)
    scales[first % P : min(P, first % P + 20), 1] *= 100
    moved = run((q_THK, place_T2, replace(paged, pool=pool), *rest))
    seen = first - 70
    assert torch.equal(moved[:seen], whole[:seen])
    assert not torch.equal(moved[seen:], whole[seen:])


def test_the_bench_verifies_it() -> None:
    c = fp8((0, 0, 100), heads=4, K=128)
    args = made(c)
    out = run(args)
    verify(SPEC, c, args, out)
    with pytest.raises(AssertionError):
        verify(SPEC, c, args, out.roll(1, 0))
