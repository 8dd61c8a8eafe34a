"""The covering set covers: every pair of values, of every op that has them; and is far smaller than the product."""

import itertools

import pytest

from kernels.catalog import SPECS
from kernels.spec import KernelSpec
from tests.kernels.covering import (
    FLOATS,
    HEAD_DIMS,
    HEADS_PER_KV,
    all_cases,
    axes_of,
    covering,
    covering_cases,
    has_axes,
    is_legal,
)

COVERED = [spec for spec in SPECS if has_axes(spec)]


def pairs(rows: list[dict]) -> set[tuple]:
    return {pair for row in rows for pair in itertools.combinations([(n, str(x)) for n, x in row.items()], 2)}


@pytest.mark.parametrize("spec", COVERED, ids=lambda spec: spec.name)
def test_every_legal_pair_is_in_a_row(spec: KernelSpec):
    axes = axes_of(spec)
    products = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    rows = covering(axes, is_legal)
    assert all(map(is_legal, rows))
    assert pairs(rows) == pairs([row for row in products if is_legal(row)])
    assert len(rows) < len(all_cases(spec)) / 3
    ids = [case.id for case in covering_cases(spec)]
    assert len(set(ids)) == len(ids)
    assert ids == [case.id for case in covering_cases(spec)]


def test_the_axes_are_those_that_kernels_can_go_wrong_on():
    by_name = {spec.name: axes_of(spec) for spec in COVERED}
    for name in ("attention", "attn_prefill", "rope_kv_write"):
        axes = by_name[name]
        assert (axes["dtype"], axes["K"], axes["heads"]) == (FLOATS, HEAD_DIMS, HEADS_PER_KV)
        assert {"bf16", "fp16", "fp32"} <= set(axes["fmt"])
    for name in ("rmsnorm", "silu_mul", "quant_rows", "linear", "gemm_w8a8", "gemm_w4a8"):
        # no rows, one, a prime, one past a tile
        assert by_name[name]["T"] == (0, 1, 19, 33)
    assert len(by_name) >= 10


def test_a_pair_that_is_never_legal_is_not_asked_for():
    axes = {"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 1)}
    rows = covering(axes, lambda row: row["a"] != row["b"])
    assert pairs(rows) == pairs(
        [{"a": a, "b": b, "c": c} for a in range(3) for b in range(3) for c in (0, 1) if a != b]
    )
    assert len(rows) < 12


def test_fewer_rows_would_miss_a_pair():
    """Two axes have as many rows as pairs; a third axis costs none more."""
    assert len(covering({"a": range(5), "b": range(4)})) == 20
    assert len(covering({"a": range(5), "b": range(4), "c": range(3)})) == 20
