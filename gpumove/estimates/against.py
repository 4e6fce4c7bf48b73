"""An estimate against the move that came after it: what was foretold, what was measured, and how far off it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumove.estimates.interval import Range
from gpumove.estimates.transfer import Transfer


@dataclass(frozen=True)
class Compared:
    """One number. ``off`` is a share of what was measured; None where either is unknown."""

    name: str
    foretold: Range | None
    measured: float | None
    off: float | None


def against(transfer: Transfer, report: Mapping[str, Any], *, blackout_s: float | None = None) -> tuple[Compared, ...]:
    """Compare with the report of a move, as ``gpumove move --json`` gives it last.

    Args:
        transfer: of the estimate that was made before.
        report: of the move.
        blackout_s: as it was measured from outside; by default the report's.
    """
    states = [event["state"] for event in report["events"]]
    before = states[: states.index("request")].count("round") if "request" in states else len(report["rounds"])
    copy_s = sum(found["seconds"] for found in report["rounds"][:before])
    blackout_s = report["blackout_s"] if blackout_s is None else blackout_s
    pairs = [
        ("bytes", transfer.nbytes, float(report["sent_bytes"])),
        ("copy_s", transfer.copy_s, copy_s),
        ("blackout_s", transfer.blackout_s, blackout_s),
    ]
    return tuple(Compared(name, found, real, _off(found, real)) for name, found, real in pairs)


def _off(found: Range | None, real: float | None) -> float | None:
    return None if found is None or not real else found.value / real - 1
