"""What goes along with a move besides checkpoints: what the run's steps were like, so that the job can compare its own
with them at the target; what is to be done if they differ; and which checkpoint stays until that is known."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from gpumove.errors import ConfigError, GpumoveError
from gpumove.format.manifest import Checkpoint, Manifest, TraceRow
from gpumove.move.report import Wishes
from gpumove.parity.usual import MOST_ROWS
from gpumove.parity.watch import baseline
from gpumove.store.log import Log
from gpumove.store.records import read_manifest

_AT_ONCE, _MOST_MANIFESTS = 16, 64


class Baggage:
    """One move's.

    Args:
        source: the log that the run is to leave.
        target: the one that it is to appear in.
        wishes: of the user.
    """

    def __init__(self, source: Log, target: Log, wishes: Wishes) -> None:
        self._source, self._target, self._wishes = source, target, wishes
        self._baseline: dict[str, Any] | None = None

    # ---------------------------------------------------------------- what the steps were like

    def look(self) -> None:
        """Read what was recorded of the steps, as long as nobody waits for it; again, it costs nothing."""
        if self._baseline is None:
            log = self._source if self.back_to is None else self._target
            self._baseline = read_baseline(log)

    def facts(self, newest: Checkpoint) -> dict[str, Any]:
        """For the seal and the handover.

        Args:
            newest: the checkpoint that is handed over. Watched, it stays at the source as long as the newest word there
                is the seal, or one that repeats ``keeps``.
        """
        self.look()
        back_to = self.back_to
        watch = self._wishes.watch if back_to is None else ""
        return {
            "moved": True,
            "baseline": self._baseline or None,
            "step_ratio": self._wishes.step_ratio,
            "on_parity": watch or None,
            "gone_after_s": self._wishes.gone_after_s if watch else None,
            "keeps": newest.number if watch else None,
            "back_to": back_to,
        }

    # ---------------------------------------------------------------- going back behind what was trained

    @property
    def back_to(self) -> int | None:
        """The step that the target is to go on from, with nothing of what the source has trained since; as a rule
        nothing is left behind."""
        move = self._source.view.move
        found = None if move is None else move.facts.get("back_to")
        return found if type(found) is int else None

    def begun(self) -> dict[str, Any]:
        """For the begin entry: the target has had the run before, and is to have it as it was then.

        Raises:
            ConfigError: there is nothing to go back to.
        """
        if not self._wishes.discard:
            return {}
        move, newest = self._target.view.move, self._target.view.find()
        said = {} if move is None else move.facts
        handed = said.get("handed", said.get("step") if move is not None and move.state == "sealed" else None)
        if type(handed) is not int:
            if newest is None or self._target.view.follows:
                raise ConfigError(
                    f"which step {self._target.store.url} has handed over is not known: take the run back with what "
                    "was trained since (--rollback without --discard)"
                )
            handed = newest.step
        return {"back_to": handed}

    def gone_back(self, step: int) -> Checkpoint:
        """The checkpoint of that step at the target, once a restore there would take it.

        Raises:
            ConfigError: it is gone.
        """
        found = self._target.view.find()
        if found is None or found.step != step:
            sound = [c for c in self._target.view.checkpoints if c.number not in self._target.view.damaged]
            found = next((c for c in reversed(sound) if c.step == step), None)
            if found is None:
                raise ConfigError(
                    f"{self._target.store.url} does not have step {step} any more, which was to be gone back to: "
                    "withdraw this, and take the run back with what was trained since (--rollback without --discard)"
                )
            self._target.note(f"back to step {step}: what came after it is left behind", resumed=found.number)
        return found


def read_baseline(log: Log) -> dict[str, Any]:
    """What the steps of a run were like, by the newest of its manifests; {} if that is not known."""
    try:
        found = baseline(_rows(log))
    except GpumoveError:
        return {}  # it is for a comparison: it never costs a move
    return {} if found is None else msgspec.to_builtins(found)


def _rows(log: Log) -> Iterator[TraceRow]:
    """Newest first, as many as are wanted."""
    view, rows = log.view, 0
    line = [c for c in reversed(view.checkpoints) if c.number not in view.abandoned | view.damaged]

    def read(checkpoint: Checkpoint) -> Manifest | None:
        try:
            return read_manifest(log.store, checkpoint)
        except GpumoveError:
            return None  # damaged, or retention has passed by

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="gpumove-traces") as pool:
        for start in range(0, min(len(line), _MOST_MANIFESTS), _AT_ONCE):
            for manifest in pool.map(read, line[start : start + _AT_ONCE]):
                if manifest is not None:
                    rows += len(manifest.trace)
                    yield from manifest.trace
            if rows >= MOST_ROWS:
                return
