"""Whether saving at every step sends less than saving every few: for differences it may.

One step apart, only the gradient's own information is left, so two to five single steps can be smaller than one
difference over all of them. Nobody knows before it was tried, and one step says little: chains of small differences end
in a base like others. So after some regular saves as many single steps are tried as a chain has, and the sums decide.
Knows numbers only.
"""

from __future__ import annotations

from collections import deque
from statistics import fmean

from gpumove.config import Config

_MOST_STEPS = 8
"""Beyond this many steps one difference has always been smaller."""
_MARGIN = 0.95
_REGULAR, _TRIAL, _KEPT = 3, 16, 32
"""Saves before a trial, single steps of a trial, and how many of either are remembered."""
_PAUSE = 64
"""Regular saves until something that lost is tried again."""


class StepLog:
    """Rank 0's reckoning of the bytes per step, single steps against the interval that was asked for."""

    def __init__(self, config: Config) -> None:
        self._every = config.every_steps or 0
        able = config.step_log == "auto" and config.delta and config.codec != "raw"
        self._on = able and 1 < self._every <= _MOST_STEPS
        self._regular: deque[float] = deque(maxlen=_KEPT)
        self._single: deque[float] = deque(maxlen=_KEPT)
        self._pause = _REGULAR
        self._last: int | None = None

    def came_out(self, step: int, ratio: float, *, in_time: bool) -> None:
        """A save was committed.

        Args:
            step: its step.
            ratio: bytes sent over bytes of state.
            in_time: it was done before the next step was.
        """
        if not self._on:
            return
        apart = step - self._last if self._last is not None else self._every
        self._last = step
        if apart == 1:
            self._single.append(ratio)
            lost = len(self._single) >= _TRIAL and fmean(self._single) * self._every > _MARGIN * fmean(self._regular)
            if lost or not in_time:  # each would be skipped while the one before runs
                self._single.clear()
                self._pause = _PAUSE
        elif apart == self._every:
            self._regular.append(ratio)
            self._pause = max(0, self._pause - 1)

    @property
    def watching(self) -> bool:
        """Whether every step is looked at: to save it, or because that may begin any time."""
        return self._on and self._pause <= 1

    def wants(self) -> bool:
        """Whether the next step is to be saved, whatever the interval says."""
        return self._on and not self._pause
