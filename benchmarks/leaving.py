"""Tell a training that its machine goes in so many seconds, over links of several rates: what is saved, what is lost?

`python -m benchmarks.leaving` exits with 1 if gpumove overran a deadline, or said what restoring does not bear out.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import facts
from benchmarks.places import Place
from benchmarks.report import write_json
from benchmarks.workload import digest_of

PEERS = ("gpumove", "dcp", "dcp-notice")
"""The second saves as often and is killed; the third also saves once more when it is told, and leaves then."""
_WIDTH = 256
_LAYER_BYTES = 3 * 4 * _WIDTH**2
_DIES_S = 60.0
_START_S = 180.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaving", description=__doc__)
    parser.add_argument("--notices", type=float, nargs="+", default=[120, 30, 15, 5, 0], help="seconds")
    parser.add_argument("--transfers", type=float, nargs="+", default=[6, 25, 60], help="seconds for the raw state")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--state-mb", type=float, default=12)
    parser.add_argument("--step-s", type=float, default=0.5, help="a step takes at least this")
    parser.add_argument("--interval", type=float, default=1.6, help="between saves, as a multiple of the transfer")
    parser.add_argument("--at-once", type=int, default=8, help="trainings beside each other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    return parser.parse_args(arguments)


# ---------------------------------------------------------------- the training, and the check: processes of their own


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    peer: str
    url: str
    options: dict[str, Any]
    folder: str
    state_mb: float
    every_steps: int
    step_s: float

    @property
    def notice(self) -> Path:
        """Appears when the machine is to go."""
        return Path(self.folder) / "notice.json"

    @property
    def steps(self) -> Path:
        """A line for every step: its number and the digest of the state."""
        return Path(self.folder) / "steps"

    @property
    def said(self) -> Path:
        """What the training says that became of it."""
        return Path(self.folder) / "said.json"


class Job:
    """Parameters that all change at every step, as cheaply as can be: the link is what is short."""

    def __init__(self, state_mb: float) -> None:
        torch.set_num_threads(1)
        count = max(1, round(state_mb * 1e6 / _LAYER_BYTES))
        self.model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def train_step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = 0.02 * torch.randn_like(parameter)
        self.optimizer.step()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.state_dict().items()
        for index, parameter in enumerate(self.model.parameters()):
            yield from ((f"{index}.{k}", v) for k, v in sorted(self.optimizer.state[parameter].items()))

    def digest(self) -> str:
        return digest_of(self._tensors)


def steps_of(task: Task, job: Job) -> Iterator[int]:
    """Train for ever, each step noted before anybody may save it."""
    step = 0
    with task.steps.open("a", buffering=1) as lines:
        while True:
            began = time.monotonic()
            job.train_step()
            step += 1
            lines.write(f"{step} {job.digest()}\n")
            time.sleep(max(0.0, task.step_s - (time.monotonic() - began)))
            yield step


def say(task: Task, **words: Any) -> None:
    """Leave word, whole or not at all."""
    known = json.loads(task.said.read_text()) if task.said.exists() else {}
    partial = task.said.with_suffix(".part")
    partial.write_text(json.dumps({**known, **words}))
    os.replace(partial, task.said)


def train_gpumove(task: Task) -> None:
    """Saves, and leaves when told."""
    import gpumove

    job = Job(task.state_mb)
    settings = {"every_steps": task.every_steps, "every_s": None, "notices": f"file:{task.notice}"}
    sizes = {"chunk_bytes": 1 << 20, "pack_bytes": 1 << 20}
    with gpumove.Checkpointer(
        task.url, model=job.model, optimizer=job.optimizer, storage_options=task.options, **settings, **sizes
    ) as ckpt:
        ckpt.restore()
        for step in steps_of(task, job):
            if ckpt.step(step):
                break
        outcome = ckpt.notice.outcome
        say(task, text=str(outcome), durable=outcome.durable, step=outcome.step, told_at=time.time())
    say(task, closed_at=time.time())


def train_dcp(task: Task) -> None:
    """Saves, and with "-notice" once more when told."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter  # not public in torch 2.13
    from torch.distributed.checkpoint.state_dict import get_state_dict

    job, running = Job(task.state_mb), None
    for step in steps_of(task, job):
        told = task.peer == "dcp-notice" and task.notice.exists()
        if step % task.every_steps and not told:
            continue
        if running is not None:
            running.result()
        model, optimizer = get_state_dict(job.model, job.optimizer)
        writer = FsspecWriter(f"{task.url}/step-{step}", **task.options)
        running = dcp.async_save({"model": model, "optimizer": optimizer}, storage_writer=writer)
        if told:
            running.result()
            say(task, text=f"durable: step {step}", durable=True, step=step, told_at=time.time(), closed_at=time.time())
            return


