"""What must hold before a move begins: the target can hold the run, and may."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from gpumove.errors import ConfigError, StoreError
from gpumove.move.rounds import Rounds

_FILES = "file://"


def check_ends(rounds: Rounds, allowed: Callable[[], object]) -> None:
    """Look at both ends before anything is asked of the job. Writes a probe, or a new run's ``format.json``.

    Args:
        rounds: of the replica that is to be made.
        allowed: raises if the run must not lie at the target.

    Raises:
        ConfigError: there is nothing to move, or the target must not be written to.
        StoreError: it cannot be, or has too little room.
    """
    source, target = rounds.replica.source, rounds.replica.target
    if source.view.find() is None:
        raise ConfigError(
            f"{source.store.url} has no checkpoint yet: there is nothing to move", code="config.no_checkpoint"
        )
    allowed()
    existed = bool(target.run)
    newest = rounds.replica.look()
    if existed:  # a new run's log was tried out as it was made
        target.store.probe_create()
    _check_room(target.store.url, rounds.left_bytes(newest))


def _check_room(url: str, nbytes: int) -> None:
    """Only a file system tells how much room it has."""
    if not url.startswith(_FILES):
        return
    place = Path(url.removeprefix(_FILES))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise StoreError(
            f"{url} has room for {free / 1e9:.2f} GB, and the newest checkpoint alone needs {nbytes / 1e9:.2f} GB more",
            code="store.full",
        )
