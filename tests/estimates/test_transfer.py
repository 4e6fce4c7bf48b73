"""How a move would go: cases by hand, and what must be so whatever the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.estimates.interval import Range
from gpumove.estimates.transfer import Link, expect
from gpumove.move.rounds import Measured, forecast

EXACT = Range.exact
MB, GB = 1e6, 1e9


def link(rate: Range | None, **more: Range) -> Link:
    return Link(rate, "as said", **more)


def test_a_link_that_keeps_up() -> None:
    """10 GB at 100 MB/s take 100 s, in which 5 commits bring 2.5 GB. These take 25 s, and one more commit comes, takes
    5 s, another one comes, takes 5 s, and none comes: the job is asked to leave. The last delta is 500 MB, 5 s."""
    known = {"save_s": EXACT(3.0), "handover_s": EXACT(0.5), "restore_s": EXACT(4.0)}
    found = expect(10 * GB, EXACT(500 * MB), EXACT(20.0), link(EXACT(100 * MB), **known))
    assert found.rounds is not None
    assert found.rounds.value == 4
    assert found.nbytes is not None
    assert found.nbytes.value == pytest.approx(10 * GB + 2.5 * GB + 3 * 0.5 * GB)
    assert found.first_s == EXACT(100.0)
    assert found.copy_s is not None
    assert found.copy_s.value == pytest.approx(135)
    assert found.keeps_up
    assert found.blackout_s is not None
    assert found.blackout_s.value == pytest.approx(5 + 3 + 0.5 + 4)
    assert found.unknown == ()


def test_a_link_that_does_not_keep_up() -> None:
    """A commit of 3 GB every 20 s, at 100 MB/s: commits are held back soon in the one round; or only after it, and then
    there is as much again, of which no more than the whole. The last delta is at most that, too."""
    found = expect(10 * GB, EXACT(3 * GB), EXACT(20.0), link(EXACT(100 * MB)))
    assert found.rounds == EXACT(1)
    assert not found.keeps_up
    assert "another round would not help" in found.why
    assert found.nbytes == Range(13.0 * GB, 13.0 * GB, 23.0 * GB)
    assert found.parts["behind"] == Range(0.0, 0.0, 100.0)
    assert found.parts["last_delta"] == Range(30.0, 30.0, 100.0)


def test_a_commit_that_comes_before_the_link_is_known_to_be_slow_is_not_held_back() -> None:
    """Ten times that, every 200 s: 268 MB that may have arrived or not hide that for 1.3 s, and the job hears of it 3 s
    later. With half of the time between commits gone none comes, with all but 2 s one does, and is sent as well."""
    found = expect(100 * GB, EXACT(30 * GB), EXACT(200.0), link(EXACT(100 * MB)))
    assert found.nbytes is not None
    assert found.nbytes.value == pytest.approx(130 * GB)
    small = expect(1 * GB, EXACT(0.9 * GB), EXACT(14.0), link(EXACT(100 * MB)))  # 10 s for all: known after 7.8 s
    assert small.keeps_up
    assert small.rounds is not None
    assert small.rounds.value == 2


def test_a_commit_that_is_about_to_come_is_reckoned_with() -> None:
    """A first round of 10 s, a commit every 30 s: if the last one came 25 s ago the next one comes in the round."""
    known = {since: expect(1 * GB, EXACT(100 * MB), EXACT(30.0), link(EXACT(100 * MB)), since_s=since).rounds
             for since in (None, 5.0, 25.0, 29.99, 31.0, 60.0, 1e6, -5.0)}  # fmt: skip
    assert {since: found and found.value for since, found in known.items()} == {
        None: 1, 5.0: 1, 25.0: 2, 29.99: 2, 31.0: 2, 60.0: 1, 1e6: 1, -5.0: 1,
    }  # fmt: skip
    assert {(found.low, found.high) for found in known.values() if found} == {(1, 2)}


def test_of_a_save_that_is_sent_while_it_is_written_only_the_first_piece_adds() -> None:
    """10 s in 5 packs: of what 5 s on the link take one is left when the save is done, of what 50 s take 42."""
    known = {"save_s": Range(8.0, 10.0, 20.0), "handover_s": EXACT(0.5), "restore_s": EXACT(4.0)}
    for nbytes, leave in ((500 * MB, Range(8.0 - 4.0, 10.0 - 4.0, 20.0 - 4.0)), (5 * GB, Range(8 / 5, 2.0, 4.0))):
        found = expect(10 * GB, EXACT(nbytes), EXACT(100.0), Link(EXACT(100 * MB), "as said", packs=5, **known))
        low, value, high = found.parts["leave"].low, found.parts["leave"].value, found.parts["leave"].high
        assert (low, value, high) == pytest.approx((leave.low, leave.value, leave.high))


def test_what_nobody_has_measured_makes_no_blackout() -> None:
    found = expect(10 * GB, EXACT(500 * MB), EXACT(20.0), link(EXACT(100 * MB), save_s=EXACT(3.0)))
    assert found.blackout_s is None
    assert found.unknown == ("the whole blackout: nobody has measured handover and restore",)
    assert found.at_least_s == pytest.approx(3.0 + 5.0)
    assert found.bounds_s is not None
    assert found.bounds_s.low == pytest.approx(found.at_least_s)
    assert found.bounds_s.high == pytest.approx(sum(p.high for p in found.parts.values()) + 2 * 600)


def test_one_checkpoint_tells_the_first_round_only() -> None:
    found = expect(10 * GB, None, None, link(Range(50 * MB, 100 * MB, 200 * MB)))
    assert found.first_s == Range(50.0, 100.0, 200.0)
    assert (found.rounds, found.nbytes, found.copy_s, found.blackout_s, found.bounds_s) == (None,) * 5
    assert "not known what a commit brings" in found.unknown[0]


@pytest.mark.parametrize(
    ("full", "rate", "why"), [(None, EXACT(1.0), "no bytes are known"), (1.0, None, "how long it takes: as said")]
)
def test_without_bytes_or_a_rate_nothing_is_known(full: float | None, rate: Range | None, why: str) -> None:
    found = expect(full, EXACT(1.0), EXACT(1.0), link(rate))
    assert (found.nbytes, found.first_s, found.blackout_s, found.bounds_s) == (None,) * 4
    assert why in found.unknown[0]


# -------------------------------------------------------------------- properties

SIZES = st.integers(1_000, 10**13).map(float)


@st.composite
def around(draw: st.DrawFn, values: st.SearchStrategy[float]) -> Range:
    return Range.around(draw(values), draw(st.floats(0, 2)))


@given(SIZES, around(st.floats(1e3, 1e12)), around(st.floats(0.01, 1e5)), around(st.floats(1e3, 1e10)))
def test_every_outlook_is_bounded(full: float, delta: Range, every: Range, rate: Range) -> None:
    found = expect(full, delta, every, link(rate))
    assert found.rounds is not None
    assert found.nbytes is not None
    assert found.first_s is not None
    assert found.copy_s is not None
    assert 1 <= found.rounds.low <= found.rounds.high <= 100
    assert found.nbytes.low >= full
    assert found.nbytes.value <= full * (found.rounds.value + 1) + delta.value + 1
    assert found.copy_s.low >= found.first_s.low * (1 - 1e-9)
    assert found.parts["last_delta"].value == pytest.approx(delta.value / rate.value)
    assert found.parts["behind"].high <= full / rate.low * (1 + 1e-9)


@given(SIZES, st.floats(1e3, 1e12), st.floats(0.01, 1e5), st.floats(1e3, 1e10), st.floats(1.1, 10))
def test_a_faster_link_is_never_worse(full: float, delta: float, every: float, rate: float, times: float) -> None:
    slow = expect(full, EXACT(delta), EXACT(every), link(EXACT(rate)))
    fast = expect(full, EXACT(delta), EXACT(every), link(EXACT(rate * times)))
    assert slow.first_s is not None
    assert fast.first_s is not None
    assert fast.first_s.value < slow.first_s.value
    assert fast.parts["last_delta"].value < slow.parts["last_delta"].value
    assert fast.keeps_up or not slow.keeps_up


@given(SIZES, st.floats(1e3, 1e12), st.floats(0.01, 1e5), st.floats(1e3, 1e10))
def test_it_is_the_arithmetic_that_a_move_goes_by(full: float, delta: float, every: float, rate: float) -> None:
    found = expect(full, EXACT(delta), EXACT(every), link(EXACT(rate)))
    goes_by = forecast(Measured(rate, delta, every))
    assert (found.keeps_up, found.why) == (goes_by.converges, goes_by.why)
    assert found.parts["last_delta"].value == goes_by.parts["last_delta"]
