"""Nobody trains while a job is moved to another cloud: for how long, with `gpumove move`, and with stop, copy, start?

`python -m benchmarks.move` exits with 1 if a target is missed, or if the state that arrives is not the one that left.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.codec.tables import outcome
from benchmarks.machine import facts
from benchmarks.move_run import Cell, Machine
from benchmarks.move_states import NAMES
from benchmarks.report import Verdict, write_json

_WIDTH = 120
_PARTS = ("leave", "copy", "hand over", "restore", "replay")
_STEP_SHARE = {"lora": 0.007, "mixed": 0.10, "fp32": 0.28}
"""What a difference of one step is of the raw state: whether a link keeps up with every step is known beforehand."""
_NEAR_LIMITS = {"mixed": 0.15, "fp32": 0.33}
_LORA_LIMIT, _FAR_LIMIT, _FAR_ROUNDS, _FAR_COPIES, _FORECAST_LIMIT = 0.05, 0.75, 1, 1.6, 0.2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.move", description=__doc__)
    parser.add_argument("--states", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ratios", type=float, nargs="+", help="steps in one transfer of the raw state (1 3 30)")
    parser.add_argument("--state-mb", type=float, help="raw size (1000)")
    parser.add_argument("--mbit-s", type=float, help="rate of the link between the clouds (100)")
    parser.add_argument("--delay-s", type=float, default=0.025, help="its delay, one way (0.025)")
    parser.add_argument("--estimate", action="store_true", help="compare with gpumove estimate instead of a stop")
    parser.add_argument("--quick", action="store_true", help="small states, one ratio: shows that all of it works")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    found = parser.parse_args(arguments)
    found.ratios = found.ratios or ([3.0] if found.quick else [1.0, 3.0, 30.0])
    found.state_mb = found.state_mb or (20.0 if found.quick else 1000.0)
    found.mbit_s = found.mbit_s or (20.0 if found.quick else 100.0)
    return found


def cells(options: argparse.Namespace) -> list[Cell]:
    """All of them, stop-copy-start of a state first."""
    found = []
    for state in options.states:
        if options.estimate:  # which knows nothing of single steps
            found += [Cell(state, ratio) for ratio in options.ratios]
            continue
        found += [Cell(state, None)]
        found += [Cell(state, ratio, every_step=_STEP_SHARE[state] * ratio <= 0.9) for ratio in options.ratios]
    return found


def share(cell: Cell, done: Sequence[Cell]) -> float | None:
    """Of the blackout of stop-copy-start."""
    whole = next((c for c in done if c.state == cell.state and c.ratio is None), None)
    if whole is None or not whole.blackout_s or not cell.blackout_s:
        return None
    return cell.blackout_s / whole.blackout_s


def targets(done: Sequence[Cell]) -> Iterator[Verdict]:
    """What the move has to reach; R is the number of steps in one transfer of the raw state."""
    for cell in done:
        if cell.ratio is None or not cell.blackout_s:
            continue
        name, found = f"R = {cell.ratio:g}", share(cell, done)
        near = cell.ratio <= 3
        limit = _LORA_LIMIT if cell.state == "lora" else _NEAR_LIMITS[cell.state] if near else _FAR_LIMIT
        if found is not None:
            words = f"blackout {found:.3f} of stop-copy-start, target {limit:g}"
            yield Verdict(cell.state, name, words, found <= limit)
        if not near and cell.state != "lora":
            words = f"{cell.rounds} rounds before the stop, target {_FAR_ROUNDS}"
            yield Verdict(cell.state, name, words, cell.rounds <= _FAR_ROUNDS)
            words = f"{cell.copies:.2f} copies of the raw state over the link, target {_FAR_COPIES}"
            yield Verdict(cell.state, name, words, cell.copies <= _FAR_COPIES)
        off = float("inf") if cell.forecast_s is None else cell.forecast_s / cell.blackout_s - 1
        words = f"the forecast was off by {100 * off:+.0f} %, target {100 * _FORECAST_LIMIT:.0f} %"
        yield Verdict(cell.state, name, words, abs(off) <= _FORECAST_LIMIT)


def estimates(done: Sequence[Cell]) -> Iterator[Verdict]:
    """What an estimate made before the move has to reach."""
    for cell in done:
        if not cell.estimated and not cell.bad:
            yield Verdict(cell.state, f"R = {cell.ratio:g}", "no estimate", False)
        for found in cell.estimated:
            off, limit = found["off"], 100 * _FORECAST_LIMIT
            said = "nothing was foretold" if off is None else f"foretold off by {100 * off:+.0f} %"
            words = f"{found['name']}: {said}, target {limit:.0f} %"
            yield Verdict(cell.state, f"R = {cell.ratio:g}", words, off is not None and abs(off) <= _FORECAST_LIMIT)


def show(console: Console, options: argparse.Namespace, done: Sequence[Cell]) -> None:
    """All cells in one table."""
    transfer_s = 8 * options.state_mb / options.mbit_s
    link = f"{options.mbit_s:g} Mbit/s, {2e3 * options.delay_s:g} ms"
    title = f"{options.state_mb:g} MB over {link}: {transfer_s:.0f} s; R = steps in that time; seconds"
    shown = Table(title=title, title_justify="left")
    shown.add_column("state")
    shown.add_column("R")
    for head in ("blackout", "share", "foretold", "rounds", "copies", *_PARTS):
        shown.add_column(head, justify="right")
    for cell in done:
        way = "stop" if cell.ratio is None else f"{cell.ratio:g}{', steps' * cell.every_step}"
        found = None if cell.ratio is None else share(cell, done)
        numbers = ["" if found is None else f"{found:.3f}", _seconds(cell.forecast_s), str(cell.rounds)]
        parts = (_seconds(cell.parts_s.get(name)) for name in _PARTS)
        shown.add_row(cell.state, way, _seconds(cell.blackout_s), *numbers, f"{cell.copies:.2f}", *parts)
    console.print(shown)
    for cell in done:
        for words in cell.bad:
            console.print(f"[red]BAD[/] {cell.state}, R = {cell.ratio}: {words}", highlight=False)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if anything was bad, or a target was missed."""
    options = parse(arguments)
    os.environ.update(AWS_EC2_METADATA_DISABLED="true", AWS_DEFAULT_REGION="us-east-1", NO_PROXY="127.0.0.1")
    machine, began, console = facts(), time.monotonic(), Console()
    console.width = max(console.width, _WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    done: list[Cell] = []
    with tempfile.TemporaryDirectory(dir=options.out, prefix="scratch-", ignore_cleanup_errors=True) as name:
        runner = Machine(options, Path(name).resolve())
        for cell in cells(options):
            done.append(runner.run(cell))
            console.print(f"{cell.state}, R = {cell.ratio}: {cell.blackout_s:.1f} s", highlight=False)
    show(console, options, done)
    judge = estimates if options.estimate else targets
    found = [] if options.quick else list(judge(done))
    outcome(console, found)
    content = {"machine": machine, "seconds": round(time.monotonic() - began, 1), "cells": [asdict(c) for c in done]}
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    verdicts = [vars(verdict) for verdict in found]
    kind = "_quick" if options.quick else "_estimate" if options.estimate else ""
    file = f"move{kind}.json"
    write_json(options.out / file, {**content, "settings": settings, "verdicts": verdicts})
    return 1 if any(cell.bad for cell in done) or not all(v.met for v in found) else 0


if __name__ == "__main__":
    sys.exit(main())
