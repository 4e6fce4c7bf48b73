"""The verb ``estimate``: its options, and how what it finds is shown. What it reckons is ``estimates/``' business."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gpumove.cli_options import given, number, parse_rate, parse_size, seconds, storage_options, whole
from gpumove.cli_tables import Cell, Screen
from gpumove.errors import ConfigError
from gpumove.estimates.estimate import Estimate, estimate
from gpumove.estimates.facts import Facts
from gpumove.estimates.interval import Range
from gpumove.estimates.outlook import Outlook
from gpumove.estimates.probing import Probe, probe
from gpumove.estimates.tables import Price, Prices, price, read_prices
from gpumove.estimates.transfer import Transfer
from gpumove.words import size

Arguments = argparse.Namespace
_STYLES = {"go": "bold green", "stay": "bold yellow", "unsure": "bold yellow", "impossible": "bold red"}
_UNKNOWN = "?"


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb to the parser."""
    found = verb("estimate", run_estimate, url="?")
    found.add_argument("--to", metavar="PLACES", help="provider:region:[Nx]instance[:spot], several with commas")
    found.add_argument("--from", metavar="PLACE", dest="runs_at", help="where the run trains now, in the same form")
    found.add_argument("--remaining-steps", metavar="N", help="steps that are left to do")
    found.add_argument("--remaining-hours", metavar="H", help="or hours, at the speed of now")
    found.add_argument("--probe", metavar="STORE", help="measure the link: 64 MB from URL and to this store")
    found.add_argument("--probe-option", metavar="KEY=VALUE", action="append", default=[], help="its storage options")
    found.add_argument("--rate", metavar="RATE", help="of the link, such as 1Gbit/s; with commas, one for each place")
    found.add_argument("--save-time", metavar="S", help="what a save takes, from its step to its commit")
    found.add_argument("--restore-time", metavar="S", help="what a restore takes at the target")
    found.add_argument("--step-time", metavar="S", help="what a step takes, such as 0.8s")
    found.add_argument("--every", metavar="S", help="time between two saves")
    found.add_argument("--state-bytes", metavar="SIZE", help="the whole state")
    found.add_argument("--delta-bytes", metavar="SIZE", help="what a save sends")
    found.add_argument("--peak-memory", metavar="SIZE", help="of one GPU, while it trains")
    found.add_argument("--committed-hours", metavar="H", help="that are paid where it runs in any case (0)")
    found.add_argument("--prices-file", metavar="FILE", help="prices of your own, which win; - for standard input")
    found.add_argument("--prices", action="store_true", help="show the table of prices")


def run_estimate(args: Arguments, screen: Screen) -> int:
    """Is a move worth it: bytes, time, blackout, cost."""
    if args.prices:
        table = read_prices(args.prices_file)
        screen.give(table, lambda s: show_prices(s, table))
        return 0
    said = _said(args)
    if args.url is None and args.probe and not any(said.values()) and not args.to:
        found = probe(args.probe, storage_options=storage_options(args, "--probe-option"))
        screen.give(found, lambda s: show_probe(s, found))
        return 0
    if args.url is None and not any(said.values()):
        raise ConfigError("there is nothing to estimate: name a run's URL, or say its numbers (--state-bytes ...)")
    data = estimate(
        args.url, args.to.split(",") if args.to else (), prices=args.prices_file,
        storage_options=storage_options(args), probe_url=args.probe,
        probe_options=storage_options(args, "--probe-option"), **said,
    )  # fmt: skip
    screen.give(data, lambda s: show_estimate(s, data))
    return 0


def _said(args: Arguments) -> dict[str, Any]:
    """What the options say; those left out are None."""
    return {
        "runs_at": args.runs_at,
        "rate_bytes_s": args.rate and [parse_rate("--rate", text) for text in args.rate.split(",")],
        "remaining_steps": given(args, "--remaining-steps", whole),
        "remaining_hours": given(args, "--remaining-hours", _hours),
        "save_s": given(args, "--save-time", seconds),
        "restore_s": given(args, "--restore-time", seconds),
        "step_s": given(args, "--step-time", seconds),
        "every_s": given(args, "--every", seconds),
        "state_bytes": given(args, "--state-bytes", parse_size),
        "delta_bytes": given(args, "--delta-bytes", parse_size),
        "peak_bytes": given(args, "--peak-memory", parse_size),
        "committed_hours": given(args, "--committed-hours", _hours) or 0.0,
    }


