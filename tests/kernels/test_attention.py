"""Attention over a pool of NaN bytes: batches, cuts, splits, and every ratio of query to key heads.

Cases that every run shares (formats, dtypes, head sizes, lengths around a block) are in the SPEC; here is what takes
more than one step to say.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.attention as attention_module
from kernels import kv_rows, kv_work
from kernels.attention import SPEC, attention, attention_ref
from kernels.kv_case import Paged, places
from kernels.kv_layout import KV_FORMATS
from kernels.kv_read import read_kv
from kernels.quant_rows import quant_rows
from kernels.rope_kv_write import rope_kv_write_triton
from kernels.spec import case
from tests.close import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [pytest.param(False, id="cpu"), pytest.param(True, id="triton")]


def filled(
    fmt: str,
    lengths: tuple[int, ...],
    heads: int = 4,
    kv_heads: int = 2,
    K: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple:
    """(q of every position of every sequence, the paged pool that holds them, scale)."""
    c = case(
        dtype,
        fmt=fmt,
        H=heads,
        G=kv_heads,
        K=K,
        spans=tuple((b, 0, n) for b, n in enumerate(lengths)),
    )
    q_THK, _, paged, scale, _ = SPEC.make(c, torch.Generator().manual_seed(0))
    return q_THK, paged, scale


def attend(triton: bool, q_THK: Tensor, paged: Paged, place_T2: Tensor, scale: float, **options) -> Tensor:
    device = DEVICE if triton else "cpu"
    paged = paged.to(device)
    step = paged.step(place_T2, triton=triton, **options)
    return attention(q_THK.to(device), paged.pool, step, 1, scale).cpu()


def truth_and_own(q_THK: Tensor, paged: Paged, place_T2: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    step = paged.step(place_T2)
    own, truth = (attention_ref(q, paged.pool, step, 1, scale) for q in (q_THK, q_THK.double()))
    return truth, own


def rows_of(lengths: tuple[int, ...], spans: list[tuple[int, int, int]]) -> Tensor:
    """Where the rows of `spans` are among all positions of all sequences."""
    first = [sum(lengths[:b]) for b in range(len(lengths))]
    return torch.tensor([first[seq] + start + i for seq, start, count in spans for i in range(count)])


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_many_ragged_decodes(fmt: str, monkeypatch: pytest.MonkeyPatch):
    """Sorted, grouped and padded on the CPU."""
    monkeypatch.setattr(kv_rows, "GROUP_KEY_BYTES", 1 << 15)
    lengths = (40, 1, 300, 31, 33, 290, 64, 5, 310, 32)
    q_THK, paged, scale = filled(fmt, lengths)
    spans = [(b, n - 1, 1) for b, n in enumerate(lengths)]
    q_BHK, place_B2 = q_THK[rows_of(lengths, spans)], places(*spans)
    assert len(paged.step(place_B2).rows.groups) >= 4
    truth, own = truth_and_own(q_BHK, paged, place_B2, scale)
    assert_no_worse(attend(False, q_BHK, paged, place_B2, scale), own, truth)


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8", "int4", "int4z"])
def test_split_decodes_are_merged(fmt: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_work, "LEAST_SPLIT", 64)
    lengths = (64, 65, 300)
    q_THK, paged, scale = filled(fmt, lengths, dtype=torch.float16)
    spans = [(b, n - 1, 1) for b, n in enumerate(lengths)]
    q_BHK, place_B2 = q_THK[rows_of(lengths, spans)], places(*spans)
    assert len(paged.step(place_B2, triton=True).work.piece_X8) == 8
    truth, own = truth_and_own(q_BHK, paged, place_B2, scale)
    assert_no_worse(attend(True, q_BHK, paged, place_B2, scale), own, truth)


@pytest.mark.parametrize("fmt", ["int8", "int4", "int4z"])
def test_int8_queries_err_as_their_rounding_does(fmt: str):
    """The truth is that of the rounded queries: what is left is the error of the products, as in any other case."""
    lengths, spans = (35, 150), [(0, 30, 5), (1, 149, 1)]
    q_THK, paged, scale = filled(fmt, lengths, K=32, dtype=torch.float16)
    q_THK, place_T2 = q_THK[rows_of(lengths, spans)], places(*spans)
    unit = q_THK.float().abs().amax(-1, keepdim=True) / 127
    rounded = (q_THK.float() / unit).round() * unit
    assert ((rounded - q_THK).abs() <= 0.5001 * unit).all()
    _, own = truth_and_own(q_THK, paged, place_T2, scale)
    moved = paged.to(DEVICE)
    step = moved.step(place_T2, triton=True)
    out = attention(q_THK.to(DEVICE), moved.pool, step, 1, scale, int8_qk=True).cpu()
    truth = attention_ref(rounded.double(), paged.pool, paged.step(place_T2), 1, scale)
    near = attention_ref(q_THK.double(), paged.pool, paged.step(place_T2), 1, scale)
    assert_no_worse(out, own + (truth - near).half(), truth)
    assert (truth - near).abs().max() > 4 * (out - truth).abs().max(), "rounding is what an int8 query costs"


@pytest.mark.parametrize("quant", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("split", [256, 64])
def test_codes_are_those_of_the_output(quant: torch.dtype, split: int, monkeypatch: pytest.MonkeyPatch):
    """Fused into the merge, or of a step with too few rows for that, or with chunks."""
    monkeypatch.setattr(kv_work, "LEAST_SPLIT", split)
    lengths, spans = (40, 150), [(0, 39, 1), (1, 149, 1)]
    q_THK, paged, scale = filled("int8", lengths, dtype=torch.bfloat16)
    q_THK, place_T2 = q_THK[rows_of(lengths, spans)].to(DEVICE), places(*spans)
    moved = paged.to(DEVICE)
    step = moved.step(place_T2, triton=True)
    expected = quant_rows(attention(q_THK, moved.pool, step, 1, scale).flatten(1), quant)
    for rows in (1, 9):
        monkeypatch.setattr(attention_module, "FUSED_ROWS", rows)
        codes, scales = attention(q_THK, moved.pool, step, 1, scale, quant)
        assert codes.dtype == quant
        if split == 256 or rows == 9:
            assert torch.equal(codes.float(), expected.codes_TD.float())
            assert torch.equal(scales, expected.scale_T)
        else:  # pieces are added up in another order, which may round a value the other way
            torch.testing.assert_close(scales, expected.scale_T, rtol=2**-8, atol=0)
            far = (
                codes.float() * scales[:, None] - expected.codes_TD.float() * expected.scale_T[:, None]
            ).abs()
            quantum = 1 if quant == torch.int8 else 32
            assert (far <= 1.01 * quantum * scales[:, None]).all()
            assert (far > 0).float().mean() < 0.1


def test_codes_on_the_cpu():
    q_THK, paged, scale = filled("bf16", (20,))
    place_T2, step = places((0, 0, 20)), paged.step(places((0, 0, 20)), triton=False)
    assert len(place_T2) == len(q_THK)
    expected = quant_rows(attention(q_THK, paged.pool, step, 1, scale).flatten(1))
    assert torch.equal(attention(q_THK, paged.pool, step, 1, scale, True).codes_TD, expected.codes_TD)


@pytest.mark.parametrize("fmt", ["bf16", "int4z"])
def test_chunks_without_room_for_their_context(fmt: str):
    """In groups of columns, each token with its own end."""
    lengths, spans = (90,), [(0, 21, 50)]
    q_THK, paged, scale = filled(fmt, lengths, dtype=torch.float16)
    q_THK, place_T2 = q_THK[rows_of(lengths, spans)], places(*spans)
    step = paged.step(place_T2, triton=True, scratch_blocks=0, heads_per_kv=2)
    assert (len(step.work.chunk_X4), step.work.wide_tokens) == (0, 32)
    truth, own = truth_and_own(q_THK, paged, place_T2, scale)
    out = attend(True, q_THK, paged, place_T2, scale, scratch_blocks=0, heads_per_kv=2)
    assert_no_worse(out, own, truth)


def test_queries_of_zeros_see_all_keys_alike():
    lengths = (33,)
    for fmt in ("int8", "int4", "int4z"):
        q_THK, paged, scale = filled(fmt, lengths, dtype=torch.float16)
        place_T2 = places((0, 32, 1))
        out = attend(True, torch.zeros_like(q_THK[:1]), paged, place_T2, scale)
        truth, own = truth_and_own(torch.zeros_like(q_THK[:1]), paged, place_T2, scale)
        assert_no_worse(out, own, truth)


@pytest.mark.parametrize("triton", PATHS)
@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8", "int4", "int4z"])
def test_a_query_with_nan_shows_in_its_row_alone(triton: bool, fmt: str):
    lengths = (33, 20)
    q_THK, paged, scale = filled(fmt, lengths, dtype=torch.float16)
    place_T2 = places((0, 32, 1), (1, 19, 1))
    q_THK = q_THK[rows_of(lengths, [(0, 32, 1), (1, 19, 1)])].clone()
    whole = attend(triton, q_THK, paged, place_T2, scale)
    q_THK[0, 1, 5] = float("nan")
    out = attend(triton, q_THK, paged, place_T2, scale)
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, 0], whole[0, 0])
    assert torch.equal(out[1], whole[1])


@pytest.mark.parametrize("triton", PATHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 1), (7, 1), (16, 1), (6, 2)])
def test_every_ratio_of_heads(triton: bool, heads: int, kv_heads: int):
    """A decode, and a chunk longer than a tile of the kernel, with context."""
    lengths = (20, 40)
    q_THK, paged, scale = filled("fp32", lengths, heads, kv_heads)
    spans = [(0, 19, 1), (1, 3, 37)]
    q_THK, place_T2 = q_THK[rows_of(lengths, spans)], places(*spans)
    truth, own = truth_and_own(q_THK, paged, place_T2, scale)
    assert_no_worse(attend(triton, q_THK, paged, place_T2, scale), own, truth)


@pytest.mark.parametrize("triton", PATHS)
def test_a_chunk_of_several_items(triton: bool):
    """More rows than a work item has, beginning and ending inside a block."""
    lengths = (kv_work.CHUNK_TOKENS + 14,)
    q_THK, paged, scale = filled("int8", lengths, 2, 1)
    place_T2 = places((0, 9, lengths[0] - 9))
    truth, own = truth_and_own(q_THK[9:], paged, place_T2, scale)
    assert_no_worse(attend(triton, q_THK[9:], paged, place_T2, scale), own, truth)


@pytest.mark.parametrize("triton", PATHS)
@pytest.mark.parametrize("fmt", ["fp32", "int4"])
def test_cuts_and_batches_leave_no_trace_in_a_deterministic_step(triton: bool, fmt: str):
    """A token decoded alone, in a chunk, in a whole prompt, beside others: the same bits."""
    lengths = (37, 70)
    q_THK, paged, scale = filled(fmt, lengths, 3, 1)
    steps = ([(0, 0, 37)], [(0, 36, 1)], [(0, 36, 1), (1, 69, 1)], [(1, 69, 1), (0, 30, 7)], [(1, 50, 20)])
    seen: dict[int, Tensor] = {}
    for spans in steps:
        rows = rows_of(lengths, spans)
        out = attend(triton, q_THK[rows], paged, places(*spans), scale, deterministic=True)
        for row, got in zip(rows.tolist(), out, strict=True):
            assert torch.equal(got, seen.setdefault(row, got)), f"row {row} in {spans}"
    truth, own = truth_and_own(q_THK[:37], paged, places((0, 0, 37)), scale)
    assert_no_worse(torch.stack([seen[row] for row in range(37)]), own, truth)


def test_triton_rows_do_not_see_their_neighbours():
    """Without `deterministic` too: neither decodes of one piece, nor chunks cut where a tile ends."""
    lengths = (37, 70, 64)
    q_THK, paged, scale = filled("bf16", lengths)
    together = [(0, 36, 1), (1, 69, 1), (2, 0, 64)]
    whole = attend(True, q_THK[rows_of(lengths, together)], paged, places(*together), scale)
    at = 0
    for span in together:
        alone = attend(True, q_THK[rows_of(lengths, [span])], paged, places(span), scale)
        assert torch.equal(alone, whole[at : at + span[2]]), f"{span}"
        at += span[2]


@pytest.mark.parametrize("triton", PATHS)
@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_chunked_is_whole(triton: bool, fmt: str):
    lengths = (50,)
    q_THK, paged, scale = filled(fmt, lengths, 2, 1)
    whole = attend(triton, q_THK, paged, places((0, 0, 50)), scale)
    cuts = [0, 1, 16, 33, 50]
    parts = [attend(triton, q_THK[a:b], paged, places((0, a, b - a)), scale) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=2e-6)


def test_fp32_is_sdpa():
    q_THK, paged, scale = filled("fp32", (90,), 4, 2, 64)
    blocks = paged.block_table_BN[0].tolist()
    key, value = (x[:90] for x in read_kv(paged.pool, paged.layout, paged.slab_table_SL, blocks, 1))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q_THK, key, value)), is_causal=True, scale=scale, enable_gqa=True
    )[0].transpose(0, 1)
    for spans in ([(0, 0, 90)], [(0, 89, 1)]):
        rows = rows_of((90,), spans)
        got = attend(False, q_THK[rows], paged, places(*spans), scale)
        assert (got - expected[rows]).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_the_scene_is_full_of_nan(fmt: str):
    """What makes the other tests of masks mean something: lanes past the length hold NaN, or scales that are."""
    _, paged, _ = filled(fmt, (33,))
    key, value = read_kv(paged.pool, paged.layout, paged.slab_table_SL, paged.block_table_BN[0].tolist(), 1)
    assert torch.isfinite(key[:33]).all()
    assert torch.isfinite(value[:33]).all()
    assert key[33:].isnan().all()
    assert value[33:].isnan().all()


def test_keys_of_the_future_do_not_matter():
    """Causal inside a chunk: overwriting later tokens' keys and values leaves earlier rows as they were."""
    q_THK, paged, scale = filled("fp32", (20,))
    before = attend(False, q_THK, paged, places((0, 0, 20)), scale)
    at = int(paged.slab_table_SL[int(paged.block_table_BN[0, 0]) >> 12, 1])
    at += (int(paged.block_table_BN[0, 0]) & 4095) * paged.layout.block_bytes
    paged.pool[at : at + paged.layout.key_bytes].view(torch.float32).view(16, 16)[12] = 100.0
    after = attend(False, q_THK, paged, places((0, 0, 20)), scale)
    assert torch.equal(before[:12], after[:12])
    assert not torch.equal(before[12:], after[12:])


