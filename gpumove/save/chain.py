"""Whether a unit may be coded as a difference once more, or has to begin anew: what a restore may cost decides.

Differences one step apart are a small part of the state, and those further apart nearly as large as a base, so a limit
on their number alone would be either far too tight for the first or far too loose for the second. The bytes that a
restore has to fetch are what is limited; the number is limited too, for a reader's latency.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from gpumove.format.stored import Stored, closure

_FIRST_GUESS = 0.5
_MOST_LIFTED = 64
"""Saves in a row where whoever restores has decoded all but the last ones already."""
_RECORD_BYTES = 150
"""Of each chunk that others are decoded from, in the part: of small chunks it is much."""


class Chain:
    """Remembers how large differences came out, by the rule that made them."""

    def __init__(self, *, max_chain: int, max_amplification: float) -> None:
        self._max_chain, self._max_amplification = max_chain, max_amplification
        self._came_out: dict[str, tuple[float, float]] = {}
        self._lifted = False
        self._lock = threading.Lock()

    def lift(self, *, lifted: bool) -> None:
        """Whether the bounds do not count for now, and only the length has one."""
        self._lifted = lifted

    def begin(self) -> None:
        """A save begins: what came out earlier counts half."""
        with self._lock:
            self._came_out = {rule: (raw / 2, stored / 2) for rule, (raw, stored) in self._came_out.items()}

    def goes_on(self, before: Sequence[Stored], rule: str) -> bool:
        """Whether a unit that was stored as ``before`` may be stored as a difference to it.

        Args:
            before: its chunks at the predecessor.
            rule: whose ratio to expect.
        """
        if any(node.chain >= (_MOST_LIFTED if self._lifted else self._max_chain) for node in before):
            return False
        raw, stored = self._came_out.get(rule, (1.0, _FIRST_GUESS))
        return self.holds(before, sum(node.nbytes for node in before) * stored / raw)

    def holds(self, before: Sequence[Stored], stored_bytes: float) -> bool:
        """Whether a difference of that size to ``before`` leaves a restore within its bound."""
        if self._lifted:
            return True
        found = closure(before).values()
        fetched = stored_bytes + sum(node.length + _RECORD_BYTES for node in found)
        return fetched <= self._max_amplification * sum(node.nbytes for node in before)

    def came_out(self, rule: str, nbytes: int, stored_bytes: int) -> None:
        """A unit of ``nbytes`` was stored as a difference of ``stored_bytes``."""
        with self._lock:
            raw, stored = self._came_out.get(rule, (0.0, 0.0))
            self._came_out[rule] = (raw + nbytes, stored + stored_bytes)
