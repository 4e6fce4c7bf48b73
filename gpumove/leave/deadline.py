"""What is done with the time that is left: from measured seconds to one decision. Knows numbers only.

A save digests, codes and sends side by side, so what it takes is measured as a whole, of the last ones: their rates and
their dirty bytes are in it. They ran beside the training, which rests while the last one runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

Kind = Literal["new", "after", "instead", "finish", "nothing"]
WORDS: dict[Kind, str] = {
    "new": "saving it",
    "after": "finishing the save in flight first",
    "instead": "giving up the save in flight for a new one",
    "finish": "finishing the save in flight",
    "nothing": "saving nothing",
}
_LAST = 5
_TURN_S = 0.5
"""To stop one save and begin another."""
_SURE = 0.8
"""A save in flight that fits is given up for a new one only if that needs no more than this of what is left."""
_HOPE = 1.5
"""Where nothing is given up for it, a save is tried that took this many times what is left: the machine is free now."""


class Situation(msgspec.Struct, frozen=True):
    """One rank's, at the step to leave after. Seconds; None where nothing was measured."""

    new_s: float | None = None
    """What a save is expected to take."""
    flying: bool = False
    """Whether one is in flight."""
    flight_s: float | None = None
    """What that still needs."""
    codes: bool = False
    """Whether everything is coded, whatever that takes: without, it may be quicker."""


@dataclass(frozen=True)
class Plan:
    """What to do. ``after``: finish the save in flight, then decide again; at the latest when only ``reserve_s`` is
    left, since a save that hangs must not take the time of another. ``instead``: give it up for a new one.

    ``hurried`` saves are whole, and coded only as far as that is quicker.
    """

    kind: Kind
    expected_s: float | None = None
    why: str = ""
    hurried: bool = False
    reserve_s: float = 0.0


def margin_of(left_s: float) -> float:
    """What is kept of the time that is left, for what cannot be foreseen."""
    return min(10.0, max(1.0, left_s / 10))


def expected(took: Iterable[float]) -> float | None:
    """What a new save is expected to take: as the slowest of the last ones.

    Now and then a chain of differences ends, and a save is larger than those before it.
    """
    return max(list(took)[-_LAST:], default=None)


def remaining(new_s: float, age_s: float) -> float:
    """What a save in flight is expected to need still: one that is overdue, as long as it is overdue."""
    return max(new_s - age_s, 0.1 * new_s, age_s - new_s)


def together(ranks: Iterable[Situation]) -> Situation:
    """The job's: the slowest rank decides, and what one does not know nobody does."""
    found = list(ranks)
    return Situation(
        new_s=_slowest([s.new_s for s in found]),
        flying=any(s.flying for s in found),
        flight_s=_slowest([s.flight_s for s in found if s.flying]),
        codes=any(s.codes for s in found),
    )


def plan(left_s: float, now: Situation) -> Plan:
    """Of what fits into the time that is left, what makes the latest step durable.

    Args:
        left_s: seconds until the deadline less the margin.
        now: the job's situation.
    """
    if left_s <= 0:
        return Plan("nothing", why="no time is left")
    if now.new_s is None or (now.flying and now.flight_s is None):
        if now.flying:
            return Plan("after", why="nothing was measured yet, and the save in flight is the surer one")
        return Plan("new", why="nothing was measured yet")
    why = f"a save takes {now.new_s:.1f} s, and {left_s:.1f} s are left"
    if now.flying and now.flight_s is not None:
        reserve_s = now.new_s / _SURE + _TURN_S
        if now.flight_s + reserve_s <= left_s:
            return Plan("after", now.flight_s + now.new_s, why, reserve_s=reserve_s)
        sure = _SURE if now.flight_s <= left_s else 1.0
        if now.new_s <= sure * left_s:
            return Plan("instead", now.new_s, why)
        # Whether or not it is expected to be done in time: there is nothing better to do.
        return Plan("finish", now.flight_s, f"{why}; that in flight takes {now.flight_s:.1f} s more")
    if now.new_s <= left_s:
        return Plan("new", now.new_s, why)
    if now.codes or now.new_s <= _HOPE * left_s:
        return Plan("new", now.new_s, why, hurried=now.codes)
    return Plan("nothing", None, why)


def _slowest(seconds: list[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return max(known) if known and len(known) == len(seconds) else None
