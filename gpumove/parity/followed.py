"""Which checkpoint is followed by recorded steps, on the same line of descent. Reads the log and manifests, no more."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from gpumove.errors import ConfigError, IntegrityError, ParityError
from gpumove.format.manifest import Checkpoint, Manifest, TraceRow
from gpumove.store.log import Log
from gpumove.store.records import read_manifest

_log = logging.getLogger("gpumove")
_MOST_READ = 200
"""Manifests: one per checkpoint, the newest first."""


@dataclass(frozen=True)
class Followed:
    """A checkpoint, and what was recorded of the steps after it."""

    checkpoint: Checkpoint
    rows: Sequence[TraceRow]
    manifest: Manifest
    """The first that has rows of these: it knows the machine that they were computed on."""


def find_followed(log: Log, steps: int, *, step: int | None = None, without: Collection[int] = ()) -> Followed:
    """The newest checkpoint with so many recorded steps after it; if none has so many, the one with the most.

    Args:
        log: the run's.
        steps: how many are wanted.
        step: this step's checkpoint only.
        without: numbers of checkpoints that are known to be damaged.

    Raises:
        ConfigError: there is no run, or no such checkpoint.
        IntegrityError: none that is not known to be damaged.
        ParityError: no checkpoint is followed by any (code ``parity.unknown``).
    """
    if not log.open(create=False):
        raise ConfigError(f"there is no run at {log.store.url}")
    view = log.read()
    roots = [c for c in view.candidates() if c.number not in without and step in (None, c.step)]
    if not roots:
        which = "sound checkpoint" if step is None else f"sound checkpoint of step {step}"
        kind = IntegrityError if without else ConfigError
        raise kind(f"{log.store.url} has no {which}")
    family, best = _Family(view.checkpoints), None
    for checkpoint in sorted(view.checkpoints, key=lambda c: (c.number in view.abandoned, -c.number))[:_MOST_READ]:
        family.read(log, checkpoint)
        found = [f for root in roots if (f := family.followed(root, steps)) is not None]
        best = max(found, key=lambda f: len(f.rows), default=None)  # the first of the longest: the newest
        if best is not None and len(best.rows) >= steps:
            break
    if best is None:
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise ParityError(
            f"{log.store.url} has {which} that recorded steps follow, so there is nothing to compare with: that takes "
            "two checkpoints in a row, and certify_steps above 0 when they were written",
            code="parity.unknown",
        )
    return best


class _Family:
    """Manifests that were read, and which checkpoint each one's trace goes on from."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._all = checkpoints
        self._next: dict[str, tuple[Checkpoint, Manifest]] = {}  # the newest line counts: it is read first

    def read(self, log: Log, checkpoint: Checkpoint) -> None:
        """One more."""
        try:
            manifest = read_manifest(log.store, checkpoint)
        except IntegrityError as error:
            _log.warning("what step %d recorded is not known: %s", checkpoint.step, error)
            return
        if manifest.trace:
            before = manifest.trace_after or self._before(manifest)
            if before < manifest.attempt:
                self._next.setdefault(before, (checkpoint, manifest))

    def _before(self, manifest: Manifest) -> str:
        """By a writer that did not say it: the one before in the same epoch, if the rows begin right after it."""
        older = [c for c in self._all if c.epoch == manifest.epoch and c.attempt < manifest.attempt]
        last = max(older, key=lambda c: c.attempt, default=None)
        return last.attempt if last is not None and manifest.trace[0].step == last.step + 1 else ""

    def followed(self, root: Checkpoint, steps: int) -> Followed | None:
        """What is known by now of the steps after this checkpoint."""
        line = list(self._line(root))
        rows = {row.step: row for _, manifest in line for row in manifest.trace if row.step > root.step}
        return Followed(root, [rows[s] for s in sorted(rows)][:steps], line[0][1]) if rows else None

    def _line(self, root: Checkpoint) -> Iterator[tuple[Checkpoint, Manifest]]:
        """What follows, as far as it was computed by one life of the job."""
        at, epoch = root.attempt, None
        while (found := self._next.get(at)) is not None and epoch in (None, found[0].epoch):
            yield found
            at, epoch = found[0].attempt, found[0].epoch
