"""Pointers travel with the checkpoints that they name: who follows a replica is told what is there, and no more."""

from __future__ import annotations

import logging
import time

from gpumove.errors import IntegrityError
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
        self._read: dict[tuple[str, int], Pointer | None] = {}
        self._looked = -_EVERY_S

    def look(self) -> None:
        """Now and then; always once the source writes no more."""
        if self._source.view.sealed or time.monotonic() - self._looked >= _EVERY_S:
            self.bring()

    def bring(self) -> int:
        """Copy all that can be; how many."""
        self._looked = time.monotonic()
        there = {c.attempt for c in self._target.view.checkpoints}
        have = numbers(self._target.store) if there else {}
        brought = 0
        for name, known in numbers(self._source.store).items() if there else ():
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
