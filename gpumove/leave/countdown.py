"""How much time a notice leaves, and waiting no longer than that. Knows seconds only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from gpumove.leave.deadline import margin_of

LEAST_S = 2.0
"""Ranks wait this long for one another whatever the deadline: if they leave after different steps, they hang."""
_SILENT_S = 3.0
_PIECE_S = 0.5


class Countdown:
    """Without an end until there is a notice."""

    def __init__(self) -> None:
        self._ends, self._margin_s = math.inf, 0.0

    def ends_in(self, seconds: float) -> None:
        """There is a notice, or a nearer one."""
        self._ends, self._margin_s = time.monotonic() + seconds, margin_of(seconds)

    def left_s(self, *, margin: float = 1.0) -> float:
        """Seconds until the deadline less the margin, or part of it; not below 0, and infinity without a notice."""
        return max(0.0, self._ends - margin * self._margin_s - time.monotonic())

    @property
    def meet_s(self) -> float:
        """Bound on a meeting: if ranks do not come to it, half of the time is left for the others to save."""
        return max(LEAST_S, self.left_s() / 2)

    @property
    def silent_s(self) -> float:
        """How long a rank may give no sign before it counts as gone."""
        return max(1.0, min(_SILENT_S, self.left_s() / 3))

    def wait(self, join: Callable[[float], bool], *, margin: float = 1.0, most_s: float = math.inf) -> bool:
        """Wait in pieces, since a notice may come meanwhile, or a nearer deadline.

        Args:
            join: waits so many seconds at most, and tells whether what it waits for has come.
            margin: the part of the margin that is left afterwards.
            most_s: bound on the wait in any case.

        Returns:
            Whether it has come.
        """
        until = time.monotonic() + most_s
        while True:
            left = min(self.left_s(margin=margin), until - time.monotonic())
            if join(max(0.0, min(left, _PIECE_S))):
                return True
            if left <= _PIECE_S:
                return False
