"""What the ranks tell rank 0 when they meet, and what it answers. Plain records; who sends them is not known here."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gpumove.errors import ConfigError, describe
from gpumove.format.manifest import Checkpoint

Described = tuple[str, str, str]
"""An error as ``errors.describe`` gives it."""


class Report(msgspec.Struct):
    """What rank 0 must know of a rank before it decides on a save."""

    step: int = 0
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
    """The error of the lowest rank that has one, with the rank's name; or that the ranks are not at one step."""
    for rank, report in enumerate(reports):
        if report.error is not None:
            kind, code, text = report.error
            return kind, code, f"rank {rank}: {text}"
    for rank, report in enumerate(reports):
        if report.step != reports[0].step:
            text = f"rank {rank} is at step {report.step} and rank 0 at step {reports[0].step}"
            return describe(ConfigError(f"{text}: call step() and save() with the same numbers on all ranks"))
    return None