def _hours(option: str, text: str) -> float:
    return number(option, text.removesuffix("h"), "hours, such as 72")


# -------------------------------------------------------------------- how it is shown


def show_prices(screen: Screen, table: Prices) -> None:
    """Both tables, each row with its source."""
    screen.line(("prices ", "bold"), f"in US dollars, collected {table.collected}; the first row that fits counts")
    rows = [
        (i.provider, i.region, i.instance, f"{i.gpus} x {i.gpu}", _price(i.usd_per_h), _price(i.spot_usd_per_h),
         f"{i.read}: {i.source}")
        for i in table.instances
    ]  # fmt: skip
    screen.table(("provider", "region", "instance", "GPUs", "$/h", "spot $/h", "source"), rows, right="lllrrrl")
    screen.line("")
    out = [
        (e.provider, e.region, "; ".join(_price(t.usd_per_gb) for t in e.internet), f"{e.free_gb:g} GB",
         _price(e.inter_region_usd_per_gb), f"{e.read}: {e.source}")
        for e in table.egress
    ]  # fmt: skip
    screen.table(
        ("provider", "region", "egress $/GB, by volume", "free", "between regions", "source"), out, right="llrrrl"
    )


def _price(found: Price | None) -> str:
    if found is None:
        return _UNKNOWN
    known = price(found)
    return f"{known.value:g}" if known.is_exact else f"{known.value:g} ({known.low:g}-{known.high:g})"


def show_probe(screen: Screen, found: Probe) -> None:
    """What was measured at one store."""
    if found.problem:
        screen.line(("unknown ", "bold yellow"), found.problem)
        return
    screen.line(("store ", "bold"), found.url)
    screen.line(("up    ", "bold"), _rate(found.up_bytes_s))
    screen.line(("down  ", "bold"), _rate(found.down_bytes_s))


def show_estimate(screen: Screen, data: Estimate) -> None:
    """The run, the targets beside each other, and then each with its reasons; what is the same for all only once."""
    _show_run(screen, data)
    first = data.outlooks[0]
    same = all((o.transfer, o.rate_how) == (first.transfer, first.rate_how) for o in data.outlooks)
    if same:
        _show_transfer(screen, first)
    for why in dict.fromkeys([*data.unknown, *(first.transfer.unknown if same else ())]):
        _show_unknown(screen, why)
    targets = [o for o in data.outlooks if o.target is not None]
    if not targets:
        return
    screen.line("")
    _show_comparison(screen, data, targets)
    for outlook in targets:
        _show_target(screen, outlook, whole=not same)
    screen.line("")
    screen.line(("prices  ", "bold"), f"list prices, collected {data.prices_of}: gpumove estimate --prices")


def _show_unknown(screen: Screen, why: str) -> None:
    screen.line(("unknown  ", "bold yellow"), why)


def _show_run(screen: Screen, data: Estimate) -> None:
    facts: Facts = data.facts
    if facts.url:
        screen.line(("run     ", "bold"), f"{facts.url}, step {_number(facts.step)}")
    screen.line(("state   ", "bold"), f"{_bytes(facts.state_bytes)}; a copy of all is {_bytes(facts.full_bytes)}")
    screen.line(("commits ", "bold"), f"{_sizes(facts.delta_bytes)} every {_time(facts.every_s)}")
    how = f", {facts.now.how}" if facts.now else ""
    screen.line(("steps   ", "bold"), f"{_time(facts.step_s)}{how}")
    devices = f"{_number(data.gpus)} x {data.gpu or facts.device or _UNKNOWN}"
    screen.line(("trains  ", "bold"), devices + (f" at {data.source.name}" if data.source else ""))
    screen.line(("remains ", "bold"), f"{_hours_of(data.remaining_h)} at that speed")


