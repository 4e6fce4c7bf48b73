"""Is a move worth it: one word, its reasons, and how sure it is. It judges numbers and makes none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gpumove.estimates.costs import Costs
from gpumove.estimates.interval import Range
from gpumove.estimates.speed import Fit
from gpumove.estimates.transfer import Transfer

Answer = Literal["go", "stay", "unsure", "unknown", "impossible"]


@dataclass(frozen=True)
class Verdict:
    """``go`` and ``stay`` hold over the whole range of what is uncertain; ``unsure`` only for the likeliest values."""

    answer: Answer
    reasons: tuple[str, ...]


def judge(costs: Costs, transfer: Transfer, fit: Fit, ratio: Range | None, *, spot: bool) -> Verdict:
    """From numbers to a word."""
    if fit.answer == "no":
        return Verdict("impossible", (f"it does not fit: {fit.why}",))
    reasons = list(_money(costs))
    if transfer.keeps_up is False:
        reasons.append(transfer.why)
    if ratio is not None:
        reasons.append(_speed(ratio))
    if fit.answer == "unknown":
        reasons.append(f"whether it fits is not known: {fit.why}")
    if spot:
        reasons.append("a spot machine may be taken away; what that costs is not counted")
    return Verdict(_answer(costs.saving_usd), tuple(reasons))


def _answer(saving: Range | None) -> Answer:
    if saving is None:
        return "unknown"
    if saving.low > 0:
        return "go"
    return "stay" if saving.high <= 0 else "unsure"


def _money(costs: Costs) -> Iterator[str]:
    saving = costs.saving_usd
    if saving is None:
        yield "what it saves is not known"
        return
    kind = "saves" if saving.value > 0 else "costs more than staying, by"
    likely = f"it {kind} some {abs(saving.value):,.0f} $"
    if saving.low < 0 < saving.high:
        yield f"{likely}; but from {-saving.low:,.0f} $ lost to {saving.high:,.0f} $ saved, all is possible"
    else:
        ends = sorted((abs(saving.low), abs(saving.high)))
        yield f"{likely} ({ends[0]:,.0f} to {ends[1]:,.0f})"
    even, left = costs.break_even_h, costs.stay_h
    if even is None:
        yield "it may never pay, however much work remains: an hour of work may cost more there"
    elif left is not None:
        most = f"({even.low:.1f} to {even.high:.1f})"
        yield f"it has paid after {even.value:.1f} hours of work {most} of {left.value:.1f}"


def _speed(ratio: Range) -> str:
    return f"steps take some {ratio.value:.2f} of what they take now ({ratio.low:.2f} to {ratio.high:.2f})"
