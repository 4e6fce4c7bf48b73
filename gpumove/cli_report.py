"""The verbs ``report`` and ``status``: their options, and how they show what ``report/`` has read."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from gpumove.cli_options import number, seconds, storage_options
from gpumove.cli_tables import Cell, Screen, claimed
from gpumove.errors import ConfigError
from gpumove.inspection.run import open_run
from gpumove.report.bill import Rates
from gpumove.report.making import report
from gpumove.report.status import Status, Watch
from gpumove.words import lasting, size

Arguments = argparse.Namespace


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs to the parser."""
    page = verb("report", run_report)
    page.add_argument("url2", metavar="TARGET", nargs="?", help="where it was moved to")
    page.add_argument("-o", dest="out", metavar="FILE", default="report.html", help="the page to write (report.html)")
    page.add_argument("--deep", action="store_true", help="read every byte to tell whether checkpoints are sound")
    page.add_argument(
        "--hourly",
        metavar="PRICE",
        action="append",
        default=[],
        help="what the machines cost per hour; twice: each side",
    )
    page.add_argument(
        "--certificate", metavar="FILE", action="append", default=[], help="show what certify --output has written"
    )
    page.add_argument("--from", metavar="PLACE", dest="runs_at", help="where it trained, for the table of prices")
    page.add_argument("--to", metavar="PLACE", help="where it trained after the move")
    page.add_argument("--prices-file", metavar="FILE", help="prices of your own, which win; - for standard input")
    page.add_argument(
        "--target-option", metavar="KEY=VALUE", action="append", help="a storage option of TARGET (those of URL)"
    )
    live = verb("status", run_status)
    live.add_argument("--watch", action="store_true", help="look again and again, until interrupted")
    live.add_argument("--every", metavar="S", default="5s", help="how often (5s)")


# -------------------------------------------------------------------- report


def run_report(args: Arguments, screen: Screen) -> int:
    """Write one page about a run: timeline, losses, step times, checkpoints."""
    urls = [args.url, *([args.url2] if args.url2 else [])]
    options = storage_options(args)
    target = options if args.target_option is None else storage_options(args, "--target-option")
    hourly = tuple(number("--hourly", text, "a price such as 12.50", low=0) for text in args.hourly)
    rates = Rates(hourly, (args.runs_at, args.to), args.prices_file)
    with screen.progress("reading packs") as progress:
        text = report(
            urls, deep=args.deep, rates=rates, certificates=args.certificate, storage_options=[options, target],
            progress=progress,
        )  # fmt: skip
    out = Path(args.out)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}: choose another place with -o") from error
    nbytes = len(text.encode())
    screen.give({"out": str(out), "bytes": nbytes}, lambda s: s.line(f"{out}: {size(nbytes)}; open it in a browser"))
    return 0


# -------------------------------------------------------------------- status


def run_status(args: Arguments, screen: Screen) -> int:
    """How the run stands; with --watch, again and again."""
    every_s = max(0.1, seconds("--every", args.every))
    with open_run(args.url, storage_options=storage_options(args)) as log:
        watch = Watch(log)
        if not args.watch:
            found = watch.look()
            screen.give(found, lambda s: show_status(s, found))
        elif screen.json:
            while True:
                screen.note(msgspec.json.encode(watch.look()).decode())
                time.sleep(every_s)
        else:
            _live(watch, screen, every_s)
    return 0


def _live(watch: Watch, screen: Screen, every_s: float) -> None:
    """At a terminal one picture that changes; elsewhere a new one only where something is new."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        told: object = None
        while True:
            found = watch.look()
            news = found.epoch, found.step, found.condition, found.ended, found.quiet, found.health, found.broken
            if news != told:
                told = news
                show_status(screen, found)
                screen.line("")
            time.sleep(every_s)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(_picture(watch.look()), refresh=True)
            time.sleep(every_s)


def show_status(screen: Screen, found: Status) -> None:
    """One look."""
    for row in _rows(found):
        screen.line(*row)


def _picture(found: Status) -> Text:
    return Text("\n").join(Text.assemble(*row) for row in _rows(found))


def _rows(found: Status) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = [
        (("run        ", "bold"), f"{found.run} at {found.url}"),
        (("owner      ", "bold"), claimed(found.epoch, found.host)),
        (("checkpoint ", "bold"), _checkpoint(found)),
        (("commits    ", "bold"), _commits(found)),
        (("step time  ", "bold"), "unknown" if found.step_s is None else lasting(found.step_s)),
        (("loss       ", "bold"),
         "unknown" if found.loss is None else f"{found.loss:.6g} at step {found.loss_step}"),
    ]  # fmt: skip
    if found.condition:
        rows.append((("moving     ", "bold yellow"), found.condition))
    if found.ended:
        rows.append((("ended      ", "bold"), found.ended))
    if found.quiet:
        rows.append((("quiet      ", "bold yellow"), "no commit has come for long: the job has ended, or hangs"))
    if found.broken:
        rows.append((("damaged    ", "bold red"), f"{found.broken} entries of the log cannot be read"))
    rows += [(("health     ", "bold yellow"), text) for text in found.health[-3:]]
    return rows


def _checkpoint(found: Status) -> str:
    if found.committed is None or found.state_bytes is None or found.new_bytes is None:
        return "none yet"
    sent = f"{size(found.state_bytes)}, of which {size(found.new_bytes)} were sent"
    return f"step {found.step}, {lasting(max(0.0, found.now - found.committed))} ago; {sent}"


def _commits(found: Status) -> str:
    every = "" if found.every_s is None else f", one every {lasting(found.every_s)}"
    return f"{found.checkpoints}{every}"
