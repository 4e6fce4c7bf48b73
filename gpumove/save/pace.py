"""Which share of a save is worth coding: all of it when the store is slow, none when it is faster than the codecs.

Coding and sending run side by side, so a save takes as long as the slower of the two. With rates L (link) and C (all
threads' codecs), and coded bytes r times the raw ones, both end together if the share ``1 / (L / C + 1 - r)`` is coded.

Rates are not all: requests have a latency, and the training wants the processor too. So where rates say that sending
raw could be about as fast, it is tried, and of the two ways the one that took less time goes on.
"""

from __future__ import annotations

import threading
import time

_LEAST = 0.25
"""A smaller share than this saves less than it costs the training."""
_KNOWN_BYTES = 1 << 20
"""Rates are believed after this many bytes."""
_HOPE = 2.0
"""Sending raw is tried if it may take at most this many times what coding takes."""
_AGAIN = 32
"""Saves after which the slower way is tried again."""


class Pace:
    """Measured rates of this rank, and the choice that follows from them. Older saves count half of newer ones."""

    def __init__(self, *, always: bool, never: bool, threads: int) -> None:
        self._always, self._never, self._threads = always, never, threads
        self._lock = threading.Lock()
        self._raw = self._stored = self._code_s = 0.0
        self._sent = self._busy_s = 0.0
        self._in_flight, self._since = 0, 0.0
        self._credit = 0.0
        self._took: dict[bool, float] = {}
        """Seconds per changed byte, by whether it was coded."""
        self._coding, self._row, self._began = True, 0, 0.0

    def insist(self, *, always: bool) -> None:
        """Whether everything is coded, from the next save on."""
        self._always = always

    def begin(self) -> None:
        """A save begins."""
        with self._lock:
            self._raw, self._stored, self._code_s = self._raw / 2, self._stored / 2, self._code_s / 2
            self._sent, self._busy_s, self._credit = self._sent / 2, self._busy_s / 2, 0.0
            self._began = time.perf_counter()
            self._coding = self._always or (not self._never and self._pays())

    def end(self, changed_bytes: int) -> None:
        """The save is over; so many bytes had changed. Not called for one that failed."""
        if changed_bytes < _KNOWN_BYTES:
            return
        with self._lock:
            took = (time.perf_counter() - self._began) / changed_bytes
            self._row += 1
            self._took[self._coding] = (self._took.get(self._coding, took) + took) / 2

    def _pays(self) -> bool:
        """Whether the next save is coded at all."""
        coded, raw = self._took.get(True), self._took.get(False)
        if coded is None:
            return True
        faster = raw is None or coded <= raw
        if self._row < (_AGAIN if raw is not None else 1):
            return faster
        self._row = 0
        if not faster:
            return True
        # The link's rate is that of coded objects, which are smaller: for raw ones it is more.
        return not self._sent or self._busy_s / self._sent > _HOPE * coded

    def coded(self, raw_bytes: int, stored_bytes: int, seconds: float) -> None:
        """One thread coded so much in so long."""
        with self._lock:
            self._raw += raw_bytes
            self._stored += stored_bytes
            self._code_s += seconds

    def put_begins(self) -> None:
        """One more object is on its way."""
        with self._lock:
            if not self._in_flight:
                self._since = time.perf_counter()
            self._in_flight += 1

    def put_ends(self, nbytes: int) -> None:
        """It has arrived, or failed."""
        with self._lock:
            self._in_flight -= 1
            self._sent += nbytes
            now = time.perf_counter()
            self._busy_s += now - self._since
            self._since = now

    @property
    def share(self) -> float:
        """Of the bytes that changed, how many to code."""
        if not self._coding or self._always or self._never:
            return float(self._coding and not self._never)
        if min(self._raw, self._sent) < _KNOWN_BYTES or not (self._code_s and self._busy_s):
            return 1.0
        link, codecs = self._sent / self._busy_s, self._raw / self._code_s * self._threads
        share = 1.0 / (link / codecs + 1.0 - self._stored / self._raw)
        return 0.0 if share < _LEAST else min(1.0, share)

    def worth(self) -> bool:
        """Whether the next unit is to be coded."""
        with self._lock:
            self._credit += self.share  # below 2 at all times: a whole one is spent at once
            if self._credit < 1.0:
                return False
            self._credit -= 1.0
            return True
