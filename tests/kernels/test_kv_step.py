"""The plan of a step: who is grouped with whom, how work is cut, and what is refused."""

import numpy as np
import pytest
import torch

from kernels import kv_rows, kv_work
from kernels.kv_case import Paged, places
from kernels.kv_layout import KvLayout
from kernels.kv_step import KvStep

LAYOUT = KvLayout("bf16", 2, 16)


def paged(*lengths: int) -> Paged:
    return Paged.make(LAYOUT, lengths, torch.Generator().manual_seed(0))


def decodes(*lengths: int) -> KvStep:
    return paged(*lengths).step(places(*((b, n - 1, 1) for b, n in enumerate(lengths))))


def test_positions_follow_the_rows():
    step = paged(10, 50).step(places((0, 9, 1), (1, 40, 4)))
    assert step.pos_T.tolist() == [9, 40, 41, 42, 43]
    assert step.num_tokens == 5


def test_similar_lengths_are_taken_as_they_come():
    rows = decodes(*range(60, 90)).rows
    assert rows.order_B is None
    assert sum(g.size for g in rows.groups) == 30


def test_ragged_lengths_are_sorted_and_grouped():
    lengths = [900, 20, 300, 33, 1, 310, 32, 901]
    rows = decodes(*lengths).rows
    assert rows.order_B[rows.back_B].tolist() == list(range(8))
    seen = [[lengths[b] for b in rows.order_B[g.first : g.first + g.size].tolist()] for g in rows.groups]
    assert sorted(n for group in seen for n in group) == sorted(lengths)
    assert len(seen) >= 3
    for group in seen:
        blocks = [LAYOUT.blocks_for(n) for n in group]
        assert max(blocks) <= kv_rows.GROUP_STRETCH * min(blocks) + 1, f"{group=}"


def test_a_group_fits_its_budget(monkeypatch: pytest.MonkeyPatch):
    block_bytes = 4 * 2 * 16 * 32  # keys of a block, in fp32
    monkeypatch.setattr(kv_rows, "GROUP_KEY_BYTES", 6 * block_bytes // torch.get_num_threads())
    rows = decodes(*[64] * 7).rows
    assert [g.size for g in rows.groups] == [3, 3, 1]
    assert decodes(*[32 * 9] * 2).rows.groups[0].size == 1  # one sequence is never too many


@pytest.mark.parametrize("lengths", [(5,), (1, 63, 64), (7, 8, 9, 200, 300)])
def test_every_table_is_aligned_alike_in_every_step(lengths: tuple[int, ...]):
    work = paged(*lengths).step(places(*((b, n - 1, 1) for b, n in enumerate(lengths))), triton=True).work
    assert {(t.data_ptr() - work.block_BN.data_ptr()) % 16 for t in work if t.numel()} == {0}


def test_pieces_cover_every_key_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_work, "SPLIT_TOKENS", 64)
    lengths = (1, 63, 64, 65, 200)
    step = paged(*lengths).step(places(*((b, n - 1, 1) for b, n in enumerate(lengths))), triton=True)
    pieces, merges = step.work.piece_X4.numpy(), step.work.merge_X3.numpy()
    for (row, first, count), length in zip(merges, lengths, strict=True):
        mine = pieces[first : first + count]
        assert (mine[:, 1] == row).all()
        assert np.concatenate([np.arange(low, end) for low, end in mine[:, 2:]]).tolist() == list(
            range(length)
        )
        assert (mine[:, 3] - mine[:, 2] <= 64).all()


def test_chunks_and_touches_cover_every_row_once():
    step = paged(10, 300, 70).step(places((0, 9, 1), (1, 100, 150), (2, 0, 70)), triton=True)
    chunk_rows = [range(row, row + rows) for _, row, rows, _ in step.work.chunk_X4.tolist()]
    assert sorted(r for rows in chunk_rows for r in rows) == list(range(1, 221))
    touched = [range(row, row + lanes) for _, _, lanes, row in step.work.touch_X4.tolist()]
    assert sorted(r for rows in touched for r in rows) == list(range(221))
    for _, lane, lanes, row in step.work.touch_X4.tolist():
        assert int(step.pos_T[row]) % 32 == lane
        assert lane + lanes <= 32


@pytest.mark.parametrize(
    ("starts", "counts", "words"),
    [([0], [1, 1], "len"), ([-1], [1], "starts"), ([0], [0], "counts"), ([60], [9], "3 blocks")],
)
def test_impossible_steps_are_refused(starts: list[int], counts: list[int], words: str):
    p = paged(64)
    with pytest.raises(AssertionError, match=words):
        KvStep.build(LAYOUT, p.slab_table_SL, p.block_table_BN, starts, counts, "cpu")
