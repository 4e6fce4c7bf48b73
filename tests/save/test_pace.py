"""Which share is coded: what the measured rates say, and nothing else."""

from __future__ import annotations

import pytest

from gpumove.save import pace as module
from gpumove.save.pace import Pace

MB = 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def measured(clock: Clock, *, link: float, codecs: float, ratio: float, threads: int = 2) -> Pace:
    """A pace that has seen 100 MB coded and sent, at these bytes per second."""
    pace = Pace(always=False, never=False, threads=threads)
    pace.coded(100 * MB, int(100 * MB * ratio), 100 * MB / codecs)
    pace.put_begins()
    clock.now += 100 * MB / link
    pace.put_ends(100 * MB)
    return pace


def test_a_slow_link_gets_everything_coded(clock: Clock) -> None:
    assert measured(clock, link=100 * MB, codecs=500 * MB, ratio=0.3).share == 1.0


def test_a_link_that_is_much_faster_than_the_codecs_gets_nothing_coded(clock: Clock) -> None:
    assert measured(clock, link=8000 * MB, codecs=500 * MB, ratio=0.8).share == 0.0


@pytest.mark.parametrize(("link", "ratio"), [(1000, 0.3), (1200, 0.7), (2000, 0.5), (900, 0.12)])
def test_in_between_coding_and_sending_end_together(clock: Clock, link: float, ratio: float) -> None:
    share = measured(clock, link=link * MB, codecs=500 * MB, ratio=ratio).share
    coding = share / (2 * 500)
    sending = (share * ratio + 1 - share) / link
    if share < 1.0:
        assert coding == pytest.approx(sending)
    assert max(coding, sending) <= min(1 / link, max(1 / 1000, ratio / link)) * 1.0001, "no worse than all or nothing"


def test_objects_side_by_side_count_the_time_once(clock: Clock) -> None:
    pace = Pace(always=False, never=False, threads=1)
    pace.coded(100 * MB, 50 * MB, 1.0)
    for _ in range(4):
        pace.put_begins()
    clock.now += 1.0
    for _ in range(4):
        pace.put_ends(100 * MB)
    clock.now += 50.0  # idle time is no rate
    assert pace.share == pytest.approx(1 / (4.0 + 1 - 0.5), rel=1e-6) or pace.share == 0.0


def test_units_are_coded_in_proportion(clock: Clock) -> None:
    pace = measured(clock, link=1000 * MB, codecs=500 * MB, ratio=0.5)
    share = pace.share
    assert 0.5 < share < 0.8
    assert sum(pace.worth() for _ in range(1000)) == pytest.approx(1000 * share, abs=2)


def test_nothing_known_means_coding_and_settings_are_obeyed() -> None:
    assert Pace(always=False, never=False, threads=1).worth()
    assert all(Pace(always=True, never=False, threads=1).worth() for _ in range(3))
    assert not any(Pace(always=False, never=True, threads=1).worth() for _ in range(3))


def test_what_was_not_tried_for_long_is_tried_again(clock: Clock) -> None:
    pace = measured(clock, link=8000 * MB, codecs=500 * MB, ratio=0.8)
    for _ in range(2):
        pace.begin()
        assert not pace.worth()
    for _ in range(5):
        pace.begin()
    assert pace.worth()
