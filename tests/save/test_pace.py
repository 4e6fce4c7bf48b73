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
    always, never = Pace(always=True, never=False, threads=1), Pace(always=False, never=True, threads=1)
    for _ in range(3):
        always.begin()
        never.begin()
        assert always.worth()
        assert not never.worth()
        always.end(100 * MB)
        never.end(100 * MB)


def saves(
    pace: Pace, clock: Clock, count: int, *, coded_s: float, raw_s: float, link: float, ratio: float = 0.5
) -> list[bool]:
    """Save 100 MB so many times; which were coded."""
    found = []
    for _ in range(count):
        pace.begin()
        coding = pace.worth()
        found.append(coding)
        nbytes = int(100 * MB * ratio) if coding else 100 * MB
        if coding:
            pace.coded(100 * MB, nbytes, 0.01)
        pace.put_begins()
        clock.now += nbytes / link
        pace.put_ends(nbytes)
        clock.now += max(0.0, (coded_s if coding else raw_s) - nbytes / link)
        pace.end(100 * MB)
    return found


def test_the_way_that_takes_less_time_goes_on(clock: Clock) -> None:
    """Whatever rates say: the processor may be needed elsewhere."""
    pace = Pace(always=False, never=False, threads=2)
    found = saves(pace, clock, 40, coded_s=1.0, raw_s=0.7, link=200 * MB)
    assert found[0]
    assert not found[1], "worth a try"
    assert sum(found) == 2, "the first, and one more try after a while"
    other = saves(Pace(always=False, never=False, threads=2), clock, 40, coded_s=0.7, raw_s=1.0, link=200 * MB)
    assert sum(other) >= 38


def test_raw_is_not_tried_over_a_link_that_is_far_too_slow(clock: Clock) -> None:
    pace = Pace(always=False, never=False, threads=2)
    assert all(saves(pace, clock, 100, coded_s=0.2, raw_s=10.0, link=10 * MB, ratio=0.3))
