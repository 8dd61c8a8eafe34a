"""The limits of docs/kernels.md: bench.roofline gives the numbers that were worked out by hand."""

import pytest

from bench.roofline import Precision, decode_limit, kv_token_bytes, prefill_limit
from bench.shapes import CHIPS, MODELS

LLAMA = MODELS["llama-3-8b"]


def test_bytes_and_parameters() -> None:
    assert LLAMA.linear_params == pytest.approx(6.979e9, rel=1e-3)
    assert LLAMA.head_params == pytest.approx(0.525e9, rel=1e-3)
    assert [kv_token_bytes(LLAMA, kv) for kv in ("bf16", "int8", "int4")] == [131072, 66560, 33792]


@pytest.mark.parametrize(
    ("gpu", "batch", "context", "expected"),
    [
        ("h200", 1, 1024, (3.52, 1.88, 1.09)),
        ("h200", 64, 1024, (5.50, 2.89, 1.60)),
        ("h200", 64, 4096, (11.49, 5.93, 3.15)),
        ("h200", 256, 1024, (12.88, 7.08, 5.08)),
        ("a100", 64, 1024, (13.50, 7.10, 3.94)),
        ("l40s", 64, 1024, (31.51, 16.57, 9.20)),
    ],
)
def test_decode_steps(gpu: str, batch: int, context: int, expected: tuple[float, ...]) -> None:
    cells = (("bf16", "bf16"), ("w8a8", "int8"), ("w4a8", "int4"))
    rates = CHIPS[gpu].practical
    got = [decode_limit(LLAMA, Precision(w, kv), batch, context, rates).total_s * 1e3 for w, kv in cells]
    assert got == pytest.approx(expected, rel=0.02)


def test_datasheet_prefill_and_parts() -> None:
    chip = CHIPS["h200"]
    assert decode_limit(LLAMA, Precision("bf16", "bf16"), 1, 1024, chip.datasheet).total_s == pytest.approx(
        3.16e-3, rel=0.02
    )
    parts = decode_limit(LLAMA, Precision("w4a8", "int4"), 64, 4096, chip.practical)
    assert [p * 1e3 for p in parts] == pytest.approx([0.84, 2.06, 0.25], rel=0.02)
    prefills = [
        prefill_limit(LLAMA, Precision(w, "bf16"), n, chip.practical).total_s * 1e3
        for w in ("bf16", "w8a8")
        for n in (2048, 8192)
    ]
    assert prefills == pytest.approx([37.6, 167, 22.6, 107], rel=0.02)


def test_an_8_bit_head_halves_the_head() -> None:
    rates = CHIPS["h200"].practical
    heads = [decode_limit(LLAMA, Precision("w8a8", "int8", h), 1, 1024, rates).head_s for h in ("bf16", "w8")]
    assert heads[0] == pytest.approx(2 * heads[1], rel=0.01)
