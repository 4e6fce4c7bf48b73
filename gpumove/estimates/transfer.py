"""How a move would go: rounds, bytes, time, blackout. The same arithmetic that a move goes by (move/rounds.py), over
numbers of which only the bounds are known."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpumove.estimates.interval import Range, total
from gpumove.move.rounds import Measured, forecast

_MOST_ROUNDS = 100
_OTHERS = frozenset({"leave", "handover", "restore"})
"""Parts of a blackout that do not depend on bytes."""
_PATIENCE_S = 600.0
"""Of ``gpumove move``, for a job that is to leave and for one that is to arrive."""


@dataclass(frozen=True)
class Link:
    """The way between the stores, and what a move takes besides bytes. None is unknown."""

    rate_bytes_s: Range | None
    how: str
    handover_s: Range | None = None
    save_s: Range | None = None
    """From the job's last step to the commit of it."""
    restore_s: Range | None = None
    """At the target, once it has all."""


@dataclass(frozen=True)
class Transfer:
    """What a move would send, and for how long nobody would train. None is unknown, and ``unknown`` says why."""

    rounds: Range | None = None
    """Before the job is stopped."""
    nbytes: Range | None = None
    """In all."""
    first_s: Range | None = None
    """The first round, which copies all."""
    copy_s: Range | None = None
    """All of them, beside the training."""
    blackout_s: Range | None = None
    parts: dict[str, Range] = field(default_factory=dict)
    """Of the blackout: those that are known."""
    keeps_up: bool | None = None
    """Whether commits bring no more than the link carries until the next one."""
    why: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def at_least_s(self) -> float:
        """What is known of the blackout is this long."""
        return sum(part.low for part in self.parts.values())

    @property
    def bounds_s(self) -> Range | None:
        """The blackout for sums of hours and dollars, to which it matters little: each part that nobody has measured
        takes from nothing to what a move has patience for."""
        if self.blackout_s is not None or not self.parts:
            return self.blackout_s
        known = total(*self.parts.values())
        assert known is not None
        return Range(known.low, known.value, known.high + _PATIENCE_S * len(_OTHERS - self.parts.keys()))


def expect(full_bytes: float | None, delta_bytes: Range | None, every_s: Range | None, link: Link) -> Transfer:
    """From bytes and a rate to a move.

    Args:
        full_bytes: what the target lacks at the beginning.
        delta_bytes: what a commit brings.
        every_s: seconds between two commits.
        link: the way.
    """
    rate = link.rate_bytes_s
    if full_bytes is None or rate is None:
        why = "what is sent: no bytes are known" if full_bytes is None else f"how long it takes: {link.how}"
        return Transfer(unknown=(why,))
    first_s = Range.exact(full_bytes) / rate
    if delta_bytes is None or every_s is None:
        why = "rounds, bytes and blackout: it is not known what a commit brings, or how often one comes"
        return Transfer(first_s=first_s, unknown=(why,))
    likely = _course(full_bytes, delta_bytes.value, every_s.value, rate.value)
    # Fewer rounds are not always better: both ends, and what lies between them, make the range.
    others = [
        _course(full_bytes, delta_bytes.low, every_s.high, rate.high),
        _course(full_bytes, delta_bytes.high, every_s.low, rate.low),
    ]
    parts = {
        "behind": Range.over(likely.behind_s, *(c.behind_s for c in others), 0.0),
        "last_delta": Range.over(likely.last_s, *(c.last_s for c in others)),
    }
    also = {"leave": link.save_s, "handover": link.handover_s, "restore": link.restore_s}
    parts |= {name: found for name, found in also.items() if found is not None}
    missing = [name for name, found in also.items() if found is None]
    unknown = (f"the whole blackout: nobody has measured {' and '.join(missing)}",) if missing else ()
    return Transfer(
        rounds=Range.over(likely.rounds, *(c.rounds for c in others)),
        nbytes=Range.over(likely.nbytes, *(c.nbytes for c in others)),
        first_s=first_s,
        copy_s=Range.over(likely.copy_s, *(c.copy_s for c in others)),
        blackout_s=None if missing else total(*parts.values()),
        parts=parts, keeps_up=likely.keeps_up, why=likely.why, unknown=unknown,
    )  # fmt: skip


@dataclass(frozen=True)
class _Course:
    rounds: int
    nbytes: float
    copy_s: float
    behind_s: float
    last_s: float
    keeps_up: bool
    why: str


def _course(full_bytes: float, delta_bytes: float, every_s: float, rate_bytes_s: float) -> _Course:
    """One move: rounds until what is lacking is no more than a commit brings, or until a round does not help."""
    expected = forecast(Measured(rate_bytes_s, delta_bytes, every_s))
    rounds, sent, seconds, left = 0, 0.0, 0.0, full_bytes
    while rounds < _MOST_ROUNDS:
        took = left / rate_bytes_s
        rounds, sent, seconds = rounds + 1, sent + left, seconds + took
        # What the job commits meanwhile; never more than to begin anew would be.
        left = min(full_bytes, took / every_s * delta_bytes)
        if left <= delta_bytes or not expected.converges:
            break
    nbytes = sent + left + delta_bytes
    last_s = expected.parts["last_delta"]
    return _Course(rounds, nbytes, seconds, left / rate_bytes_s, last_s, expected.converges, expected.why)
