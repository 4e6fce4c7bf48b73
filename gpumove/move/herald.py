"""Says at the source what only a thread beside a long round can: that the mover is still there, and that saves are to
wait where they take too much of the link. A wish that nobody repeats is forgotten by the job."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from gpumove.errors import GpumoveError
from gpumove.format.manifest import Move
from gpumove.store.log import Log
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
_TICK_S = 1.0
_AGAIN_S = 300.0
"""Between two words of the mover; the job waits for three times as long."""


class _ChangedError(Exception):
    """The mover itself has gone on meanwhile."""


class Herald:
    """Runs between ``with`` and its end, and speaks while ``copying``.

    Args:
        source: the mover's log, whose view is looked at; what is written goes through another one.
        crowded: whether commits take too much of the link.
    """

    def __init__(self, source: Log, crowded: Callable[[], bool]) -> None:
        self._source, self._crowded = source, crowded
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
            begun = self._source.view.move
            if not self.copying or begun is None or begun.state != "begin":
                continue
            hold = not begun.facts.get("hold") and not begun.facts.get("idle") and self._crowded()
            try:
                if hold or time.time() - begun.time > _AGAIN_S:
                    self._say(begun, {**begun.facts, "hold": hold or begun.facts.get("hold", False)}, hold=hold)
            except _ChangedError:
                continue
            except GpumoveError as error:
                _log.debug("not said at the source: %s", error)

    def _say(self, begun: Move, facts: Mapping[str, Any], *, hold: bool) -> None:
        log = Log(self._source.store)
        log.view = self._source.view

        def check(view: View) -> None:
            # What the job has answered in the meantime is no change: it is asked anew.
            if view.move is None or (view.move.move, view.move.state) != (begun.move, "begin"):
                raise _ChangedError

        text = "no saves that are only due: they take too much of the link" if hold else "still copying"
        log.move("begin", move=begun.move, other=begun.other, facts=facts, text=text, check=check)
