"""How a run stands now, for a terminal that looks again and again. Reads the log and the newest manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from gpumove.errors import IntegrityError
from gpumove.format.manifest import Checkpoint, LogEntry, Manifest, Note
from gpumove.inspection.condition import explain
from gpumove.parity.watch import told
from gpumove.report.points import Point, points
from gpumove.store.log import Log
from gpumove.store.records import read_entry, read_manifest
from gpumove.store.view import Broken, View

_RECENT, _LOOK_BACK = 8, 3


@dataclass(frozen=True)
class Status:
    """A run at one moment. None is unknown."""

    url: str
    run: str
    now: float
    epoch: int
    host: str
    condition: str
    """Where the run is moved, or was, in words; "" if it is not."""
    checkpoints: int
    step: int | None
    """Of the newest checkpoint."""
    committed: float | None
    state_bytes: int | None
    new_bytes: int | None
    every_s: float | None
    """Between the newest commits of this life of the job."""
    step_s: float | None
    """A step, of the newest ones, saves and all."""
    loss: float | None
    loss_step: int | None
    health: tuple[str, ...]
    """What was wrong with the training, by the newest checkpoint; the newest last."""
    broken: int
    """Log entries that cannot be read."""
    owned: bool
    """Whether a job may write here: the run was not moved away, nor is this a copy."""
    ended: str = ""
    """What the log says of the end of the job, if it does: one that just comes to its end says nothing."""

    @property
    def quiet(self) -> bool:
        """Whether a commit should have come long ago, by how they came before, had the job not ended."""
        if self.every_s is None or self.committed is None or not self.owned or self.ended:
            return False
        return self.now - self.committed > 3 * self.every_s + 30


class Watch:
    """Looks at one run again and again; a manifest is read once, and so is the last entry."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._read: dict[str, Manifest | None] = {}
        self._last: tuple[int, LogEntry | Broken | None] = 0, None

    def look(self) -> Status:
        """How it stands.

        Raises:
            IntegrityError: the log has a hole.
            StoreError: the store failed.
        """
        self._log.follow()
        view = self._log.view
        newest = max(view.checkpoints, key=lambda c: c.number, default=None)
        manifest = None if newest is None else self._manifest(newest)
        rows = self._newest_rows(view)
        last = next((p for p in reversed(rows) if p.loss is not None), None)
        every_s, step_s = _paces(view)
        timed = [p.seconds for p in rows if p.seconds is not None]
        return Status(
            url=self._log.store.url, run=self._log.run, now=time.time(), epoch=view.epoch, host=view.host,
            condition=explain(view, self._log.store.url), checkpoints=len(view.checkpoints),
            step=newest.step if newest else None, committed=newest.time if newest else None,
            state_bytes=newest.state_bytes if newest else None, new_bytes=newest.new_bytes if newest else None,
            every_s=every_s, step_s=median(timed) if timed else step_s,
            loss=last.loss if last else None, loss_step=last.step if last else None,
            health=tuple(f"step {h.get('step')}: {h.get('text')}" for h in manifest.health) if manifest else (),
            broken=len(view.broken), owned=not view.sealed and not view.follows, ended=_ended(view, self._entry(view)),
        )  # fmt: skip

    def _entry(self, view: View) -> LogEntry | Broken | None:
        """The last one."""
        if self._last[0] != view.head:
            self._last = view.head, read_entry(self._log.store, view.head)
        return self._last[1]

    def _newest_rows(self, view: View) -> list[Point]:
        """Of the newest manifest that has any: one that follows at once on another has none."""
        for checkpoint in sorted(view.checkpoints, key=lambda c: -c.number)[:_LOOK_BACK]:
            manifest = self._manifest(checkpoint)
            if manifest is not None and manifest.trace:
                return points(manifest.trace, epoch=manifest.epoch)
        return []

    def _manifest(self, checkpoint: Checkpoint) -> Manifest | None:
        key = checkpoint.manifest
        if key not in self._read:
            kept = list(self._read.items())[1 - _LOOK_BACK :]
            try:
                self._read = dict(kept) | {key: read_manifest(self._log.store, checkpoint)}
            except IntegrityError:  # what it said is unknown; `gpumove verify` says why
                self._read = dict(kept) | {key: None}
        return self._read[key]


def _ended(view: View, last: LogEntry | Broken | None) -> str:
    """What a job has said at its end: on a notice, for a move, or while it compared itself after one."""
    if isinstance(last, Note) and last.text.startswith("left after step"):
        return f"the job has {last.text}"
    if view.move is None or view.move.epoch != view.epoch:
        return ""  # another one has come since
    if view.move.state == "left":
        return "the job has left, for a move"
    state = told(view.move)
    if state is None or not state.ended:
        return ""
    known = {"finished": "the job has come to its end", "left": "the job has left, as it was asked to"}
    return known.get(state.ended, f"the job has ended with {state.ended}")


def _paces(view: View) -> tuple[float | None, float | None]:
    """Seconds between commits and of a step, by the newest commits of one life of the job."""
    recent = [c for c in sorted(view.checkpoints, key=lambda c: c.number)[-_RECENT:] if c.epoch == view.epoch]
    pairs = [(a, b) for a, b in pairwise(recent) if b.step != a.step and b.time > a.time]
    if not pairs:
        return None, None
    steps = sum(max(0, b.step - a.step) for a, b in pairs)
    took = sum(b.time - a.time for a, b in pairs)
    return median(b.time - a.time for a, b in pairs), took / steps if steps else None
