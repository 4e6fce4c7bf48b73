"""SIGTERM, SIGUSR1 and SIGUSR2 as notices, also while the main thread is inside a collective.

Python runs a signal's handler in the main thread, between two bytecodes: one that waits in C++ for another rank gets
there too late. The byte that Python's C handler writes into the wakeup fd is there at once, and a thread reads it.

Slurm's SIGCONT before a SIGTERM needs nothing: a process that was not stopped ignores it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import weakref
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from types import FrameType

from gpumove.notices.notice import Notice

_log = logging.getLogger("gpumove")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_HANDLED = 0x80
"""Marks what our handler writes, and not Python: the main thread got there, be it late."""
_WAKE = b"\0"
_POLL_S = 60.0


class Signals:
    """The signals that nobody else has a handler for, from ``open`` to ``close``, both in the main thread.

    SIGTERM again, ``again_s`` after the first one or later, means now. Before that it is the same one, which has come
    two ways: systemd and Slurm signal every process of the job, and torchrun signals its workers on top of that.
    """

    name = "signals"
    pause_s = 0.0

    def __init__(self, *, again_s: float = 5.0) -> None:
        self._again_s = again_s
        self._ours: list[signal.Signals] = []
        self._pid = 0
        self._earlier: tuple[int, tuple[int, int]] | None = None
        self._closed = True
        self._polling = threading.Lock()
        self._raised: Counter[int] = Counter()  # by signal, what Python wrote
        self._handled: Counter[int] = Counter()  # and what our handler wrote
        self._first_term_s: float | None = None
        self._news: deque[Notice] = deque()

    def open(self) -> None:
        """Take the signals.

        Raises:
            RuntimeError: not in the main thread, or all of them have handlers already.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals can be caught only by a Checkpointer that is made in the main thread")
        free = [number for number in _SIGNALS if _is_free(number)]
        if taken := [number.name for number in _SIGNALS if number not in free]:
            _log.info("%s: somebody else has a handler for this, which stays; no notices from it", ", ".join(taken))
        if not free:
            raise RuntimeError("all signals have handlers of somebody else")
        self._pid, self._closed = os.getpid(), False
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(_POLL_S)
        self._writer.setblocking(False)
        earlier = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._earlier = (earlier, identity) if (identity := _identity(earlier)) else None
        for number in free:
            signal.signal(number, self._handle)
            self._ours.append(number)
        method = weakref.WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (found := method()) and found())

    def poll(self) -> Notice | None:
        """Wait for a signal, a minute at most."""
        with self._polling:
            if self._closed:
                return None
            if not self._news:
                with suppress(TimeoutError):
                    self._take(self._reader.recv(4096))
            return self._news.popleft() if self._news else None

    def close(self) -> None:
        """Give the signals back; elsewhere than in the main thread this happens when the next one comes."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            self._writer.send(_WAKE)
        if threading.current_thread() is threading.main_thread():
            self._give_back()
            with self._polling:  # the poll that was running has been woken
                self._reader.close()
                self._writer.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._closed:  # by another thread, which could not do this
            self._give_back()
            signal.raise_signal(number)
            return
        with suppress(OSError):  # full of signals: it is known
            self._writer.send(bytes([number | _HANDLED]))

    def _give_back(self) -> None:
        """Restore what was there, unless somebody has put something else there since."""
        ours, self._ours = self._ours, []
        for number in ours:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL)
        present = signal.set_wakeup_fd(-1)
        if present != self._writer.fileno():
            earlier = present
        else:
            earlier = self._earlier[0] if self._earlier and self._still_there() else -1
        if earlier != -1:
            signal.set_wakeup_fd(earlier)

    def _after_fork(self) -> None:
        """A child is not the job: what ends it must end it, and not be heard by the parent, who has the same socket."""
        if self._ours:
            self._closed = True
            self._give_back()

    def _still_there(self) -> bool:
        """Whether the earlier wakeup fd is what it was: its number may belong to another file by now."""
        return self._earlier is not None and _identity(self._earlier[0]) == self._earlier[1]

    def _take(self, data: bytes) -> None:
        """Pass on to the earlier wakeup fd what is its as well, and note what is ours."""
        known = self._counts()
        for byte in data:
            if byte & _HANDLED:
                self._handled[byte & ~_HANDLED] += 1
            elif byte:
                self._raised[byte] += 1
                if self._earlier and self._still_there():
                    with suppress(OSError):
                        os.write(self._earlier[0], bytes([byte]))
        for number, count in self._counts().items():
            if count > known.get(number, 0):
                self._heard(signal.Signals(number))

    def _counts(self) -> dict[int, int]:
        """How often each signal came. Where somebody took the wakeup fd from us, only our handler knows."""
        return {number: max(self._raised[number], self._handled[number]) for number in _SIGNALS}

    def _heard(self, number: signal.Signals) -> None:
        now = time.monotonic()
        deadline = None
        if number == signal.SIGTERM:
            if self._first_term_s is not None and now - self._first_term_s >= self._again_s:
                deadline = time.time()
            elif self._first_term_s is None:
                self._first_term_s = now
        detail = f"{number.name}{' again' if deadline else ''}"
        self._news.append(Notice(number.name.lower(), deadline, detail))


def _is_free(number: signal.Signals) -> bool:
    """Whether nobody handles a signal, neither in Python nor in C, as faulthandler does."""
    if signal.getsignal(number) != signal.SIG_DFL:
        return False
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        caught = int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)
        return not caught >> (number - 1) & 1
    return True


def _identity(fd: int) -> tuple[int, int] | None:
    """What a file descriptor is open on."""
    if fd == -1:
        return None
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino
