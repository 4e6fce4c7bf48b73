"""Recorded steps against the same steps trained again: the certificate. Pure; docs/parity.md has the reasons."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from gpumove.errors import ConfigError, ParityError
from gpumove.format.manifest import TraceRow
from gpumove.parity import causes
from gpumove.parity.rows import DICE, NUMBERS, STATE, Setting, Table, said
from gpumove.parity.trace import number
from gpumove.words import percent

Verdict = Literal["bitwise", "within tolerance", "different", "unknown"]
BITWISE: Verdict = "bitwise"
WITHIN: Verdict = "within tolerance"
DIFFERENT: Verdict = "different"
UNKNOWN: Verdict = "unknown"
_JUMP = 100.0
"""Rounding grows from step to step, but not by so much."""


class Compared(msgspec.Struct, frozen=True):
    """One step. Losses that are no finite numbers are words; None was not told."""

    step: int
    before: float | str | None
    after: float | str | None
    relative: float | None
    """Difference of the losses over the recorded one; None also if it is infinite: see ``differs``."""
    differs: tuple[str, ...]


class First(msgspec.Struct, frozen=True):
    """The first difference that counts."""

    step: int
    fact: str
    before: float | str | None
    after: float | str | None


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a job is the one that it was."""

    verdict: Verdict
    why: str
    """One sentence, or two."""
    cause: str
    """The likeliest, as a word of docs/parity.md; "" if there is nothing to explain."""
    setting: Setting
    tolerance: float
    largest: float | None
    """Largest relative difference of a loss; None if none was compared, or one is no number."""
    largest_step: int | None
    first: First | None
    steps: tuple[Compared, ...]
    time: float

    @property
    def good(self) -> bool:
        """Whether it is the same job, as far as its numbers tell."""
        return self.verdict in (BITWISE, WITHIN)

    @property
    def text(self) -> str:
        """The verdict in words."""
        return f"{self.verdict}: {self.why}"

    def check(self) -> None:
        """Go on only if it is good.

        Raises:
            ParityError: the numbers differ (code ``parity.different``), or nothing tells (``parity.unknown``).
        """
        if not self.good:
            word = "different" if self.verdict == DIFFERENT else "unknown"
            raise ParityError(f"{self.setting.url} after step {self.setting.step}: {self.text}", code=f"parity.{word}")


