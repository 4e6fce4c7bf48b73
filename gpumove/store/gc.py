"""Retention and reachability: which checkpoints stay, what may be deleted, in which order (docs/format.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpumove.errors import IntegrityError
from gpumove.format import keys
from gpumove.format.manifest import FORMAT, Checkpoint, Collect, LogEntry
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.pointers import likely, settled
from gpumove.store.records import reachable
from gpumove.store.view import View

_BATCH = 1000


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest, pinned and published ones, what a move keeps, multiples of ``keep_every``."""

    keep_last: int | None = None
    keep_every: int | None = None

    def kept(self, view: View) -> tuple[Checkpoint, ...]:
        """The checkpoints that stay, oldest first. The newest, and the one resumed from, always do."""
        sound = [c for c in view.checkpoints if c.number not in view.damaged]
        newest = {c.number for c in (sound[-self.keep_last :] if self.keep_last else sound)}
        newest |= {c.number for c in view.checkpoints[-1:]}
        return tuple(
            c
            for c in view.checkpoints
            if c.number in newest
            or c.pinned
            or c.pointers
            or c.number in (view.resumed, view.keeps)
            or (self.keep_every and c.step % self.keep_every == 0 and c.number not in view.damaged)
        )


@dataclass(frozen=True)
class Plan:
    """What a collection would do. ``doomed`` is in the order of deletion."""

    kept: tuple[Checkpoint, ...]
    dropped: tuple[Checkpoint, ...]
    doomed: tuple[str, ...]
    doomed_bytes: int
    unreadable: tuple[Checkpoint, ...] = ()
    """Kept, but damaged: nothing as old as the newest of these is deleted."""


def plan(store: Store, view: View, retention: Retention, *, reach: Callable[[Checkpoint], Iterable[str]]) -> Plan:
    """Decide what to delete. Reads the store, changes nothing.

    Args:
        store: the run.
        view: a fresh view of its log.
        retention: what to keep.
        reach: the keys that a checkpoint needs; :func:`reachable`, or a cache of it.
    """
    view = settled(store, view)
    kept = retention.kept(view)
    dropped = tuple(c for c in view.checkpoints if c not in kept)
    needed, unreadable = _needed(kept, reach)
    # What a damaged checkpoint needs is not known, but it can only be of its own attempt or an earlier one.
    spared = max((c.attempt for c in unreadable), default="")
    alive = _first_alive(view)
    doomed: list[str] = []
    size = 0
    for prefix in ("manifests/", "parts/", "packs/"):
        for found in store.list(prefix):
            attempt = keys.attempt_of(found.key)
            if attempt is not None and spared < attempt < alive and found.key not in needed:
                doomed.append(found.key)
                size += found.nbytes
    return Plan(kept, dropped, tuple(doomed), size, unreadable)


def surplus(view: View, retention: Retention) -> int:
    """About how many checkpoints a collection would drop. Asks no store."""
    return len(view.checkpoints) - len(retention.kept(likely(view)))


def _needed(
    kept: Iterable[Checkpoint], reach: Callable[[Checkpoint], Iterable[str]]
) -> tuple[set[str], tuple[Checkpoint, ...]]:
    """The keys that the kept checkpoints need, and those checkpoints whose needs cannot be read."""
    needed: set[str] = set()
    unreadable = []
    for checkpoint in kept:
        try:
            needed.update(reach(checkpoint))
        except IntegrityError:
            unreadable.append(checkpoint)
    return needed, tuple(unreadable)


def _first_alive(view: View) -> str:
    """The first attempt that may still be committed; all before it are dead unless a kept manifest reaches them."""
    return keys.attempt_name(view.epoch, keys.last_serial(view.epoch, (c.attempt for c in view.checkpoints)) + 1)


def collect(log: Log, retention: Retention, *, reach: Callable[[Checkpoint], Iterable[str]] | None = None) -> Plan:
    """Drop checkpoints and delete what nothing needs any more.

    The log is told first. If it cannot be, nothing is deleted; if the deletion breaks off, the next one completes it.

    Returns:
        What was done.
    """
    store = log.store
    reach = reach or (lambda c: reachable(store, c))
    made: list[Plan] = []
    firsts: list[int] = []

    def make(view: View, number: int) -> LogEntry:
        firsts.append(view.first)
        made.append(plan(store, view, retention, reach=reach))
        return Collect(
            format=FORMAT, number=number, epoch=view.epoch, writer=log.writer, time=time.time(),
            kept=made[-1].kept, resumed=view.resumed, abandoned=tuple(sorted(view.abandoned)),
            follows=view.follows, sealed=view.sealed, regions=view.regions, owner=view.writer, host=view.host,
            move=view.move,
        )  # fmt: skip

    log.append(make)
    _delete(log, made[-1].doomed)
    _delete(log, _old_entries(store, below=firsts[-1]))
    return made[-1]


def _old_entries(store: Store, *, below: int) -> list[str]:
    """Entries older than the gc entry before this one: should this one rot, that one still tells what there is."""
    found = (o.key for o in store.list("log/"))
    return [k for k in found if (n := keys.entry_number(k)) is not None and n < below]


def _delete(log: Log, doomed: Iterable[str]) -> None:
    """In order, manifests before parts before packs, so that nothing that stays refers to what is gone.

    Raises:
        FencedError: the run is somebody else's meanwhile, who may have begun to use what looked dead.
    """
    batches: list[list[str]] = []
    for key in doomed:
        if not batches or key.split("/")[0] != batches[-1][0].split("/")[0] or len(batches[-1]) >= _BATCH:
            batches.append([])
        batches[-1].append(key)
    for number, batch in enumerate(batches):
        if number:  # just before the first one the log was written to
            log.follow()
        log.store.delete(batch)
