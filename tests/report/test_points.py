"""Rows of traces in both forms, and what is taken of them."""

from __future__ import annotations

import math

from gpumove.report.points import Point, joined, points


def test_rows_with_and_without_facts() -> None:
    rows = [[1, 2.5], [2, None], [3, 2.25, {"s": 0.5, "grad_norm": 1.5, "samples": "aa", "rng": "bb"}], [4, 2.0, {}]]
    assert points(rows, epoch=7) == [
        Point(1, 2.5, 7),
        Point(2, None, 7),
        Point(3, 2.25, 7, seconds=0.5, grad_norm=1.5),
        Point(4, 2.0, 7),
    ]


def test_facts_that_are_no_numbers_are_unknown() -> None:
    rows = [[1, 2.5, {"s": "fast", "grad_norm": math.inf}], [2, 2.5, {"s": True}], [3, 2.5, None], [4, math.nan]]
    assert [(p.seconds, p.grad_norm, p.loss) for p in points(rows, epoch=1)] == [
        (None, None, 2.5),
        (None, None, 2.5),
        (None, None, 2.5),
        (None, None, None),
    ]


def test_a_step_that_was_done_again_counts_once() -> None:
    first, again = points([[1, 4.0], [2, 3.0], [3, 9.0]], epoch=1), points([[3, 2.0], [4, 1.0]], epoch=2)
    assert [(p.step, p.loss) for p in joined([*first, *again])] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert joined([*again, *first]) == joined([*first, *again])
