"""The verb ``move``: its options, and how what happens is told. What it does is ``move/``'s business."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable

import msgspec

from gpumove.cli_options import add_copying, copying, given, number, seconds
from gpumove.cli_tables import Screen
from gpumove.errors import ConfigError, ParityError
from gpumove.move.moving import move
from gpumove.move.report import Event, Report, Wishes
from gpumove.words import count, size

Arguments = argparse.Namespace
_STYLES = {"done": "bold green", "cancelled": "bold yellow", "forced": "bold red", "damaged": "bold red",
           "watch": "bold"}  # fmt: skip


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb to the parser."""
    found = verb("move", run_move, ends="--to")
    way = found.add_mutually_exclusive_group()
    way.add_argument("--resume", action="store_true", help="go on with the move that is under way, whoever began it")
    way.add_argument("--rollback", action="store_true", help="give SRC the run back, with what DST has trained since")
    found.add_argument("--max-blackout", metavar="S", help="do not stop the job for longer than this, such as 30s")
    add_copying(found)
    found.add_argument("--leave-timeout", metavar="S", default="600", help="how long the job may take to leave (600)")
    found.add_argument("--arrive-timeout", metavar="S", default="600", help="how long to wait for the job at DST (600)")
    found.add_argument("--no-wait", action="store_true", help="do not wait for the job at DST")
    found.add_argument("--watch", action="store_true", help="then stay until the job at DST has compared itself")
    found.add_argument("--on-parity", choices=("warn", "rollback"), help="if it is not as before (warn)")
    found.add_argument("--step-ratio", metavar="R", help="a step at DST takes R times as long as at SRC")
    found.add_argument("--gone-after", metavar="S", help="of a watch: silence of the job that says that it is gone")
    found.add_argument("--discard", action="store_true", help="of --rollback: as it was handed over, nothing later")
    found.add_argument("--every-step", action="store_true", help="ask for a save after every step before the end")
    found.add_argument("--slow", metavar="S", help="and for so much longer steps meanwhile, such as 0.2s")
    found.add_argument("--force", action="store_true", help="without an answer of the job, or of a store that is lost")


def run_move(args: Arguments, screen: Screen) -> int:
    """Move a run to another store while its job trains, and hand it over."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s gpumove move: %(message)s")
    if args.slow is not None and not args.every_step:
        raise ConfigError("--slow is for the steps that --every-step asks a save after")
    if not args.watch and (args.on_parity or args.gone_after):
        raise ConfigError("--on-parity and --gone-after are for a --watch")
    if args.watch and args.no_wait:
        raise ConfigError("--watch stays until the job at DST has compared itself: leave out --no-wait")
    wishes = Wishes(
        max_blackout_s=given(args, "--max-blackout", seconds),
        leave_timeout_s=seconds("--leave-timeout", args.leave_timeout),
        arrive_timeout_s=0.0 if args.no_wait else seconds("--arrive-timeout", args.arrive_timeout),
        force=args.force, every_step=args.every_step, slow_s=given(args, "--slow", seconds) or 0.0,
        watch=(args.on_parity or "warn") if args.watch else "", discard=args.discard,
        step_ratio=given(args, "--step-ratio", _ratio), gone_after_s=given(args, "--gone-after", seconds),
    )  # fmt: skip
    with screen.progress("copying") as progress:
        done = move(
            args.src, args.dst, wishes, resume=args.resume, rollback=args.rollback,
            **copying(args), tell=lambda event: _tell(screen, event), progress=progress,
        )  # fmt: skip
    screen.give(done, lambda s: show_move(s, done))
    return ParityError.exit_code if done.findings else 0


def _ratio(option: str, text: str) -> float:
    return number(option, text, "a number such as 0.6", low=0.001, high=1000)


def _tell(screen: Screen, event: Event) -> None:
    """One line, as it happens: for programs one JSON document each."""
    if screen.json:
        screen.note(msgspec.json.encode(event).decode())
    else:
        screen.note(f"{_clock(event.at)}  {event.state:<9}  {event.text}")


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def show_move(screen: Screen, done: Report) -> None:
    """The timeline, unless it was told there as it happened, and what came of it."""
    if not screen.notes_are_beside:
        began = done.events[0].at if done.events else 0.0
        rows = ((f"{e.at - began:.1f} s", (e.state, _STYLES.get(e.state, "")), e.text) for e in done.events)
        screen.table(("after", "state", "what"), rows, right="r")
        screen.line("")
    title = "moved   " if done.phase == "done" else "now     "
    screen.line((title, "bold"), f"{done.source} to {done.target}: {done.text}")
    if done.rounds:
        screen.line(("sent    ", "bold"), f"{size(done.sent_bytes)} in {count(len(done.rounds), 'round')}")
    if done.blackout_s is not None:
        told = (event.facts for event in done.events if event.state == "request")
        parts: dict[str, float] = next(told, {}).get("forecast_parts", {})
        rest = " and the restore" if parts and "restore" not in parts else ""
        foretold = "" if done.forecast_s is None else f"; {done.forecast_s:.1f} s{rest} were foretold"
        screen.line(("blackout ", "bold"), f"{done.blackout_s:.1f} s{foretold}")
    for finding in done.findings:
        screen.line(("finding ", "bold red"), finding)
