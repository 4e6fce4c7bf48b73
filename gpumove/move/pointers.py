"""Pointers travel with the checkpoints that they name: who follows a replica is told what is there, and no more.

A name comes with its newest pointer or stays behind: where that stands for what is not there, older ones would say that
it still stands for what it was taken away from.
"""

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
        self._said: set[str] = set()
        self._looked, self._sealed = -_EVERY_S, False
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Now and then, and once more when nothing can be published at the source: beside what is copied, since a move
        waits for nothing that a job can do without."""
        last = bool(self._source.view.sealed) and not self._sealed
        due = time.monotonic() - self._looked >= _EVERY_S and not self._sealed
        if (last or due) and not (self._thread is not None and self._thread.is_alive()):
            self._sealed = last
            self._thread = threading.Thread(target=self.bring_quietly, name="gpumove-pointers", daemon=True)
            self._thread.start()

    def bring_quietly(self) -> None:
        """Likewise, for who must not fail because of it."""
        try:
            self.bring()
        except GpumoveError as error:
            _log.warning("pointers were not copied this time: %s", error)

    def bring(self) -> int:
        """Copy all that can be; how many."""
        with self._lock:
            return self._bring()

    def _bring(self) -> int:
        if not self._target.view.checkpoints:
            return 0
        self._looked, brought = time.monotonic(), 0
        have = numbers(self._target.store)
        for name, known in numbers(self._source.store).items():
            newest = self._pointer(name, known[-1])
            if newest is None or not self._has(newest):
                self._stays(newest)
                continue
            # The newest first: nobody is to see one that is over.
            for number in sorted(set(known) - set(have.get(name, ())), reverse=True):
                pointer = self._pointer(name, number)
                if pointer is not None and self._has(pointer):
                    brought += self._target.store.create(pointer.key, encode_checked(pointer))
        return brought

    def _has(self, pointer: Pointer) -> bool:
        """Whether the target has its checkpoint: looked up just before, since retention works beside this."""
        return pointer.step is None or any(c.attempt == pointer.attempt for c in self._target.view.checkpoints)

    def _stays(self, pointer: Pointer | None) -> None:
        """Say so, once, unless what it stands for is newer than all that is there, and so on its way."""
        there = max((c.attempt for c in self._target.view.checkpoints), default="")
        if pointer is not None and pointer.attempt < there and pointer.mark not in self._said:
            self._said.add(pointer.mark)
            _log.warning(
                "%s stays behind: it stands for step %s, which %s does not have; gpumove replicate --step all, before "
                "anything else is copied there, brings all", pointer.mark, pointer.step, self._target.store.url,
            )  # fmt: skip

    def _pointer(self, name: str, number: int) -> Pointer | None:
        """A pointer never changes, so once read is enough."""
        if (name, number) not in self._read:
            try:
                self._read[name, number] = read_pointer(self._source.store, name, number)
            except IntegrityError as error:
                _log.warning("a pointer is not copied: %s", error)
                self._read[name, number] = None
        return self._read[name, number]
