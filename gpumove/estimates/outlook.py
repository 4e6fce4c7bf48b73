"""What a move to one target would be: bytes, time, speed, fit, cost, verdict. It puts together what others reckon."""

from __future__ import annotations

from dataclasses import dataclass

from gpumove.estimates.costs import Costs, Situation, egress, reckon
from gpumove.estimates.facts import Facts
from gpumove.estimates.interval import Range, product
from gpumove.estimates.places import Place
from gpumove.estimates.said import Said
from gpumove.estimates.speed import Devices, Fit, compare, fits, ratio
from gpumove.estimates.tables import Gpus, Prices
from gpumove.estimates.transfer import Link, Transfer, expect
from gpumove.estimates.verdict import Verdict, judge
from gpumove.store.address import parse

_CLOUDS = {"gcs": "gcp", "azure": "azure"}
"""Whose address tells whose store it is. That of S3 does not: many speak it."""
_NO_TARGET = "no target was named"
_NO_FIT, _NO_COSTS, _NO_VERDICT = Fit("unknown", _NO_TARGET), Costs(), Verdict("unknown", (_NO_TARGET,))


@dataclass(frozen=True)
class Outlook:
    """What a move to one target would be."""

    target: Place | None
    transfer: Transfer
    rate_bytes_s: Range | None
    rate_how: str
    machines: int | None = None
    gpus: int | None = None
    mapping: str | None = None
    """The target's GPUs beside the source's: same, larger, smaller, different."""
    ratio: Range | None = None
    """A step's time there as a multiple of that here."""
    ratio_how: str = ""
    fit: Fit = _NO_FIT
    costs: Costs = _NO_COSTS
    verdict: Verdict = _NO_VERDICT
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """All that is the same for every target."""

    facts: Facts
    said: Said
    source: Place | None
    prices: Prices
    table: Gpus
    lies_at: tuple[str, str] | None
    """Provider and region of the data."""
    here: Devices | None
    gpus: int | None
    remaining_h: Range | None
    unknown: tuple[str, ...]

    @classmethod
    def of(cls, facts: Facts, said: Said, source: Place | None, prices: Prices, table: Gpus, src: str | None) -> Case:
        """From what is known and said."""
        unknown = list(source.unknown) if source else []
        gpu = source.gpu if source else table.called(facts.device or "")
        gpus = facts.ranks
        if source and source.gpus_each and (source.machines or gpus is None):
            gpus = source.gpus_each * (source.machines or 1)
        if source is None:
            unknown.append("what the run costs now: say where it trains (--from)")
            if gpu is None:
                what = f"the table of GPUs has no {facts.device}" if facts.device else "its manifests name no device"
                unknown.append(f"what the run's GPUs can do: {what}; say where it trains (--from)")
        elif (known := table.called(facts.device or "")) and gpu and known != gpu:
            unknown.append(f"on which GPUs it trains: its manifests say {known.name}; {gpu.name}, as was said, counts")
        remaining_h = None if said.remaining_hours is None else Range.exact(said.remaining_hours)
        if remaining_h is None and said.remaining_steps is not None:
            remaining_h = product(Range.exact(said.remaining_steps), facts.step_s, Range.exact(1 / 3600))
            if remaining_h is None:
                unknown.append("how much work remains: steps were said, and nobody knows how long one takes")
        elif remaining_h is None:
            unknown.append("how much work remains: say it (--remaining-steps or --remaining-hours)")
        here = Devices(gpu, gpus) if gpu and gpus else None
        found = lies_at(src, source)
        return cls(facts, said, source, prices, table, found, here, gpus, remaining_h, tuple(unknown))

    def outlook(self, target: Place | None, link: Link) -> Outlook:
        """For one target; for none, only what is sent."""
        facts = self.facts
        transfer = expect(facts.full_bytes, facts.delta_bytes, facts.every_s, link, since_s=facts.since_s)
        if target is None:
            return Outlook(None, transfer, link.rate_bytes_s, link.how, unknown=transfer.unknown)
        machines = target.count(self.gpus)
        gpus = machines * target.gpus_each if machines and target.gpus_each else None
        there = Devices(target.gpu, gpus) if target.gpu and gpus else None
        unknown = [*target.unknown, *transfer.unknown]
        if machines is None and not target.unknown:
            unknown.append(f"how many {target.instance} it takes: say it, as in 2x{target.instance}")
        found, how = self._ratio(there)
        if found is None:
            unknown.append(f"how long a step takes there: {how}")
        fit = Fit("unknown", "its GPUs are not known")
        if there is not None:
            peak_bytes = facts.peak_bytes if self.said.peak_bytes is None else self.said.peak_bytes
            fit = fits(there, state_bytes=facts.state_bytes, peak_bytes=peak_bytes, here=self.here)
        out = egress(transfer.nbytes, self.lies_at, target, self.prices)
        if isinstance(out, str):
            unknown.append(out)
        costs = reckon(
            Situation(
                remaining_h=self.remaining_h, ratio=found,
                source_usd_h=self._usd_h(self.source, self.gpus), target_usd_h=self._usd_h(target, self.gpus),
                egress_usd=None if isinstance(out, str) else out, copy_s=transfer.copy_s,
                blackout_s=transfer.bounds_s, committed_h=self.said.committed_hours,
            )
        )  # fmt: skip
        return Outlook(
            target, transfer, link.rate_bytes_s, link.how, machines, gpus,
            compare(self.here, there) if self.here and there else None, found, how, fit, costs,
            judge(costs, transfer, fit, found, spot=target.spot), tuple(unknown),
        )  # fmt: skip

    def _usd_h(self, where: Place | None, gpus: int | None) -> Range | None:
        machines = where.count(gpus) if where else None
        return product(where.usd_per_h, Range.exact(machines)) if where and machines else None

    def _ratio(self, there: Devices | None) -> tuple[Range | None, str]:
        """Measured where the run has trained on such GPUs before, else from peak figures."""
        now = self.facts.step_s
        if there is not None and now is not None:
            for speed in self.facts.speeds:
                gpu = self.table.called(speed.device or "")
                if (
                    speed is not self.facts.now
                    and gpu is not None
                    and (gpu.name, speed.ranks) == (there.gpu.name, there.count)
                ):
                    return speed.step_s / now, "measured: the run has trained on such GPUs"
        if self.here is None or there is None:
            return None, f"the GPUs {'here' if self.here is None else 'there'} are not known"
        alike = self.here.gpu == there.gpu
        how = "the same GPUs elsewhere" if alike else "from peak figures"
        return ratio(self.here, there), f"{how}; measured step times win as soon as there are any"


def lies_at(src: str | None, source: Place | None) -> tuple[str, str] | None:
    """Provider and region of the data, which is not always where the GPUs are."""
    provider = _CLOUDS.get(parse(src).family) if src else None
    if provider is not None and (source is None or source.provider != provider):
        return provider, ""
    return (source.provider, source.region) if source else None
