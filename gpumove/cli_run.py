"""The verb ``run``: its options, its log at a terminal, and its last line. What it does is ``job/``'s business."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from gpumove.cli_options import storage_options
from gpumove.cli_tables import Screen
from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.job.launch import settings
from gpumove.job.outcome import DURABLE, FINISHED, MOVED, NOT_DURABLE
from gpumove.job.supervise import Job, run

Arguments = argparse.Namespace
_STYLES = {FINISHED: "bold green", DURABLE: "bold green", MOVED: "bold green", NOT_DURABLE: "bold yellow"}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours and, for ``run`` and ``certify``, what after ``--`` is torchrun's."""
    given = list(arguments)
    if given[:1] not in (["run"], ["certify"]) or "--" not in given:
        return given, []
    return given[: given.index("--")], given[given.index("--") + 1 :]


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb to the parser."""

    def run_run(args: Arguments, screen: Screen) -> int:
        """Run torchrun, restart it, and have it leave in time."""
        _run(args, screen, storage_options(args))

    found = verb("run", run_run)
    found.usage = "gpumove run [--grace S] [--notice WORDS] [--max-restarts N] [--wait] URL -- TORCHRUN-ARGUMENTS"
    found.add_argument("--grace", metavar="S", type=float, help="seconds that a notice leaves (GPUMOVE_GRACE_S, 30)")
    found.add_argument(
        "--notice", metavar="WORDS", help="besides signals: aws, gcp, azure, file:PATH, url:URL (GPUMOVE_NOTICES)"
    )
    found.add_argument(
        "--max-restarts", metavar="N", type=int, default=3, help="restarts in a row without a newer checkpoint (3)"
    )
    found.add_argument("--wait", action="store_true", help="wait for a run that is on its way here (GPUMOVE_WAIT)")


def _run(args: Arguments, screen: Screen, options: Mapping[str, Any]) -> NoReturn:
    if args.max_restarts < 0:
        raise ConfigError(f"--max-restarts takes a whole number of at least 0, not {args.max_restarts}")
    given = {"grace_s": args.grace, "notices": args.notice, "wait": args.wait or None}
    config = Config.from_env(settings(), **{name: value for name, value in given.items() if value is not None})
    if config.certify:
        raise ConfigError("GPUMOVE_CERTIFY is set, so the job would save nothing: unset it, or use gpumove certify")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s gpumove run: %(message)s")
    logging.getLogger("gpumove").setLevel(logging.INFO)
    result = run(
        Job(url=args.url, torchrun=args.torchrun, config=config, options=options, max_restarts=args.max_restarts)
    )
    facts = {
        "exit_code": result.exit_code,
        "text": result.text,
        "outcome": result.outcome,
        "notice": result.notice and {"source": result.notice.source, "deadline": result.notice.deadline},
        "restarts": result.restarts,
    }
    style = _STYLES.get(result.exit_code, "bold red")
    screen.give(facts, lambda s: s.line((result.text, style)))
    logging.shutdown()
    sys.stdout.flush()
    # To take the interpreter down took a second with a cloud's client in it: there may be none left.
    os._exit(result.exit_code)
