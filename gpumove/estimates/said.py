"""What a person says of a run, a link and a target, checked; and a run's numbers and links under it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gpumove.errors import ConfigError
from gpumove.estimates.facts import Facts, Speed
from gpumove.estimates.interval import Range, product
from gpumove.estimates.probing import Probe, between
from gpumove.estimates.transfer import Link

_SHARE = 0.2
"""A rate that a person says may be off by this share."""
_ENTRIES = 3
"""Of a handover: the seal, the handover itself, and the job's claim."""
_UNMEASURED = "the link's rate is not known: measure it (--probe) or say it (--rate)"


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a person says. It wins over what the run has measured."""

    runs_at: str | None = None
    """Where the run trains: ``provider:region:[Nx]instance[:spot]``."""
    rate_bytes_s: float | Range | Sequence[float | Range] | None = None
    """Of the link: one for all targets, or one for each."""
    remaining_steps: int | None = None
    remaining_hours: float | None = None
    """Of work, at the source's speed."""
    state_bytes: float | None = None
    """Of the whole state, and so of the first copy."""
    delta_bytes: float | None = None
    every_s: float | None = None
    step_s: float | None = None
    save_s: float | None = None
    """From the job's last step to the commit of it."""
    handover_s: float | None = None
    """Three entries in a log: the seal, the handover, and the job's claim."""
    restore_s: float | None = None
    """At the target, once it has all."""
    peak_bytes: float | None = None
    """Of one GPU's memory."""
    committed_hours: float = 0.0
    """Hours from now that are paid at the source in any case."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Said:
        """From arguments.

        Raises:
            ConfigError: there is no such fact, or it cannot be.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ConfigError(f"unknown facts {unknown}; known ones are {sorted(known)}")
        found = cls(**given)
        named = {name: value for name, value in given.items() if name not in ("runs_at", "rate_bytes_s")}
        wrong = [name for name, value in named.items() if value is not None and not _is_number(value)]
        wrong += [name for name in ("every_s", "step_s") if given.get(name) == 0]
        wrong += [
            "rate_bytes_s" for rate in found.rates() if not isinstance(rate, Range) and not (_is_number(rate) and rate)
        ]
        wrong += ["rate_bytes_s" for rate in found.rates() if isinstance(rate, Range) and rate.low <= 0]
        if wrong:
            raise ConfigError(
                f"{', '.join(sorted(set(wrong)))}: a finite number from 0 is needed, and above 0 for rates and times"
            )
        return found

    def rates(self) -> list[float | Range]:
        """Those of the links; none if nothing was said."""
        given = self.rate_bytes_s
        if given is None:
            return []
        return list(given) if isinstance(given, Sequence) else [given]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def under(said: Said, found: Facts) -> Facts:
    """A run's numbers with those that were said in their place."""
    changes: dict[str, Any] = {}
    if said.state_bytes is not None:
        changes |= {"state_bytes": said.state_bytes, "full_bytes": said.state_bytes}
    for name in ("delta_bytes", "every_s", "save_s"):
        if (value := getattr(said, name)) is not None:
            changes[name] = Range.exact(value)
    if said.step_s is not None:
        now = Speed(Range.exact(said.step_s), found.ranks or 0, found.device, "as said")
        changes["speeds"] = (now, *found.speeds)
    unknown = {name: why for name, why in found.unknown.items() if name not in changes}
    return replace(found, **changes, unknown=unknown)


def links(said: Said, facts: Facts, probed: tuple[Probe | None, Probe] | None, many: int) -> list[Link]:
    """One for each target.

    Args:
        said: rates, and what a restore takes.
        facts: what a save takes, and a restore if nothing was said.
        probed: the source, if there is one, and the target.
        many: targets.

    Raises:
        ConfigError: there are neither one rate nor as many as targets.
    """
    restore_s = facts.restore_s if said.restore_s is None else Range.exact(said.restore_s)
    handover_s = product(Range.exact(_ENTRIES), probed[1].entry_s) if probed else None
    if said.handover_s is not None:
        handover_s = Range.exact(said.handover_s)
    rate, how = between(*probed) if probed else (None, _UNMEASURED)
    link = Link(rate, how, handover_s=handover_s, save_s=facts.save_s, packs=facts.packs, restore_s=restore_s)
    if rates := said.rates():
        if len(rates) not in (1, many):
            raise ConfigError(f"there are {len(rates)} rates for {many} targets: give one for all, or one for each")
        return [_with_rate(link, rate) for rate in (rates * many)[:many]]
    return [link] * many


def _with_rate(link: Link, given: float | Range) -> Link:
    if isinstance(given, Range):
        return replace(link, rate_bytes_s=given, how="as said")
    return replace(link, rate_bytes_s=Range.around(given, _SHARE), how=f"as said, give or take {_SHARE:.0%}")
