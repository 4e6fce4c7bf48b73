"""``gpumove.estimate``: a run's numbers, a link, the tables, and what a person says, put together for each target."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from gpumove.estimates.facts import Facts, read_facts
from gpumove.estimates.interval import Range
from gpumove.estimates.outlook import Case, Outlook
from gpumove.estimates.places import Place, place
from gpumove.estimates.probing import probe
from gpumove.estimates.said import Said, links, under
from gpumove.estimates.tables import our_gpus, read_prices
from gpumove.inspection.run import open_run

_NO_RUN = Facts(unknown={"full_bytes": "what is to be sent: name a run, or say --state-bytes"})


@dataclass(frozen=True)
class Estimate:
    """What is known of the run, and an outlook for each target, the cheapest finish first."""

    facts: Facts
    source: Place | None
    gpu: str | None
    gpus: int | None
    remaining_h: Range | None
    prices_of: dt.date
    """When the table of prices was collected."""
    outlooks: tuple[Outlook, ...]
    unknown: tuple[str, ...]


def estimate(
    src: str | None = None,
    to: str | Sequence[str] = (),
    *,
    prices: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    probe_url: str | None = None,
    probe_options: Mapping[str, Any] | None = None,
    **said: Any,
) -> Estimate:
    """Is a move worth it? From the run's own numbers, a link's rate, and dated tables of GPUs and prices.

    Args:
        src: the run; without one, ``said`` has to have its numbers.
        to: targets, each ``provider:region:[Nx]instance[:spot]``; without one, only what is sent and how long it takes.
        prices: a table of the user's own, whose rows win; docs/estimate.md has its form.
        storage_options: of ``src``, for fsspec.
        probe_url: a store at the target: 64 MB are read from ``src``, and sent there, to measure the link.
        probe_options: its storage options.
        **said: fields of :class:`Said`, which win over what was measured.

    Returns:
        Numbers with their least and most. What needs something that nobody knows is None, and ``unknown`` says why.

    Raises:
        ConfigError: there is no such run, or what was said cannot be.
        StoreError: the run's store failed.
    """
    wishes, table, gpus = Said.of(said), read_prices(prices), our_gpus()
    targets = [place(text, table, gpus) for text in ([to] if isinstance(to, str) else to)]
    source = None if wishes.runs_at is None else place(wishes.runs_at, table, gpus)
    found, probed = _NO_RUN, None
    with nullcontext() if src is None else open_run(src, storage_options=storage_options) as log:
        if probe_url is not None:  # first: a job that trains commits meanwhile
            here = probe(src, storage_options=storage_options) if src is not None else None
            probed = (here, probe(probe_url, storage_options=probe_options))
        if log is not None:
            found = read_facts(log)
    facts = under(wishes, found)
    case = Case.of(facts, wishes, source, table, gpus, src)
    ways = links(wishes, facts, probed, len(targets) or 1)
    outlooks = [case.outlook(*each) for each in zip(targets, ways)] if targets else [case.outlook(None, ways[0])]
    return Estimate(
        facts=facts, source=source, gpu=case.here.gpu.name if case.here else None, gpus=case.gpus,
        remaining_h=case.remaining_h, prices_of=table.collected, outlooks=tuple(sorted(outlooks, key=_cheapest)),
        unknown=(*facts.unknown.values(), *(case.unknown if targets else ())),
    )  # fmt: skip


def _cheapest(found: Outlook) -> tuple[bool, bool, float]:
    cost = found.costs.go_usd
    return found.verdict.answer == "impossible", cost is None, cost.value if cost else 0.0