def read_certificate(path: str | Path) -> Certificate:
    """A certificate that ``gpumove certify --output`` has written.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Certificate)
    except (OSError, msgspec.MsgspecError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} is no certificate that can be read: {why}") from error


def judge(recorded: Sequence[TraceRow], replayed: Sequence[TraceRow], setting: Setting) -> Certificate:
    """The certificate.

    Args:
        recorded: rows of the run, oldest first.
        replayed: rows of the same steps, trained again.
        setting: what is known besides.
    """
    before, after = {row.step: row for row in recorded}, {row.step: row for row in replayed}
    pairs = [(before[step], after[step]) for step in sorted(before.keys() & after.keys())]
    table = Table(pairs, setting)
    verdict, cause, why, first = _verdict(table)
    largest = max(((r, s) for s, r in table.losses.items()), default=None, key=lambda found: found[0])
    finite = largest is not None and math.isfinite(largest[0])
    return Certificate(
        verdict=verdict, why=why, cause=cause, setting=setting, tolerance=table.tolerance,
        largest=largest[0] if largest and finite else None, largest_step=largest[1] if largest else None,
        first=first, steps=tuple(_compared(table, b, a) for b, a in pairs), time=time.time(),
    )  # fmt: skip


def _verdict(table: Table) -> tuple[Verdict, str, str, First | None]:
    """Verdict, cause, sentence, and the first difference that counts."""
    setting = table.setting
    few = _few(setting, len(table.pairs))
    dice, beyond, onset = table.first(DICE), table.beyond(), table.first(NUMBERS)
    # Generators that stand elsewhere are a cause if numbers differ: a loader's iterator draws a seed, used or not.
    facts = [fact for fact in (table.first(STATE), dice if beyond else None) if fact and _explains(fact, beyond)]
    if facts:
        step, fact = min(facts, key=lambda found: found[0])
        return DIFFERENT, causes.BY_FACT[fact], causes.of_fact(fact, step) + few, _first(table, step, fact)
    if beyond is not None:
        step, fact = beyond
        earlier = [relative for at, relative in table.relative[fact].items() if at < step]
        size = table.relative[fact][step]
        cause = causes.of_numbers(
            earlier=len(earlier), fact=fact, same_world=table.same_world,
            jumped=not earlier or size > _JUMP * earlier[-1],
        )  # fmt: skip
        first = _first(table, step, fact)
        far = f"differs by {percent(size)}" if math.isfinite(size) else f"was {first.before} and is {first.after}"
        why = f"{causes.NAMES[fact]} of step {step} {far}: {causes.WORDS[cause]}"
        if cause == causes.MODEL and not {"samples", "rank_samples"} & set(table.known[step]):
            why += causes.BLIND
        return DIFFERENT, cause, why + _machines(setting, cause) + few, first
    numbers = [step for step, known in table.known.items() if "loss" in known or "grad_norm" in known]
    if not numbers:
        return UNKNOWN, "", _nothing(table) + few, None
    span = f"{len(numbers)} step{'s' * (len(numbers) != 1)} ({numbers[0]} to {numbers[-1]})"
    apart = dice or onset
    if apart is None:
        named = [causes.NAMES[n] for n in ("loss", "grad_norm", "samples", "rank_samples", "lr", "rng")
                 if any(n in known for known in table.known.values())]  # fmt: skip
        return BITWISE, "", f"{span} gave the same bits: {', '.join(named)}" + few, None
    cause = causes.RNG if dice else causes.NUMERICS
    why = f"in {span} {_within(table, onset)}"
    if dice is not None:
        why += f", but {causes.of_fact(dice[1], dice[0])}. What draws later will not be the same"
    return WITHIN, cause, why + _machines(setting, cause) + few, _first(table, *apart)


def _within(table: Table, onset: tuple[int, str] | None) -> str:
    if onset is None:
        return "every loss has the same bits"
    worst = max(table.losses.values(), default=0.0)
    why = f"no loss differs by more than {percent(worst)}; {causes.NAMES[onset[1]]} differs from step {onset[0]} on"
    return why + ("; losses are rounded to bfloat16, which hides smaller differences" if table.coarse else "")


def _explains(fact: tuple[int, str], beyond: tuple[int, str] | None) -> bool:
    """Whether it came before the numbers. A learning rate is that after its step: it cannot have moved that loss."""
    return beyond is None or fact[0] < beyond[0] or (fact[0] == beyond[0] and fact[1] != "lr")


def _few(setting: Setting, compared: int) -> str:
    if compared >= setting.asked:
        return ""
    if compared < setting.recorded:
        return f" (only {compared} of {setting.recorded} recorded steps were trained again)"
    return f" (no more than {setting.recorded} of the {setting.asked} steps asked for were recorded)"


def _nothing(table: Table) -> str:
    if not table.pairs:
        return "no step that was recorded was trained again: the script ended before, or counts its steps otherwise"
    told = [any(number(row, "loss") is not None for row in rows) for rows in zip(*table.pairs.values())]
    side = "the run did not record" if not told[0] else "the job did not tell"
    return f"{side} a loss or a gradient norm: give loss= and grad_norm= to ckpt.step()"


def _machines(setting: Setting, cause: str) -> str:
    if cause not in (causes.NUMERICS, causes.MODEL, causes.WORLD_SIZE):
        return ""
    words = list(setting.differences[:3])
    if setting.world_sizes[0] != setting.world_sizes[1]:
        words.insert(0, setting.ranks)
    return f"; the machines differ: {', '.join(words)}" if words else ""


def _first(table: Table, step: int, fact: str) -> First:
    before, after = table.pairs[step]
    return First(step, fact, said(before, fact), said(after, fact))


def _compared(table: Table, before: TraceRow, after: TraceRow) -> Compared:
    relative = table.losses.get(before.step)
    finite = relative is not None and math.isfinite(relative)
    return Compared(before.step, said(before, "loss"), said(after, "loss"), relative if finite else None,
                    table.differs[before.step])  # fmt: skip
