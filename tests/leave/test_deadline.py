"""What is done with the time that is left: numbers in, one decision out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.leave.deadline import Situation, expected, margin_of, plan, remaining, together

SECONDS = st.floats(0.01, 500)


@pytest.mark.parametrize(
    ("left_s", "now", "kind"),
    [
        (20.0, Situation(5.0), "new"),
        (4.0, Situation(5.0), "new"),  # measured beside training: worth a try, as nothing is given up for it
        (3.0, Situation(5.0), "nothing"),
        (20.0, Situation(), "new"),
        (20.0, Situation(flying=True), "after"),
        (20.0, Situation(5.0, True, 4.0), "after"),
        (9.5, Situation(5.0, True, 4.0), "instead"),  # to change one's mind later has to be possible
        (8.0, Situation(5.0, True, 4.0), "instead"),
        (6.0, Situation(5.0, True, 4.0), "finish"),  # the new one might just fit: not worth the one that will
        (6.0, Situation(5.0, True, 7.0), "instead"),
        (4.5, Situation(5.0, True, 4.0), "finish"),
        (3.0, Situation(5.0, True, 4.0), "finish"),  # it runs: nothing is lost by waiting for it
        (0.0, Situation(), "nothing"),
        (0.0, Situation(0.1, True, 0.1), "nothing"),
    ],
)
def test_the_first_that_fits_is_taken(left_s: float, now: Situation, kind: str) -> None:
    assert plan(left_s, now).kind == kind


def test_a_save_that_codes_everything_may_be_quicker_without() -> None:
    assert plan(20.0, Situation(30.0, codes=True)).hurried
    assert not plan(20.0, Situation(10.0, codes=True)).hurried
    assert plan(20.0, Situation(100.0)).kind == "nothing"


@given(SECONDS, st.none() | SECONDS, st.booleans(), st.none() | SECONDS)
def test_what_gives_up_a_surer_save_fits_by_itself(
    left_s: float, new_s: float | None, flying: bool, flight_s: float | None
) -> None:
    chosen = plan(left_s, Situation(new_s, flying, flight_s if flying else None))
    if chosen.kind == "instead":
        assert new_s is not None
        assert new_s <= left_s
    if chosen.kind == "after" and chosen.expected_s is not None:
        assert chosen.expected_s <= left_s
        later = Situation(new_s, True, flight_s)
        assert plan(chosen.reserve_s, later).kind == "instead", "what is reserved is enough to decide again"
    assert chosen.why
    assert (chosen.kind in ("after", "finish", "instead")) <= flying


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_more_time_never_makes_an_earlier_step_durable(
    left_s: float, more_s: float, new_s: float, rest_s: float
) -> None:
    worth = {"nothing": 0, "finish": 1, "instead": 2, "new": 2, "after": 2}
    now = Situation(new_s, True, rest_s)
    if left_s < rest_s <= left_s + more_s:
        return  # with more time the save in flight fits, and is not given up for one that might not
    assert worth[plan(left_s + more_s, now).kind] >= worth[plan(left_s, now).kind]


def test_a_save_that_is_overdue_is_not_believed() -> None:
    assert remaining(10.0, 3.0) == 7.0
    assert remaining(10.0, 9.9) == 1.0
    assert remaining(10.0, 60.0) == 50.0


def test_the_slowest_rank_decides_and_what_one_does_not_know_nobody_does() -> None:
    fast, slow = Situation(1.0, True, 0.5), Situation(9.0, True, 0.1)
    assert together([fast, slow]) == Situation(9.0, True, 0.5)
    assert together([fast, Situation()]).new_s is None
    assert together([fast, Situation(2.0)]).flight_s == 0.5, "a rank that is done with it does not count"


def test_what_is_expected_is_the_slowest_of_the_last_ones() -> None:
    assert expected([]) is None
    assert expected([90.0, 1.0, 1.0, 4.0, 1.0, 1.0]) == 4.0


@pytest.mark.parametrize(("left_s", "margin_s"), [(0.0, 1.0), (5.0, 1.0), (30.0, 3.0), (420.0, 10.0)])
def test_the_margin(left_s: float, margin_s: float) -> None:
    assert margin_of(left_s) == margin_s
