"""``every_s="auto"``: the interval that follows from what a save costs and how often the run was interrupted."""

from __future__ import annotations

import logging
import math

import pytest

from gpumove.cadence import Cadence, Interval, Past, past
from gpumove.config import Config


def test_young_and_daly() -> None:
    interval = Interval()
    interval.learn(Past(7200.0, 2), 0.0)
    interval.measured(stall_s=0.5, took_s=1.0, grace_s=30.0, now=0.0)
    mtbf_s = (7200 + 3600) / 3
    assert interval.seconds == pytest.approx(math.sqrt(2 * 0.5 * mtbf_s))

    def lost_per_s(every_s: float) -> float:
        return 0.5 / every_s + every_s / 2 / mtbf_s

    assert lost_per_s(interval.seconds) < min(lost_per_s(0.9 * interval.seconds), lost_per_s(1.1 * interval.seconds))


def test_bounds_and_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gpumove")
    interval = Interval()
    assert interval.seconds == 30, "until a save was measured"
    interval.measured(stall_s=1e-9, took_s=42.0, grace_s=30.0, now=0.0)
    assert interval.seconds == 42, "no more often than a save takes"
    interval.measured(stall_s=1e-9, took_s=41.0, grace_s=30.0, now=60.0)
    assert len(caplog.records) == 1, "a small change is no news"
    interval.measured(stall_s=1000.0, took_s=41.0, grace_s=30.0, now=60.0)
    assert interval.seconds == 600, "ten minutes at most"
    assert len(caplog.records) == 2
    assert "a save every 600 s" in caplog.text
    assert "with one of 30 s: as much" in caplog.text


def test_the_past_is_counted_in_epochs() -> None:
    assert past([]) == Past(0.0, 0)
    assert past([(100.0, 2), (160.0, 2), (400.0, 4)]) == Past(300.0, 2)


def test_a_cadence_follows_it() -> None:
    cadence = Cadence(Config(every_s="auto"), 0.0)
    assert not cadence.due(5, 29.0)
    assert cadence.due(5, 30.0)
    cadence.interval.seconds = 100.0
    assert not cadence.due(5, 99.0)
