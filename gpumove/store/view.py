"""What a log says: its live entries folded into one view. Pure: entries in, a view out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby

import msgspec

from gpumove.errors import IntegrityError
from gpumove.format import keys
from gpumove.format.manifest import Checkpoint, Claim, Collect, LogEntry, Move, Note, Pin


@dataclass(frozen=True)
class Broken:
    """An entry whose bytes cannot be read. What it said is lost; that it was there is not."""

    number: int
    error: str


@dataclass(frozen=True)
class View:
    """What the live entries of a log say, up to ``head`` (0 for an empty log)."""

    head: int = 0
    epoch: int = 0
    writer: str = ""
    host: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    resumed: int | None = None
    """The entry that the run went on from last, until something was committed after that."""
    abandoned: frozenset[int] = frozenset()
    """Checkpoints that were newer than one that the run went on from: another line, left on purpose or for damage."""
    damaged: frozenset[int] = frozenset()
    broken: tuple[Broken, ...] = ()
    """Damaged entries. Each may have been a claim: epochs are counted past them."""
    first: int = 1
    """Number of the first live entry."""
    follows: str = ""
    """The log that this one is a copy of: only its replicator writes here."""
    sealed: str = ""
    """Where the run was moved to: only tools write here."""
    regions: str = ""
    """Where the run may lie, as its owners have said last: patterns with commas; empty for everywhere."""
    move: Move | None = None
    """The newest entry of a move."""

    def extended(self, entry: LogEntry | Broken) -> View:
        """The view after one more entry."""
        seen = replace(self, head=entry.number)
        match entry:
            case Broken():
                return replace(seen, broken=(*self.broken, entry))
            case Claim():
                seen = replace(seen, epoch=entry.epoch, writer=entry.writer, host=entry.host)
                regions = entry.regions.strip() or self.regions
                seen = replace(seen, follows=entry.follows, sealed="", regions="" if regions == "*" else regions)
                return seen._going_on_from(entry.resumed)
            case Move():
                return seen._moved(entry)
            case Checkpoint():
                return self.committed([entry])
            case Note():
                return replace(seen, damaged=self.damaged | set(entry.damaged))._going_on_from(entry.resumed)
            case Pin():
                return replace(seen, checkpoints=tuple(_pinned(c, entry) for c in self.checkpoints))
            case Collect():
                # The gc entry carries the epoch that it was written in, so that claims below it are not missed.
                return replace(
                    seen, checkpoints=entry.kept, resumed=entry.resumed, first=entry.number, epoch=entry.epoch,
                    abandoned=frozenset(entry.abandoned), follows=entry.follows, sealed=entry.sealed, move=entry.move,
                    regions=entry.regions, writer=entry.owner, host=entry.host,
                )  # fmt: skip

    def _moved(self, entry: Move) -> View:
        seen = replace(self, move=entry)
        if entry.state not in ("sealed", "handover"):
            return seen
        sealed = entry.other if entry.state == "sealed" else ""
        return replace(seen, epoch=entry.epoch, writer=entry.writer, host="", follows="", sealed=sealed)

    @property
    def keeps(self) -> int | None:
        """The entry of a checkpoint that stays for the sake of a move, for as long as its newest word says so."""
        found = None if self.move is None else self.move.facts.get("keeps")
        return found if type(found) is int else None

    def refusal(self) -> str:
        """Why no job may claim this log; "" if it may."""
        if self.sealed:
            return f"the run was moved to {self.sealed}: resume it there, or take it back with gpumove move --rollback"
        if self.follows:
            return f"this is a replica of {self.follows}: hand the run over with gpumove move"
        move = self.move
        lost = [b.number for b in self.broken if move is not None and b.number > move.number]
        if move is not None and lost and move.state in ("begin", "request", "left"):
            return (
                f"a move to {move.other} was under way, and log entry {lost[0]}, which cannot be read, may have ended "
                "it: end the move with gpumove move --resume or --rollback"
            )
        return ""

    def committed(self, entries: Sequence[Checkpoint]) -> View:
        """The view after a row of checkpoints."""
        return replace(self, head=entries[-1].number, checkpoints=(*self.checkpoints, *entries), resumed=None)

    def _going_on_from(self, number: int | None) -> View:
        if number is None:
            return self
        newer = {c.number for c in self.checkpoints if c.number > number}
        return replace(self, resumed=number, abandoned=(self.abandoned | newer) - {number})

    def candidates(self) -> list[Checkpoint]:
        """What a restore tries: the run's own line, newest first, then abandoned ones; nothing known to be damaged."""
        sound = [c for c in reversed(self.checkpoints) if c.number not in self.damaged]
        return sorted(sound, key=lambda c: c.number in self.abandoned)

    def find(self, step: int | None = None) -> Checkpoint | None:
        """The newest one of a step, or the one that a restore would try first."""
        line = self.candidates() if step is None else []
        return next((c for c in (*line, *reversed(self.checkpoints)) if step is None or c.step == step), None)


def _pinned(checkpoint: Checkpoint, pin: Pin) -> Checkpoint:
    if checkpoint.number != pin.checkpoint:
        return checkpoint
    if pin.pointer:
        name = pin.pointer.rpartition("/")[0]
        others = (m for m in checkpoint.pointers if m.rpartition("/")[0] != name)
        return msgspec.structs.replace(checkpoint, pointers=(*others, pin.pointer))
    return msgspec.structs.replace(checkpoint, pinned=pin.pinned)


def replay(entries: Sequence[LogEntry | Broken], head: int) -> View:
    """Fold entries into a view, starting at the newest gc entry, and look for holes."""
    start = max((i for i, e in enumerate(entries) if isinstance(e, Collect)), default=0)
    live = entries[start:]
    first = live[0].number if live and isinstance(live[0], Collect) else 1
    if missing := sorted(set(range(first, head + 1)) - {e.number for e in live}):
        raise IntegrityError(
            f"the log has a hole: {keys.entry_key(missing[0])} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f", while {keys.entry_key(head)} exists. Restore the object from the store's versions, or copy the run "
            "up to the hole to a new URL",
            code="integrity.log_hole",
        )
    view = View()
    for _, row in groupby(live, key=lambda entry: isinstance(entry, Checkpoint)):
        entries = list(row)
        # Rows of checkpoints at once: one by one, a year of them would be copied as often as there are entries.
        common = [entry for entry in entries if isinstance(entry, Checkpoint)]
        view = view.committed(common) if common else reduce(View.extended, entries, view)
    return view