def _show_transfer(screen: Screen, outlook: Outlook) -> None:
    screen.line(("link    ", "bold"), f"{_rate(outlook.rate_bytes_s)}: {outlook.rate_how}")
    found = outlook.transfer
    if found.first_s is not None:
        all_s = "" if found.copy_s in (None, found.first_s) else f", all of them {_time(found.copy_s)}"
        screen.line(("copy    ", "bold"), f"{_bytes_of(found)}; the first round takes {_time(found.first_s)}{all_s}")
    parts = ", ".join(f"{name.replace('_', ' ')} {_time(part)}" for name, part in found.parts.items() if part.high)
    screen.line(("blackout ", "bold"), _blackout(found) + (f": {parts}" if parts else ""))


def _bytes_of(found: Transfer) -> str:
    if found.rounds is None:
        return _UNKNOWN
    rounds = _range(found.rounds, lambda value: f"{value:.0f}")
    return f"{_sizes(found.nbytes)} in {rounds} round{'' if found.rounds.high == 1 else 's'} and the last delta"


def _show_comparison(screen: Screen, data: Estimate, targets: list[Outlook]) -> None:
    heads = ("place", "GPUs", "blackout", "done in", "once $", "in all $", "saves $", "verdict")
    costs = targets[0].costs
    rows: list[tuple[Cell, ...]] = [
        (
            "stay",
            f"{_number(data.gpus)} x {data.gpu or _UNKNOWN}",
            "",
            _hours_of(costs.stay_h),
            "",
            _usd(costs.stay_usd),
            "",
            "",
        )
    ]
    for outlook in targets:
        assert outlook.target is not None
        gpu = outlook.target.gpu.name if outlook.target.gpu else _UNKNOWN
        mapping = f", {outlook.mapping}" if outlook.mapping else ""
        costs = outlook.costs
        rows.append(
            (outlook.target.name, f"{_number(outlook.gpus)} x {gpu}{mapping}", _blackout(outlook.transfer),
             _hours_of(costs.go_h), _usd(costs.once_usd), _usd(costs.go_usd), _usd(costs.saving_usd),
             (outlook.verdict.answer, _STYLES.get(outlook.verdict.answer, "bold")))
        )  # fmt: skip
    screen.table(heads, rows, right="llrrrrrl")


def _show_target(screen: Screen, outlook: Outlook, *, whole: bool) -> None:
    assert outlook.target is not None
    answer, costs = outlook.verdict.answer, outlook.costs
    screen.line("")
    screen.line((outlook.target.name, "bold"), ": ", (answer, _STYLES.get(answer, "bold")))
    for reason in outlook.verdict.reasons:
        screen.line("  ", reason)
    screen.line(
        f"  once: egress {_usd(costs.egress_usd)} $, both ends at a time {_usd(costs.double_usd)} $, "
        f"lost commitment {_usd(costs.lost_usd)} $"
    )
    screen.line(f"  steps: {outlook.ratio_how}")
    screen.line(f"  fits: {outlook.fit.answer}, {outlook.fit.why}")
    if outlook.target.source:
        screen.line(f"  price: {outlook.target.source}")
    if whole:
        _show_transfer(screen, outlook)
    for why in outlook.unknown:
        if whole or why not in outlook.transfer.unknown:
            _show_unknown(screen, why)


# -------------------------------------------------------------------- numbers for people


def _range(found: Range | None, say: Callable[[float], str]) -> str:
    """The likeliest value, and its bounds where they read otherwise."""
    if found is None:
        return _UNKNOWN
    low, value, high = say(found.low), say(found.value), say(found.high)
    return value if low == high else f"{value} ({low} to {high})"


def _number(found: int | None) -> str:
    return _UNKNOWN if found is None else str(found)


def _bytes(found: float | None) -> str:
    return _UNKNOWN if found is None else size(int(found))


def _sizes(found: Range | None) -> str:
    return _range(found, lambda value: size(int(value)))


def _rate(found: Range | None) -> str:
    return _range(found, lambda value: f"{value / 1e6:.1f} MB/s")


def _time(found: Range | None) -> str:
    return _range(found, _duration)


def _duration(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _hours_of(found: Range | None) -> str:
    return _range(found, lambda value: _duration(3600 * value))


def _usd(found: Range | None) -> str:
    return _range(found, lambda value: f"{value:,.0f}")


def _blackout(found: Transfer) -> str:
    if found.blackout_s is not None:
        return _time(found.blackout_s)
    return f"at least {_duration(found.at_least_s)}" if found.parts else _UNKNOWN
