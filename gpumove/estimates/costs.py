"""What staying and going cost: dollars, from hours, prices and bytes. What needs a number that nobody knows is None."""

from __future__ import annotations

from dataclasses import dataclass

from gpumove.estimates.interval import Range, product, total
from gpumove.estimates.places import Place
from gpumove.estimates.tables import Egress, Prices, Tier, price

_GB = 1e9
_HOURS = Range.exact(1 / 3600)


@dataclass(frozen=True)
class Situation:
    """What costs are made of. None is unknown."""

    remaining_h: Range | None
    """At the source's speed."""
    ratio: Range | None
    """A step's time at the target as a multiple of the source's."""
    source_usd_h: Range | None
    target_usd_h: Range | None
    """Of all machines."""
    egress_usd: Range | None
    copy_s: Range | None
    blackout_s: Range | None
    committed_h: float = 0.0
    """Hours from now that are paid at the source in any case."""


@dataclass(frozen=True)
class Costs:
    """In US dollars and hours. None is unknown."""

    stay_h: Range | None = None
    """Until the job is done where it is."""
    go_h: Range | None = None
    """Until it is done at the target, from the moment that it stops here."""
    stay_usd: Range | None = None
    go_usd: Range | None = None
    """With what going costs once."""
    egress_usd: Range | None = None
    double_usd: Range | None = None
    """The target's machines, which wait while it is copied, and both ends', while nobody trains."""
    lost_usd: Range | None = None
    """What is paid at the source for hours that nobody uses any more."""
    once_usd: Range | None = None
    """These three."""
    saving_usd: Range | None = None
    """Of going. Below 0, it costs more."""
    break_even_h: Range | None = None
    """Hours of work, at the source's speed, after which going has paid. None: it may never, or that is unknown."""


def reckon(now: Situation) -> Costs:
    """All of it, from one situation."""
    copy_h, blackout_h = product(now.copy_s, _HOURS), product(now.blackout_s, _HOURS)
    both_usd_h = total(now.source_usd_h, now.target_usd_h)
    double_usd = total(product(copy_h, now.target_usd_h), product(blackout_h, both_usd_h))
    lost_usd = product(Range.exact(now.committed_h), now.source_usd_h) if now.committed_h else Range.exact(0.0)
    once_usd = total(now.egress_usd, double_usd, lost_usd)
    worked_h = product(now.remaining_h, now.ratio)
    paid_h = None if now.remaining_h is None else _at_least(now.remaining_h, now.committed_h)
    # What an hour of work here costs less there. The hours are the same in both, and so is what nobody knows of them.
    hourly_usd = _minus(now.source_usd_h, product(now.ratio, now.target_usd_h))
    idle_usd = product(_minus(paid_h, now.remaining_h, together=True), now.source_usd_h)
    return Costs(
        stay_h=now.remaining_h,
        go_h=total(worked_h, blackout_h),
        stay_usd=product(paid_h, now.source_usd_h),
        go_usd=total(product(worked_h, now.target_usd_h), once_usd),
        egress_usd=now.egress_usd,
        double_usd=double_usd,
        lost_usd=lost_usd,
        once_usd=once_usd,
        saving_usd=_minus(total(product(now.remaining_h, hourly_usd), idle_usd), once_usd),
        break_even_h=once_usd / hourly_usd if once_usd and hourly_usd and hourly_usd.low > 0 else None,
    )


def _minus(left: Range | None, right: Range | None, *, together: bool = False) -> Range | None:
    """The difference; of two that are certain or uncertain ``together``, end by end."""
    if left is None or right is None:
        return None
    if not together:
        return left - right
    return Range(*sorted((left.low - right.low, left.value - right.value, left.high - right.high)))


def _at_least(found: Range, least: float) -> Range:
    return Range(max(found.low, least), max(found.value, least), max(found.high, least))


# -------------------------------------------------------------------- egress


def egress(nbytes: Range | None, source: tuple[str, str] | None, target: Place, prices: Prices) -> Range | str:
    """What it costs to get these bytes out of the source, or why that is unknown.

    Args:
        nbytes: of the whole move.
        source: provider and region that the data lies in; the region may be "".
        target: where it goes.
        prices: the table.
    """
    if nbytes is None:
        return "what egress costs: it is not known how much is sent"
    if source is None:
        return "what egress costs: it is not known which provider the data lies at (--from)"
    provider, region = source
    row = prices.egress_from(provider, region)
    if row is None:
        return f"what egress costs: the table of prices has no row for {provider}"
    if provider != target.provider:
        return internet(row, nbytes)
    if region == target.region:
        return Range.exact(0.0)
    if row.inter_region_usd_per_gb is None:
        return f"what egress costs: the row of {provider} has no price between regions"
    if not region:
        # The same provider, but who knows whether the same region.
        return Range(0.0, *_ends(nbytes / _GB * price(row.inter_region_usd_per_gb))[1:])
    return nbytes / _GB * price(row.inter_region_usd_per_gb)


def _ends(found: Range) -> tuple[float, float, float]:
    return found.low, found.value, found.high


def internet(row: Egress, nbytes: Range) -> Range:
    """By volume. At the least, what is free of a month's volume is still free; at the most, all of it is used up, and
    this goes at the first volume's price."""
    low, value, high = (size / _GB for size in _ends(nbytes))
    return Range(
        _tiers(row.internet, max(0.0, low - row.free_gb), end="low"),
        _tiers(row.internet, max(0.0, value - row.free_gb), end="value"),
        _tiers(row.internet, high, end="high"),
    )


def _tiers(tiers: tuple[Tier, ...], gb: float, *, end: str) -> float:
    usd, below = 0.0, 0.0
    for tier in tiers:
        top = float("inf") if tier.up_to_gb is None else tier.up_to_gb
        usd += max(0.0, min(gb, top) - below) * float(getattr(price(tier.usd_per_gb), end))
        below = top
    return usd
