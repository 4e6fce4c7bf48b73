"""When the ranks meet next to decide on a save: a step number that all of them know beforehand.

Between two meetings a step costs one comparison. A cadence in seconds is turned into steps by the measured step time,
so that no clock of any other rank matters. Knows numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpumove.config import Config


@dataclass
class Cadence:
    """Rank 0's reckoning. ``now`` arguments are seconds of a monotonic clock."""

    config: Config
    started_s: float
    last_save_s: float = 0.0
    last_step: int = 0
    _seen_step: int | None = None
    _seen_s: float = 0.0
    _step_s: float | None = None

    def __post_init__(self) -> None:
        """The first interval counts from the start."""
        self.last_save_s = self.started_s

    def due(self, step: int, now: float) -> bool:
        """Whether a save is due at this step."""
        every = self.config.every_steps
        if every is not None and step // every > self.last_step // every:
            return True
        return self.config.every_s is not None and now - self.last_save_s >= self.config.every_s

    def took(self, step: int, now: float) -> None:
        """A save was begun, or skipped: the next interval counts from here."""
        self.last_step, self.last_save_s = step, now

    def next_meeting(self, step: int, now: float) -> int:
        """The next step at which a save may be due."""
        passed = step - self._seen_step if self._seen_step is not None else 0
        if passed > 0:
            self._step_s = (now - self._seen_s) / passed
        self._seen_step, self._seen_s = step, now
        candidates = []
        if self.config.every_steps is not None:
            candidates.append((step // self.config.every_steps + 1) * self.config.every_steps)
        if self.config.every_s is not None:
            candidates.append(step + self._steps_in(self.last_save_s + self.config.every_s - now, passed))
        return min(candidates, default=1 << 62)

    def _steps_in(self, seconds: float, passed: int) -> int:
        """Steps that surely fit into the seconds left; most of them, so that a wrong guess is corrected on the way.

        At most twice as many as were measured: the first steps of a job may take a thousandth of the later ones.
        """
        if not self._step_s:
            return 1
        return max(1, min(math.floor(0.9 * seconds / self._step_s), 2 * passed))
