"""gpumove beside its peers: what a save costs a running training, and how long a restore takes.

`python -m benchmarks.compare` runs every peer in processes of its own, interleaved over several rounds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from benchmarks.codec.tables import outcome
from benchmarks.compare import report, targets
from benchmarks.compare.figures import Table
from benchmarks.compare.launch import run_trial
from benchmarks.compare.options import parse
from benchmarks.compare.picture import picture
from benchmarks.compare.plan import DISK, Trial, each_once, sections, size_mb, trials
from benchmarks.machine import facts
from benchmarks.places import Place, fresh_place
from benchmarks.report import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, report; 0 if gpumove restored everything bit for bit."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    console, machine = Console(), facts()
    options.out.mkdir(parents=True, exist_ok=True)
    found = sections(options.workloads, options.stores, options.ranks)
    needed = (lambda _: {DISK, *options.peers}) if options.all_rounds else targets.needed
    plan = list(
        each_once(found, options.peers) if options.quick else trials(options.rounds, found, options.peers, needed)
    )
    samples = _run(console, plan, options)
    if not samples:
        return 1
    table = Table(samples)
    must, hoped = targets.checks(table), [] if options.quick else targets.verdicts(table)
    report.show(console, table)
    outcome(console, must + hoped)
    name = "compare_quick" if options.quick else "compare"
    content = {
        "machine": machine,
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "figures": table.summary(),
        "verdicts": [vars(v) for v in must + hoped],
        "samples": samples,
    }
    write_json(options.out / f"{name}.json", content)
    (options.out / f"{name}.md").write_text(report.markdown(table, machine))
    picture(table, options.out / f"{name}.png")
    console.print(f"written to {options.out}: {name}.json, .md, .png", highlight=False)
    needed = [v for v in must if v.peer in targets.BOTH] + (hoped if options.strict else [])
    return 0 if all(v.met for v in needed) else 1


def _run(console: Console, plan: Sequence[Trial], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All trials; after Ctrl-C, or when time is up, those that were complete."""
    scratch = Path(tempfile.mkdtemp(dir=options.out, prefix="scratch-"))
    samples: list[dict[str, Any]] = []
    until = perf_counter() + 60 * options.minutes
    try:
        for (number, section), group in groupby(plan, key=lambda trial: (trial.round, trial.section)):
            if number and perf_counter() > until:
                console.print(f"{options.minutes:g} minutes are over: no more of round {number + 1}")
                break
            with fresh_place(section.store, scratch) as store:
                for trial in group:
                    words = f"{len(samples) + 1}/{len(plan)} round {number + 1}, {section}: {trial.peer}"
                    console.print(words, highlight=False)
                    samples.append(_timed(trial, options, store))
                    if error := samples[-1].get("error"):
                        console.print(f"  failed: {error}", highlight=False, markup=False)
    except KeyboardInterrupt:
        console.print("interrupted: what follows is of the trials that were complete")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return samples


def _timed(trial: Trial, options: argparse.Namespace, store: Place) -> dict[str, Any]:
    began = perf_counter()
    sample = run_trial(trial, size_mb(trial.section, options.size_mb), options.saves, store)
    return {**sample, "trial_s": perf_counter() - began}


if __name__ == "__main__":
    sys.exit(main())
