"""The dated tables of GPUs and of prices, ours and the user's: read, checked, looked up. A row that is missing is None.

It knows files in YAML, never runs and never stores.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml
from msgspec import Struct

from gpumove.errors import ConfigError
from gpumove.estimates.interval import Range

Price = float | tuple[float, float, float]
"""A number, or the least that it may be, itself, and the most."""


def price(found: Price) -> Range:
    """As a range."""
    return Range(*found) if isinstance(found, tuple) else Range.exact(found)


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU's peak figures. What it does not have is None."""

    name: str
    names: tuple[str, ...]
    memory_gb: float
    bandwidth_gb_s: float
    source: str
    read: dt.date
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None


class Gpus(Struct, frozen=True, forbid_unknown_fields=True):
    """The table of GPUs."""

    collected: dt.date
    gpus: tuple[Gpu, ...]

    def named(self, name: str) -> Gpu | None:
        """The one of this name in the table."""
        return next((gpu for gpu in self.gpus if gpu.name == name), None)

    def called(self, device: str) -> Gpu | None:
        """The one that a driver calls so. Where two fit (``NVIDIA L4`` and ``NVIDIA L40S``) the longer one does."""
        fits = [(len(name), gpu) for gpu in self.gpus for name in gpu.names if _begins(device, name)]
        return max(fits, key=lambda fit: fit[0])[1] if fits else None


def _begins(device: str, name: str) -> bool:
    rest = device[len(name) :]
    return device.startswith(name) and (not rest or not rest[0].isalnum())


class Tier(Struct, frozen=True, forbid_unknown_fields=True):
    """What a month's volume costs up to some size; without one, all that is left."""

    usd_per_gb: Price
    up_to_gb: float | None = None


class Egress(Struct, frozen=True, forbid_unknown_fields=True):
    """What it costs to get data out of a place."""

    provider: str
    internet: tuple[Tier, ...]
    source: str
    read: dt.date
    region: str = "*"
    free_gb: float = 0.0
    inter_region_usd_per_gb: Price | None = None


class Instance(Struct, frozen=True, forbid_unknown_fields=True):
    """What a machine has and costs."""

    provider: str
    instance: str
    gpu: str
    gpus: int
    source: str
    read: dt.date
    region: str = "*"
    usd_per_h: Price | None = None
    spot_usd_per_h: Price | None = None


class Prices(Struct, frozen=True, forbid_unknown_fields=True):
    """The table of prices. The first row that fits counts."""

    collected: dt.date
    egress: tuple[Egress, ...] = ()
    instances: tuple[Instance, ...] = ()

    def under(self, own: Prices) -> Prices:
        """This table, with the rows of another one before its own."""
        return Prices(
            min(own.collected, self.collected), (*own.egress, *self.egress), (*own.instances, *self.instances)
        )

    def egress_from(self, provider: str, region: str) -> Egress | None:
        """What it costs to get data out of there."""
        return next((e for e in self.egress if e.provider == provider and fnmatchcase(region, e.region)), None)

    def instance(self, provider: str, region: str, name: str) -> Instance | None:
        """A machine's row."""
        rows = (i for i in self.instances if (i.provider, i.instance) == (provider, name))
        return next((row for row in rows if fnmatchcase(region, row.region)), None)

    def regions_of(self, provider: str, name: str) -> list[str]:
        """Where a machine has a price."""
        return sorted({i.region for i in self.instances if (i.provider, i.instance) == (provider, name)})


def our_gpus() -> Gpus:
    """The table of GPUs that comes with the package."""
    return _read(Gpus, _ours("gpus.yaml"), "gpus.yaml")


def read_prices(path: str | None = None) -> Prices:
    """The table of prices that comes with the package, below the rows of the user's own.

    Args:
        path: the user's table; ``-`` for standard input, so that a command can make it.

    Raises:
        ConfigError: it cannot be read, or is not such a table.
    """
    ours = _read(Prices, _ours("prices.yaml"), "prices.yaml")
    if path is None:
        return ours
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prices at {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return ours.under(_read(Prices, text, path))


def _ours(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


Table = TypeVar("Table", Gpus, Prices)


def _read(kind: type[Table], text: str, name: str) -> Table:
    try:
        found = msgspec.convert(yaml.safe_load(text), kind)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{name} is no table as docs/estimate.md describes it: {error}") from None
    if isinstance(found, Prices):
        _check(found, name)
    return found


def _check(prices: Prices, name: str) -> None:
    """What types do not say."""
    for row in prices.egress:
        bounds = [tier.up_to_gb for tier in row.internet]
        closed: Sequence[float] = [b for b in bounds[:-1] if b is not None]
        if not bounds or bounds[-1] is not None or len(closed) < len(bounds) - 1 or list(closed) != sorted(set(closed)):
            raise ConfigError(f"{name}: the volumes of {row.provider}'s egress must grow, and the last have no bound")
    given: list[Price | None] = [tier.usd_per_gb for row in prices.egress for tier in row.internet]
    given += [row.inter_region_usd_per_gb for row in prices.egress]
    given += [p for row in prices.instances for p in (row.usd_per_h, row.spot_usd_per_h)]
    for found in given:
        low, value, high = found if isinstance(found, tuple) else (found, found, found)
        if found is not None and not (low is not None and 0 <= low <= value <= high < float("inf")):  # type: ignore[operator]
            raise ConfigError(f"{name}: {found} is no price: a number from 0, or [low, value, high] in order")
    if wrong := [row.instance for row in prices.instances if row.gpus < 1]:
        raise ConfigError(f"{name}: {', '.join(wrong)} must have at least one GPU")
