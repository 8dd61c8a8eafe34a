"""Fake quantization gives the very numbers that the kernels' codes stand for."""

import pytest
import torch

from kernels.kv_case import Paged, places, rope_tables
from kernels.kv_layout import KV_FORMATS, KvLayout
from kernels.kv_read import read_kv
from kernels.kv_write_triton import NO_SCALES, KvScales
from kernels.quant_rows import quant_rows_ref
from kernels.rope_kv_write import rope_kv_write_cpu, rotate
from quant.ptq import fake
from quant.scheme import FP8_ROWS, INT8_ROWS, Activations

T, G, K = 21, 2, 32


def x_TD(columns: int = 256) -> torch.Tensor:
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(0)) * 3
    x[2], x[:, 5] = 0.0, x[:, 5] * 40
    return x


@pytest.mark.parametrize("activations", [INT8_ROWS, FP8_ROWS])
def test_rows_are_the_kernels(activations: Activations) -> None:
    codes_TD, scale_T = quant_rows_ref(x_TD(), fake.CODES[activations.dtype])
    assert torch.equal(fake.rows(x_TD(), activations), codes_TD.float() * scale_T[:, None])
    batched = fake.rows(x_TD().view(7, 1, -1), activations)
    assert torch.equal(batched.view(7, -1), fake.rows(x_TD(), activations))


def test_rows_by_block_and_none() -> None:
    rows = fake.rows(x_TD(), Activations("fp8", block=True))
    assert torch.equal(rows[:, 128:], fake.rows(x_TD()[:, 128:].contiguous(), FP8_ROWS))
    assert torch.equal(fake.rows(x_TD(), None), x_TD())
    with pytest.raises(ValueError, match="130 columns do not divide into 128"):
        fake.rows(x_TD(130), Activations("fp8", block=True))


def test_rows_with_zeros_and_static() -> None:
    x = x_TD() + 7
    error = (fake.rows(x, Activations(symmetric=False)) - x).abs().amax(1)
    step = (x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)) / 255
    assert (error <= step * 0.51).all()
    assert (error < (fake.rows(x, INT8_ROWS) - x).abs().amax(1))[3:].any()
    static = Activations(dynamic=False)
    assert fake.rows(torch.tensor([[0.26, -900.0]]), static, 0.5).tolist() == [[0.5, -63.5]]
    with_zero = Activations(dynamic=False, symmetric=False)
    assert fake.rows(torch.tensor([[0.26, -900.0]]), with_zero, 0.5, 28).tolist() == [[0.5, -78.0]]
    fp8 = Activations("fp8", dynamic=False)
    assert fake.rows(torch.tensor([[0.26, -900.0]]), fp8, 0.5).tolist() == [[0.25, -224.0]]
    with pytest.raises(ValueError, match="a scale or zero point does not go with"):
        fake.rows(x, static)
    with pytest.raises(ValueError, match="a scale or zero point does not go with"):
        fake.rows(x, INT8_ROWS, 0.5)


@pytest.mark.parametrize(
    ("fmt", "scales"),
    [(fmt, NO_SCALES) for fmt in KV_FORMATS]
    + [
        ("int4", KvScales(torch.rand(G, K, generator=torch.Generator().manual_seed(3)) + 0.5)),
        ("fp8", KvScales(static=(0.01, 0.25))),
        ("int8", KvScales(torch.full((G, K), 0.75), static=(0.03, 0.02))),
    ],
    ids=str,
)
def test_kv_is_what_the_pool_gives_back(fmt: str, scales: KvScales) -> None:
    paged = Paged.make(KvLayout(fmt, G, K), (T,), torch.Generator().manual_seed(1))
    qkv_TX = torch.randn(T, 3 * G * K, generator=torch.Generator().manual_seed(2)) * 2
    step = paged.step(places((0, 0, T)), triton=False)
    rope_kv_write_cpu(qkv_TX, *rope_tables(T, K), paged.pool, step, 1, scales)
    blocks = paged.block_table_BN[0].tolist()
    key_TGK, value_TGK = read_kv(paged.pool, paged.layout, paged.slab_table_SL, blocks, 1)
    if scales.channel_GK is not None:
        key_TGK = key_TGK * scales.channel_GK
    heads_TXK = qkv_TX.view(T, 3 * G, K)
    turned_TGK = rotate(heads_TXK[:, G : 2 * G], *rope_tables(T, K))
    k, v = fake.kv(fmt, turned_TGK[None], heads_TXK[None, :, 2 * G :], scales.channel_GK, scales.static)
    torch.testing.assert_close(k[0], key_TGK[:T].float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v[0], value_TGK[:T].float(), rtol=1e-6, atol=1e-7)


def test_kv_refusals() -> None:
    x = torch.ones(1, 1, G, K)
    with pytest.raises(ValueError, match=r"kv format must be one of fp32, .* got 'int3'"):
        fake.kv("int3", x, x)
    with pytest.raises(ValueError, match="static scales are for int8 and fp8, got 'int4'"):
        fake.kv("int4", x, x, static=(1.0, 1.0))


def test_queries() -> None:
    q = torch.randn(1, 3, 4, K)
    assert torch.equal(fake.queries(q)[0, 0, 1], fake.rows(q[0, 0, 1][None], FP8_ROWS)[0])
