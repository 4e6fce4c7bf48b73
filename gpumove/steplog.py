"""Whether saving at every step sends less than saving every few: for differences it may.

One step apart, only the gradient's own information is left, so two to five single steps can be smaller than one
difference over all of them. Nobody knows before it was tried, and one step says little: chains of small differences end
in a base like others. So after some regular saves as many single steps are tried as a chain has, and the sums decide.
A move may ask for single steps whatever the sums say: then all that counts is whether they are done in time. Knows
numbers only.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from statistics import fmean

from gpumove.config import Config

_log = logging.getLogger("gpumove")
_MOST_STEPS = 8
"""Beyond this many steps one difference has always been smaller."""
_MARGIN = 0.95
_REGULAR, _TRIAL, _KEPT = 3, 16, 32
"""Saves before a trial, single steps of a trial, and how many of either are remembered."""
_PAUSE = 64
"""Regular saves until something that lost is tried again."""
_MOST_LATE = 3
"""So many single steps in a row that were not done before the next one was are enough, where a move has asked."""


@dataclass
class Asked:
    """What a move asks of the saves, on rank 0."""

    under_way: bool = False
    """Everything is to be coded: it goes over the move's link too, which is slower than that to the job's own store."""
    every_step: bool = False
    """A save after every step, as far as that is in time."""
    hold: bool = False
    """None that are only due: what is copied meanwhile takes longer than they come."""
    slow_s: float = 0.0
    """What every step is to take longer, with saves after every one."""

    @property
    def thrift(self) -> int:
        """What writers are told: 0 nothing, 1 to code everything, 2 also without regard to how long a chain gets."""
        return self.under_way + (self.under_way and self.every_step)


class StepLog:
    """Rank 0's reckoning of the bytes per step, single steps against the interval that was asked for."""

    def __init__(self, config: Config, asked: Asked | None = None) -> None:
        """Nothing was measured yet.

        Args:
            config: the run's.
            asked: what a move asks for.
        """
        self._asked, self._late = asked or Asked(), 0
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
        if self._asked.every_step:
            self._came_out_asked(in_time)
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

    def _came_out_asked(self, in_time: bool) -> None:
        self._late = 0 if in_time else self._late + 1
        if self._late == _MOST_LATE:
            _log.warning("saves take longer than steps: a move asks for one after every step, and gets them as usual")

    def _obliges(self) -> bool:
        """Whether a move asks for single steps, and they pay."""
        if not self._asked.every_step:
            self._late = 0
        return self._asked.every_step and self._late < _MOST_LATE

    @property
    def watching(self) -> bool:
        """Whether every step is looked at: to save it, or because that may begin any time."""
        return (self._on and self._pause <= 1) or self._obliges()

    def wants(self) -> bool:
        """Whether the next step is to be saved, whatever the interval says."""
        return (self._on and not self._pause) or self._obliges()
