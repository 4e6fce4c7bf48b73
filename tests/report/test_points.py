"""Rows of traces in both forms, and what is taken of them."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from gpumove.format.manifest import FORMAT, Checkpoint, Manifest, TraceRow
from gpumove.report.compare import Line
from gpumove.report.history import Event, Saved, findings
from gpumove.report.points import Point, joined, points


def read(rows: list[list[Any]]) -> list[TraceRow]:
    """As they are decoded from a manifest, also from one of two columns."""
    return msgspec.convert(rows, list[TraceRow])


def test_rows_with_and_without_facts() -> None:
    rows = [[1, 2.5], [2, None], [3, 2.25, {"s": 0.5, "grad_norm": 1.5, "samples": "aa", "rng": "bb"}], [4, 2.0, {}]]
    assert points(read(rows), epoch=7) == [
        Point(1, 2.5, 7),
        Point(2, None, 7),
        Point(3, 2.25, 7, seconds=0.5, grad_norm=1.5),
        Point(4, 2.0, 7),
    ]


def test_facts_that_are_no_numbers_are_unknown() -> None:
    rows = [[1, 2.5, {"s": "fast", "grad_norm": math.inf}], [2, 2.5, {"s": True}], [3, 2.5, {"grad_norm": "inf"}],
            [4, None, {"loss": "nan"}]]  # fmt: skip
    assert [(p.seconds, p.grad_norm, p.loss) for p in points(read(rows), epoch=1)] == [
        (None, None, 2.5),
        (None, None, 2.5),
        (None, None, 2.5),
        (None, None, None),
    ]


def test_a_step_that_was_done_again_counts_once() -> None:
    first, again = points(read([[1, 4.0], [2, 3.0], [3, 9.0]]), epoch=1), points(read([[3, 2.0], [4, 1.0]]), epoch=2)
    assert [(p.step, p.loss) for p in joined([*first, *again])] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert joined([*again, *first]) == joined([*first, *again])


def saved(step: int, at: float, *, epoch: int = 1) -> Saved:
    entry = Checkpoint(
        format=FORMAT, number=step, epoch=epoch, writer="w", time=at, step=step, attempt="a",
        manifest=f"{step}-{epoch}", manifest_bytes=1, world_size=1, state_bytes=100, new_bytes=10,
    )  # fmt: skip
    return Saved(entry, None, "")


def test_step_times_are_recorded_ones_or_means_between_commits_of_one_life() -> None:
    saves = (saved(10, 100.0), saved(20, 105.0), saved(30, 200.0, epoch=2), saved(40, 220.0, epoch=2))
    means = Line("", tuple(points(read([[1, 2.0]]), epoch=1)), saves)
    assert [(p.step, p.seconds) for p in means.paces] == [(20, 0.5), (40, 2.0)]
    assert (means.measured, means.usual_s, means.trained_s) == (False, 1.25, 25.0)
    timed = Line("", tuple(points(read([[1, 2.0, {"s": 0.25}], [2, 2.0], [3, 2.0, {"s": 0.75}]]), epoch=1)), saves)
    assert [(p.step, p.seconds) for p in timed.paces] == [(1, 0.25), (3, 0.75)]
    assert (timed.measured, timed.usual_s) == (True, 0.5)
    assert Line("", (), ()).usual_s is None


def test_a_finding_is_told_once_with_the_time_of_the_first_manifest_that_has_it() -> None:
    slow = {"kind": "slow", "step": 7, "text": "a step takes 2 s", "rank": 0}
    lost = {"kind": "nan", "step": 9, "text": "the loss of rank 1 is nan", "rank": 1}
    common = {"format": 1, "run": "r", "epoch": 1, "attempt": "a", "world_size": 2, "state_bytes": 1, "new_bytes": 1,
              "plan": "p", "parts": ()}  # fmt: skip
    manifests = [Manifest(step=20, time=50.0, health=(slow, lost), **common),  # type: ignore[arg-type]
                 Manifest(step=10, time=40.0, health=(slow,), **common)]  # type: ignore[arg-type]  # fmt: skip
    assert findings(manifests) == [
        Event(40.0, "health", "slow at step 7: a step takes 2 s", 7),
        Event(50.0, "health", "nan at step 9: the loss of rank 1 is nan", 9),
    ]
    jump = {"kind": "parity", "step": 21, "text": "the loss is 3 % above the source's", "rank": 0}
    (event,) = findings([Manifest(step=30, time=60.0, health=(jump,), **common)])  # type: ignore[arg-type]
    assert event.kind == "parity"
