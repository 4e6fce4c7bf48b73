"""What a run says of itself: bytes per checkpoint, time between them, time of a step, devices. From its log and its
records alone; nothing is guessed, and what it does not say is None."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from gpumove.environment.devices import kinds
from gpumove.environment.difference import whole
from gpumove.errors import IntegrityError
from gpumove.estimates.interval import Range
from gpumove.format.manifest import Checkpoint, Manifest, Move
from gpumove.parity.trace import number
from gpumove.store.log import Log
from gpumove.store.records import reachable, read_manifest

_RECENT = 10
"""Commits that are looked at, of one start of the job."""
_TIMED, _COUNTED = "measured, step by step", "from the times of commits, with all that lies between them"
_SAVES = 4
"""Of these so many are asked for what they took: each costs a request."""
_EPOCHS = 5
"""Starts of the job that are looked at for the devices that it had."""


Read = Callable[[Checkpoint], Manifest | None]
"""Gives a checkpoint's manifest, or None if it cannot be read."""


@dataclass(frozen=True)
class Speed:
    """How long a step took on some devices."""

    step_s: Range
    ranks: int
    device: str | None
    """As its driver calls it."""
    how: str


@dataclass(frozen=True)
class Facts:
    """A run's numbers, as it has measured them or a person has said them. None is unknown."""

    url: str = ""
    step: int | None = None
    state_bytes: float | None = None
    full_bytes: float | None = None
    """All objects that the newest checkpoint needs."""
    delta_bytes: Range | None = None
    """What a commit brings."""
    every_s: Range | None = None
    """Between two commits."""
    since_s: float | None = None
    """Since the newest one, when this was read."""
    save_s: Range | None = None
    """From a step to the commit of it, as the job leaves."""
    packs: int = 1
    """In how many pieces the newest one came."""
    restore_s: Range | None = None
    """Of the last starts of the job that have restored."""
    ranks: int | None = None
    device: str | None = None
    peak_bytes: float | None = None
    """Of the memory of one GPU, while it trains; of rank 0's, the fullest."""
    speeds: tuple[Speed, ...] = ()
    """The newest first, one for each start of the job that tells."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Of what is None, or not as good as it could be: why, by field."""

    @property
    def now(self) -> Speed | None:
        """On the devices that the run has now."""
        return next((s for s in self.speeds if (s.ranks, s.device) == (self.ranks or 0, self.device)), None)

    @property
    def step_s(self) -> Range | None:
        """Of a step, where the run trains now."""
        return self.now.step_s if self.now else None


def read_facts(log: Log) -> Facts:
    """Read a run's log, the records of its newest checkpoint, and a few manifests of each of its last starts.

    Raises:
        IntegrityError: the log is damaged.
        StoreError: the store failed.
    """
    view = log.read()
    line = [c for c in view.checkpoints if c.number not in view.abandoned and c.number not in view.damaged]
    if not line:
        return Facts(url=log.store.url, unknown={"full_bytes": "what is to be sent: the run has no checkpoint yet"})
    newest, unknown = line[-1], dict[str, str]()

    @cache
    def read(checkpoint: Checkpoint) -> Manifest | None:
        try:
            return read_manifest(log.store, checkpoint)
        except IntegrityError:
            return None

    try:
        needed: dict[str, int] | None = reachable(log.store, newest)
    except IntegrityError as error:
        needed = None
        unknown["full_bytes"] = f"what a first copy brings: {error}"
    packs = sum(key.startswith(f"packs/{newest.attempt}/") for key in needed or ())
    record_bytes = sum(n for key, n in (needed or {}).items() if not key.startswith("packs/"))
    recent = _of_one_start(line)
    delta, every = _deltas(line, recent, record_bytes), _gaps(recent)
    if delta is None:
        unknown["delta_bytes"] = "what a commit brings: there is only one checkpoint"
    if every is None:
        unknown["every_s"] = "how often a commit comes: there is only one since the job was started last"
    manifest = read(newest)
    machine = {} if manifest is None else manifest.fingerprint
    found = Facts(
        url=log.store.url, step=newest.step, state_bytes=newest.state_bytes,
        full_bytes=None if needed is None else sum(needed.values()), delta_bytes=delta, every_s=every,
        since_s=time.time() - newest.time,
        save_s=_saved_s(recent, line[0], read) or _told_s(view.move), packs=max(1, packs),
        restore_s=_restored_s(line, read), ranks=newest.world_size,
        device=device_of(machine), peak_bytes=whole(machine, "peak.device_bytes") or None,
        speeds=tuple(_speeds(line, read)), unknown=unknown,
    )  # fmt: skip
    if found.now is None:
        unknown["speeds"] = "how long a step takes: no trace has step times, and there are too few commits to tell"
    elif found.now.how != _TIMED:
        unknown["speeds"] = "how long a step takes by itself: no trace has step times, so commits were counted"
    return found


