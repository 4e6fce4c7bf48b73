"""How fast a transfer may be, and how fast it is. Knows bytes and time only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from gpumove.store.retry import Clock

RANGE = 8 << 20
"""Bytes of one read. A request for less costs more than the bytes; one for more leaves fewer under way."""
_WINDOW_S = 30.0


class Cap:
    """A bound on bytes per second, over all threads: who comes too early waits."""

    def __init__(self, limit_bytes_s: float, clock: Clock) -> None:
        self.piece_bytes = max(64 << 10, min(RANGE, int(limit_bytes_s / 4)))
        """How much to ask for at once, so that it stays smooth."""
        self._limit, self._clock = limit_bytes_s, clock
        self._free_at = clock.now()
        self._lock = threading.Lock()

    def wait(self, nbytes: int) -> None:
        """Until so many bytes more may go."""
        with self._lock:
            start = max(self._clock.now(), self._free_at)
            self._free_at = start + nbytes / self._limit
        if (pause := start - self._clock.now()) > 0:
            self._clock.sleep(pause)


class Rate:
    """Bytes per second of the last half minute in which anything was under way."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._active_s, self._began = 0.0, 0.0
        self._nbytes, self._busy, self._under_way = 0, 0, 0
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The time inside counts."""
        with self._lock:
            self._began = self._began if self._busy else self._now()
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._mark(0)
                self._busy -= 1

    @contextlib.contextmanager
    def moving(self, nbytes: int) -> Iterator[None]:
        """An object of so many bytes is under way."""
        with self._lock:
            self._under_way += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= nbytes

    def add(self, nbytes: int) -> None:
        """So much has arrived."""
        with self._lock:
            self._mark(nbytes)

    def _mark(self, nbytes: int) -> None:
        now = self._now()
        self._active_s, self._began = self._active_s + now - self._began, now
        self._nbytes += nbytes
        self._marks.append((self._active_s, self._nbytes))
        while len(self._marks) > 2 and self._active_s - self._marks[1][0] >= _WINDOW_S:
            self._marks.popleft()

    @property
    def bytes_s(self) -> float | None:
        """None as long as nothing was sent."""
        with self._lock:
            (begin, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - begin) if end > begin and after > before else None

    @property
    def most_bytes_s(self) -> float | None:
        """What it cannot be above: as if all that is under way had arrived. Objects that share a link arrive late, and
        all at once. None as long as nothing was sent."""
        with self._lock:
            begin, before = self._marks[0]
            now = self._active_s + (self._now() - self._began if self._busy else 0.0)
            nbytes = self._nbytes + self._under_way - before
        return nbytes / (now - begin) if now > begin and nbytes else None
