"""Hundreds of saves in one process: memory, descriptors and threads must stay where they are.

`python -m benchmarks.soak --saves 200` exits with 1 if memory grows, or if a save takes more than the state's copy and
the byte budget.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import descriptors, facts, memory, reset_peak, threads
from benchmarks.places import Place
from benchmarks.report import write_json

_MIB = 1 << 20
_WARM_SHARE = 0.25
# What does not depend on the state or the budget: scratch and heaps of threads that code, and for S3 a client session.
_SLACK_MIB = {"file": 48.0, "s3": 68.0}


@dataclass(frozen=True)
class Row:
    """One save: what the process held when it was over, and the most that it held meanwhile."""

    resident_bytes: int
    peak_bytes: int
    descriptors: int
    threads: int
    seconds: float


@dataclass(frozen=True)
class Soak:
    """What was measured. ``bare_peak_bytes`` is the peak of the same training before there was a Checkpointer."""

    state_bytes: int
    budget_bytes: int
    bare_peak_bytes: int
    rows: list[Row]

    @property
    def steady(self) -> list[Row]:
        """Without the first quarter, in which allocators and pools fill."""
        return self.rows[int(len(self.rows) * _WARM_SHARE) :]

    @property
    def slope(self) -> float:
        """Bytes that the process gains per save: of a line through resident memory."""
        return linear_regression(range(len(self.steady)), [row.resident_bytes for row in self.steady]).slope

    def ends(self, name: str) -> tuple[float, float]:
        """The medians of the first and of the last quarter of the steady saves: deaf to single outliers.

        A thread that looks at the log at the very moment of a measurement may have two dozen readers for a blink.
        """
        quarter = max(1, len(self.steady) // 4)
        values = [getattr(row, name) for row in self.steady]
        return median(values[:quarter]), median(values[-quarter:])

    @property
    def growth_bytes(self) -> float:
        """What the process has gained between those ends."""
        first, last = self.ends("resident_bytes")
        return last - first

    @property
    def above_bytes(self) -> int:
        """The most that saving took beyond the training itself."""
        return max(row.peak_bytes for row in self.rows) - self.bare_peak_bytes

    def problems(self, *, slack_bytes: int, growth_bytes: int) -> list[str]:
        """What is wrong, in words; [] if nothing."""
        found = []
        allowed = 2 * self.state_bytes + self.budget_bytes + slack_bytes
        if self.above_bytes > allowed:
            found.append(
                f"saving took {_mib(self.above_bytes)}; two staged copies, budget and slack are {_mib(allowed)}"
            )
        if self.growth_bytes > growth_bytes:
            found.append(f"memory grew by {_mib(self.growth_bytes)} over {len(self.steady)} saves")
        for name in ("descriptors", "threads"):
            first, last = self.ends(name)
            if last > first + 2:
                found.append(f"{name} went from {first:g} to {last:g}")
        return found


def _mib(nbytes: float) -> str:
    return f"{nbytes / _MIB:.1f} MiB"


def run(place: Place, *, size_mb: float, saves: int, budget_mib: int) -> Soak:
    """Train and save; measure after each save."""
    from benchmarks.workload import gpt
    from gpumove import Checkpointer  # before the measurement: modules are no part of a save

    place.nbytes()  # nor is a cloud's client, tens of megabytes of modules and service descriptions
    job = gpt(size_mb, layers=4)
    for _ in range(10):
        job.train_step()
    reset_peak()
    for _ in range(10):
        job.train_step()
    bare, rows = memory(), []
    budget = budget_mib * _MIB
    settings: dict[str, Any] = {
        "budget_bytes": budget,
        "pack_bytes": budget // 8,
        "chunk_bytes": budget // 32,
        "keep_last": 2,
    }
    with Checkpointer(
        place.url,
        model=job.model,
        optimizer=job.optimizer,
        every_s=None,
        storage_options=place.options,
        **settings,
    ) as ckpt:
        ckpt.restore()
        for _ in range(saves):
            reset_peak()
            began = time.perf_counter()
            handle = ckpt.save(job.step)
            while not handle.finished:
                job.train_step()
                ckpt.step(job.step)
            handle.wait()
            job.train_step()
            now = memory()
            rows.append(Row(now.now, now.peak, descriptors(), threads(), time.perf_counter() - began))
    return Soak(job.state_bytes, budget, bare.peak, rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--size-mb", type=float, default=60)
    parser.add_argument("--budget-mib", type=int, default=16)
    parser.add_argument("--slack-mib", type=float, help="beyond staged copy and budget; by default that of the store")
    parser.add_argument("--growth-mib", type=float, default=4, help="between the first and the last steady saves")
    parser.add_argument("--store", choices=("file", "s3"), default="file")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    return parser.parse_args(arguments)


@contextmanager
def _place(store: str, scratch: Path) -> Iterator[Place]:
    if store == "file":
        yield Place((scratch / "run").resolve().as_uri())
        return
    from tests.servers import ministack

    with ministack(scratch) as bucket:
        yield Place(f"{bucket.url}/run", bucket.options)


def show(console: Console, found: Soak, problems: Sequence[str]) -> None:
    """The outcome as a table."""
    table = Table(title="soak", title_justify="left", show_header=False)
    for name, value in {
        "saves": str(len(found.rows)),
        "state": _mib(found.state_bytes),
        "budget": _mib(found.budget_bytes),
        "peak over the training alone": _mib(found.above_bytes),
        "... of which beyond the staged copy": _mib(found.above_bytes - found.state_bytes),
        "slope of resident memory": f"{found.slope / 1024:.2f} KiB per save",
        "growth, first to last steady saves": _mib(found.growth_bytes),
        "descriptors": "{:g} to {:g}".format(*found.ends("descriptors")),
        "threads": "{:g} to {:g}".format(*found.ends("threads")),
        "seconds per save, with training": f"{median(row.seconds for row in found.steady):.2f}",
    }.items():
        table.add_row(name, value)
    console.print(table)
    for words in problems:
        console.print(f"[red]BAD[/] {words}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if memory, descriptors or threads are not what they should be."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = facts()
    with (
        tempfile.TemporaryDirectory(dir=options.out, prefix="scratch-") as name,
        _place(options.store, Path(name)) as place,
    ):
        found = run(place, size_mb=options.size_mb, saves=options.saves, budget_mib=options.budget_mib)
    slack_mib = _SLACK_MIB[options.store] if options.slack_mib is None else options.slack_mib
    problems = found.problems(slack_bytes=int(slack_mib * _MIB), growth_bytes=int(options.growth_mib * _MIB))
    show(Console(), found, problems)
    content: dict[str, Any] = {
        "machine": machine,
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "state_bytes": found.state_bytes,
        "budget_bytes": found.budget_bytes,
        "bare_peak_bytes": found.bare_peak_bytes,
        "above_bytes": found.above_bytes,
        "slope_bytes_per_save": found.slope,
        "growth_bytes": found.growth_bytes,
        "problems": problems,
        "rows": [vars(row) for row in found.rows],
    }
    write_json(options.out / f"soak_{options.store}.json", content)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
