"""Says at the source what only a thread beside a long round can: that the mover is still there, and that saves are to
wait where they take too much of the link. A wish that nobody repeats is forgotten by the job."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from gpumove.errors import GpumoveError
from gpumove.format.manifest import Move
from gpumove.store.log import Log
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
_TICK_S = 1.0
_AGAIN_S = 300.0
"""Between two words of the mover; the job waits for three times as long."""


class _ChangedError(Exception):
    """Somebody has said something since: it is to be read first."""


class Herald:
    """Runs between ``with`` and its end, and speaks while ``copying``.

    Args:
        source: the mover's log, whose view is looked at; what comes meanwhile is read and written through another one.
        crowded: whether commits take too much of the link.
    """

    def __init__(self, source: Log, crowded: Callable[[], bool]) -> None:
        self._source, self._crowded = source, crowded
        self._log = Log(source.store)
        self.copying = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpumove-herald", daemon=True)

    def __enter__(self) -> Herald:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(_TICK_S)

    def _run(self) -> None:
        while not self._ended.wait(_TICK_S):
            if not self.copying:
                continue
            if self._log.view.head < self._source.view.head:
                self._log.view = self._source.view
            if self._due() is None:
                continue
            try:
                self._log.follow()  # the mover looks between rounds only
                if (due := self._due()) is not None:
                    self._say(*due)
            except _ChangedError:
                continue
            except GpumoveError as error:
                _log.debug("not said at the source: %s", error)

    def _due(self) -> tuple[Move, bool] | None:
        """The word to be said again, by what is known of the log, and whether it is now that saves are to wait."""
        begun = self._log.view.move
        if begun is None or begun.state != "begin":
            return None
        hold = not begun.facts.get("hold") and not begun.facts.get("idle") and self._crowded()
        return (begun, hold) if hold or time.time() - begun.time > _AGAIN_S else None

    def _say(self, begun: Move, hold: bool) -> None:
        def check(view: View) -> None:
            if view.move != begun:
                raise _ChangedError

        text = "no saves that are only due: they take too much of the link" if hold else "still copying"
        facts = {**begun.facts, "hold": hold or begun.facts.get("hold", False)}
        self._log.move("begin", move=begun.move, other=begun.other, facts=facts, text=text, check=check)
