"""What is usual of a number that comes with every step: its level, and how far it rises above that by itself. Pure.

A rise is told from chance by what the number did before: the medians of windows of several lengths are compared with
the level as they will be, at every place of the past, and what was seen there is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import median

import msgspec

WINDOWS = (32, 64, 128)
"""Rows whose median is looked at. A spike that is shorter than half the shortest is not seen."""
MOST_ROWS = 768
LEAST_ROWS = 64
"""Fewer tell nothing of chance."""
_LEVEL_ROWS = 64
_AHEAD = 256
"""Rows that a rise is looked for in, from a level on."""
_STRIDE = 4
_BLOCK = 128
"""Rows that a trend is straight in."""
_SIGMAS, _FEW, _BEYOND = 5.0, 96.0, 1.6
"""A rise is no chance from so many standard deviations on (more where few rows tell them), and only if it is so many
times what was seen before."""
_OF_MEDIAN = 1.2533
"""The standard deviation of a median, in those of a mean."""


class Usual(msgspec.Struct, frozen=True):
    """One number's."""

    rows: int
    level: float
    """The median of its newest rows."""
    margins: tuple[float, ...]
    """By window, as far as there are rows for: how far above the level chance may bring a median."""


def usual(values: Sequence[float]) -> Usual | None:
    """What is usual, from values in their order.

    Args:
        values: finite ones; the newest ``MOST_ROWS`` count.

    Returns:
        None if there are too few of them.
    """
    rows = list(values[-MOST_ROWS:])
    if len(rows) < LEAST_ROWS:
        return None
    kept = min(_LEVEL_ROWS, len(rows) // 4)
    single = spread([value - around for value, around in zip(rows, _around(rows))])
    flat = [value - line for value, line in zip(rows, _trend(rows))]
    margins = []
    for window in WINDOWS:
        if 2 * window > len(rows):
            break
        white = _OF_MEDIAN * single * sqrt(1 / window + 1 / kept)
        correlated = spread(_rises(flat, kept, window))
        seen = max(_SIGMAS * max(white, correlated), _BEYOND * max(_rises(rows, kept, window), default=0.0))
        margins.append(seen * (1 + _FEW / len(rows)))
    return Usual(len(rows), median(rows[-kept:]), tuple(margins))


def _around(rows: Sequence[float]) -> list[float]:
    """By row: the median of it and those beside it."""
    half = 8
    return [median(rows[max(0, place - half) : place + half + 1]) for place in range(len(rows))]


def _trend(rows: Sequence[float]) -> list[float]:
    """By row: the line through the medians of a few blocks, which a slow curve follows and chance does not."""
    size = len(rows) // max(2, len(rows) // _BLOCK)
    marks = [(at + size / 2, median(rows[at : at + size])) for at in range(0, len(rows) - size + 1, size)]
    found = []
    for place in range(len(rows)):
        first = min(max(0, int((place - size / 2) // size)), len(marks) - 2)
        (x, low), (y, high) = marks[first : first + 2]
        found.append(low + (high - low) * (place - x) / (y - x))
    return found


def _rises(rows: Sequence[float], kept: int, window: int) -> list[float]:
    """What this very look would have seen in the past: medians of windows, above the level of some time before."""
    levels = {start: median(rows[start - kept : start]) for start in range(kept, len(rows), _STRIDE)}
    medians = {end: median(rows[end - window : end]) for end in range(window, len(rows) + 1, _STRIDE)}
    return [
        value - level
        for start, level in levels.items()
        for end, value in medians.items()
        if start + window <= end <= start + _AHEAD
    ]


def spread(values: Sequence[float]) -> float:
    """The standard deviation of what is normal, by quantiles: single ones that stand out do not count, a tail does."""
    if not values:
        return 0.0
    ordered = sorted(values)
    middle, high = median(ordered), ordered[-1 - len(ordered) // 10]
    return max(1.4826 * median([abs(value - middle) for value in ordered]), (high - middle) / 1.2816)


class Rise:
    """Looks at a number from some step on, and says when it has risen.

    Args:
        before: what is usual of it.
        floor: the share of the level that it may rise by in any case.
        scale: what it is to be multiplied with to be comparable.
    """

    def __init__(self, before: Usual, *, floor: float, scale: float = 1.0) -> None:
        self.before, self._floor, self._scale = before, floor, scale
        self._rows: list[float] = []

    def add(self, value: float) -> tuple[int, float, float] | None:
        """One more.

        Returns:
            If it has risen: rows that tell it, their median as it is comparable, and what it might have been.
        """
        self._rows = [*self._rows[1 - WINDOWS[-1] :], value * self._scale]
        for window, limit in zip(WINDOWS, self.limits()):
            if window <= len(self._rows) and (now := median(self._rows[-window:])) > limit:
                return window, now, limit
        return None

    def limits(self) -> list[float]:
        """By window: what the median may be at most."""
        return [self.before.level + max(self._floor * abs(self.before.level), m) for m in self.before.margins]

    @property
    def now(self) -> float | None:
        """The median of the newest rows; None while there are too few."""
        last = self._rows[-WINDOWS[-1] :]
        return median(last) if len(last) >= WINDOWS[0] else None
