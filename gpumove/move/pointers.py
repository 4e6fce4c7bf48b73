"""Pointers travel with the checkpoints that they name: who follows a replica is told what is there, and no more."""

from __future__ import annotations

import logging
import threading
import time

from gpumove.errors import GpumoveError, IntegrityError
from gpumove.format.manifest import encode_checked
from gpumove.format.pointer import Pointer
from gpumove.store.log import Log
from gpumove.store.pointers import numbers, read_pointer

_log = logging.getLogger("gpumove")
_EVERY_S = 10.0


class Courier:
    """Copies what ``target`` lacks of the pointers of ``source``, once the checkpoints that they name are there."""

    def __init__(self, source: Log, target: Log) -> None:
        self._source, self._target = source, target
        self._lock = threading.Lock()
        self._read: dict[tuple[str, int], Pointer | None] = {}
        self._looked, self._sealed = -_EVERY_S, False
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Now and then, and once more when nothing can be published at the source: beside what is copied, since a move
        waits for nothing that a job can do without."""
        last = bool(self._source.view.sealed) and not self._sealed
        due = time.monotonic() - self._looked >= _EVERY_S and not self._sealed
        if (last or due) and not (self._thread is not None and self._thread.is_alive()):
            self._sealed = last
            self._thread = threading.Thread(target=self._bring_quietly, name="gpumove-pointers", daemon=True)
            self._thread.start()

    def _bring_quietly(self) -> None:
        try:
            self.bring()
        except GpumoveError as error:
            _log.warning("pointers were not copied this time: %s", error)

    def bring(self) -> int:
        """Copy all that can be; how many."""
        with self._lock:
            return self._bring()

    def _bring(self) -> int:
        there = {c.attempt for c in self._target.view.checkpoints}
        if not there:
            return 0
        self._looked, brought = time.monotonic(), 0
        have = numbers(self._target.store)
        for name, known in numbers(self._source.store).items():
            for number in sorted(set(known) - set(have.get(name, ()))):
                pointer = self._pointer(name, number)
                if pointer is not None and (pointer.step is None or pointer.attempt in there):
                    brought += self._target.store.create(pointer.key, encode_checked(pointer))
        return brought

    def _pointer(self, name: str, number: int) -> Pointer | None:
        """A pointer never changes, so once read is enough."""
        if (name, number) not in self._read:
            try:
                self._read[name, number] = read_pointer(self._source.store, name, number)
            except IntegrityError as error:
                _log.warning("a pointer is not copied: %s", error)
                self._read[name, number] = None
        return self._read[name, number]
