"""What was recorded of each step, out of the traces of manifests. Pure: rows in, points out.

What a row does not have is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gpumove.format.manifest import TraceRow
from gpumove.parity.trace import number


@dataclass(frozen=True)
class Point:
    """One step. None is unknown, or was no finite number."""

    step: int
    loss: float | None
    epoch: int
    seconds: float | None = None
    grad_norm: float | None = None


def points(trace: Iterable[TraceRow], *, epoch: int) -> list[Point]:
    """The steps that a manifest tells of, in its order.

    Args:
        trace: its rows.
        epoch: in which it was written.
    """
    return [_point(row, epoch) for row in trace]


def _point(row: TraceRow, epoch: int) -> Point:
    return Point(row.step, row.loss, epoch, _finite(row, "s"), _finite(row, "grad_norm"))


def _finite(row: TraceRow, name: str) -> float | None:
    value = number(row, name)
    return value if value is not None and math.isfinite(value) else None


def joined(rows: Iterable[Point]) -> list[Point]:
    """Points of several manifests as one line: of a step that was done again, the newer epoch counts."""
    newest: dict[int, Point] = {}
    for point in rows:
        if point.step not in newest or point.epoch >= newest[point.step].epoch:
            newest[point.step] = point
    return [newest[step] for step in sorted(newest)]
