"""How a move would go: rounds, bytes, time, blackout. It has the move's own arithmetic decide (move/rounds.py,
move/cutover.py), over numbers of which only the bounds are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gpumove.config import Config
from gpumove.estimates.interval import Range, total
from gpumove.move.cutover import Standing, decide, is_steady, leave_s
from gpumove.move.rounds import Measured, crowded_below, forecast

_MOST_ROUNDS = 100
_SINCE, _SINCES = 0.5, (0.0, 0.99)
"""How long ago the last commit came, as a share of the time between two: where that is not known, and both ends."""
_OTHERS = frozenset({"leave", "handover", "restore"})
"""Parts of a blackout that do not depend on bytes."""
_UNDER_WAY_BYTES = Config.budget_bytes
"""Which a move may have sent and does not know to have arrived. Until that is little it takes the link to be fast."""
_HEARS_S = 3.0
"""From then on: it says so in the log, where the job looks for it."""
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
    packs: int = 1
    """In how many pieces that comes: each is sent as it is there."""
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


def expect(
    full_bytes: float | None,
    delta_bytes: Range | None,
    every_s: Range | None,
    link: Link,
    *,
    since_s: float | None = None,
) -> Transfer:
    """From bytes and a rate to a move.

    Args:
        full_bytes: what the target lacks at the beginning.
        delta_bytes: what a commit brings.
        every_s: seconds between two commits.
        link: the way.
        since_s: how long ago the last one came when the move begins. Longer than two take: there may be nobody.
    """
    rate = link.rate_bytes_s
    if full_bytes is None or rate is None:
        why = "what is sent: no bytes are known" if full_bytes is None else f"how long it takes: {link.how}"
        return Transfer(unknown=(why,))
    first_s = Range.exact(full_bytes) / rate
    if delta_bytes is None or every_s is None:
        why = "rounds, bytes and blackout: it is not known what a commit brings, or how often one comes"
        return Transfer(first_s=first_s, unknown=(why,))
    likely, *others = _courses(full_bytes, delta_bytes, every_s, rate, since_s)
    # Commits that come faster than they can be sent are held back, and the last delta is then one over all of them.
    most_s = 0.0 if all(c.keeps_up for c in (likely, *others)) else full_bytes / rate.low
    parts = {
        "behind": Range.over(likely.behind_s, *(c.behind_s for c in others)),
        "last_delta": Range.over(likely.last_s, *(c.last_s for c in others), max(likely.last_s, most_s)),
    }
    also = {"leave": _leave_s(link, parts["last_delta"]), "handover": link.handover_s, "restore": link.restore_s}
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


def _leave_s(link: Link, send_s: Range) -> Range | None:
    """What leaving adds to the time that the last bytes take."""
    if (save_s := link.save_s) is None:
        return None
    likely, *ends = (
        leave_s(saves, sends, link.packs)
        for saves, sends in ((save_s.value, send_s.value), (save_s.low, send_s.high), (save_s.high, send_s.low))
    )
    return Range.over(likely, *ends)


@dataclass(frozen=True)
class _Course:
    rounds: int
    nbytes: float
    copy_s: float
    behind_s: float
    last_s: float
    keeps_up: bool
    why: str


def _courses(full_bytes: float, delta: Range, every_s: Range, rate: Range, since_s: float | None) -> list[_Course]:
    """The likeliest first; then those of both ends of what is uncertain, and of when in its interval a commit comes.
    Fewer rounds are not always better, so that all of them together make the ranges."""
    numbers = [
        (delta.value, every_s.value, rate.value, False),
        (delta.low, every_s.high, rate.high, False),
        (delta.high, every_s.low, rate.low, True),
    ]
    lately = since_s is not None and 0 <= since_s < 2 * every_s.value
    likely = min(since_s / every_s.value, max(_SINCES)) if since_s is not None and lately else _SINCE
    return [_course(full_bytes, *found, since=since) for found in numbers for since in (likely, *_SINCES)]


def _course(
    full_bytes: float, delta_bytes: float, every_s: float, rate_bytes_s: float, late: bool, *, since: float
) -> _Course:
    """One move, as it would decide: rounds until nothing is lacking, or until they do not help.

    Args:
        full_bytes: of the first round.
        delta_bytes: of a commit.
        every_s: between two commits.
        rate_bytes_s: of the link.
        late: commits that take too much of the link are held back only after the first round.
        since: how long ago the last commit came when it begins, as a share of the time between two.
    """
    found = Measured(rate_bytes_s, delta_bytes, every_s)
    expected, held_s = forecast(found), _held_s(full_bytes, found, late=late)
    rounds, steady, sent, now, commits = 0, 0, 0.0, 0.0, 0
    left: int | None = int(full_bytes)
    while rounds < _MOST_ROUNDS:
        # Nobody knows how long a step takes: what is lacking is supposed to go over after the job's last one.
        now_s = expected if left is None else forecast(found, behind=left / rate_bytes_s)
        standing = Standing(now_s, left, delta_bytes, rounds, steady)
        if left is None or decide(standing, None).is_end:
            break
        steady += is_steady(standing)
        rounds, sent, now = rounds + 1, sent + left, now + left / rate_bytes_s
        before, commits = commits, int(min(now, held_s) / every_s + since)
        # Never more than to begin anew would be.
        left = int(min(full_bytes, (commits - before) * delta_bytes)) or None
    behind = left or 0
    last_s = expected.parts["last_delta"]
    nbytes = sent + behind + delta_bytes
    return _Course(rounds, nbytes, now, behind / rate_bytes_s, last_s, expected.converges, expected.why)


def _held_s(full_bytes: float, found: Measured, *, late: bool) -> float:
    """How long after the beginning the job holds back commits that take too much of the link; infinite if none do.

    In the first round a move takes for sent what is under way, and finds the link slower the longer that takes.
    """
    assert found.rate_bytes_s is not None
    assert found.delta_bytes is not None
    assert found.every_s is not None
    rate, least = found.rate_bytes_s, crowded_below(found.delta_bytes, found.every_s)
    if rate >= least:
        return math.inf
    known_s = full_bytes / rate if late else min(full_bytes / least, _UNDER_WAY_BYTES / (least - rate))
    return known_s + _HEARS_S
