"""The loop that divides a pool outlives a division that fails, and does not fill the log with it."""

import asyncio
import logging

import pytest

from minserve import quota_writer
from minserve.quota_writer import QuotaWriter


def test_what_stays_wrong_is_said_once_and_the_loop_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = iter(["a", "a", "a", "", "a", "b"])
    ticks = []

    def tick(self: QuotaWriter, now_s: float) -> None:
        fault = next(faults, None)
        ticks.append(fault)
        if fault is None:
            raise asyncio.CancelledError
        if fault:
            raise ValueError(fault)

    monkeypatch.setattr(quota_writer, "TICK_S", 0.0)
    monkeypatch.setattr(QuotaWriter, "tick", tick)
    monkeypatch.setattr(logging.getLogger("minserve"), "propagate", True)
    with caplog.at_level(logging.ERROR, "minserve"), pytest.raises(asyncio.CancelledError):
        asyncio.run(QuotaWriter.__new__(QuotaWriter).run())
    assert ticks == ["a", "a", "a", "", "a", "b", None]
    assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info] == ["a", "a", "b"]
