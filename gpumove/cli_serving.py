"""The verbs of the hand-over to serving: publish, promote, demote, pointers."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import Any

from gpumove.cli_options import given, number, storage_options
from gpumove.cli_tables import Screen
from gpumove.format.pointer import Pointer
from gpumove.serving.following import pointers
from gpumove.serving.publishing import demote, promote, publish
from gpumove.words import when

Arguments = argparse.Namespace


def run_publish(args: Arguments, screen: Screen) -> int:
    """Have a name stand for a checkpoint, for inference servers to follow."""
    found = publish(
        args.url, args.step, args.name, **_gate(args), export=args.export, text=args.text,
        storage_options=storage_options(args), export_options=storage_options(args, "--export-option"),
    )  # fmt: skip
    screen.give(found, lambda s: _say(s, found))
    return 0


def run_promote(args: Arguments, screen: Screen) -> int:
    """Have a name stand for what another one stands for, if its outputs are those that were recorded."""
    found = promote(
        args.url, args.source, args.name, **_gate(args), gate=not args.no_gate, text=args.text,
        storage_options=storage_options(args),
    )  # fmt: skip
    screen.give(found, lambda s: _say(s, found))
    return 0


def run_demote(args: Arguments, screen: Screen) -> int:
    """Take back what a name was made to stand for last."""
    found = demote(args.url, args.name, retire=args.retire, text=args.text, storage_options=storage_options(args))
    screen.give(found, lambda s: _say(s, found))
    return 0


def run_pointers(args: Arguments, screen: Screen) -> int:
    """What each name stands for, or all that one has stood for."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s gpumove pointers: %(message)s")
    found = pointers(args.url, args.name, storage_options=storage_options(args))
    screen.give({"pointers": found}, lambda s: _show(s, found))
    return 0


def _gate(args: Arguments) -> dict[str, Any]:
    """What is compared, and how, as arguments."""
    return {"outputs": args.outputs, "probe": args.probe, "tolerance": given(args, "--tolerance", _share)}


def _share(option: str, text: str) -> float:
    return number(option, text, "a number such as 0.001")


def _say(screen: Screen, pointer: Pointer) -> None:
    what = "nothing" if pointer.step is None else f"step {pointer.step}"
    screen.line(f"{pointer.name} stands for {what} now (number {pointer.number}{_passed(pointer, ', gate: ')})")


def _passed(pointer: Pointer, before: str = "") -> str:
    if not pointer.gate:
        return ""
    relative = pointer.gate.get("relative")
    far = f", {relative:.2g} off" if relative else ""
    return f"{before}{pointer.gate.get('verdict', '')}{far}"


def _show(screen: Screen, found: Sequence[Pointer]) -> None:
    if not found:
        screen.line("nothing is published")
        return
    rows = [
        [
            p.name, str(p.number), "nothing" if p.step is None else str(p.step),
            p.action + (f" from {p.source}" if p.action == "promote" else ""), _passed(p) or "not asked", when(p.time),
            p.by, "" if p.export is None else p.export.url, p.text,
        ]
        for p in found
    ]  # fmt: skip
    screen.table(("name", "number", "step", "by what", "gate", "when", "who", "export", "why"), rows, right="lrr")


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add these verbs to the command line."""
    first = verb("publish", run_publish)
    first.add_argument("step", metavar="STEP", type=int, help="the checkpoint's step")
    first.add_argument("--as", dest="name", metavar="NAME", required=True, help="such as canary")
    first.add_argument("--export", metavar="PLACE", help="an export of it: a folder or a URL")
    first.add_argument("--export-option", metavar="KEY=VALUE", action="append", default=[], help="a storage option")
    second = verb("promote", run_promote)
    second.add_argument("source", metavar="NAME", help="the name that has it, such as canary")
    second.add_argument("--to", dest="name", metavar="NAME", required=True, help="the name that is to have it")
    second.add_argument("--no-gate", action="store_true", help="without comparing any outputs")
    for found in (first, second):
        _add_gate(found)
    third = verb("demote", run_demote)
    third.add_argument("name", metavar="NAME", help="such as production")
    third.add_argument("--retire", action="store_true", help="have it stand for nothing")
    for found in (first, second, third):
        found.add_argument("--text", metavar="TEXT", default="", help="why, for people")
    table = verb("pointers", run_pointers)
    table.add_argument("name", metavar="NAME", nargs="?", help="all that this one has stood for")


def _add_gate(found: Any) -> None:
    found.add_argument("--outputs", metavar="FILE", help="safetensors: what the serving stack gives for the probe")
    found.add_argument("--probe", metavar="NAME", help="which probe, if the checkpoint has several")
    found.add_argument("--tolerance", metavar="X", help="the largest difference, as a share of the largest value")