@pytest.mark.parametrize("fmt", ["bf16", "int4z"])
def test_blocks_beyond_4_gib_are_those_before(fmt: str):
    """Unit addresses fit 32 bits far longer than bytes do.  Of the larger pool only what is touched is mapped."""
    lengths, spans = (90, 67, 70), [(0, 89, 1), (1, 64, 3), (2, 30, 40)]
    q_THK, paged, scale = filled(fmt, lengths, dtype=torch.float16)
    q_THK, place_T2 = q_THK[rows_of(lengths, spans)].to(DEVICE), places(*spans)
    near = paged.to(DEVICE)
    far_bytes = 5 << 30
    pool = torch.empty(far_bytes + near.pool.numel(), dtype=torch.uint8, device=DEVICE)
    pool[far_bytes:] = near.pool
    far = replace(near, pool=pool, slab_table_SL=near.slab_table_SL + far_bytes)
    qkv_TX = torch.randn(len(place_T2), 8 * 16, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    one_MK = torch.ones(max(lengths), 16, device=DEVICE)
    outs = []
    for p in (near, far):
        step = p.step(place_T2, triton=True, heads_per_kv=2)
        assert all(len(table) for table in (step.work.piece_X8, step.work.wide_X8, step.work.chunk_X4))
        q_written = rope_kv_write_triton(qkv_TX, one_MK, torch.zeros_like(one_MK), p.pool, step, 1)
        outs.append((q_written.cpu(), attention(q_THK, p.pool, step, 1, scale).cpu()))
    assert torch.isfinite(outs[0][1]).all()
    for before, beyond in zip(*outs, strict=True):
        assert torch.equal(before, beyond)
    assert torch.equal(near.pool, pool[far_bytes:])
