"""A bound on bytes in flight: whoever would exceed it waits. Knows nothing else."""

from __future__ import annotations

import threading


class ByteBudget:
    """Admits work while its bytes fit; one piece of work that is larger than the whole budget goes alone."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = max(1, limit_bytes)
        self.peak_bytes = 0
        self._used = 0
        self._turn = threading.Condition()

    def acquire(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more fit."""
        with self._turn:
            self._turn.wait_for(lambda: self._used == 0 or self._used + nbytes <= self.limit_bytes)
            self._used += nbytes
            self.peak_bytes = max(self.peak_bytes, self._used)

    def release(self, nbytes: int) -> None:
        """Give them back."""
        with self._turn:
            self._used -= nbytes
            self._turn.notify_all()
