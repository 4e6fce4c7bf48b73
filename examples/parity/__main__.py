"""Certify a job on machines that differ on purpose, and resumes that are broken on purpose; tell who judged right.

    python -m examples.parity [--quick] [--out DIR]

Two jobs train a GPT, one with dropout and one without. Then `gpumove certify` trains recorded steps of them again: on
the same machine; with other threads, products, kernels or ranks; and with a resume that has one of four faults. Each
certificate is compared with what both scripts have put down of themselves, and with what it has to say.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.looks import bars, console, leave, say
from examples.parity.cases import CASES, Case, Numbers, wrong
from examples.parity.picture import draw
from examples.sizes import parse_sizes, parser_of
from gpumove.parity.verdict import DIFFERENT, Certificate, read_certificate
from gpumove.words import percent

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {True: "with dropout", False: "without dropout"}


@dataclass(frozen=True)
class Judged:
    """One case, and what came of it."""

    case: Case
    certificate: Certificate
    wrong: list[str]
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """For the report."""
        found = self.certificate
        return {
            "name": self.case.name, "verdict": found.verdict, "cause": found.cause, "why": found.why,
            "largest": found.largest, "tolerance": found.tolerance, "seconds": self.seconds, "wrong": self.wrong,
        }  # fmt: skip


class Laboratory:
    """Trains, and certifies."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        self._out, self._steps, self._most_s = out, args.certify, args.most_s
        self._sizes = {
            "steps": args.steps, "every-steps": args.every_steps, "batch": args.batch, "context": args.context,
            "layers": args.layers, "width": args.width, "threads": 1, "precision": "highest",
        }  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUMOVE_", "ATEN_", "MKL_"))}
        self._env = {**kept, "GPUMOVE_EVERY_S": "none"}  # saves by steps only, however slow this machine is

    def train(self, dropout: bool) -> None:
        """One of the first jobs, to its end."""
        name = PLAIN[dropout]
        words = ["examples.train_gpt", *self._options(name, dropout, {})]
        code = self._run(name, [sys.executable, "-m", *words], {})
        if code:
            sys.exit(f"the job {name} ended with {code}; the end of its log:\n{self._log(name)}")

    def certify(self, case: Case) -> Judged:
        """One certificate, as a user would make it, and whether it is right."""
        source, path, began = PLAIN[case.dropout], self._out / f"{case.name}.json", time.monotonic()
        script = ["examples.train_gpt"] if case.fault is None else ["examples.parity.broken", f"--fault={case.fault}"]
        script += ["--ddp"] if case.ranks > 1 else []
        launch = ["--standalone", f"--nproc-per-node={case.ranks}", "-m", *script]
        words = ["certify", str(self._out / source), "--steps", str(self._steps), "--output", str(path), "--"]
        options = self._options(case.name, case.dropout, case.options)
        code = self._run(case.name, [sys.executable, "-m", "gpumove", *words, *launch, *options], case.env)
        if not path.exists():
            sys.exit(f"{case.name}: no certificate, exit code {code}; the end of its log:\n{self._log(case.name)}")
        found, numbers = read_certificate(path), [self.numbers(name) for name in (source, case.name)]
        return Judged(case, found, wrong(case, found, code, *numbers, steps=self._steps), time.monotonic() - began)

    def numbers(self, name: str) -> Numbers:
        """What a script has put down."""
        rows = [json.loads(line) for line in (self._out / f"{name}.jsonl").read_text().splitlines()]
        told = [row for row in rows if "step" in row]
        return Numbers({r["step"]: r["loss"] for r in told}, {r["step"]: r["norm"] for r in told})

    def objects(self) -> dict[str, tuple[int, int]]:
        """All that lies in both stores: nothing of it may change."""
        files = [path for name in PLAIN.values() for path in (self._out / name).rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    def _options(self, name: str, dropout: bool, other: Mapping[str, object]) -> list[str]:
        given = {**self._sizes, **other, "dropout": 0.2 if dropout else 0.0}
        given["batch"] = int(given["batch"] * self._sizes["batch"]) if "batch" in other else given["batch"]
        places = {"url": self._out / PLAIN[dropout], "out": self._out / f"{name}.jsonl"}
        return [f"--{option}={value}" for option, value in {**given, **places}.items()]

    def _run(self, name: str, command: list[str], env: Mapping[str, str]) -> int:
        (self._out / f"{name}.jsonl").write_bytes(b"")
        with (self._out / f"{name}.log").open("wb") as log:
            done = subprocess.run(
                command, cwd=ROOT, env={**self._env, **env}, stdout=log, stderr=log, timeout=self._most_s, check=False
            )
        return done.returncode

    def _log(self, name: str) -> str:
        return (self._out / f"{name}.log").read_text(errors="replace")[-3000:]


def show(judged: list[Judged]) -> None:
    """All cases side by side."""
    for broken, title in ((False, "The job goes on with"), (True, "A resume with a fault")):
        table = Table(title=title, title_justify="left", title_style="bold")
        for heading in ("what", "certificate", "difference", "cause", "first", ""):
            table.add_column(heading, justify="right" if heading in ("difference", "first") else "left", no_wrap=True)
        for one in judged:
            if (one.case.fault is not None) is broken:
                table.add_row(*_row(one))
        console.print(table)


def _row(one: Judged) -> tuple[str, ...]:
    found = one.certificate
    style = "red" if found.verdict == DIFFERENT else "green"
    largest = "unknown" if found.largest is None else percent(found.largest)
    first = "" if found.first is None else f"step {found.first.step - found.setting.step}"
    mark = "[bold red]✗[/]" if one.wrong else "[green]✓[/]"
    return one.case.what, f"[{style}]{found.verdict}[/]", largest, found.cause, first, mark


def prove(judged: list[Judged], changed: list[str]) -> list[str]:
    """What is wrong with them."""
    said = [f"{one.case.name}: {words}" for one in judged for words in one.wrong]
    said += [f"a certificate has changed {path}" for path in changed[:5]]
    broken = [one for one in judged if one.case.fault is not None]
    caught = sum(not one.wrong for one in broken)
    good = [
        f"{sum(not one.wrong for one in judged)} of {len(judged)} certificates say what the scripts' own numbers say",
        f"{caught} of {len(broken)} broken resumes were caught, with the right cause",
        "no certificate has written anything into a store",
    ]
    say(said, [] if said else good)
    return said


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "out/parity", "fewer steps and cases")
    parser.add_argument("--jobs", type=int, default=2, help="certificates at a time (2)")
    parser.add_argument("--most-s", type=float, default=300, help=argparse.SUPPRESS)
    sizes = {"steps": 100, "every-steps": 25, "certify": 20, "batch": 8, "context": 64, "layers": 3, "width": 96}
    quick = {"steps": 45, "every-steps": 15, "certify": 10, "batch": 8, "context": 64, "layers": 2, "width": 64}
    return parse_sizes(parser, sizes, quick)


def main() -> int:
    args = parse()
    out = args.out.resolve()
    for name in PLAIN.values():  # what an earlier demonstration has left, and nothing else
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if case.quick or not args.quick]
    for case in cases:
        (out / f"{case.name}.json").unlink(missing_ok=True)
    laboratory, began = Laboratory(args, out), time.monotonic()
    with bars() as shown, ThreadPoolExecutor(args.jobs) as pool:
        for _ in shown.track(pool.map(laboratory.train, PLAIN), total=len(PLAIN), description="train"):
            pass
        before = laboratory.objects()
        made = pool.map(laboratory.certify, cases)
        judged = list(shown.track(made, total=len(cases), description="certify"))
    after = laboratory.objects()
    show(judged)
    said = prove(judged, [path for path in before | after if before.get(path) != after.get(path)])
    draw(out / "parity.png", [(one.case, one.certificate) for one in judged])
    sizes = {name: value for name, value in vars(args).items() if name != "out"}
    facts = {"seconds": time.monotonic() - began, "wrong": said, "passed": not said}
    return leave(args.out, "parity.png", {**sizes, **facts, "cases": [one.facts for one in judged]})


if __name__ == "__main__":
    sys.exit(main())
