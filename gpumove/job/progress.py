"""How far the run is, as its log says: what a restart begins from, and whether attempts get anywhere."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError
from gpumove.inspection.run import open_run
from gpumove.store.retry import in_thread

_log = logging.getLogger("gpumove")


class Progress:
    """The newest checkpoint's step, read in a thread: a store that hangs delays neither an attempt nor its end."""

    def __init__(self, url: str, config: Config, options: Mapping[str, Any]) -> None:
        self._url, self._options = url, options
        self._config = config.replace(deadline_s=min(10.0, config.deadline_s), retry_s=min(20.0, config.retry_s))

    def look(self) -> Look:
        """Begin to read."""
        return Look(self)

    def read(self) -> int:
        """The step that a resume begins from; 0 with no checkpoint."""
        try:
            with open_run(self._url, config=self._config, storage_options=self._options) as log:
                found = log.read().find()
                return 0 if found is None else found.step
        except ConfigError as error:
            if error.code == "config.no_run":
                return 0
            raise

    def stays(self, timeout_s: float) -> bool:
        """Whether the run is to go on here: the move that the job has left for was withdrawn in the meantime."""

        def read(ticket: object) -> bool:
            with open_run(self._url, config=self._config, storage_options=self._options) as log:
                view = log.read()
                return not view.refusal() and view.move is not None and view.move.state == "cancelled"

        try:
            return in_thread(read, timeout_s)
        except (GpumoveError, TimeoutError) as error:
            _log.warning("whether the move goes on could not be found out: %s", error)
            return False


class Look:
    """One reading."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._step: int | None = None
        self._thread = threading.Thread(target=self._run, name="gpumove-run-progress", daemon=True)
        self._thread.start()

    def step(self, timeout_s: float) -> int | None:
        """What it found; None if it failed or has not come to an end."""
        self._thread.join(max(0.0, timeout_s))
        return self._step

    def _run(self) -> None:
        try:
            self._step = self._progress.read()
        except Exception as error:  # noqa: BLE001 - knowing it is a help, not a condition
            _log.warning("the run's newest checkpoint could not be found out: %s", error)