def restored(task: Task) -> tuple[int, str]:
    """What a resume begins from, loaded into fresh objects: the step and the digest of what is there then."""
    job = Job(task.state_mb)
    if task.peer == "gpumove":
        import gpumove

        with gpumove.Checkpointer(
            task.url, model=job.model, optimizer=job.optimizer, storage_options=task.options
        ) as ckpt:
            return ckpt.restore(), job.digest()
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    fs = Place(task.url, task.options).file_system()
    whole = [int(path.split("/step-")[1].split("/")[0]) for path in fs.glob(f"{task.url}/step-*/.metadata")]
    if not whole:
        return 0, ""
    model, optimizer = get_state_dict(job.model, job.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, storage_reader=FsspecReader(f"{task.url}/step-{max(whole)}", **task.options))
    set_state_dict(job.model, job.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return max(whole), job.digest()


def child(role: str, text: str) -> None:
    """In a process of its own."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    task = Task(**json.loads(text))
    if role == "restore":
        print(json.dumps(restored(task)))
    elif task.peer == "gpumove":
        train_gpumove(task)
    else:
        train_dcp(task)


# ---------------------------------------------------------------- the machine that goes


@dataclass
class Cell:
    """One training that was told to go."""

    peer: str
    notice_s: float
    transfer_s: float
    every_steps: int
    told_at_step: int
    last_step: int = 0
    resumed_from: int = 0
    durable: bool = False
    """Whether the step after which it ended, by itself or not, is what a resume begins from."""
    left_s: float | None = None
    """Seconds from the notice until everything was saved, said and closed; None if that was not before the deadline."""
    gone_s: float | None = None
    """Until the process had ended by itself: on busy cores, Python takes seconds for that after all is done."""
    said: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    """The end of what it wrote."""
    bad: list[str] = field(default_factory=list)

    @property
    def lost_steps(self) -> int:
        return self.last_step - self.resumed_from


def spawn(role: str, task: Task, **more: Any) -> subprocess.Popen[str]:
    """A process of ours; it ends with its task."""
    command = [sys.executable, "-m", "benchmarks.leaving", f"--{role}", json.dumps(asdict(task))]
    return subprocess.Popen(command, text=True, **more)


def newest_line(path: Path) -> tuple[int, str]:
    """The last step that was noted in full."""
    whole = path.read_text().splitlines()[-2:] if path.exists() else []
    for line in reversed(whole):
        step, _, digest = line.partition(" ")
        if len(digest) >= 16:
            return int(step), digest
    return 0, ""


class Machine:
    """Runs one cell: trains, gives notice, and is gone at the deadline."""

    def __init__(self, options: argparse.Namespace, bucket: Any, scratch: Path) -> None:
        self._options, self._bucket, self._scratch = options, bucket, scratch

    def run(self, cell: Cell) -> Cell:
        """The cell with what came out."""
        try:
            self._run(cell)
        except Exception as error:  # noqa: BLE001 - one cell that cannot be measured must not cost the others
            cell.bad.append(f"not measured: {error}")
        return cell

    def _run(self, cell: Cell) -> None:
        from tests.servers.link import Link
        from tests.servers.proxy import Proxy

        name = f"{cell.peer}-{cell.notice_s:g}-{cell.transfer_s:g}"
        folder = self._scratch / name
        folder.mkdir()
        mbit_s = 8 * self._options.state_mb / cell.transfer_s
        shape = {"state_mb": self._options.state_mb, "every_steps": cell.every_steps, "step_s": self._options.step_s}
        with Proxy(self._bucket.endpoint, up=Link(mbit_s, delay_s=0.02), down=Link(mbit_s, delay_s=0.02)) as proxy:
            bucket = self._bucket.via(proxy.endpoint)
            options = dict(bucket.options)
            if cell.peer != "gpumove":  # s3fs gives a PUT 15 s by itself: a large file over a slow link would never end
                options["config_kwargs"] = {"read_timeout": 600}
            task = Task(cell.peer, f"{bucket.url}/{name}", options, str(folder), **shape)
            with (folder / "log").open("w") as log, spawn("train", task, stdout=log, stderr=log) as process:
                try:
                    self._wait_for(cell.told_at_step, task, process)
                    self._go(cell, task, process)
                finally:
                    process.kill()
        cell.log = (folder / "log").read_text()[-4000:]
        cell.last_step = newest_line(task.steps)[0]
        self._check(cell, Task(cell.peer, task.url, dict(self._bucket.options), str(folder), **shape))

    def _wait_for(self, step: int, task: Task, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + _START_S + 4 * step * self._options.step_s
        while newest_line(task.steps)[0] < step:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{task.folder}: no step {step}\n{(Path(task.folder) / 'log').read_text()[-4000:]}")
            time.sleep(0.02)

    def _go(self, cell: Cell, task: Task, process: subprocess.Popen[str]) -> None:
        """Give notice; whatever is left of the process at the deadline is killed, as it goes with its machine."""
        began = time.time()
        partial = task.notice.with_suffix(".part")
        partial.write_text(json.dumps({"deadline": began + cell.notice_s}))
        os.replace(partial, task.notice)
        with suppress(subprocess.TimeoutExpired):
            process.wait(cell.notice_s)
            cell.gone_s = time.time() - began
            if process.returncode:
                cell.bad.append(f"it ended with status {process.returncode}, see its log")
        process.send_signal(signal.SIGABRT)  # as final as SIGKILL, and the log says where it stood
        process.wait(_DIES_S)
        cell.said = json.loads(task.said.read_text()) if task.said.exists() else {}
        if "closed_at" in cell.said:
            cell.left_s = cell.said["closed_at"] - began

    def _check(self, cell: Cell, task: Task) -> None:
        """Restore, and hold against it what was said."""
        log = Path(task.folder) / "restore.log"
        with log.open("w") as errors, spawn("restore", task, stdout=subprocess.PIPE, stderr=errors) as process:
            answer, _ = process.communicate(timeout=_START_S)
        if process.returncode:
            raise RuntimeError(f"{task.folder}: nothing could be restored\n{log.read_text()[-4000:]}")
        cell.resumed_from, digest = json.loads(answer.splitlines()[-1])
        truth = dict(line.split(" ", 1) for line in task.steps.read_text().splitlines() if " " in line)
        if cell.resumed_from and truth[str(cell.resumed_from)] != digest:
            cell.bad.append(f"step {cell.resumed_from} was restored, and is not what was trained")
        cell.durable = cell.resumed_from == cell.last_step
        if cell.peer != "gpumove":
            return
        if cell.said and cell.said["step"] != cell.resumed_from:
            cell.bad.append(f"it said {cell.said['text']!r}, and a resume begins from step {cell.resumed_from}")
        if cell.said and cell.said["durable"] and not cell.durable:
            cell.bad.append(f"it said {cell.said['text']!r}, and trained until step {cell.last_step}")
        if cell.left_s is None and cell.notice_s > 0:
            cell.bad.append("it was still at work at the deadline")


def cells(options: argparse.Namespace) -> list[Cell]:
    """All of them, the long ones first. All peers of a notice are told at the same step."""
    chance = random.Random(options.seed)
    found = []
    for transfer_s in sorted(options.transfers, reverse=True):
        every = max(2, round(options.interval * transfer_s / options.step_s))
        for notice_s in options.notices:
            step = round(every * (2 + chance.uniform(0.1, 0.95)))
            found += [Cell(peer, notice_s, transfer_s, every, step) for peer in options.peers]
    return found


def show(console: Console, options: argparse.Namespace, done: Sequence[Cell]) -> None:
    """One table per link."""
    for transfer_s in options.transfers:
        every = next(c.every_steps for c in done if c.transfer_s == transfer_s)
        title = (
            f"a link that takes {transfer_s:g} s for the raw state; a save every {every} steps of {options.step_s} s"
        )
        table = Table("notice, s", *options.peers, title=title, title_justify="left")
        for notice_s in options.notices:
            row = {c.peer: c for c in done if (c.notice_s, c.transfer_s) == (notice_s, transfer_s)}
            table.add_row(f"{notice_s:g}", *(_words(row[peer]) for peer in options.peers))
        console.print(table)
    for cell in done:
        for words in cell.bad:
            console.print(
                f"[red]BAD[/] {cell.peer}, {cell.notice_s:g} s, {cell.transfer_s:g} s: {words}", highlight=False
            )


def _words(cell: Cell) -> str:
    left = f"left after {cell.left_s:.1f} s" if cell.left_s is not None else "killed"
    return f"{'durable' if cell.durable else f'{cell.lost_steps} steps lost'}, {left}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if anything was bad."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] in (["--train"], ["--restore"]):
        child(given[0][2:], given[1])
        return 0
    options = parse(given)
    os.environ.update(AWS_EC2_METADATA_DISABLED="true", AWS_DEFAULT_REGION="us-east-1", NO_PROXY="127.0.0.1")
    from tests.servers import ministack

    console, machine, began = Console(), facts(), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out, prefix="scratch-", ignore_cleanup_errors=True) as name:
        scratch = Path(name).resolve()
        with ministack(scratch) as bucket, ThreadPoolExecutor(options.at_once) as pool:
            done = list(pool.map(Machine(options, bucket, scratch).run, cells(options)))
    show(console, options, done)
    content = {"machine": machine, "seconds": round(time.monotonic() - began, 1), "cells": [asdict(c) for c in done]}
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    write_json(options.out / "leaving.json", {**content, "settings": settings})
    return 1 if any(cell.bad for cell in done) else 0


if __name__ == "__main__":
    sys.exit(main())
