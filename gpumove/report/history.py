"""What one run's store tells of its past: saves, restores, notices, moves, losses. Reads only, and needs no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gpumove.environment.compare import of
from gpumove.errors import IntegrityError
from gpumove.format.manifest import Checkpoint, Claim, Collect, LogEntry, Manifest, Move, Note, Took
from gpumove.format.probes import Probe
from gpumove.inspection.condition import explain
from gpumove.inspection.run import VerifyReport
from gpumove.parity.trace import number
from gpumove.report.points import Point, points
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import read_every_entry, read_manifest
from gpumove.store.view import Broken, View
from gpumove.words import count

_READERS = 16


@dataclass(frozen=True)
class Event:
    """Something has happened. ``kind``: save, restore, start, notice, move, health, parity or note."""

    time: float
    kind: str
    text: str
    step: int | None = None


@dataclass(frozen=True)
class Saved:
    """One checkpoint that is still there."""

    at: Checkpoint
    """As the log has it."""
    sound: bool | None
    """None if nobody has looked."""
    condition: str
    took: Took | None = None
    """What the save has cost, if its manifest tells."""

    @property
    def ratio(self) -> float | None:
        """What was sent, over the state that it stands for."""
        return self.at.new_bytes / self.at.state_bytes if self.at.state_bytes else None


@dataclass(frozen=True)
class History:
    """One run, as its store has it."""

    url: str
    run: str
    now: float
    host: str
    condition: str
    """Where the run is moved, or was, in words; "" if it is not."""
    events: tuple[Event, ...]
    saves: tuple[Saved, ...]
    points: dict[str, tuple[Point, ...]]
    """By manifest: two stores of one run have common ones."""
    fingerprints: dict[str, dict[str, Any]]
    """By manifest, where there is one."""
    probes: dict[str, tuple[Probe, ...]]
    """By manifest, where any were recorded."""
    moves: tuple[Move, ...]
    unknown: tuple[str, ...]
    """What cannot be told of this run, and why."""
    deep: bool
    """Whether every byte was read for ``Saved.sound``."""


def read_history(log: Log, checked: VerifyReport | None = None) -> History:
    """Read a run's log and all its manifests.

    Args:
        log: of the run, open.
        checked: what is known of the soundness of its checkpoints.

    Raises:
        IntegrityError: the log has a hole.
    """
    view = log.read()
    left = {n: entry for n, entry in read_every_entry(log.store, holes=False).items() if n <= view.head}
    entries = [entry for entry in left.values() if entry is not None and not isinstance(entry, Broken)]
    broken = [n for n, entry in left.items() if isinstance(entry, Broken)]
    manifests, lost = _manifests(log.store, view.checkpoints)
    saves = tuple(_saved(c, manifests.get(c.number), lost.get(c.number), checked) for c in view.checkpoints)
    events = [event for entry in entries if (event := _event(entry)) is not None]
    events += findings(manifests.values())
    events += [event for entry in _dropped_but_told(entries, view) if (event := _event(entry)) is not None]
    named = {c.manifest: (c, manifests[c.number]) for c in view.checkpoints if c.number in manifests}
    return History(
        url=log.store.url, run=log.run, now=time.time(), host=view.host, condition=explain(view, log.store.url),
        events=tuple(sorted(events, key=lambda e: e.time)), saves=saves,
        points={name: tuple(points(m.trace, epoch=c.epoch)) for name, (c, m) in named.items()},
        fingerprints={name: of(m) for name, (_, m) in named.items() if m.fingerprint},
        probes={name: m.probes for name, (_, m) in named.items() if m.probes}, moves=_moves(entries),
        unknown=tuple(_unknown(view, entries, manifests, lost, broken)), deep=checked is not None and checked.deep,
    )  # fmt: skip


def _manifests(store: Store, checkpoints: Sequence[Checkpoint]) -> tuple[dict[int, Manifest], dict[int, str]]:
    """By entry number: the manifests, and why some cannot be read."""

    def read(checkpoint: Checkpoint) -> Manifest | str:
        try:
            return read_manifest(store, checkpoint)
        except IntegrityError as error:
            return str(error)

    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip((c.number for c in checkpoints), pool.map(read, checkpoints)))
    return (
        {n: m for n, m in found.items() if isinstance(m, Manifest)},
        {n: m for n, m in found.items() if isinstance(m, str)},
    )


def _moves(entries: Iterable[LogEntry]) -> tuple[Move, ...]:
    """Words of moves, oldest first; a gc entry keeps the newest one."""
    kept = [e.move if isinstance(e, Collect) else e for e in entries]
    return tuple({m.number: m for m in kept if isinstance(m, Move)}.values())


def _dropped_but_told(entries: Iterable[LogEntry], view: View) -> list[LogEntry]:
    """What only a gc entry tells of: its own entry is gone."""
    told = {entry.number for entry in entries}
    kept: list[LogEntry] = [*view.checkpoints, *_moves(entries)]
    return [entry for entry in kept if entry.number not in told]


def _saved(checkpoint: Checkpoint, manifest: Manifest | None, lost: str | None, checked: VerifyReport | None) -> Saved:
    sound, condition = None, "not looked at"
    if lost is not None:
        sound, condition = False, lost
    elif checked is not None:
        sound = next((c.sound for c in checked.checkpoints if c.entry == checkpoint.number), None)
        what = [d.problem for d in checked.damage if checkpoint.step in d.steps]
        condition = "damaged: " + (what[0] if what else "see gpumove verify") if sound is False else condition
        if sound:
            condition = "every byte was read" if checked.deep else "records were read, and all packs have their sizes"
    return Saved(checkpoint, sound, condition, manifest.took if manifest else None)


# -------------------------------------------------------------------- what happened


def _event(entry: LogEntry) -> Event | None:
    match entry:
        case Checkpoint():
            return Event(entry.time, "save", f"step {entry.step} was saved", entry.step)
        case Claim() if entry.follows:
            return Event(entry.time, "move", f"becomes a copy of {entry.follows}")
        case Claim():
            host = entry.host or "an unnamed host"
            if entry.resumed is None:
                return Event(entry.time, "start", f"{host} began, with epoch {entry.epoch}")
            return Event(entry.time, "restore", f"{host} resumed from entry {entry.resumed}, with epoch {entry.epoch}")
        case Move():
            return Event(entry.time, "move", f"{entry.state} ({entry.other}){': ' if entry.text else ''}{entry.text}")
        case Note() if "on a notice" in entry.text:
            return Event(entry.time, "notice", entry.text)
        case Note():
            return Event(entry.time, "note", entry.text)
        case Collect():
            return Event(entry.time, "note", f"retention kept {count(len(entry.kept), 'checkpoint')}")
    return None


def findings(manifests: Iterable[Manifest]) -> list[Event]:
    """What was wrong with the training. A finding is told by every later manifest; the first one has its time."""
    found: dict[tuple[Any, ...], Event] = {}
    for manifest in sorted(manifests, key=lambda m: m.time):
        for told in manifest.health:
            key = tuple(told.get(name) for name in ("kind", "step", "rank", "text"))
            text = f"{key[0]} at step {key[1]}: {key[3]}"
            kind = "parity" if key[0] == "parity" else "health"
            found.setdefault(key, Event(manifest.time, kind, text, key[1] if isinstance(key[1], int) else None))
    return list(found.values())


def _unknown(
    view: View,
    entries: Sequence[LogEntry],
    manifests: dict[int, Manifest],
    lost: dict[int, str],
    broken: Sequence[int],
) -> list[str]:
    rows = [row for manifest in manifests.values() for row in manifest.trace]
    losses, times = (any(number(row, name) is not None for row in rows) for name in ("loss", "s"))
    said = []
    if entries and min(entry.number for entry in entries) > 1:
        said.append(f"what happened before log entry {min(e.number for e in entries)}: retention has removed it")
    if broken:
        said.append(f"what log {'entry' if len(broken) == 1 else 'entries'} {', '.join(map(str, broken))} said")
    if lost:
        said.append(f"what the manifests of {count(len(lost), 'checkpoint')} said: they cannot be read")
    if not view.checkpoints:
        said.append("everything about the training: no checkpoint has been committed yet")
    elif not losses:
        said.append(f"losses{'' if times else ' and step times'}: no loss was given to ckpt.step(step, loss=...)")
    elif len(view.checkpoints) > 1 and not times:
        said.append("the times of single steps: the traces have losses only, so means between commits are shown")
    return said
