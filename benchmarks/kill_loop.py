"""SIGKILL a real training at random moments, again and again; after each kill, what is in the store must be right.

`python -m benchmarks.kill_loop --kills 50` exits with 1 if anything was not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.kill.board import Board
from benchmarks.machine import facts, threads
from benchmarks.places import Place
from benchmarks.report import write_json

if TYPE_CHECKING:
    from benchmarks.kill.children import Run

# Every second kill comes at a random time; the others wait for one of these to be under way.
_AIMS = ("packs", "log: checkpoint", "delete", "parts", "log: gc", "manifests", "read", "log: claim")
_LONGEST_S = 20.0


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    inspections: int = 0
    checkpoints_read: int = 0
    resumes: int = 0
    runs: int = 0
    interrupted: Counter[str] = field(default_factory=Counter)
    steps_lost: list[int] = field(default_factory=list)
    leftover_bytes: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_loop", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--store", choices=("file", "s3"), default="file")
    parser.add_argument("--every-steps", type=int, default=1, help="steps between saves")
    parser.add_argument("--steps", type=int, default=400, help="length of a run; then a new one begins")
    parser.add_argument("--width", type=int, default=384, help="of the model; 384 gives 3 MB of state")
    parser.add_argument("--longest-s", type=float, default=0.8, help="a random kill comes no later after the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    return parser.parse_args(arguments)


class Loop:
    """Fork, kill, inspect. The parent has one thread and never computes: only such a process may be forked safely."""

    def __init__(self, options: argparse.Namespace, scratch: Path, bucket: Place | None) -> None:
        self._options, self._scratch, self._bucket = options, scratch, bucket
        self._chance = random.Random(options.seed)
        self._board = Board()
        self._log = scratch / "children.log"
        self._log.touch()
        self.tally = Tally()
        self._acknowledged = self._killed_at = -1

    def go(self, console: Console) -> Tally:
        """All kills, over as many runs as it takes."""
        from benchmarks.kill.children import Run, ask, reference

        shape = {"steps": self._options.steps, "every_steps": self._options.every_steps, "width": self._options.width}
        self._truth = ask(lambda: reference(Run("", **shape)), self._log)
        while self.tally.kills < self._options.kills and not self.tally.bad:
            place = self._place()
            self._acknowledged = self._killed_at = -1
            self._one_run(Run(place.url, place.options, **shape), console)
            self.tally.runs += 1
            place.remove()
        return self.tally

    def _place(self) -> Place:
        name = f"run-{self.tally.runs}"
        if self._bucket is not None:
            return Place(self._bucket.child(name), self._bucket.options)
        return Place((self._scratch / name).resolve().as_uri())

    def _one_run(self, run: Run, console: Console) -> None:
        """Kill a run until it reaches its end, or there were enough kills; then let it reach its end."""
        ended = False
        while not ended and not self.tally.bad:
            final = self.tally.kills >= self._options.kills
            ended = self._one_life(run, None if final else self._aim())
            self._inspect(run)
            if not ended:
                console.print(f"{self.tally.kills}/{self._options.kills} {self._last_words}", highlight=False)

    def _aim(self) -> str:
        # A fresh run never does what some aims wait for: it reaches its end, and the next one gets another aim.
        number = self.tally.kills + self.tally.runs
        return "" if number % 2 else _AIMS[number // 2 % len(_AIMS)]

    def _one_life(self, run: Run, aim: str | None) -> bool:
        """Start the training, and kill it unless ``aim`` is None; whether it reached its end by itself."""
        from benchmarks.kill.children import fork, train

        self._board.clear()
        child = fork(lambda: train(run, self._truth, self._board), self._log)
        status = os.waitpid(child, 0)[1] if aim is None else self._kill(child, aim)
        if resumed := self._board.get("restored"):
            self.tally.resumes += 1
            if self._killed_at >= 0:
                self.tally.steps_lost.append(self._killed_at - (resumed - 1))
            self._killed_at = self._board.get("done")
        self._acknowledged = max(self._acknowledged, self._board.get("acknowledged") - 1)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.tally.kills += 1
            word = self._board.interrupted()
            self.tally.interrupted[word] += 1
            self._last_words = f"after step {self._board.get('done')}, during: {word}"
            return False
        if status:
            words = self._log.read_text(errors="replace").strip().splitlines() or ["it resumed from a wrong state"]
            self.tally.bad.append(f"the training ended with status {os.waitstatus_to_exitcode(status)}: {words[-1]}")
        return True

    def _kill(self, child: int, aim: str) -> int:
        """Wait for the moment, then SIGKILL. The wait status."""
        began = time.monotonic()
        at = began + self._chance.uniform(0.0, self._options.longest_s)
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return status
            now = time.monotonic()
            if (aim and self._board.in_flight(aim)) or (not aim and now >= at) or now >= began + _LONGEST_S:
                break
            time.sleep(1e-4)
        if aim:
            time.sleep(self._chance.choice((0.0, 0.0, 3e-4, 1e-3)))
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def _inspect(self, run: Run) -> None:
        """Everything that the log refers to must be there and be what the reference had."""
        from benchmarks.kill.children import ask, inspect

        try:
            found = ask(lambda: inspect(run, self._truth), self._log)
        except RuntimeError as error:
            self.tally.bad.append(f"the run cannot be read: {error}")
            return
        self.tally.inspections += 1
        self.tally.checkpoints_read += len(found["steps"])
        self.tally.bad += [f"step {step} is not what the reference has" for step in found["wrong"]]
        self.tally.bad += found["damage"]
        newest = max(found["steps"], default=-1)
        if newest < self._acknowledged:
            self.tally.bad.append(f"step {self._acknowledged} was committed, and the newest is {newest}")
        self.tally.leftover_bytes.append(Place(run.url, run.options).nbytes() - found["needed_bytes"])


def show(console: Console, tally: Tally) -> None:
    """The outcome as a table."""
    lost = sorted(tally.steps_lost)
    rows = {
        "kills": tally.kills,
        "runs that reached their end": tally.runs,
        "resumes checked against the reference": tally.resumes,
        "inspections of all objects": tally.inspections,
        "checkpoints loaded and compared": tally.checkpoints_read,
        "steps lost by a kill": f"mean {mean(lost):.1f}, most {lost[-1]}" if lost else "-",
        "MB that nothing refers to, at most and at the end": _leftovers(tally),
        "bad": len(tally.bad),
    }
    table = Table(title="kill loop", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    for name, count in tally.interrupted.most_common():
        table.add_row(f"interrupted during: {name}", str(count))
    console.print(table)
    for words in tally.bad:
        console.print(f"[red]BAD[/] {words}", highlight=False)


def _leftovers(tally: Tally) -> str:
    found = [nbytes / 1e6 for nbytes in tally.leftover_bytes]
    return f"{max(found):.1f}, {found[-1]:.1f}" if found else "-"


@contextlib.contextmanager
def _bucket(store: str, scratch: Path) -> Iterator[Place | None]:
    if store == "file":
        yield None
        return
    import s3fs  # noqa: F401 - imported here, so that no child has to

    from tests.servers import ministack

    with ministack(scratch) as bucket:
        yield Place(bucket.url, bucket.options)


def _import_all() -> None:
    """Once, before any fork. Numeric libraries must not start threads at that."""
    import gpumove

    importlib.import_module("benchmarks.kill.children")
    importlib.import_module("torch._dynamo")  # the first optimizer of a process would do so, for half a second
    for name in gpumove.__all__:
        getattr(gpumove, name)
    if (count := threads()) > 1:
        raise RuntimeError(f"{count} threads run before the first fork")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if anything was bad."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    os.environ.update(AWS_EC2_METADATA_DISABLED="true", AWS_DEFAULT_REGION="us-east-1", NO_PROXY="127.0.0.1")
    console, machine = Console(), facts()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.out, prefix="scratch-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        _import_all()
        with _bucket(options.store, scratch) as bucket:
            tally = Loop(options, scratch, bucket).go(console)
    show(console, tally)
    content: dict[str, Any] = {"machine": machine, "seconds": round(time.monotonic() - began, 1), **vars(tally)}
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    write_json(options.out / f"kill_loop_{options.store}.json", {**content, "settings": settings})
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
