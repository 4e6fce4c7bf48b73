"""The command line: one function per verb. It parses, calls, and hands what comes back to be shown; it decides nothing.

Exit codes are those of the error classes (``errors.py``), 130 when interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from gpumove import cli_certify, cli_estimate, cli_move, cli_moving, cli_report, cli_run, cli_serving
from gpumove import cli_tables as tables
from gpumove.cli_options import parse_size, storage_options, whole
from gpumove.cli_tables import Screen
from gpumove.cmdline import hide_secrets, shown
from gpumove.config import Config
from gpumove.errors import IntegrityError
from gpumove.inspection.doctor import Check, doctor
from gpumove.inspection.export import export
from gpumove.inspection.run import open_run, pick, verify
from gpumove.inspection.summary import detail, overview
from gpumove.store.gc import Retention, collect, plan
from gpumove.store.log import Log
from gpumove.store.records import reachable
from gpumove.version import __version__

Arguments = argparse.Namespace
Verb = Callable[[Arguments, Screen], int]

_INTERRUPTED, _BROKEN_PIPE = 130, 141


# -------------------------------------------------------------------- the verbs


def run_ls(args: Arguments, screen: Screen) -> int:
    """The run's checkpoints, its owner, and what would be resumed."""
    with _opened(args) as log:
        data = overview(log)
    screen.give(data, lambda s: tables.show_overview(s, data))
    return 0


def run_show(args: Arguments, screen: Screen) -> int:
    """One checkpoint: what it is made of."""
    with _opened(args) as log:
        checkpoint = pick(log.read(), args.step, url=log.store.url)
        data = detail(log, checkpoint, config=Config.from_env(), tensors=args.tensors)
    screen.give(data, lambda s: tables.show_detail(s, data))
    return 0


def run_verify(args: Arguments, screen: Screen) -> int:
    """Whether every byte that the checkpoints need is there."""
    with screen.progress("reading packs") as progress:
        data = verify(
            args.url, step=args.step, deep=args.deep, storage_options=storage_options(args), progress=progress
        )
    screen.give(data, lambda s: tables.show_verify(s, data))
    return 0 if data.sound else IntegrityError.exit_code


def run_gc(args: Arguments, screen: Screen) -> int:
    """Drop old checkpoints and delete what nothing needs."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s gpumove gc: %(message)s")
    config = Config.from_env(**_retention(args))
    retention = Retention(config.keep_last, config.keep_every)
    with _opened(args) as log:
        view = log.read()
        if args.yes:
            found = collect(log, retention)
        else:
            found = plan(log.store, view, retention, reach=lambda c: reachable(log.store, c))
    facts = {
        "dry_run": not args.yes,
        "kept": [{"entry": c.number, "step": c.step} for c in found.kept],
        "dropped": [{"entry": c.number, "step": c.step} for c in found.dropped],
        "deleted": found.doomed,
        "deleted_bytes": found.doomed_bytes,
    }
    screen.give(facts, lambda s: tables.show_gc(s, found, done=args.yes))
    return 0


def _retention(args: Arguments) -> dict[str, int | None]:
    """What the options say; what they leave out is the environment's."""
    given: dict[str, int | None] = {}
    if args.keep_last is not None:
        given["keep_last"] = None if args.keep_last == "all" else whole("--keep-last", args.keep_last)
    if args.keep_every is not None:
        given["keep_every"] = whole("--keep-every", args.keep_every)
    return given


def run_pin(args: Arguments, screen: Screen) -> int:
    """Keep one checkpoint from retention, or no longer."""
    with _opened(args) as log:
        checkpoint = pick(log.read(), args.step, url=log.store.url)
        changed = checkpoint.pinned == args.undo
        if changed:
            log.pin(checkpoint, pinned=not args.undo)
    facts = {"entry": checkpoint.number, "step": checkpoint.step, "pinned": not args.undo, "changed": changed}
    already = "" if changed else "already "
    undone = "not pinned" if checkpoint.pointers else "not pinned: retention may drop it"
    text = undone if args.undo else "pinned: retention keeps it"
    screen.give(facts, lambda s: s.line(f"step {checkpoint.step} (entry {checkpoint.number}) is {already}{text}"))
    return 0


def run_export(args: Arguments, screen: Screen) -> int:
    """Write a checkpoint's tensors as safetensors files."""
    with screen.progress("exporting") as progress:
        data = export(
            args.url, args.out, step=args.step, what=args.what, dtype=args.dtype, force=args.force,
            max_shard_bytes=parse_size("--max-shard-size", args.max_shard_size), drop_tied=args.tied == "drop",
            beside=args.config, storage_options=storage_options(args), progress=progress,
        )  # fmt: skip
    screen.give(data, lambda s: tables.show_export(s, data))
    return 0


