"""Memory that is lent for the time of one transfer: bounded in all, and reused. Knows nothing of what is in it.

Fresh memory costs more to touch than to fill, so what comes back is kept; and it begins on a page, so that a file can
be written from where it lies.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable

_GRAIN = 64 << 10
_LOOK_S = 0.25


class Lender:
    """Lends memory while it fits in ``limit_bytes``; one piece that is larger than all of it goes alone."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        """Most that was held at once, lent or kept for the next one."""
        self._lent = self._kept = 0
        self._free: list[mmap.mmap] = []
        self._turn = threading.Condition()

    def lend(self, nbytes: int, unwanted: Callable[[], bool]) -> memoryview | None:
        """Memory of this size, once there is room; None if nobody wants it any more."""
        whole = max(_GRAIN, -(-nbytes // _GRAIN) * _GRAIN)
        with self._turn:
            while self._lent and self._lent + whole > self.limit_bytes:
                self._turn.wait(_LOOK_S)
                if unwanted():
                    return None
            found = self._fitting(whole)
            self._lent += len(found)
            self.peak_bytes = max(self.peak_bytes, self._lent + self._kept)
            return memoryview(found)[:nbytes]

    def _fitting(self, nbytes: int) -> mmap.mmap:
        """The smallest piece that will do, but none of twice the size; else a new one, for which others make room."""
        room = self.limit_bytes - self._lent
        fits = [piece for piece in self._free if nbytes <= len(piece) <= max(nbytes, min(2 * nbytes, room))]
        if fits:
            best = min(fits, key=len)
            self._free.remove(best)
            self._kept -= len(best)
            return best
        while self._free and self._kept + nbytes > room:
            self._kept -= len(self._free.pop(0))
        return mmap.mmap(-1, nbytes)

    def take_back(self, view: memoryview, *, again: bool) -> None:
        """It is not used any more; ``again``: not even by a call that hung, so that it may be lent again."""
        piece = view.obj
        assert isinstance(piece, mmap.mmap)
        with self._turn:
            self._lent -= len(piece)
            if again:
                self._free.append(piece)
                self._kept += len(piece)
            self._turn.notify_all()
