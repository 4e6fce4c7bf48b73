"""Whether saving at every step sends less than saving every few: for differences it may.

One step apart, only the gradient's own information is left, so two to five single steps can be smaller than one
difference over all of them. Nobody knows before it was tried: after a regular save one single step is tried, and the
rest follows from what was measured. Knows numbers only.
"""

from __future__ import annotations

from gpumove.config import Config

_MOST_STEPS = 8
"""Beyond this many steps one difference has always been smaller."""
_MARGIN = 0.95


class StepLog:
    """Rank 0's reckoning of the bytes per step, single steps against the interval that was asked for."""

    def __init__(self, config: Config) -> None:
        self._every = config.every_steps or 0
        able = config.step_log == "auto" and config.delta and config.codec != "raw"
        self._on = able and 1 < self._every <= _MOST_STEPS
        self._sizes: dict[int, float] = {}
        self._slow = False
        self._last: int | None = None

    def came_out(self, step: int, ratio: float, *, in_time: bool) -> None:
        """A save was committed.

        Args:
            step: its step.
            ratio: bytes sent over bytes of state.
            in_time: it was done before the next step was.
        """
        apart = step - self._last if self._last is not None else 0
        self._last = step
        if apart == 1 and not in_time:
            self._slow = True  # each would be skipped while the one before runs
        if apart in (1, self._every):
            self._sizes[apart] = (self._sizes.get(apart, ratio) + ratio) / 2

    @property
    def watching(self) -> bool:
        """Whether every step is looked at: to save it, or because too little is known yet."""
        return self._on and not self._slow and (len(self._sizes) < 2 or self.wants())

    def wants(self) -> bool:
        """Whether the next step is to be saved, whatever the interval says."""
        if not self._on or self._slow or self._every not in self._sizes:
            return False
        single = self._sizes.get(1)
        return single is None or single * self._every < _MARGIN * self._sizes[self._every]
