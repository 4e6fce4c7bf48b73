"""One run, or the two ends of a move, side by side: whose steps are whose, and where the cut is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any

from gpumove.environment.compare import Difference
from gpumove.environment.compare import compare as graded
from gpumove.format.manifest import Move
from gpumove.parity.watch import told as watched
from gpumove.report.history import History, Saved
from gpumove.report.points import Point, joined


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, or their mean over all steps since the commit before."""

    step: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """What one side has trained itself."""

    label: str
    points: tuple[Point, ...]
    saves: tuple[Saved, ...]

    @cached_property
    def paces(self) -> tuple[Pace, ...]:
        """Step times as recorded; where they are not, from the times of the commits of one life of the job."""
        told = tuple(Pace(p.step, p.seconds) for p in self.points if p.seconds is not None)
        if told:
            return told
        return tuple(
            Pace(b.at.step, (b.at.time - a.at.time) / (b.at.step - a.at.step))
            for a, b in pairwise(sorted(self.saves, key=lambda s: s.at.number))
            if a.at.epoch == b.at.epoch and b.at.step > a.at.step and b.at.time > a.at.time
        )

    @property
    def usual_s(self) -> float | None:
        """The median step."""
        return median(p.seconds for p in self.paces) if self.paces else None

    @property
    def measured(self) -> bool:
        """Whether single steps were timed."""
        return any(p.seconds is not None for p in self.points)

    @property
    def trained_s(self) -> float:
        """From the first commit of each life of the job to its last: what is known to have been paid for."""
        spans: dict[int, list[float]] = {}
        for save in self.saves:
            spans.setdefault(save.at.epoch, []).append(save.at.time)
        return sum(max(times) - min(times) for times in spans.values())


@dataclass(frozen=True)
class Comparison:
    """Lines, and the step after which the second side went on; None where there was no move."""

    histories: tuple[History, ...]
    lines: tuple[Line, ...]
    cut: int | None
    move: Move | None
    """The newest word of the move between them."""
    differences: tuple[Difference, ...] | None
    """Of the machines, worst first; None if one side has not told."""


def compare(histories: Sequence[History]) -> Comparison:
    """Tell the sides apart.

    Args:
        histories: of one run, or of two; of a move first the source.
    """
    move = _move(histories)
    if len(histories) == 1 and move is None:
        line = _line("this run", histories, lambda save: True)
        return Comparison(tuple(histories), (line,), None, None, None)
    if len(histories) == 2 and move is None and histories[0].run != histories[1].run:
        lines = tuple(_line(label, [h], lambda save: True) for label, h in zip(("first run", "second run"), histories))
        return Comparison(tuple(histories), lines, None, None, _differences(histories, lines))
    there = {save.at.manifest for save in histories[0].saves} if len(histories) == 2 else set()
    since = _first_epoch(move)
    after = _line("after the move", histories[-1:], lambda s: s.at.manifest not in there and s.at.epoch >= since)
    if move is None and not after.saves:  # it is a copy, or will be the target of a move
        return Comparison(tuple(histories), (_line("this run", histories, lambda save: True),), None, None, None)
    trained = {save.at.manifest for save in after.saves}
    before = _line("before the move", histories, lambda s: s.at.manifest not in trained)
    lines = (before, after)
    return Comparison(tuple(histories), lines, _cut(histories, move, before), move, _differences(histories, lines))


def _move(histories: Sequence[History]) -> Move | None:
    """The newest word, at the run's last place, of how it came there; else what the source says of it.

    Retention keeps the newest word only, which is that the job has arrived.
    """
    last = histories[-1]
    source = histories[0].url if len(histories) == 2 else None
    found = [m for m in last.moves if (m.state == "handover" or m.is_over) and source in (None, m.other)]
    if not found and source is not None:
        found = [m for m in histories[0].moves if m.state == "sealed" and m.other == last.url]
    return found[-1] if found else None


def _first_epoch(move: Move | None) -> int:
    """From which epoch on checkpoints at the run's last place were made there; 0 if that is not known."""
    if move is None or move.state == "sealed":
        return 0  # epochs of the source are not those of the target
    if (watch := watched(move)) is not None and watch.epoch:
        return watch.epoch
    return move.epoch + 1 if move.state == "handover" else move.epoch


def _cut(histories: Sequence[History], move: Move | None, before: Line) -> int | None:
    """The step that the run was handed over after: as either end says, else the last one that was copied."""
    if move is None:
        return None
    said = [m for h in histories for m in h.moves if m.move == move.move]
    steps = [
        m.facts["step"] for m in said if m.state in ("sealed", "handover") and isinstance(m.facts.get("step"), int)
    ]
    steps = steps or [watch.handed for m in said if (watch := watched(m)) is not None]
    return steps[-1] if steps else max((save.at.step for save in before.saves), default=None)


def _line(label: str, histories: Sequence[History], own: Callable[[Saved], bool]) -> Line:
    saves: dict[str, Saved] = {}
    rows: list[Point] = []
    for history in histories:
        for save in history.saves:
            if own(save) and save.at.manifest not in saves:
                saves[save.at.manifest] = save
                rows += history.points.get(save.at.manifest, ())
    return Line(label, tuple(joined(rows)), tuple(sorted(saves.values(), key=lambda s: (s.at.time, s.at.number))))


def _differences(histories: Sequence[History], lines: Sequence[Line]) -> tuple[Difference, ...] | None:
    """Between the newest fingerprints of both sides; None if one has none."""
    before, after = (fingerprint(histories, line) for line in lines)
    return tuple(graded(before, after)) if before and after else None


def fingerprint(histories: Sequence[History], line: Line) -> dict[str, Any]:
    """Of the newest checkpoint of a side that has one; empty if none has."""
    for save in reversed(line.saves):
        for history in histories:
            if found := history.fingerprints.get(save.at.manifest):
                return found
    return {}
