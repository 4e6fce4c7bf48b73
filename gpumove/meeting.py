"""What the ranks tell rank 0 when they meet, and what it answers. Plain records; who sends them is not known here."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gpumove.format.manifest import Checkpoint

Described = tuple[str, str, str]
"""An error as ``errors.describe`` gives it."""


class Report(msgspec.Struct):
    """What rank 0 must know of a rank before it decides on a save."""

    replan: bool = False
    error: Described | None = None


class Verdict(msgspec.Struct):
    """What rank 0 decided."""

    save: bool = False
    replan: bool = False
    next_meeting: int = 0
    serial: int = 0
    told: bool = False
    """The failure of the last save is dealt with: nobody raises it again."""
    error: Described | None = None


class Claimed(msgspec.Struct):
    """What rank 0 found in the log."""

    run: str = ""
    epoch: int = 0
    candidates: list[Checkpoint] = []
    error: Described | None = None


def first_error(reports: Sequence[Report]) -> Described | None:
    """The error of the lowest rank that has one, with the rank's name."""
    for rank, report in enumerate(reports):
        if report.error is not None:
            kind, code, text = report.error
            return kind, code, f"rank {rank}: {text}"
    return None
