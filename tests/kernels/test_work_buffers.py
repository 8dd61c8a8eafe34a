"""Tables of fixed size, refilled step after step, give what a step of its own gives."""

import pytest
import torch
from torch import Tensor

from kernels import backend, kv_step, kv_work, work_buffers
from kernels.attention import attention
from kernels.kv_case import Paged, places
from kernels.kv_layout import KvLayout
from kernels.kv_step import KvStep
from kernels.rope_kv_write import rope_kv_write, rope_kv_write_cpu
from kernels.work_buffers import WorkBuffers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (70, 3, 160, 33)


def scene(fmt: str) -> Paged:
    return Paged.make(KvLayout(fmt, 2, 32), LENGTHS, torch.Generator().manual_seed(0))


def buffers(paged: Paged, rows: int = 5, **options) -> WorkBuffers:
    return WorkBuffers(paged.layout, paged.slab_table_SL, rows, 8, DEVICE, **options)


def layer(paged: Paged, step: KvStep, qkv_TX: Tensor) -> tuple[Tensor, Tensor]:
    """Writes keys and values, attends; returns the pool and the output."""
    one_MK = torch.ones(max(LENGTHS), 32, device=DEVICE)
    pool = paged.pool.clone()
    q_THK = rope_kv_write(qkv_TX, one_MK, torch.zeros_like(one_MK), pool, step, 1, 4)
    return pool, attention(q_THK, pool, step, 1, 0.2)


@pytest.mark.parametrize(("fmt", "deterministic"), [("bf16", False), ("int4", True)])
def test_refilled_is_fresh(fmt: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch):
    """Full, then with padding; rows of several pieces among those of one."""
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)
    monkeypatch.setattr(kv_work, "LEAST_SPLIT", 64)
    for module in (work_buffers, kv_step):
        monkeypatch.setattr(module, "full_grid", lambda layout, device: 12)  # a GPU for an interpreter
    paged = scene(fmt)
    generator = torch.Generator().manual_seed(1)
    whole = places(*((b, 0, n) for b, n in enumerate(LENGTHS)))
    one_MK = torch.ones(max(LENGTHS), 32)
    qkv_TX = torch.randn(len(whole), 8 * 32, generator=generator)
    rope_kv_write_cpu(
        qkv_TX, one_MK, torch.zeros_like(one_MK), paged.pool, paged.step(whole, triton=False), 1
    )
    paged = paged.to(DEVICE)
    held = buffers(paged, deterministic=deterministic)
    addresses = [t.data_ptr() for t in held.step.work if isinstance(t, Tensor)]
    for seqs in ([0, 1, 2, 3], [2, 1]):
        starts = [LENGTHS[b] - 1 for b in seqs]
        qkv_TX = torch.randn(5, 8 * 32, generator=generator).to(DEVICE)
        fresh = paged.step(
            places(*((b, n, 1) for b, n in zip(seqs, starts, strict=True))), deterministic=deterministic
        )
        held.refill(paged.block_table_BN[seqs], starts)
        expected_pool, expected = layer(paged, fresh, qkv_TX[: len(seqs)])
        pool, out = layer(paged, held.step, qkv_TX)
        assert torch.equal(pool, expected_pool), "padding was written"
        assert torch.isfinite(expected).all()
        assert torch.equal(out[: len(seqs)], expected)
        assert held.step.num_tokens == 5
    assert addresses == [t.data_ptr() for t in held.step.work if isinstance(t, Tensor)]


def test_room_is_enough_for_any_lengths():
    """The most pieces there can be: as many as fill the GPU, and one more a row."""
    layout = KvLayout("int8", 8, 128)
    held = WorkBuffers(layout, torch.zeros(1, 1, dtype=torch.int64), 256, 4096, "cpu")
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 17, 100, 131, 133, 256):
        for scale in (1, 300, 4000, 131072):
            starts = (torch.rand(rows, generator=generator).pow(4) * scale).int().tolist()
            held.refill(torch.zeros(rows, 4096, dtype=torch.int32), starts)
            assert held.step.work.count_X[0] >= rows


def test_what_does_not_fit_is_refused():
    paged = scene("int8")
    held = WorkBuffers(paged.layout, paged.slab_table_SL, 2, 2, "cpu")
    with pytest.raises(AssertionError, match="room for 2"):
        held.refill(paged.block_table_BN[:3], [1, 1, 1])
    with pytest.raises(AssertionError, match="3 blocks, room for 2"):
        held.refill(paged.block_table_BN[:1], [69])
