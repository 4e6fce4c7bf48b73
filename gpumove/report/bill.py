"""What a run has cost so far: hours by prices that were said, or of a dated table. Pure; unknown stays unknown."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpumove.errors import ConfigError
from gpumove.estimates.costs import egress
from gpumove.estimates.facts import device_of
from gpumove.estimates.interval import Range, product, total
from gpumove.estimates.outlook import lies_at
from gpumove.estimates.places import Place, place
from gpumove.estimates.tables import Gpus, Prices, our_gpus, read_prices
from gpumove.report.compare import Comparison, Line, fingerprint

_HOURS = Range.exact(1 / 3600)
_OPTIONS = ("--from", "--to")


@dataclass(frozen=True)
class Rates:
    """What a person says of prices."""

    hourly: tuple[float, ...] = ()
    """Of all machines: one for all sides, or one for each. They win over the table."""
    places: tuple[str | None, ...] = ()
    """Of each side: ``provider:region:[Nx]instance[:spot]``."""
    prices: str | None = None
    """A table of the user's own, for the places."""


@dataclass(frozen=True)
class Item:
    """One side, or the bytes of the move. What is unknown is None, and ``why`` says what to do about it."""

    label: str
    trained_s: float | None = None
    hourly: Range | None = None
    """Of all machines."""
    cost: Range | None = None
    why: str = ""
    """Where the price is from."""


@dataclass(frozen=True)
class Bill:
    """All sides, and what left the old place."""

    items: tuple[Item, ...]
    sent: Item | None
    """None if nothing was moved."""
    unit: str
    """``$``, or "" where all prices were said, in any currency."""

    @property
    def machines(self) -> Range | None:
        """All of their hours. Of two sides of which only one is known, nothing is."""
        return total(*(item.cost for item in self.items))


def reckon(found: Comparison, rates: Rates) -> Bill:
    """Put hours and prices together.

    Args:
        found: both sides.
        rates: what was said.

    Raises:
        ConfigError: there are more prices or places than sides, or a place is none.
    """
    sides = len(found.lines)
    if len(rates.hourly) > sides:
        raise ConfigError(
            f"{len(rates.hourly)} prices per hour were said of {'two sides' if sides == 2 else 'one side'}: "
            "one for all is enough, or one for each"
        )
    if any(rates.places[sides:]):
        raise ConfigError("the run was not moved, as far as its log goes back: it has no --to")
    table, gpus = read_prices(rates.prices), our_gpus()
    places = [None if text is None else place(text, table, gpus) for text in (*rates.places, None, None)[:sides]]
    said = rates.hourly * sides if len(rates.hourly) == 1 else (*rates.hourly, None, None)
    items = []
    for line, usd, where, option in zip(found.lines, said, places, _OPTIONS):
        if usd is not None:
            item = Item(line.label, line.trained_s, Range.exact(usd), why="as said")
        elif where is not None:
            item = _listed(found, line, where, gpus)
        else:
            item = Item(line.label, line.trained_s, why=f"say where it trained ({option}), or its price (--hourly)")
        items.append(replace(item, cost=product(item.hourly, Range.exact(line.trained_s), _HOURS)))
    return Bill(tuple(items), _sent(found, places, table), "$" if any(places) else "")


def _listed(found: Comparison, line: Line, where: Place, gpus: Gpus) -> Item:
    """By the table's row."""
    item = Item(line.label, line.trained_s)
    machines = where.count(max((save.at.world_size for save in line.saves), default=None))
    if machines is None or where.usd_per_h is None:
        missing = where.unknown or (f"how many {where.instance} there were: say it, as in 2x{where.instance}",)
        return replace(item, why="; ".join(missing))
    why = f"{machines} x {where.instance}, list price: {where.source}"
    device = device_of(fingerprint(found.histories, line))
    known = gpus.called(device or "")
    if known is not None and where.gpu is not None and known != where.gpu:
        why += f". The manifests say {device}, though, which is no {where.gpu.name}"
    return replace(item, hourly=product(where.usd_per_h, Range.exact(machines)), why=why)


# -------------------------------------------------------------------- what left the old place


def _sent(found: Comparison, places: list[Place | None], table: Prices) -> Item | None:
    if found.move is None:
        return None
    source, target, nbytes = places[0], places[-1], sent_bytes(found)
    item = Item("what the move sent")
    if nbytes is None:
        return replace(item, why="the log does not say how many bytes that were")
    if source is None or target is None:
        return replace(item, why="say both places (--from and --to)")
    url = found.histories[0].url if len(found.histories) == 2 else found.move.other
    cost = egress(Range.exact(nbytes), lies_at(url, source), target, table)
    if isinstance(cost, str):
        return replace(item, why=cost)
    return replace(item, cost=cost, why=f"egress of {source.provider}, list price")


def sent_bytes(found: Comparison) -> int | None:
    """What the mover has sent, as either end's log says."""
    if found.move is None:
        return None
    told = [m.facts.get("sent_bytes") for h in found.histories for m in h.moves if m.move == found.move.move]
    return max((n for n in told if isinstance(n, int) and not isinstance(n, bool)), default=None)
