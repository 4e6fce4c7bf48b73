"""Retention after a commit: drops what the settings no longer keep. Its failure is no failure of a save."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from gpumove.errors import FencedError, GpumoveError
from gpumove.format.manifest import Checkpoint
from gpumove.store.gc import Retention, collect, surplus
from gpumove.store.log import Log
from gpumove.store.records import reachable

_log = logging.getLogger("gpumove")


class Keeper:
    """Rank 0's; used between saves, in their thread."""

    def __init__(self, log: Log, retention: Retention) -> None:
        self._book, self._retention = log, retention
        self._reach: dict[str, frozenset[str]] = {}

    def retain(self) -> None:
        """Drop, once enough checkpoints have gathered."""
        if surplus(self._book.view, self._retention) <= max(0, (self._retention.keep_last or 0) // 4):
            return
        try:
            done = collect(self._book, self._retention, reach=self._reachable)
        except FencedError:
            return  # the next commit says so
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not be lost in the background
            gave_way = isinstance(error, GpumoveError) and error.code == "store.abandoned"
            level = logging.DEBUG if gave_way else logging.WARNING
            _log.log(level, "retention broke off and is completed after the next save: %s", error)
            return
        live = {c.attempt for c in done.kept}
        self._reach = {attempt: found for attempt, found in self._reach.items() if attempt in live}

    def _reachable(self, checkpoint: Checkpoint) -> Iterable[str]:
        """Every key that a checkpoint needs; records never change, so once read is enough."""
        if checkpoint.attempt not in self._reach:
            self._reach[checkpoint.attempt] = frozenset(reachable(self._book.store, checkpoint))
        return self._reach[checkpoint.attempt]
