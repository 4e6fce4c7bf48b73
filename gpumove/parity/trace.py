"""The numbers of a trace row: how one that JSON does not have is written, and read back. Pure."""

from __future__ import annotations

import math
from typing import Any

from gpumove.format.manifest import TraceRow

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def word(value: float) -> str | None:
    """What stands for a number that JSON does not have; None for one that it has."""
    if math.isfinite(value):
        return None
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def number(row: TraceRow, name: str) -> float | None:
    """``loss``, ``grad_norm``, ``lr`` or ``s`` of a row, not necessarily finite; None if it was not recorded."""
    found: Any = row.facts.get(name)
    if name == "loss" and row.loss is not None:
        return row.loss
    if isinstance(found, str):
        return _WORDS.get(found)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None
