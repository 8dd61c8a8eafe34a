"""What rope_kv_write leaves in the pool, byte for byte, and what it must not touch."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels.kv_case import Paged, places, rope_tables
from kernels.kv_layout import KV_FORMATS, KvLayout
from kernels.kv_read import read_kv
from kernels.rope_kv_write import (
    KvScales,
    quantize_heads,
    rope_kv_write_cpu,
    rope_kv_write_ref,
    rope_kv_write_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [pytest.param(rope_kv_write_cpu, id="cpu"), pytest.param(rope_kv_write_triton, id="triton")]
Write = Callable[..., Tensor]
H, G = 3, 2


def write(run: Write, paged: Paged, qkv_TX: Tensor, place_T2: Tensor, tables: tuple[Tensor, Tensor]) -> Paged:
    device = DEVICE if run is rope_kv_write_triton else "cpu"
    paged = paged.to(device)
    step = paged.step(place_T2, triton=run is rope_kv_write_triton)
    cos_MK, sin_MK = (t.to(device) for t in tables)
    run(qkv_TX.to(device), cos_MK, sin_MK, paged.pool, step, 1)
    return paged.to("cpu")


def no_rotation(head_dim: int) -> tuple[Tensor, Tensor]:
    return torch.ones(200, head_dim), torch.zeros(200, head_dim)


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.float32), (10, torch.bfloat16)])
def test_the_whole_pool_is_as_the_reference_leaves_it(
    run: Write, fmt: str, head_dim: int, dtype: torch.dtype
):
    """Without rotation there is nothing to round differently: every byte counts, those nobody wrote too."""
    generator = torch.Generator().manual_seed(0)
    layout = KvLayout(fmt, G, head_dim)
    P = layout.block_tokens
    paged = Paged.make(layout, (1, P - 1, P + 1, 3 * P + 5), generator)
    place_T2 = places((0, 0, 1), (1, P - 2, 1), (2, P // 2 - 1, 2), (3, P - 3, 7))
    qkv_TX = torch.randn(len(place_T2), (H + 2 * G) * head_dim, generator=generator).to(dtype)
    expected = write(rope_kv_write_ref, paged, qkv_TX, place_T2, no_rotation(head_dim))
    got = write(run, paged, qkv_TX, place_T2, no_rotation(head_dim))
    assert int((got.pool != paged.pool).sum()) > 0
    assert torch.equal(got.pool, expected.pool), f"{int((got.pool != expected.pool).sum())} bytes differ"


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4"])
def test_cuts_do_not_matter(run: Write, fmt: str):
    """A sequence written at once, in chunks, or (the CPU) token by token in a random order: the same bytes."""
    generator = torch.Generator().manual_seed(1)
    length = 36
    paged = Paged.make(KvLayout(fmt, G, 16), (length,), generator)
    qkv_TX = torch.randn(length, (H + 2 * G) * 16, generator=generator)
    tables = rope_tables(length, 16)
    whole = write(run, paged, qkv_TX, places((0, 0, length)), tables)
    orders = [pairwise([0, 7, 8, 20, length])]
    if run is rope_kv_write_cpu:
        orders.append((t, t + 1) for t in torch.randperm(length, generator=generator).tolist())
    for order in orders:
        cut = paged
        for start, stop in order:
            cut = write(run, cut, qkv_TX[start:stop], places((0, start, stop - start)), tables)
        assert torch.equal(cut.pool, whole.pool)


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("lane", [3, 19])
def test_the_other_nibble_keeps_its_token(run: Write, lane: int):
    generator = torch.Generator().manual_seed(2)
    layout = KvLayout("int4", G, 16, block_tokens=32)
    paged = Paged.make(layout, (32,), generator)
    qkv_TX = torch.randn(33, (H + 2 * G) * 16, generator=generator)
    tables, blocks = rope_tables(32, 16), paged.block_table_BN[0].tolist()
    full = write(rope_kv_write_cpu, paged, qkv_TX[:32], places((0, 0, 32)), tables)
    again = write(run, full, qkv_TX[32:], places((0, lane, 1)), tables)
    for before, after in zip(
        *(read_kv(p.pool, layout, p.slab_table_SL, blocks, 1) for p in (full, again)), strict=True
    ):
        changed = (before != after).any(-1).any(-1).nonzero().flatten().tolist()
        assert changed == [lane]


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_extreme_rows(run: Write, fmt: str):
    """Zeros, values that no fp16 scale reaches, and values below the smallest scale: finite, and never a wrong sign."""
    layout = KvLayout(fmt, G, 16)
    paged = Paged.make(layout, (4,), torch.Generator().manual_seed(3))
    row = torch.linspace(-1, 1, 16).repeat(H + 2 * G)
    qkv_TX = torch.stack((row * 0, row * 1e30, row * 1e-30, row))
    got = write(run, paged, qkv_TX, places((0, 0, 4)), no_rotation(16))
    key, value = read_kv(got.pool, layout, got.slab_table_SL, got.block_table_BN[0].tolist(), 1)
    for held in (key[:4, 0], value[:4, 0]):
        assert torch.isfinite(held).all()
        assert not held[0].any()
        assert (held * row[:16] >= 0).all()
        assert (held[3] - row[:16]).abs().max() <= 0.5001 / (127 if fmt == "int8" else 7)


def test_quantized_within_half_a_step():
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for fmt, qmax in (("int8", 127), ("int4", 7)):
        codes, scale, _ = quantize_heads(x, fmt)
        assert codes.abs().max() == qmax
        step = scale.double()[:, None]
        # half a step, and what rounding the scale to fp16 takes off the largest code
        assert ((codes * step - x).abs() <= step * (0.5 + qmax * 2.0**-11)).all()


@pytest.mark.parametrize("run", [rope_kv_write_cpu, rope_kv_write_triton])
def test_rotation_is_that_of_transformers(run: Write):
    generator = torch.Generator().manual_seed(5)
    layout = KvLayout("fp32", G, 16)
    paged = Paged.make(layout, (60,), generator)
    place_T2, (cos, sin) = places((0, 50, 10)), rope_tables(60, 16)
    qkv_TX = torch.randn(10, (H + 2 * G) * 16, generator=generator)
    device = DEVICE if run is rope_kv_write_triton else "cpu"
    paged = paged.to(device)
    step = paged.step(place_T2, triton=run is rope_kv_write_triton)
    q_THK = run(qkv_TX.to(device), cos.to(device), sin.to(device), paged.pool, step, 0)
    heads = qkv_TX.view(1, 10, -1, 16).transpose(1, 2)
    q, k = apply_rotary_pos_emb(heads[:, :H], heads[:, H : H + G], cos[None, 50:], sin[None, 50:])
    torch.testing.assert_close(q_THK.cpu(), q[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(paged.stored(place_T2, 0).key_XGK, k[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_a_step_for_the_other_path_is_refused():
    paged = Paged.make(KvLayout("bf16", G, 16), (4,), torch.Generator().manual_seed(6))
    qkv_TX, tables = torch.randn(4, (H + 2 * G) * 16), no_rotation(16)
    step = paged.step(places((0, 0, 4)))
    with pytest.raises(AssertionError, match="CPU path"):
        rope_kv_write_triton(qkv_TX, *tables, paged.pool, step, 0)
    with pytest.raises(AssertionError, match="Triton"):
        rope_kv_write_cpu(qkv_TX, *tables, paged.pool, replace(step, rows=None), 0)


CHANNEL_GK = torch.linspace(0.5, 1.5, G * 16).view(G, 16)
CHECKPOINTS = [
    pytest.param("fp8", KvScales(static=(0.01, 0.25)), id="fp8-static"),
    pytest.param("int8", KvScales(CHANNEL_GK, static=(0.03, 1e9)), id="int8-channel-static"),
    pytest.param("int4z", KvScales(CHANNEL_GK), id="int4z-channel"),
]


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize(("fmt", "scales"), CHECKPOINTS)
def test_scales_of_a_checkpoint_byte_for_byte(run: Write, fmt: str, scales: KvScales):
    """Constant scales clip what they do not reach; a scale beyond fp16 becomes the largest."""
    paged = Paged.make(KvLayout(fmt, G, 16), (40,), torch.Generator().manual_seed(8))
    place_T2, tables = places((0, 3, 1), (0, 20, 14)), no_rotation(16)
    qkv_TX = 5 * torch.randn(len(place_T2), (H + 1 + 2 * G) * 16, generator=torch.Generator().manual_seed(9))
    device = DEVICE if run is rope_kv_write_triton else "cpu"
    on_device = KvScales(None if scales.channel_GK is None else scales.channel_GK.to(device), scales.static)
    q_THK, got = written(run, paged, qkv_TX, place_T2, tables, on_device)
    expected_THK, expected = written(rope_kv_write_ref, paged, qkv_TX, place_T2, tables, scales)
    assert torch.equal(got.pool, expected.pool), f"{int((got.pool != expected.pool).sum())} bytes differ"
    assert torch.equal(q_THK, expected_THK)
    if scales.static:
        held = got.stored(place_T2, 1)
        given = torch.tensor(scales.static).clamp(max=65504.0).half()
        assert (held.key_scale_XG == given[0]).all()
        assert (held.value_scale_XG == given[1]).all()


def written(
    run: Write,
    paged: Paged,
    qkv_TX: Tensor,
    place_T2: Tensor,
    tables: tuple[Tensor, Tensor],
    scales: KvScales,
) -> tuple[Tensor, Paged]:
    device = DEVICE if run is rope_kv_write_triton else "cpu"
    paged = paged.to(device)
    step = paged.step(place_T2, triton=run is rope_kv_write_triton)
    q_THK = run(qkv_TX.to(device), *(t.to(device) for t in tables), paged.pool, step, 1, scales)
    return q_THK.cpu(), paged.to("cpu")


@pytest.mark.parametrize("run", PATHS)
def test_channel_scales_keep_scores_and_tame_an_outlier(run: Write):
    """A channel 30 times as large as the others takes all codes of int4; divided by its size, scores are right again."""
    generator = torch.Generator().manual_seed(10)
    place_T2, tables = places((0, 0, 24)), rope_tables(24, 16)
    qkv_TX = torch.randn(24, 3 * G * 16, generator=generator)
    qkv_TX.view(24, 3 * G, 16)[:, G : 2 * G, [5, 13]] *= (
        30.0  # a pair: rotation keeps it apart from the others
    )
    scale_GK = torch.ones(G, 16)
    scale_GK[:, [5, 13]] = 30.0

    def scores(fmt: str, scales: KvScales) -> Tensor:
        paged = Paged.make(KvLayout(fmt, G, 16), (24,), torch.Generator().manual_seed(11))
        q_THK, after = written(run, paged, qkv_TX, place_T2, tables, scales)
        blocks = after.block_table_BN[0].tolist()
        key, _ = read_kv(after.pool, after.layout, after.slab_table_SL, blocks, 1)
        return torch.einsum("tgk,sgk->gts", q_THK, key[:24])

    scaled = KvScales(scale_GK.to(DEVICE if run is rope_kv_write_triton else "cpu"))
    exact = scores("fp32", KvScales())
    torch.testing.assert_close(scores("fp32", scaled), exact, rtol=1e-5, atol=1e-4)
    # what the outlier itself loses stays, relative to it, so the rest is looked at: q without the outlying channels
    qkv_TX.view(24, 3 * G, 16)[:, :G, [5, 13]] = 0.0
    exact = scores("fp32", KvScales())
    plain, tamed = (float((scores("int4", s) - exact).square().mean()) for s in (KvScales(), scaled))
    assert tamed < plain / 20, f"{plain=} {tamed=}"


@pytest.mark.parametrize("count", [1, 4, 20], ids=["single", "as-many-lines-as-rows", "tile"])
def test_a_padding_line_writes_nothing(count: int):
    """As a captured launch has them: no lanes, and a block id that leads nowhere."""
    paged = Paged.make(KvLayout("int4", G, 16), (40, 40), torch.Generator().manual_seed(12)).to(DEVICE)
    place_T2 = places((0, 3, 1), (1, 5, count))
    qkv_TX = torch.randn(len(place_T2), (H + 2 * G) * 16).to(DEVICE)
    tables = tuple(t.to(DEVICE) for t in rope_tables(40, 16))
    pools, steps = [], [paged.step(place_T2, triton=True)]
    nothing = torch.tensor([[2**30, 0, 0, 0]] * 3, dtype=torch.int32, device=DEVICE)
    work = steps[0].work
    steps.append(replace(steps[0], work=work._replace(touch_X4=torch.cat((work.touch_X4, nothing)))))
    for step in steps:
        pools.append(paged.pool.clone())
        rope_kv_write_triton(qkv_TX, *tables, pools[-1], step, 1)
    assert torch.equal(*pools)
