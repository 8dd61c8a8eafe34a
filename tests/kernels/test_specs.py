"""Every kernel in the catalogue, every run of it, every case: right, and each row independent of the others."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.catalog import SPECS
from kernels.spec import Case, KernelSpec
from tests.close import assert_no_worse, assert_within, in_float64, is_float, ordered
from tests.kernels.covering import FLOATS, all_cases, covering_cases, has_axes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = [
    pytest.param(spec, run, case, id=f"{spec.name}-{run}-{case.id}")
    for spec in SPECS
    for run in spec.runs
    for case in spec.tests
]
COVERING = [
    pytest.param(spec, case, id=f"{spec.name}-{case.id}") for spec in SPECS for case in covering_cases(spec)
]


def moved(args: tuple[Any, ...], run: str) -> tuple[Any, ...]:
    """Triton runs where the tests' device is, all else on the CPU."""
    if run != "triton":
        return args
    return tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)


def parts(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [r.cpu() for r in results if r is not None]


def as_bits(x: Tensor) -> Tensor:
    """torch cannot compare fp8."""
    return x.view(torch.uint8) if x.is_floating_point() and x.dtype.itemsize == 1 else x


def assert_same_codes(got: Tensor, expected: Tensor) -> None:
    """Codes may differ by one, where a value lies on the border of two: in one element of a hundred at most."""
    assert got.dtype == expected.dtype
    off = (ordered(got) - ordered(expected)).abs()
    assert off.numel() == 0 or (off.max() <= 1 and off.float().mean() <= 0.01), (
        f"{off.max()=} {off.float().mean()=}"
    )


def assert_right(spec: KernelSpec, runs: Iterable[str], case: Case) -> None:
    args = spec.make(case, torch.Generator().manual_seed(0))
    given = [a.clone() if isinstance(a, Tensor) else a for a in args]
    ref, truth = parts(spec.ref(*args)), parts(spec.ref(*in_float64(args)))
    bound = spec.bound(case, args)
    for run in runs:
        out = parts(spec.bind(run, moved(args, run))())
        assert len(out) == len(ref), run
        if bound is not None and run == "triton":
            assert_within(out[0], bound)
            continue
        for got, own, true in zip(out, ref, truth, strict=True):
            if is_float(got.dtype):
                assert_no_worse(got, own, true)
            else:
                # the codes of the rounded values, not of the fp64 ones: half an ulp of bf16 is many quanta
                assert_same_codes(got, own)
        for before, after in zip(given, args, strict=True):
            assert not isinstance(before, Tensor) or torch.equal(before, after), f"{run} wrote to an argument"


@pytest.mark.parametrize(("spec", "run", "case"), GRID)
def test_right(spec: KernelSpec, run: str, case: Case):
    assert_right(spec, [run], case)


@pytest.mark.parametrize(("spec", "case"), COVERING)
def test_right_for_every_pair(spec: KernelSpec, case: Case):
    assert_right(spec, spec.runs, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if has_axes(spec)], ids=lambda spec: spec.name)
def test_right_for_the_full_product(spec: KernelSpec, dtype: torch.dtype):
    wrong = {}
    for case in all_cases(spec):
        if case.dtype == dtype:
            try:
                assert_right(spec, spec.runs, case)
            except AssertionError as fault:
                wrong[case.id] = str(fault)
    assert not wrong


@pytest.mark.parametrize(("spec", "run", "case"), [p for p in GRID if p.values[2].dims.get("T", 2) > 1])
def test_a_row_does_not_see_its_neighbours(
    spec: KernelSpec, run: str, case: Case, request: pytest.FixtureRequest
):
    """Alone, or with half of the others, at another place: the same bits."""
    if run == "cpu":
        request.getfixturevalue("two_threads")
    args = spec.make(case, torch.Generator().manual_seed(1))
    rows = args[spec.row_args[0]].shape[0]
    assert rows > 1
    options = spec.invariant.get(run, {})

    def some(start: int, stop: int) -> tuple[Any, ...]:
        return tuple(a[start:stop] if i in spec.row_args and a is not None else a for i, a in enumerate(args))

    whole = parts(spec.bind(run, moved(args, run), **options)())
    for start, stop in dict.fromkeys(((0, 1), (rows - 1, rows), (rows // 2, rows))):
        piece = parts(spec.bind(run, moved(some(start, stop), run), **options)())
        for part, full in zip(piece, whole, strict=True):
            assert torch.equal(as_bits(part), as_bits(full[start:stop])), f"rows {start}..{stop} differ"


@pytest.mark.gpu
def test_offsets_above_two_to_the_31():
    """Rows that begin past 2^31 elements: 4 GiB in, 2 GiB out, of which the last rows are compared."""
    rows, width = 2**17 + 3, 2**14
    gu = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(5, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    gu[-5:] = tail.cuda()
    spec = next(s for s in SPECS if s.name == "silu_mul")
    out = parts(spec.runs["triton"](gu))[0][-5:]
    truth = parts(spec.ref(tail.double()))[0]
    assert_no_worse(out, parts(spec.ref(tail))[0], truth)
