"""The verb ``certify``: its options, and how a certificate is shown. What it does is ``job/``'s and ``parity/``'s."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from gpumove.cli_options import storage_options
from gpumove.cli_tables import Cell, Screen
from gpumove.config import Config
from gpumove.errors import ConfigError, ParityError
from gpumove.inspection.run import open_run
from gpumove.job.launch import settings
from gpumove.job.outcome import DURABLE, FINISHED, NOT_DURABLE
from gpumove.job.supervise import Job, Result, run
from gpumove.parity.causes import NAMES
from gpumove.parity.followed import find_followed
from gpumove.parity.verdict import DIFFERENT, Certificate, Compared

Arguments = argparse.Namespace
UNKNOWN = 51
"""The exit code where nothing could be compared. ``ParityError`` has that of different numbers."""
_STEPS = 20
_GRACE_S = 1.0
"""There is nothing to save: whoever interrupts it is not kept waiting."""
_STYLES = {"bitwise": "bold green", "within tolerance": "bold green", "different": "bold red"}
_SHOWN = 12


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb to the parser."""
    found = verb("certify", run_certify)
    found.usage = "gpumove certify [--steps K] [--tolerance SHARE] [--output FILE] URL -- TORCHRUN-ARGUMENTS"
    found.add_argument(
        "--steps", metavar="K", type=int, help=f"recorded steps to train again (GPUMOVE_CERTIFY, {_STEPS})"
    )
    found.add_argument(
        "--tolerance", metavar="SHARE", type=float, help="of a loss: 0.001, and 0.005 across devices, if left out"
    )
    found.add_argument("--output", metavar="FILE", help="write the certificate there, for gpumove report --certificate")


def run_certify(args: Arguments, screen: Screen) -> int:
    """Train recorded steps again, claim and save nothing, and tell whether it is the same job."""
    if args.steps is not None and args.steps < 1:
        raise ConfigError(f"--steps takes a whole number above 0, not {args.steps}")
    given = {"certify": args.steps, "certify_tolerance": args.tolerance}
    config = Config.from_env(settings(), **{name: value for name, value in given.items() if value is not None})
    config = config.replace(certify=config.certify or _STEPS, grace_s=_GRACE_S, wait=False)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s gpumove certify: %(message)s")
    logging.getLogger("gpumove").setLevel(logging.INFO)
    options = storage_options(args)
    if args.output is not None:
        _check_place(Path(args.output))
    if why := _nothing_to_train(args.url, config, options):
        facts = {"exit_code": UNKNOWN, "job": "it was not started", "certificate": None}
        screen.give(facts, lambda s: s.line(("unknown", "bold yellow"), f": {why}"))
        return UNKNOWN
    result = run(Job(url=args.url, torchrun=args.torchrun, config=config, options=options))
    if result.certificate is None and result.notice is not None and result.notice.source == "sigint":
        raise KeyboardInterrupt
    certificate = None if result.certificate is None else msgspec.json.decode(result.certificate, type=Certificate)
    if certificate is not None and args.output is not None:
        _write(Path(args.output), result.certificate or b"")
    code = _code(certificate, result)
    facts = {"exit_code": code, "job": result.text, "certificate": certificate}
    screen.give(facts, lambda s: _show(s, certificate, result))
    return code


def _nothing_to_train(url: str, config: Config, options: Mapping[str, Any]) -> str:
    """Why nothing can be compared, whatever the job does. Its ranks would say it after minutes, with tracebacks."""
    with open_run(url, config=config, storage_options=options) as log:
        try:
            find_followed(log, config.certify)
        except ParityError as error:
            return str(error)
    return ""


def _check_place(path: Path) -> None:
    """Before the job is started: a result that has nowhere to go is found out too late else."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: choose another place with --output")


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(msgspec.json.format(data, indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}: choose another place with --output") from error


def _code(certificate: Certificate | None, result: Result) -> int:
    """A job that failed on the way is no good one, whatever the steps before have shown."""
    if certificate is not None and certificate.verdict == DIFFERENT:
        return ParityError.exit_code
    complete = certificate is not None and len(certificate.steps) >= certificate.setting.recorded
    if not complete and result.exit_code not in (FINISHED, DURABLE, NOT_DURABLE, ParityError.exit_code):
        return result.exit_code
    return FINISHED if certificate is not None and certificate.good else UNKNOWN


def _show(screen: Screen, certificate: Certificate | None, result: Result) -> None:
    if certificate is None:
        why = result.text
        if result.notice is not None:
            why = f"it was ended before anything was compared ({result.notice.source})"
        elif result.exit_code == FINISHED:
            why = "the job ended without a word: its script has to use gpumove.Checkpointer, restore() and step()"
        screen.line(("unknown", "bold yellow"), f": {why}")
        return
    setting, steps = certificate.setting, certificate.steps
    devices = {True: "the same devices", False: "other devices", None: "devices that are not known"}
    screen.line(("run        ", "bold"), f"{setting.run} at {setting.url}")
    screen.line(("checkpoint ", "bold"), f"step {setting.step} (entry {setting.entry}); {setting.ranks}; "
                f"{devices[setting.same_devices]}")  # fmt: skip
    for difference in setting.differences:
        screen.line(("differs    ", "bold"), difference)
    if steps:
        screen.line("")
        screen.table(("step", "loss then", "loss now", "difference", "what differs"), _rows(certificate), right="rrrr")
        if len(steps) > _SHOWN:
            screen.line(f"... and {len(steps) - _SHOWN} more steps")
        screen.line("")
    if result.exit_code != FINISHED:
        screen.line(("the job itself ended otherwise", "bold yellow"), f": {result.text}")
    style = _STYLES.get(certificate.verdict, "bold yellow")
    screen.line((certificate.verdict, style), f": {certificate.why}")


def _rows(certificate: Certificate) -> list[tuple[Cell, ...]]:
    """The first steps, and in any case the one that decided."""
    rows, first = list(certificate.steps), certificate.first
    shown = rows[:_SHOWN]
    if first is not None and first.step > shown[-1].step:
        shown[-1] = next(row for row in rows if row.step == first.step)
    return [_row(row) for row in shown]


def _row(row: Compared) -> tuple[Cell, ...]:
    relative = "-" if row.relative is None else "0" if row.relative == 0 else f"{row.relative:.1e}"
    names = ", ".join(NAMES[name].removeprefix("the ") for name in row.differs)
    return str(row.step), _loss(row.before), _loss(row.after), relative, (names, "bold red")


def _loss(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.9g}"
