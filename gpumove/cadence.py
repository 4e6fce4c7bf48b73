"""When the ranks meet next to decide on a save: a step number that all of them know beforehand.

Between two meetings a step costs one comparison. A cadence in seconds is turned into steps by the measured step time,
so that no clock of any other rank matters. Knows numbers only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gpumove.config import Config

_log = logging.getLogger("gpumove")
_FIRST_S, _MOST_S = 30.0, 600.0
"""Of ``every_s="auto"``: until a save was measured, and in any case."""
_PRIOR_S = 3600.0
"""One interruption in this time is supposed of a run that has none yet: it counts less the longer the run is."""
_NEWS = 0.25
"""A change that is worth a line in the log."""


class Past(NamedTuple):
    """How often a run was interrupted, as its log tells."""

    seconds: float = 0.0
    interruptions: int = 0


def past(commits: Sequence[tuple[float, int]]) -> Past:
    """From when checkpoints were committed, and in which epoch: each of these starts was interrupted, or ended.

    Epochs in between were opened by moves and replicators, or by starts that came to nothing.
    """
    if not commits:
        return Past()
    return Past(max(0.0, commits[-1][0] - commits[0][0]), len({epoch for _, epoch in commits}))


@dataclass
class Interval:
    """Seconds between saves, from what one costs and how often the run is interrupted (Young, Daly).

    A save costs its stall, and an interruption half an interval: with one every ``mtbf_s``, the sum is least at
    ``sqrt(2 * stall_s * mtbf_s)``.
    """

    seconds: float = _FIRST_S
    _past: Past = field(default_factory=Past)
    _since_s: float = 0.0
    _said_s: float = 0.0

    def learn(self, before: Past, now: float) -> None:
        """What the log tells of this run until now."""
        self._past, self._since_s = before, now

    def measured(self, *, stall_s: float, took_s: float, grace_s: float, now: float) -> None:
        """A save was done.

        Args:
            stall_s: what it cost the training.
            took_s: from its begin to its commit.
            grace_s: what a notice leaves.
            now: seconds of a monotonic clock.
        """
        mtbf_s = (self._past.seconds + now - self._since_s + _PRIOR_S) / (self._past.interruptions + 1)
        best_s = math.sqrt(2 * max(stall_s, 1e-3) * mtbf_s)
        self.seconds = min(max(best_s, took_s), _MOST_S)
        if abs(self.seconds - self._said_s) <= _NEWS * self._said_s:
            return
        self._said_s = self.seconds
        _log.info(
            "a save every %.0f s: one costs %.2f s of training and takes %.1f s, and the run is interrupted every %.0f "
            "minutes (%d times so far). Lost without a notice: %.0f s on average; with one of %.0f s: %s",
            self.seconds, stall_s, took_s, mtbf_s / 60, self._past.interruptions, self.seconds / 2 + took_s, grace_s,
            "nothing" if took_s < 0.9 * grace_s else "as much, since a save takes longer",
        )  # fmt: skip


@dataclass
class Cadence:
    """Rank 0's reckoning. ``now`` arguments are seconds of a monotonic clock."""

    config: Config
    started_s: float
    last_save_s: float = 0.0
    last_step: int = 0
    interval: Interval = field(default_factory=Interval)
    _seen_step: int | None = None
    _seen_s: float = 0.0
    _step_s: float | None = None

    def __post_init__(self) -> None:
        """The first interval counts from the start."""
        self.last_save_s = self.started_s

    @property
    def every_s(self) -> float | None:
        """Seconds between saves, if that is how they are counted."""
        every = self.config.every_s
        return self.interval.seconds if isinstance(every, str) else every

    def due(self, step: int, now: float) -> bool:
        """Whether a save is due at this step."""
        every = self.config.every_steps
        if every is not None and step // every > self.last_step // every:
            return True
        return self.every_s is not None and now - self.last_save_s >= self.every_s

    def took(self, step: int, now: float) -> None:
        """A save was begun, or skipped: the next interval counts from here."""
        self.last_step, self.last_save_s = step, now

    def next_meeting(self, step: int, now: float, *, most_s: float | None = None) -> int:
        """The next step at which a save may be due, or that is about ``most_s`` away."""
        passed = step - self._seen_step if self._seen_step is not None else 0
        if passed > 0:
            self._step_s = (now - self._seen_s) / passed
        self._seen_step, self._seen_s = step, now
        candidates = []
        if self.config.every_steps is not None:
            candidates.append((step // self.config.every_steps + 1) * self.config.every_steps)
        if self.every_s is not None:
            candidates.append(step + self._steps_in(self.last_save_s + self.every_s - now, passed))
        if most_s is not None:
            candidates.append(step + self._steps_in(most_s, passed))
        return min(candidates, default=1 << 62)

    def _steps_in(self, seconds: float, passed: int) -> int:
        """Steps that surely fit into the seconds left; most of them, so that a wrong guess is corrected on the way.

        At most twice as many as were measured: the first steps of a job may take a thousandth of the later ones.
        """
        if not self._step_s:
            return 1
        return max(1, min(math.floor(0.9 * seconds / self._step_s), 2 * passed))
