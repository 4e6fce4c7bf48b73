"""The entries that a move consists of: each is made only if its log is still as it was when that was decided."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from gpumove.move.phase import Ends
from gpumove.move.report import Event
from gpumove.store.log import Log
from gpumove.store.view import View


class OvertakenError(Exception):
    """The log is not any more as it was when an entry was decided upon: look, and decide again."""


class Entries:
    """Writes them, and tells people of them.

    Args:
        ends: the logs' URLs.
        source: the log that the run is to leave.
        target: the one that it is to appear in.
        tell: told what happens.
    """

    def __init__(self, ends: Ends, source: Log, target: Log, tell: Callable[[Event], None]) -> None:
        self.ends, self.source, self.target = ends, source, target
        self._tell = tell
        self._decided = source.view, target.view
        self.told: list[Event] = []
        self.id = ""
        self.entry_s: float | None = None
        """What the last entry took."""

    def decided(self) -> None:
        """What is to be done was decided upon the logs as they are known now."""
        self._decided = self.source.view, self.target.view

    def enter(
        self,
        state: str,
        *,
        at: Log | None = None,
        save: bool = True,
        facts: Mapping[str, Any] | None = None,
        text: str,
    ) -> None:
        """One entry.

        Args:
            state: what is reached.
            at: the log, by default the source's.
            save: of a request: whether the job saves.
            facts: what was measured; None is not.
            text: in words.

        Raises:
            OvertakenError: the log is not any more as it was when that was decided.
        """
        log = at or self.source
        other = self.ends.source if log is self.target else self.ends.target
        seen, newest = self._decided[log is self.target], log.view.find()

        def check(view: View) -> None:
            # What was committed since that was decided has been looked at; what comes now has not.
            late = state in ("sealed", "handover") and view.find() != newest
            if late or view.epoch != seen.epoch or view.move != seen.move or view.broken != seen.broken:
                raise OvertakenError

        known = {name: value for name, value in (facts or {}).items() if value is not None}
        began = time.monotonic()
        log.move(state, move=self.id, other=other, save=save, facts=known, text=text, check=check)
        self.entry_s = time.monotonic() - began
        self.event(state, text if log is self.source else f"at the target: {text}", known)

    def wait(self, why: str) -> None:
        """Nothing happens, and why; said once in a row."""
        if not self.told or (self.told[-1].state, self.told[-1].text) != ("wait", why):
            self.event("wait", why)

    def event(self, state: str, text: str, facts: Mapping[str, Any] | None = None) -> None:
        """Something has happened."""
        self.told.append(Event(time.time(), state, text, facts or {}))
        self._tell(self.told[-1])
