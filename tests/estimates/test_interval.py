"""Sums over numbers of which only the bounds are known: whatever they really are, the result holds it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.estimates.interval import Range, product, total

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def ranges(draw: st.DrawFn, least: float = -1e6) -> tuple[Range, float]:
    """A range, and what the number really is."""
    low, value, real, high = sorted(draw(st.lists(st.floats(least, 1e6), min_size=4, max_size=4)))
    return Range(low, value, high), real


def holds(found: Range, real: float) -> bool:
    slack = 1e-9 * (1 + abs(real) + abs(found.low) + abs(found.high))
    return found.low - slack <= real <= found.high + slack


@given(ranges(), ranges())
def test_sums_differences_and_products_hold_what_is_really_so(a: tuple[Range, float], b: tuple[Range, float]) -> None:
    assert holds(a[0] + b[0], a[1] + b[1])
    assert holds(a[0] - b[0], a[1] - b[1])
    assert holds(a[0] * b[0], a[1] * b[1])
    assert holds(a[0] * 3.0, a[1] * 3.0)


@given(ranges(), ranges(least=1e-3))
def test_quotients_hold_what_is_really_so(a: tuple[Range, float], b: tuple[Range, float]) -> None:
    assert holds(a[0] / b[0], a[1] / b[1])


@given(ranges(), ranges())
def test_the_value_is_that_of_the_values(a: tuple[Range, float], b: tuple[Range, float]) -> None:
    assert (a[0] * b[0]).value == a[0].value * b[0].value
    assert (a[0] - b[0]).value == a[0].value - b[0].value


@given(st.floats(1e-3, 1e6), st.floats(0, 2))
def test_around(value: float, share: float) -> None:
    found = Range.around(value, share)
    assert found.low <= value <= found.high
    assert found.high / value == pytest.approx(value / found.low)


def test_what_is_unknown_stays_unknown() -> None:
    one = Range.exact(1.0)
    assert total(one, None, one) is None
    assert product(one, None) is None
    assert total() == Range.exact(0.0)
    assert product(one, Range(1, 2, 3)) == Range(1, 2, 3)


@pytest.mark.parametrize("wrong", [(2, 1, 3), (1, 2, float("inf")), (1, float("nan"), 2), (float("-inf"), 0, 1)])
def test_no_range(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="not in order"):
        Range(*wrong)


def test_no_division_by_what_may_be_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        Range.exact(1.0) / Range(-1.0, 1.0, 2.0)
