"""The plan of a step: who is grouped with whom, how work is cut, and what is refused."""

import numpy as np
import pytest
import torch

from kernels import kv_rows, kv_work
from kernels.kv_case import Paged, places
from kernels.kv_layout import KvLayout
from kernels.kv_step import KvStep, make_spans
from kernels.kv_work import GpuWork, Routing, plan_work

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
    assert {
        (t.data_ptr() - work.block_BN.data_ptr()) % 16
        for t in work
        if isinstance(t, torch.Tensor) and t.numel()
    } == {0}


def work_of(spans: list[tuple[int, int, int]], slots: int = 64, **routing) -> GpuWork:
    """Spans (sequence, start, count) of distinct sequences."""
    p = paged(*(start + count for _, start, count in spans))
    starts, counts = [start for _, start, _ in spans], [count for _, _, count in spans]
    host = make_spans(LAYOUT, p.block_table_BN, starts, counts)
    return plan_work(
        LAYOUT, host, torch.device("cpu"), Routing(slots=slots, **{"deterministic": False} | routing)
    )


def seen_keys(work: GpuWork) -> dict[int, list[int]]:
    """The keys that each row's merge adds up, and where: a slot holds what one piece left."""
    left = {}
    for _, row, pos, rows, low, end, slot, parts in np.concatenate((work.piece_X8, work.wide_X8)).tolist():
        assert low % LAYOUT.block_tokens == 0
        for lane in range(rows):
            assert slot + lane * parts not in left, "two pieces leave their part in one slot"
            left[slot + lane * parts] = row + lane, [k for k in range(low, end) if k <= pos + lane]
    assert sorted(left) == list(range(work.num_slots))
    keys = {}
    for row, first, parts in work.merge_X3.tolist():
        assert {left[slot][0] for slot in range(first, first + parts)} == {row}
        keys[row] = [k for slot in range(first, first + parts) for k in left[slot][1]]
    return keys


@pytest.mark.parametrize("slots", [8, 64, 4096])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_row_sees_every_key_once(slots: int, deterministic: bool):
    spans = [(0, 0, 1), (1, 62, 1), (2, 1999, 1), (3, 700, 1), (4, 100, 5), (5, 0, 3), (6, 31, 16)]
    work = work_of(spans, slots, deterministic=deterministic)
    keys = seen_keys(work)
    positions = [start + i for _, start, count in spans for i in range(count)]
    assert keys == {row: list(range(pos + 1)) for row, pos in enumerate(positions)}
    counts = [len(work.piece_X8), len(work.wide_X8), work.num_split, len(keys)]
    assert work.count_X.tolist() == counts
    assert bool(len(work.wide_X8)) != deterministic
    assert work.wide_tokens == (0 if deterministic else 16)


def test_rows_of_several_pieces_come_first_and_long_pieces_too():
    work = work_of([(0, 0, 1), (1, 1999, 1), (2, 60, 1), (3, 900, 1)], slots=40)
    parts = work.merge_X3[:, 2]
    assert (parts[: work.num_split] > 1).all()
    assert (parts[work.num_split :] == 1).all()
    assert 0 < work.num_split < 4
    length = work.piece_X8[:, 5] - work.piece_X8[:, 4]
    assert length.tolist() == sorted(length.tolist(), reverse=True)


@pytest.mark.parametrize(
    ("lengths", "slots", "expected"),
    [
        ([100, 90], 264, 256),  # nothing to gain below the floor
        ([4096] * 4, 264, 128 * 2),  # 4 x 16 pieces x 2 heads
        ([4096] * 32, 264, 1024),  # 128 items of 1024: two more cuts would be too many
        ([4096] * 200, 264, 6208),  # more rows than slots: no cut
        ([100] * 200 + [60000], 264, 608),  # but for a sequence that is far longer than its share
    ],
)
def test_pieces_fill_the_gpu_once(lengths: list[int], slots: int, expected: int):
    ends = np.array(lengths)
    tokens = kv_work.piece_tokens(ends, LAYOUT, slots)
    assert tokens == expected
    items = int((-(-ends // tokens)).sum()) * LAYOUT.num_kv_heads
    assert items <= slots + len(lengths) * LAYOUT.num_kv_heads


def test_piece_length_is_the_least_that_fits():
    generator = np.random.default_rng(0)
    P, G = LAYOUT.block_tokens, LAYOUT.num_kv_heads
    for _ in range(50):
        ends = generator.integers(1, 5000, generator.integers(1, 60))
        slots = int(generator.integers(len(ends) * G + 1, 1000))
        tokens = kv_work.piece_tokens(ends, LAYOUT, slots)
        least = next(n for n in range(256, 10000, P) if (-(-ends // n)).sum() * G <= slots)
        assert tokens == least


def test_a_deterministic_row_is_cut_by_its_own_length_alone():
    alone = work_of([(0, 1999, 1)], deterministic=True)
    among = work_of([(0, 1999, 1), (1, 5, 1), (2, 0, 9)], deterministic=True)
    cut = {(low, end) for _, row, _, _, low, end, _, _ in among.piece_X8.tolist() if row == 0}
    assert cut == {(low, end) for _, _, _, _, low, end, _, _ in alone.piece_X8.tolist()}
    assert max(end - low for low, end in cut) == kv_work.SPLIT_TOKENS


def test_chunks_go_where_their_columns_and_the_scratch_say():
    spans = [(0, 9, 1), (1, 100, 8), (2, 100, 9), (3, 0, 300), (4, 60, 40)]
    work = work_of(spans, heads_per_kv=8)
    assert sorted(work.wide_X8[:, 0].tolist()) == [1]
    assert sorted(set(work.chunk_X4[:, 0].tolist())) == [2, 3, 4]
    # room for 4 + 10 blocks: the last one's context of 4 has none
    work = work_of(spans, heads_per_kv=8, scratch_blocks=15)
    assert sorted(set(work.chunk_X4[:, 0].tolist())) == [2, 3]
    groups = work.wide_X8[work.wide_X8[:, 0] == 4]
    assert sorted(groups[:, 3].tolist()) == [8] * 5
    assert work.wide_tokens == 8


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
