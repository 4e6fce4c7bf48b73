"""Whether a job trains as it did where it comes from: its steps after a move against what was usual before. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec

from gpumove.format.manifest import Move, TraceRow
from gpumove.parity.trace import number
from gpumove.parity.usual import LEAST_ROWS, MOST_ROWS, WINDOWS, Rise, Usual, usual
from gpumove.steptimes import SLOWER, in_words

LOSS_ABOVE = 0.01
"""A loss that is so much higher is told, if chance does not explain it."""
_WARM = 10
"""Steps whose time does not count: what is compiled, and what is read for the first time, takes long once."""
_WILD = 3
"""Losses in a row that are no numbers, in a run that has had such."""


class Baseline(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the source's steps were like, in a few numbers: they travel in an entry of the log."""

    step: int
    """The newest that is in it."""
    loss: Usual | None = None
    seconds: Usual | None = None
    wild: int = 0
    """Losses that were no finite number."""


def baseline(rows: Iterable[TraceRow]) -> Baseline | None:
    """From what was recorded of the source's steps, in any order; None if nothing was."""
    newest = sorted({row.step: row for row in rows}.values(), key=lambda row: row.step)[-MOST_ROWS:]
    if not newest:
        return None
    losses = [loss for row in newest if (loss := number(row, "loss")) is not None]
    finite = [loss for loss in losses if math.isfinite(loss)]
    seconds = [taken for row in newest if (taken := number(row, "s")) is not None and 0 < taken < math.inf]
    return Baseline(newest[-1].step, usual(finite), usual(seconds), len(losses) - len(finite))


def from_facts(facts: Any) -> Baseline | None:
    """A baseline as a log entry has it; None if it is none."""
    try:
        return None if facts is None else msgspec.convert(facts, Baseline)
    except msgspec.ValidationError:
        return None


@dataclass(frozen=True)
class Found:
    """Something is not as it was: ``loss``, ``nan`` or ``time``."""

    what: str
    step: int
    text: str


class Judge:
    """One job's steps since a move.

    Args:
        before: what the source was like; None if that is not known.
        ratio: what a step takes here over what it took there; None if that is not known.
    """

    def __init__(self, before: Baseline | None, ratio: float | None) -> None:
        self._ratio, self._before = ratio, before
        loss, seconds = (before.loss, before.seconds) if before is not None else (None, None)
        self._loss = None if loss is None else Rise(loss, floor=LOSS_ABOVE)
        timed = seconds is not None and ratio is not None and ratio > 0
        self._time = Rise(seconds, floor=SLOWER, scale=1 / ratio) if timed and seconds and ratio else None
        self._patience = _WILD if before is not None and before.wild else 1
        self._wild, self._timed = 0, 0
        self._losses: list[float] = []
        self._told: set[str] = set()

    def add(self, step: int, loss: float | None, seconds: float | None) -> list[Found]:
        """One more step; what is found from here on. Each kind is found once."""
        found = [self._look_at_loss(step, loss), self._look_at_time(step, seconds)]
        new = [f for f in found if f is not None and f.what not in self._told]
        self._told.update(f.what for f in new)
        return new

    def _look_at_loss(self, step: int, loss: float | None) -> Found | None:
        if loss is None:
            return None
        if not math.isfinite(loss):
            self._wild += 1
            if self._wild < self._patience:
                return None
            return Found("nan", step, f"the loss is {loss}")
        self._wild = 0
        self._losses = [*self._losses[1 - WINDOWS[-1] :], loss]
        risen = None if self._loss is None else self._loss.add(loss)
        if risen is None or self._loss is None:
            return None
        window, now, limit = risen
        level = self._loss.before.level
        return Found(
            "loss", step,
            f"the loss is {now:.4g}, as the median of {window} steps, {_above(now, level)} the {level:.4g} that it had "
            f"at the source; chance and {LOSS_ABOVE:.0%} explain at most {limit:.4g}",
        )  # fmt: skip

    def _look_at_time(self, step: int, seconds: float | None) -> Found | None:
        if self._time is None or seconds is None or self._ratio is None:
            return None
        self._timed += 1
        risen = self._time.add(seconds) if self._timed > _WARM else None
        if risen is None:
            return None
        window, now, limit = risen
        expected, above = self._time.before.level * self._ratio, _above(now, self._time.before.level)
        scaled = "" if self._ratio == 1 else f", times {self._ratio:.3g}"
        return Found(
            "time", step,
            f"a step takes {in_words(now * self._ratio)}, as the median of {window}, {above} "
            f"the {in_words(expected)} that are to be expected (as at the source{scaled}); chance and {SLOWER:.0%} "
            f"explain at most {in_words(limit * self._ratio)}",
        )  # fmt: skip

    def unjudged(self) -> list[str]:
        """What cannot be compared, and why."""
        said = []
        if self._loss is None:
            said.append(f"the loss, because {_lacking('losses')}")
        if self._before is None or self._before.seconds is None:
            said.append(f"the step time, because {_lacking('step times')}")
        elif self._ratio is None:
            said.append("the step time, because these are other devices, or another number of them, and nobody has "
                        "said how fast they are (gpumove move --step-ratio)")  # fmt: skip
        return said

    def standing(self) -> dict[str, float]:
        """How it looks so far: medians here and there."""
        facts: dict[str, float] = {}
        if len(self._losses) >= WINDOWS[0] // 2:
            facts["loss"] = median(self._losses)
        if self._loss is not None:
            facts |= {"loss_before": self._loss.before.level, "loss_most": min(self._loss.limits())}
        if self._time is not None and self._ratio is not None:
            now = self._time.now
            facts |= {"s_expected": self._time.before.level * self._ratio}
            facts |= {} if now is None else {"s": now * self._ratio}
        return {name: float(f"{value:.5g}") for name, value in facts.items()}


def _lacking(what: str) -> str:
    return f"the source has fewer than {LEAST_ROWS} recorded {what}"


def _above(now: float, level: float) -> str:
    return f"{now / level - 1:.1%} above" if level > 0 else f"{now - level:.4g} above"


def in_text(standing: dict[str, float], unjudged: Sequence[str]) -> str:
    """How it looks, for people."""
    said = []
    if "loss" in standing and "loss_before" in standing:
        said.append(f"loss {standing['loss']:.4g} against {standing['loss_before']:.4g} at the source")
    if "s" in standing:
        said.append(f"a step takes {in_words(standing['s'])}, and {in_words(standing['s_expected'])} are expected")
    if unjudged:
        said.append(f"not compared: {'; '.join(unjudged)}")
    return "; ".join(said)


# -------------------------------------------------------------------- in the log


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """``facts.watch`` of an entry: all that is known of one move's comparison."""

    handed: int
    """The step that was handed over."""
    steps: int
    """How many after it are compared."""
    epoch: int
    """The first one in which the job trained here."""
    baseline: dict[str, Any] | None = None
    ratio: float | None = None
    step: int | None = None
    """As far as it is compared."""
    findings: tuple[dict[str, Any], ...] = ()
    over: bool = False
    ended: str = ""
    """Why the job ended before that: ``finished``, ``left``, or the name of an error."""
    standing: dict[str, float] = {}
    unjudged: tuple[str, ...] = ()
    """What cannot be compared, and why."""


def told(move: Move | None) -> Told | None:
    """What the newest word of a move says of the comparison; None if nothing."""
    facts = None if move is None else move.facts.get("watch")
    try:
        return None if facts is None else msgspec.convert(facts, Told)
    except msgspec.ValidationError:
        return None
