"""A thread that looks after the training thread: it judges the step times, and tells where a hung rank stands.

It needs the interpreter now and then: what hangs while it holds the GIL stops this thread too. It never stops, slows
or changes the training.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from gpumove.health import Finding, Health
from gpumove.steptimes import in_words

_log = logging.getLogger("gpumove")
_PAUSE_S = 1.0
_MOST_BYTES = 256 << 10
_LOGGED = 16 << 10
_FRAMES = 6
_IDLE = ("gpumove-watchdog", "gpumove-notice", "gpumove-leave")
"""Threads that wait all day long."""
_OURS = str(Path(__file__).parent) + os.sep


class Watchdog:
    """Watches the thread that starts it."""

    def __init__(
        self,
        health: Health,
        *,
        hang_s: float,
        folder: str | None = None,
        saving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Nothing runs yet.

        Args:
            health: what the training thread tells.
            hang_s: seconds without a step after which all Python stacks are dumped; and again after twice as many.
            folder: where to; without one they go into the log.
            saving: whether a save runs beside the training.
        """
        self._health, self._hang_s, self._saving = health, hang_s, saving
        self._folder = None if folder is None else Path(folder)
        self._pause_s = min(_PAUSE_S, hang_s / 4)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched = 0
        self._quiet_s, self._next_s, self._dumps = 0.0, hang_s, 0

    def start(self) -> None:
        """Watch the calling thread, from now on."""
        if self._thread is None:
            self._watched = threading.get_ident()
            self._thread = threading.Thread(target=self._run, name="gpumove-watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self._pause_s):
            now = time.monotonic()
            try:
                self._look(now - looked)
            except Exception:  # noqa: BLE001 - whatever it is, it must not touch the training
                _log.exception("the watchdog gave up: a hang will not be seen, nor slower steps")
                return
            looked = now

    def _look(self, passed_s: float) -> None:
        if self._health.look(saving=self._saving()):
            if self._dumps:
                _log.warning("rank %d goes on, at step %s", self._health.rank, self._health.last_step)
            self._quiet_s, self._next_s, self._dumps = 0.0, self._hang_s, 0
            return
        self._quiet_s += min(passed_s, 2 * self._pause_s)  # a process that was stopped meanwhile has not hung
        if self._quiet_s >= self._next_s:
            self._next_s *= 2
            self._dumps += 1
            self._tell()

    def _tell(self) -> None:
        """Say where all threads stand: in words, and as their stacks."""
        stacks, step = _stacks(), self._health.last_step
        words = (
            f"rank {self._health.rank} has told no step for {in_words(self._quiet_s)}; "
            f"its training thread is in {_where(sys._current_frames().get(self._watched))}; "
            f"gpumove itself is in {' and '.join(self._ours()) or 'nothing'}"
        )
        if self._dumps == 1 and step is not None:  # before the first step it may well be compiling
            self._health.tell(Finding("hang", step, words, self._health.rank))
        else:
            _log.warning("after step %s: %s", step, words)
        self._keep(stacks, f"hang-step-{step or 0:010d}-rank-{self._health.rank:06d}-{self._dumps}.txt")

    def _keep(self, stacks: str, name: str) -> None:
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / name).write_text(stacks)
                _log.warning("all stacks are in %s", self._folder / name)
                return
            except OSError as error:
                _log.warning("%s cannot be written: %s", name, error)
        _log.warning("all stacks:\n%s", stacks[:_LOGGED])

    def _ours(self) -> Iterator[str]:
        """What gpumove's own code is doing, in any thread that has something to do."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            mine = next((f for f in _outwards(frame) if f.f_code.co_filename.startswith(_OURS)), None)
            name = names.get(ident, str(ident))
            if mine is not None and not name.startswith(_IDLE):
                yield f"{_place(mine)} ({name})"


def _stacks() -> str:
    """All Python stacks as faulthandler writes them: file names and functions, never a value."""
    names = [f"0x{thread.ident or 0:016x} {thread.name}\n" for thread in threading.enumerate()]
    memory = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(memory, all_threads=True)
        size = min(os.lseek(memory, 0, os.SEEK_CUR), _MOST_BYTES)
        return "".join(names) + "\n" + os.pread(memory, size, 0).decode(errors="replace")
    finally:
        os.close(memory)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where(frame: FrameType | None) -> str:
    """The innermost frames in one line; source files are not opened, their disk may be what hangs."""
    found = [_place(f) for f, _ in zip(_outwards(frame), range(_FRAMES))]
    return ", called from ".join(found) or "no Python code: it has ended"


def _place(frame: FrameType) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
