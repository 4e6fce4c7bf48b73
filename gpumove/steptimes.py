"""Step times against the run's own: when training became slower, and for good. Knows numbers only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, median

_WARM_STEPS = 10
"""First steps compile, tune and fill caches: they are no measure."""
BLOCK_STEPS, BLOCK_S = 8, 10.0
"""Steps and seconds that are judged together, at least."""
_MOST_STEPS = 4096
"""More are never judged together: sorting them would be felt."""
_TRIM = 4
"""Of a block, so many parts: the slowest and the fastest are not counted. Evaluations, saves and hiccups are there."""
_LARGEST = 16
"""Blocks grow up to so many times, where steps differ so much that a tenth would not be seen."""
_LEARNED, _KEPT = 12, 48
"""Blocks until there is a baseline, and how many tell how much blocks differ when nothing is wrong."""
SLOWER, _NOISE = 0.10, 4.0
"""What is reported: a tenth, or where blocks differ more by themselves, so many of their standard deviations."""
ROW, _ROW_S = 3, 60.0
"""Blocks in a row, and the seconds they take, before anything is said."""
_CHANCE = 1e-6
"""Where single blocks are slower now and then, so many in a row are waited for that chance is less likely than this."""
_FOLLOW_PER_H = 0.10
"""The baseline follows so much per hour: data that slowly grows longer is no fault of the machine."""
_SETTLED_S = 3600.0
"""An episode that lasts so long is how this run is from now on."""


class Pace:
    """Step times against the run's own: a baseline that is learned, and episodes that are slower."""

    def __init__(self) -> None:
        self._warm, self._scale = _WARM_STEPS, 1
        self._block: list[float] = []
        self._block_s = 0.0
        self._learning: list[float] = []
        self._baseline = 0.0
        self._calm: deque[float] = deque(maxlen=_KEPT)  # blocks over the baseline when nothing was wrong
        self._row: list[tuple[float, float]] = []
        self._slow_s: float | None = None

    def add(self, seconds: float) -> str | None:
        """One more step; words if from here on the training is slower than it was."""
        if self._warm > 0:
            self._warm -= 1
            return None
        self._block.append(seconds)
        self._block_s += seconds
        steps, took = len(self._block), self._block_s
        if steps < BLOCK_STEPS * self._scale or (took < BLOCK_S * self._scale and steps < _MOST_STEPS):
            return None
        value, self._block, self._block_s = _trimmed_mean(self._block), [], 0.0
        if not self._baseline:
            self._learn(value)
            return None
        return self._judge(value, took)

    def _learn(self, value: float) -> None:
        self._learning.append(value)
        if len(self._learning) < _LEARNED:
            return
        self._baseline = median(self._learning)
        self._calm = deque((block / self._baseline for block in self._learning), maxlen=_KEPT)
        self._learning.clear()
        self._grow()

    def _grow(self) -> None:
        """Longer blocks, and all anew, where these differ too much to tell a tenth."""
        if self._scale < _LARGEST and _NOISE * _spread(self._calm) > SLOWER:
            self._scale *= 2
            self._forget()

    def _forget(self) -> None:
        self._baseline, self._slow_s = 0.0, None
        self._row.clear()

    def _judge(self, value: float, took: float) -> str | None:
        margin = max(SLOWER, _NOISE * _spread(self._calm))
        ratio = value / self._baseline
        if self._slow_s is not None:
            self._recover(ratio, margin, took)
            return None
        if ratio <= 1 + margin:
            self._follow(ratio, took)
            return None
        self._row.append((ratio, took))
        if len(self._row) < self._needed(1 + margin) or sum(block_s for _, block_s in self._row) < _ROW_S:
            return None
        now = self._baseline * median(block for block, _ in self._row)
        self._row.clear()
        self._slow_s = 0.0
        share = f"{now / self._baseline - 1:.0%}"
        return f"a step takes {in_words(now)}, {share} longer than the {in_words(self._baseline)} of this run before"

    def _needed(self, limit: float) -> int:
        """Blocks in a row that chance alone does not bring about."""
        seen = sum(ratio > limit for ratio in self._calm)
        # Of blocks that differ much, that none was so slow so far says little.
        usual = max(seen, 0.5 if limit > 1 + SLOWER else 0.0) / len(self._calm)
        return math.ceil(math.log(_CHANCE, min(usual, 0.5))) if usual else ROW

    def _follow(self, ratio: float, took: float) -> None:
        self._calm.extend([*(above for above, _ in self._row), ratio])  # those above were chance
        self._row.clear()
        most = _FOLLOW_PER_H * took / 3600
        self._baseline *= 1 + min(max(ratio - 1, -most), most)
        if len(self._calm) == _KEPT:  # a dozen may have been alike by chance
            self._grow()

    def _recover(self, ratio: float, margin: float, took: float) -> None:
        """The episode ends where steps are again as they were, or have been like this for long."""
        self._slow_s = (self._slow_s or 0.0) + took
        self._row = [*self._row, (ratio, took)] if ratio <= 1 + margin / 2 else []
        if len(self._row) >= ROW:
            self._slow_s, self._row = None, []
        elif self._slow_s >= _SETTLED_S:
            self._forget()


def _trimmed_mean(values: Sequence[float]) -> float:
    off = len(values) // _TRIM
    return fmean(sorted(values)[off:-off])


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of what is normal, by quantiles: outliers do not count, a tail does."""
    ordered = sorted(values)
    middle, high = median(ordered), ordered[-1 - len(ordered) // 10]
    return max(1.4826 * median(abs(value - middle) for value in values), (high - middle) / 1.2816)


def in_words(value: float) -> str:
    """Seconds for people."""
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
