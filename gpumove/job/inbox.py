"""One queue for everything that wakes the supervisor: notices, what a terminal sends, and the ends of children."""

from __future__ import annotations

import queue
import signal
from types import FrameType

from gpumove.notices.notice import Notice

_TERMINAL = (signal.SIGINT, signal.SIGHUP)


class Inbox:
    """Open it in the main thread; put from any. The other signals are the business of ``notices/signals.py``."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()

    def open(self) -> None:
        """Take the signals, until the process ends: one in its last moments must not replace its exit status."""
        for number in (*_TERMINAL, signal.SIGCHLD):
            # What the one who started us wants ignored, as nohup does, stays ignored.
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def put(self, notice: Notice) -> None:
        """Hand in a notice, from any thread."""
        self._queue.put(notice)

    def wait(self, timeout_s: float) -> list[Notice]:
        """Wait for anything to happen, at most this long; the notices that came."""
        found = []
        try:
            found.append(self._queue.get(timeout=max(0.0, timeout_s)))
            while True:
                found.append(self._queue.get_nowait())
        except queue.Empty:
            return [notice for notice in found if notice is not None]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A SimpleQueue may be put to from a handler, also while the code below it is in the middle of a get.
        name = signal.Signals(number).name
        self._queue.put(None if number == signal.SIGCHLD else Notice(name.lower(), None, f"{name} was sent"))
