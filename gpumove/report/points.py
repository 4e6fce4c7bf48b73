"""What was recorded of each step, out of the traces of manifests. Pure: rows in, points out.

A row is ``[step, loss]`` or ``[step, loss, facts]``; facts that are not there are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One step. None is unknown, or was no finite number."""

    step: int
    loss: float | None
    epoch: int
    seconds: float | None = None
    grad_norm: float | None = None


def points(trace: Iterable[Sequence[Any]], *, epoch: int) -> list[Point]:
    """The steps that a manifest tells of, in its order.

    Args:
        trace: its rows.
        epoch: in which it was written.
    """
    return [_point(row, epoch) for row in trace]


def _point(row: Sequence[Any], epoch: int) -> Point:
    facts: Mapping[str, Any] = row[2] if len(row) > 2 and isinstance(row[2], Mapping) else {}
    return Point(int(row[0]), _finite(row[1]), epoch, _finite(facts.get("s")), _finite(facts.get("grad_norm")))


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def joined(rows: Iterable[Point]) -> list[Point]:
    """Points of several manifests as one line: of a step that was done again, the newer epoch counts."""
    newest: dict[int, Point] = {}
    for point in rows:
        if point.step not in newest or point.epoch >= newest[point.step].epoch:
            newest[point.step] = point
    return [newest[step] for step in sorted(newest)]
