"""Asks every source in a thread of its own, and passes on what is news. Knows nothing of training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from gpumove.notices.notice import Acknowledged, Notice, Opened, Source, one_line

_log = logging.getLogger("gpumove")
_MOST_PAUSE_S = 60.0


class Watcher:
    """Calls ``on_notice`` in some thread for each notice that is news; no source delays another, or the caller."""

    def __init__(self, sources: Sequence[Source], on_notice: Callable[[Notice], None]) -> None:
        self._sources, self._on_notice = list(sources), on_notice
        self._closed = threading.Event()
        self._open: list[Source] = []

    def start(self) -> None:
        """Begin to watch. Signals are caught only if this is called in the main thread."""
        for source in self._sources:
            try:
                if isinstance(source, Opened):
                    source.open()
            except Exception as error:  # noqa: BLE001 - a source may raise anything, and none is needed to train
                _log.info("notices from %s are not watched: %s", source.name, _told(error))
                continue
            self._open.append(source)
            threading.Thread(
                target=self._watch, args=(source,), name=f"gpumove-notice-{source.name}", daemon=True
            ).start()

    def close(self) -> None:
        """Pass on nothing from now on. Returns at once: a poll that is running ends by itself."""
        self._closed.set()
        opened, self._open = self._open, []
        for source in opened:
            if isinstance(source, Opened):
                source.close()

    def acknowledge(self, notice: Notice) -> None:
        """Tell the sources that want to know that the job has left. Best effort, some seconds at most."""
        if notice.outcome is None:
            return
        for source in self._sources:
            if isinstance(source, Acknowledged):
                try:
                    source.acknowledge()
                except Exception as error:  # noqa: BLE001 - what counts is saved already
                    _log.info("%s did not take the acknowledgement: %s", source.name, _told(error))

    def _watch(self, source: Source) -> None:
        failures, told = 0, False
        known: Notice | None = None
        while not self._closed.is_set():
            try:
                notice = source.poll()
            except BaseException as error:  # noqa: BLE001 - whatever it is, the next poll may work
                level = logging.DEBUG if told else logging.INFO  # on a machine of another cloud it stays so
                _log.log(level, "%s cannot be asked for notices, and is tried on: %s", source.name, _told(error))
                failures, told = failures + 1, True
            else:
                failures = 0
                if notice is not None and _is_news(notice, known):
                    known = notice
                    self._pass_on(notice)
            self._closed.wait(source.pause_s if not failures else _pause_after(source.pause_s, failures))

    def _pass_on(self, notice: Notice) -> None:
        if self._closed.is_set():
            return
        try:
            self._on_notice(notice)
        except Exception:  # noqa: BLE001 - the thread has to watch on
            _log.exception("the notice from %s could not be passed on", notice.source)


def _is_news(notice: Notice, known: Notice | None) -> bool:
    """Whether it is the first one of its source, or has a nearer deadline."""
    if known is None:
        return True
    return notice.deadline is not None and (known.deadline is None or notice.deadline < known.deadline)


def _pause_after(pause_s: float, failures: int) -> float:
    return float(min(_MOST_PAUSE_S, max(pause_s, 1.0) * 2 ** min(failures, 10)))


def _told(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")
