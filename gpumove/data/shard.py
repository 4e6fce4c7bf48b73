"""One shard on its way from the store to the folder: where it stands, and what is left to read. Does nothing itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gpumove.data.folder import Lease, Not, Part
from gpumove.errors import GpumoveError
from gpumove.store.objects import ObjectInfo

_RANGE = 8 << 20

State = Literal["wanted", "opening", "parked", "loading", "closing", "ready", "failed"]


@dataclass
class Shard:
    """One shard on its way. The fetcher's lock guards it; in "opening" and "closing" one thread has it."""

    name: str
    rank: float
    """Its place among what is wanted; infinite if it is not wanted any more."""
    state: State = "wanted"
    asked: bool = False
    """Somebody waits for it, or has it."""
    info: ObjectInfo | None = None
    part: Part | None = None
    lease: Lease | None = None
    error: GpumoveError | None = None
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """Not read yet, the last one first."""
    busy: int = 0
    """Ranges that are being read."""
    tries: int = 0
    full: int = 0
    """How often the disk was."""
    parked_for: Not | None = None
    parked_since: float = 0.0
    look_at: float = 0.0


def ranges(nbytes: int) -> list[tuple[int, int]]:
    """What to read of an object, the last range first."""
    return [(start, min(start + _RANGE, nbytes)) for start in reversed(range(0, nbytes, _RANGE))]
