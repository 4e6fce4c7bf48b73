"""Tell a training that its machine goes in so many seconds, over links of several rates: what is saved, what is lost?

`python -m benchmarks.leaving` exits with 1 if gpumove overran a deadline, or said what restoring does not bear out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.leaving_job import Task, put
from benchmarks.machine import facts
from benchmarks.report import write_json

PEERS = ("gpumove", "dcp", "dcp-notice")
"""The second saves as often and is killed; the third also saves once more when it is told, and leaves then."""
_DELAY_S = 0.02
_DIES_S = 60.0
_START_S = 180.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaving", description=__doc__)
    parser.add_argument("--notices", type=float, nargs="+", default=[120, 30, 15, 5, 0], help="seconds")
    parser.add_argument("--transfers", type=float, nargs="+", default=[4, 12, 30], help="seconds for the raw state")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--state-mb", type=float, default=12)
    parser.add_argument("--step-s", type=float, default=0.5, help="a step takes at least this")
    parser.add_argument("--interval", type=float, default=1.6, help="between saves, as a multiple of the transfer")
    parser.add_argument("--at-once", type=int, default=8, help="trainings beside each other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    return parser.parse_args(arguments)


@dataclass
class Cell:
    """One training that was told to go."""

    peer: str
    notice_s: float
    transfer_s: float
    every_steps: int
    told_at_step: int
    measured: bool = False
    last_step: int = 0
    resumed_from: int = 0
    durable: bool = False
    """Whether the step after which it ended, by itself or not, is what a resume begins from."""
    done_s: float | None = None
    """Seconds from the notice until all was saved, closed and said; None if that was not before the deadline."""
    gone_s: float | None = None
    """Until the process was gone too; None if it was killed at the deadline. Python with torch in it takes a second of
    processor time to go, and several where others do the same."""
    said: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    """The begin of what it wrote: where it stood when it was killed comes last, and is long."""
    bad: list[str] = field(default_factory=list)

    @property
    def lost_steps(self) -> int:
        return self.last_step - self.resumed_from

    def judge(self, trained: dict[int, str], digest: str) -> None:
        """Hold what was said, and when, against what a resume found."""
        self.last_step = max(trained, default=0)
        self.durable = self.resumed_from == self.last_step
        if self.resumed_from and trained[self.resumed_from] != digest:
            self.bad.append(f"step {self.resumed_from} was restored, and is not what was trained")
        if self.peer != "gpumove":
            return
        if self.said and self.said["step"] != self.resumed_from:
            self.bad.append(f"it said {self.said['text']!r}, and a resume begins from step {self.resumed_from}")
        if self.said and self.said["durable"] and not self.durable:
            self.bad.append(f"it said {self.said['text']!r}, and trained until step {self.last_step}")
        if self.notice_s > 0 and self.done_s is None:
            self.bad.append("it was still at work at the deadline")


def trained(task: Task) -> dict[int, str]:
    """By step, the digest of the state; a line that is being written does not count."""
    lines = task.steps.read_text().split("\n")[:-1] if task.steps.exists() else []
    return {int(step): digest for step, digest in map(str.split, lines)}


class Machine:
    """Runs one cell: trains, gives notice, and is gone at the deadline."""

    def __init__(self, options: argparse.Namespace, bucket: Any, scratch: Path) -> None:
        self._options, self._bucket, self._scratch = options, bucket, scratch

    def run(self, cell: Cell) -> Cell:
        """The cell with what came out."""
        try:
            self._run(cell)
            cell.measured = True
        except Exception as error:  # noqa: BLE001 - one cell that cannot be measured must not cost the others
            cell.bad.append(f"not measured: {error}")
        return cell

    def _run(self, cell: Cell) -> None:
        from tests.servers.link import Link
        from tests.servers.proxy import Proxy

        name = f"{cell.peer}-{cell.notice_s:g}-{cell.transfer_s:g}"
        folder = self._scratch / name
        folder.mkdir()
        given = self._options
        mbit_s = 8 * given.state_mb / cell.transfer_s
        with Proxy(self._bucket.endpoint, up=Link(mbit_s, _DELAY_S), down=Link(mbit_s, _DELAY_S)) as proxy:
            bucket = self._bucket.via(proxy.endpoint)
            options = dict(bucket.options)
            if cell.peer != "gpumove":  # s3fs gives a PUT 15 s by itself: a large file over a slow link would never end
                options["config_kwargs"] = {"read_timeout": 600}
            shape = (str(folder), given.state_mb, cell.every_steps, given.step_s)
            task = Task(cell.peer, f"{bucket.url}/{name}", options, *shape)
            with (folder / "log").open("w") as log:
                process = subprocess.Popen(task.command("train"), stdout=log, stderr=log)
            try:
                self._wait_for(cell.told_at_step, task, process)
                self._go(cell, task, process)
            finally:
                process.kill()
                process.wait(_DIES_S)
        cell.log = (folder / "log").read_text()[:4000]
        cell.resumed_from, digest = self._restore(Task(cell.peer, task.url, dict(self._bucket.options), *shape))
        cell.judge(trained(task), digest)

    def _wait_for(self, step: int, task: Task, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S + 4 * step * self._options.step_s
        while max(trained(task), default=0) < step:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{task.folder}: no step {step}\n{(Path(task.folder) / 'log').read_text()[-4000:]}")
            time.sleep(0.05)

    def _go(self, cell: Cell, task: Task, process: subprocess.Popen[bytes]) -> None:
        """Give notice; whatever is left of the process at the deadline is killed, as it goes with its machine."""
        began = time.time()
        put(task.notice, {"deadline": began + cell.notice_s})
        with suppress(subprocess.TimeoutExpired):
            process.wait(cell.notice_s)
            cell.gone_s = time.time() - began
            if process.returncode:
                cell.bad.append(f"it ended with status {process.returncode}, see its log")
        process.send_signal(signal.SIGABRT)  # as final as SIGKILL, and the log says where it stood
        process.wait(_DIES_S)
        if task.said.exists():
            cell.said = json.loads(task.said.read_text())
            done_s = cell.said["at"] - began
            cell.done_s = done_s if done_s <= cell.notice_s else None

    def _restore(self, task: Task) -> tuple[int, str]:
        """What a resume begins from."""
        done = subprocess.run(task.command("restore"), capture_output=True, text=True, timeout=_START_S)
        if done.returncode:
            raise RuntimeError(f"{task.folder}: nothing could be restored\n{done.stderr[-4000:]}")
        step, digest = json.loads(done.stdout.splitlines()[-1])
        return step, digest


def cells(options: argparse.Namespace) -> list[Cell]:
    """All of them, the long ones first. All peers of a notice are told at the same step, two saves after the start."""
    chance = random.Random(options.seed)
    found = []
    for transfer_s in sorted(options.transfers, reverse=True):
        every = max(2, round(options.interval * transfer_s / options.step_s))
        for notice_s in options.notices:
            step = round(every * (2 + chance.uniform(0.1, 0.95)))
            found += [Cell(peer, notice_s, transfer_s, every, step) for peer in options.peers]
    return sorted(found, key=lambda c: c.told_at_step * options.step_s + c.notice_s, reverse=True)


def show(console: Console, options: argparse.Namespace, done: Sequence[Cell]) -> None:
    """One table per link."""
    for transfer_s in options.transfers:
        every = next(c.every_steps for c in done if c.transfer_s == transfer_s)
        link = f"{options.state_mb:g} MB over {8 * options.state_mb / transfer_s:.3g} Mbit/s, {transfer_s:g} s"
        title = f"{link}; a save every {every} steps of {options.step_s:g} s"
        table = Table("notice, s", "told at step", *options.peers, title=title, title_justify="left")
        for notice_s in options.notices:
            row = {c.peer: c for c in done if (c.notice_s, c.transfer_s) == (notice_s, transfer_s)}
            told = row[options.peers[0]].told_at_step
            table.add_row(f"{notice_s:g}", str(told), *(_words(row[peer]) for peer in options.peers))
        console.print(table)
    for cell in done:
        for words in cell.bad:
            name = f"{cell.peer}, {cell.notice_s:g} s, {cell.transfer_s:g} s"
            console.print(f"[red]BAD[/] {name}: {words}", highlight=False)


def _words(cell: Cell) -> str:
    if not cell.measured:
        return "not measured"
    left = "killed" if cell.done_s is None else f"left after {cell.done_s:.1f} s"
    return f"{'durable' if cell.durable else f'{cell.lost_steps} steps lost'}, {left}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if anything was bad."""
    options = parse(arguments)
    os.environ.update(AWS_EC2_METADATA_DISABLED="true", AWS_DEFAULT_REGION="us-east-1", NO_PROXY="127.0.0.1")
    from tests.servers import ministack

    machine, began = facts(), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out, prefix="scratch-", ignore_cleanup_errors=True) as name:
        scratch = Path(name).resolve()
        with ministack(scratch) as bucket, ThreadPoolExecutor(options.at_once) as pool:
            done = list(pool.map(Machine(options, bucket, scratch).run, cells(options)))
    show(Console(), options, done)
    content = {"machine": machine, "seconds": round(time.monotonic() - began, 1), "cells": [asdict(c) for c in done]}
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    write_json(options.out / "leaving.json", {**content, "settings": settings})
    return 1 if any(cell.bad for cell in done) else 0


if __name__ == "__main__":
    sys.exit(main())