def _of_one_start(line: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The last commits between which the job was not away. One of the same step, as at a job's end, is no other one."""
    here = {c.step: c for c in reversed(line) if c.epoch == line[-1].epoch}
    return sorted(here.values(), key=lambda c: c.number)[-_RECENT - 1 :]


def _deltas(line: Sequence[Checkpoint], recent: Sequence[Checkpoint], record_bytes: int) -> Range | None:
    # The run's very first commit is whole: it is no difference.
    later = [c for c in recent if c.number != line[0].number]
    return _spread([c.new_bytes + record_bytes for c in later])


def _gaps(recent: Sequence[Checkpoint]) -> Range | None:
    return _spread([after.time - before.time for before, after in pairwise(recent) if after.time > before.time])


def _saved_s(recent: Sequence[Checkpoint], first: Checkpoint, read: Read) -> Range | None:
    """What the last saves took, the commit as well: its first half lies between the times of both its records, and its
    second half, the entry, takes about as long. No training thread is waited for as a job leaves. The run's very first
    save is whole: it counts if there is no other."""
    later = [c for c in recent if c.number != first.number] or recent
    known = []
    for checkpoint in later[-_SAVES:]:
        manifest = read(checkpoint)
        if manifest is not None and manifest.took is not None and manifest.took.ready_s is not None:
            ready_s = max(0.0, manifest.took.ready_s - (manifest.took.sight_s or 0.0))
            known.append((ready_s, max(0.0, checkpoint.time - manifest.time)))
    if not known:
        return None
    likely = statistics.median(ready_s + 2 * half_s for ready_s, half_s in known)
    ends = [ready_s + times * half_s for ready_s, half_s in known for times in (1, 3)]
    return Range.over(likely, *ends)


def _restored_s(line: Sequence[Checkpoint], read: Read) -> Range | None:
    """What the last starts of the job took to go on, from the claim on; every manifest of a start says the same."""
    newest = {c.epoch: c for c in line}
    took = [found.took for _, c in sorted(newest.items())[-_EPOCHS:] if (found := read(c)) is not None]
    known = [found.restore_s for found in took if found is not None and found.restore_s is not None]
    return Range.over(statistics.median(known), *known) if known else None


def _told_s(move: Move | None) -> Range | None:
    """What the job has told the last move."""
    told = move.facts.get("job") if move else None
    found = told.get("save_s") if isinstance(told, Mapping) else None
    return Range.exact(found) if isinstance(found, (int, float)) and found >= 0 else None


def _spread(values: Sequence[float]) -> Range | None:
    """The median, and all but the outermost tenths."""
    if not values:
        return None
    found, off = sorted(values), len(values) // 10
    return Range.over(statistics.median(found), found[off], found[-1 - off])


# -------------------------------------------------------------------- steps


def _speeds(line: Sequence[Checkpoint], read: Read) -> Iterable[Speed]:
    """For each of the last starts of the job what its newest manifest, or else its commits, say."""
    for epoch in sorted({c.epoch for c in line}, reverse=True)[:_EPOCHS]:
        commits = [c for c in line if c.epoch == epoch][-_RECENT - 1 :]
        manifest = read(commits[-1])
        # A commit that follows at once on another one has no steps of its own.
        timed, how = next((s for c in reversed(commits[-_SAVES:]) if (s := _timed(read(c)))), None), _TIMED
        if timed is None:
            timed, how = _counted(commits), _COUNTED
        if timed is not None:
            yield Speed(timed, commits[-1].world_size, device_of(manifest.fingerprint) if manifest else None, how)


def _timed(manifest: Manifest | None) -> Range | None:
    """Step times of the trace."""
    given = [number(row, "s") for row in (manifest.trace if manifest else ())]
    return _spread([s for s in given if s is not None and 0 < s < float("inf")])


def _counted(commits: Sequence[Checkpoint]) -> Range | None:
    pairs = [(after.time - before.time, after.step - before.step) for before, after in pairwise(commits)]
    return _spread([seconds / steps for seconds, steps in pairs if seconds > 0 and steps > 0])


def device_of(fingerprint: Mapping[str, Any]) -> str | None:
    """The first device's name; a job whose devices differ is not told apart."""
    found = next((kind.get("model") for kind in kinds(fingerprint) or ()), None)
    return found if isinstance(found, str) else None