def run_doctor(args: Arguments, screen: Screen) -> int:
    """Is this machine, and this store, fit for a run?"""
    checks: list[Check] = []
    for check in doctor(args.url, storage_options=storage_options(args), bandwidth=args.probe):
        checks.append(check)
        if not screen.json:
            tables.show_check(screen, check)
    if screen.json:
        screen.give({"checks": checks}, lambda s: None)
    return max(check.exit_code for check in checks)


# -------------------------------------------------------------------- what they share


def _opened(args: Arguments) -> AbstractContextManager[Log]:
    return open_run(args.url, storage_options=storage_options(args))


# -------------------------------------------------------------------- parsing


class _Discreet(argparse.ArgumentParser):
    """Repeats no value that it does not know: it may be a key."""

    def error(self, message: str) -> NoReturn:
        """As argparse does."""
        super().error(shown(message))


class _Parser(_Discreet):
    """Takes options and places in any order, which argparse by itself does not where a place may be left out."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if self._inside:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Discreet(
        prog="gpumove", description="Looks after the checkpoints of running PyTorch jobs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gpumove {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, run: Verb, *, url: str | None = None, ends: str = "") -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        found.set_defaults(run=run, refuse=found.error)
        if ends:
            found.add_argument("src", metavar="SRC", help="where it lies")
            named: dict[str, Any] = {"dest": "dst", "required": True} if ends.startswith("-") else {}
            found.add_argument(ends, metavar="DST", help="where it is to lie", **named)
        else:
            found.add_argument("url", metavar="URL", nargs=url, help="where the run lies")
        for option in ("--from-option", "--to-option") if ends else ("--option",):
            end = {"--from-option": " of SRC", "--to-option": " of DST"}.get(option, "")
            found.add_argument(option, metavar="KEY=VALUE", action="append", default=[], help=f"a storage option{end}")
        found.add_argument("--json", action="store_true", help="answer in JSON")
        found.add_argument("--debug", action="store_true", help="show where an error comes from")
        return found

    _add_reading(verb)
    _add_changing(verb)
    cli_run.add(verb)
    cli_certify.add(verb)
    cli_move.add(verb)
    cli_moving.add(verb)
    cli_estimate.add(verb)
    cli_report.add(verb)
    cli_serving.add(verb)
    return parser


def _add_reading(verb: Callable[..., argparse.ArgumentParser]) -> None:
    verb("ls", run_ls)
    show = verb("show", run_show)
    _add_step(show)
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    check = verb("verify", run_verify)
    check.add_argument("--step", type=int, metavar="N", help="this checkpoint only")
    check.add_argument("--deep", action="store_true", help="read every pack too")
    out = verb("export", run_export)
    _add_step(out)
    out.add_argument("out", metavar="OUT", help="the folder to write")
    out.add_argument("--what", default="model", metavar="NAME", help="model (default), all, or the beginning of names")
    out.add_argument("--dtype", metavar="DTYPE", help="turn floating point tensors into this, such as bfloat16")
    out.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (5GB)")
    out.add_argument("--tied", choices=("keep", "drop"), default="keep", help="tied tensors under all names, or one")
    out.add_argument("--force", action="store_true", help="replace an earlier export")
    out.add_argument("--config", metavar="DIR", help="copy what lies there beside weights: config.json, tokenizer, ...")
    fit = verb("doctor", run_doctor, url="?")
    fit.add_argument("--probe", action="store_true", help="also send 64 MB to the store and back")


def _add_changing(verb: Callable[..., argparse.ArgumentParser]) -> None:
    gc = verb("gc", run_gc)
    gc.add_argument("--keep-last", metavar="N", help="newest checkpoints to keep, or all (GPUMOVE_KEEP_LAST, 10)")
    gc.add_argument("--keep-every", metavar="K", help="also keep those whose step is a multiple of this")
    gc.add_argument("--yes", action="store_true", help="do it; without, only say what would be done")
    pin = verb("pin", run_pin)
    pin.add_argument("step", metavar="STEP", type=int, help="the checkpoint's step")
    pin.add_argument("--undo", action="store_true", help="unpin it")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "step", metavar="STEP", nargs="?", type=int, help="the checkpoint's step; the newest if left out"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code.
    """
    if arguments is None:
        hide_secrets()
    given, torchrun = cli_run.split(sys.argv[1:] if arguments is None else arguments)
    args, unknown = build_parser().parse_known_args(given, Arguments(torchrun=torchrun))
    if unknown:
        args.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    screen = Screen(json=args.json)
    try:
        code: int = args.run(args, screen)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return _BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - nobody above; a traceback is shown on request only
        if args.debug:
            traceback.print_exc()
        return tables.show_error(screen, error)


def _close_stdout() -> None:
    """Whoever read our output is gone. Without this, the interpreter complains at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
