"""The verb ``replicate``: its options, and how what it did is shown. What it does is ``move/``'s business."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import msgspec

from gpumove.cli_options import add_copying, copying, given, whole
from gpumove.cli_tables import Screen
from gpumove.errors import ConfigError, IntegrityError
from gpumove.move.replicate import Replication, replicate
from gpumove.move.rounds import Forecast, Round
from gpumove.words import count, size

Arguments = argparse.Namespace


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb to the parser."""
    found = verb("replicate", run_replicate, ends="dst")
    found.add_argument("--step", metavar="N", help="of a run: one checkpoint, latest (default) or all")
    found.add_argument("--follow", action="store_true", help="go on with every checkpoint that the run commits")
    add_copying(found)
    found.add_argument("--deep", action="store_true", help="read what is there already too, and mend it")
    found.add_argument("--keep-last", metavar="N", help="newest checkpoints that stay at DST, or all")
    found.add_argument("--keep-every", metavar="K", help="also keep those whose step is a multiple of this")


def run_replicate(args: Arguments, screen: Screen) -> int:
    """Copy what another store lacks: a run's checkpoints, or any prefix."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s gpumove replicate: %(message)s")
    with screen.progress("copying") as progress:
        done = replicate(
            args.src, args.dst, step=_step(args.step), follow=args.follow,
            deep=args.deep,
            keep_last=_keep_last(args.keep_last),
            keep_every=given(args, "--keep-every", whole),
            progress=progress, **copying(args),
            each=lambda found, expected: _show_round(screen, found, expected, follow=args.follow),
        )  # fmt: skip
    if args.follow and screen.json:
        screen.note(msgspec.json.encode(done).decode())
    else:
        screen.give(done, lambda s: show_replication(s, done))
    return IntegrityError.exit_code if done.problems else 0


def _step(text: str | None) -> int | str | None:
    if text is None or text in ("latest", "all"):
        return text
    if not text.isdecimal():
        raise ConfigError(f"--step takes a step, latest or all, not {text!r}")
    return int(text)


def _keep_last(text: str | None) -> int | str | None:
    return text if text in (None, "all") else whole("--keep-last", text)


def _show_round(screen: Screen, found: Round, expected: Forecast, *, follow: bool) -> None:
    """A line per checkpoint, as it is brought. To programs only where it has no end: their answer is one document."""
    if screen.json:
        if follow:
            screen.note(msgspec.json.encode({"round": found, "forecast": expected}).decode())
        return
    blackout = ""
    if follow and expected.blackout_s is not None:
        blackout = f"; a last delta of {expected.parts['last_delta']:.1f} s is to be expected: {expected.why}"
    screen.note(f"step {found.step}: {size(found.nbytes)} in {found.seconds:.1f} s{blackout}")


def show_replication(screen: Screen, done: Replication) -> None:
    """What was done, in a few lines."""
    rate = "" if done.rate_bytes_s is None else f" at {size(int(done.rate_bytes_s))}/s"
    sent = f"{count(done.objects, 'object')}, {size(done.nbytes)}, in {done.seconds:.1f} s{rate}"
    what = sent if done.objects else "nothing: all is there"
    screen.line(("sent    ", "bold"), what)
    if done.run:
        steps = ", ".join(map(str, done.steps)) or "none"
        screen.line(("steps   ", "bold"), steps)
        newest = "none yet" if done.newest is None else f"step {done.newest}"
        screen.line(("newest  ", "bold"), f"{newest} at {done.target}")
    for problem in done.problems:
        screen.line(("problem ", "bold red"), problem)
