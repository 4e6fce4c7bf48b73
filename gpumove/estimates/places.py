"""Places to train at: provider, region and machines, as a user names them, with what the tables know of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpumove.errors import ConfigError
from gpumove.estimates.interval import Range
from gpumove.estimates.tables import Gpu, Gpus, Prices, price

_FORM = re.compile(r"(?P<provider>[\w-]+):(?P<region>[\w-]+):(?:(?P<many>\d+)x)?(?P<instance>[\w.-]+)(?P<spot>:spot)?")


@dataclass(frozen=True)
class Place:
    """Machines somewhere. What is not known of them is None, and ``unknown`` says why."""

    name: str
    provider: str
    region: str
    instance: str
    machines: int | None
    """None: as many as the run has GPUs for."""
    gpus_each: int | None
    gpu: Gpu | None
    usd_per_h: Range | None
    """Of one machine."""
    spot: bool
    source: str = ""
    """Where the price is from, and of what day."""
    unknown: tuple[str, ...] = ()

    def count(self, gpus: int | None) -> int | None:
        """Machines that it takes for so many GPUs."""
        if self.machines is not None:
            return self.machines
        return -(-gpus // self.gpus_each) if gpus and self.gpus_each else None


def place(text: str, prices: Prices, gpus: Gpus) -> Place:
    """Take ``provider:region:[Nx]instance[:spot]`` apart and look it up.

    Raises:
        ConfigError: it is not of that form.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None or match["many"] == "0":
        raise ConfigError(
            f"{text!r} is no place: write provider:region:instance, such as gcp:us-central1:a3-highgpu-8g, with 2x "
            "before the instance for two of them, and :spot after it for spot prices"
        )
    provider, region, instance, spot = match["provider"], match["region"], match["instance"], bool(match["spot"])
    many = int(match["many"]) if match["many"] else None
    row = prices.instance(provider, region, instance)
    if row is None:
        regions = prices.regions_of(provider, instance)
        where = f" in {region}, only in {', '.join(regions)}" if regions else ""
        why = (
            f"what {provider}:{instance} costs and has: the table of prices has no row for it{where}: give one "
            "(--prices-file)"
        )
        return Place(text, provider, region, instance, many, None, None, None, spot, unknown=(why,))
    gpu, given = gpus.named(row.gpu), row.spot_usd_per_h if spot else row.usd_per_h
    unknown = () if gpu else (f"what the GPU {row.gpu} can do: the table of GPUs has no row for it",)
    if given is None:
        kind = "spot" if spot else "on demand"
        unknown = (*unknown, f"what {provider}:{instance} costs {kind}: its row in the table of prices does not say")
    source = f"{row.source}, {row.read.isoformat()}"
    cost = None if given is None else price(given)
    return Place(text, provider, region, instance, many, row.gpus, gpu, cost, spot, source, unknown)
