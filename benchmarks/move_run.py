"""Runs one cell of `benchmarks.move`: two clouds, a link between them, the processes of one trip. Judges nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gpumove
from benchmarks.move_job import Task
from gpumove.estimates.against import against
from gpumove.estimates.transfer import Transfer

_RAW = {"codec": "raw", "delta": False, "every_steps": None}
_ROOM = {"predecessor_bytes": 1 << 40}
"""Whatever else the machine does: without the last state in memory there would be no differences."""
_LOOK_S, _MOST_S, _FAREWELL_S = 0.05, 3600.0, 20.0


@dataclass
class Cell:
    """One job that went from one cloud to the other."""

    state: str
    ratio: float | None
    """Steps in one transfer of the raw state; None for stop-copy-start, which does not depend on it."""
    every_step: bool = False
    """Whether the move asks for a save after every step."""
    state_bytes: int = 0
    blackout_s: float = 0.0
    """From the end of the last step at the source until the job at the target is as far, and may go on."""
    parts_s: dict[str, float] = field(default_factory=dict)
    link_bytes: int = 0
    rounds: int = 0
    """Before the job was asked to leave."""
    forecast_s: float | None = None
    steps_s: list[float] = field(default_factory=list)
    """Of every step at the source."""
    report: dict[str, Any] = field(default_factory=dict)
    estimated: list[dict[str, Any]] = field(default_factory=list)
    """By `gpumove estimate`, before the move began, against what was measured."""
    bad: list[str] = field(default_factory=list)

    @property
    def copies(self) -> float:
        """Bytes over the link, as a multiple of the raw state."""
        return self.link_bytes / self.state_bytes if self.state_bytes else 0.0


class Lines:
    """What a job has put down so far."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self, what: str) -> list[dict[str, Any]]:
        """The lines of one kind; one that is being written does not count."""
        text = self._path.read_text() if self._path.exists() else ""
        return [line for line in map(json.loads, text.split("\n")[:-1]) if line["what"] == what]

    def one(self, what: str) -> dict[str, Any]:
        """The last of its kind."""
        return self.all(what)[-1]


class Processes:
    """Those of one cell; none outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._running.values():
            if exc[0] is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_FAREWELL_S)
            process.kill()
            process.wait()

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """One more."""
        with (self._folder / f"{name}.out").open("wb") as out, (self._folder / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(command, env=env and {**os.environ, **env}, stdout=out, stderr=log)

    def job(self, role: str, task: Task) -> Lines:
        """One of the two jobs."""
        self.start(role, task.command(role))
        return Lines(task.record(role))

    def until(self, what: Callable[[], object]) -> None:
        """Wait for something; the end of a process in failure is one, too, and so is an hour."""
        deadline = time.monotonic() + _MOST_S
        while not what():
            for name, process in self._running.items():
                if process.poll() not in (None, 0):
                    raise RuntimeError(f"{name} ended with {process.returncode}: {self.log(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError("\n".join(["this takes too long", *map(self.log, self._running)]))
            time.sleep(_LOOK_S)

    def answer(self, name: str) -> dict[str, Any]:
        """What one has said last on standard output, as JSON: before that come lines, one for whatever happened."""
        text = "\n" + (self._folder / f"{name}.out").read_text()
        found: dict[str, Any] = json.loads(text[text.rindex("\n{") :])
        return found

    def ended(self, name: str) -> bool:
        """Whether one has ended."""
        return self._running[name].poll() is not None

    def log(self, name: str) -> str:
        """The end of what it wrote."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-2000:]


class Clouds(NamedTuple):
    """A bucket in either cloud, and the near one as it is seen from the far cloud, over the link."""

    near: Any
    far: Any
    near_from_far: Any
    link: Any


class Machine:
    """Runs cells, one after the other."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self._options, self._scratch = options, scratch

    def run(self, cell: Cell) -> Cell:
        """The cell with what came out."""
        folder = self._scratch / f"{cell.state}-{cell.ratio or 'stop'}"
        folder.mkdir()
        try:
            with self._clouds(folder) as clouds, Processes(folder) as processes:
                go = self._stop_copy_start if cell.ratio is None else self._move
                go(cell, clouds, processes, folder)
                cell.link_bytes = clouds.link.bytes_down
        except Exception as error:  # noqa: BLE001 - one cell that cannot be measured must not cost the others
            cell.bad.append(f"not measured: {type(error).__name__}: {error}")
        return cell

    @contextmanager
    def _clouds(self, folder: Path) -> Iterator[Clouds]:
        from tests.servers import gcs, ministack
        from tests.servers.link import Link
        from tests.servers.proxy import Proxy

        up, down = (Link(self._options.mbit_s, self._options.delay_s) for _ in range(2))
        with (
            ministack(folder / "s3") as near,
            gcs(folder / "gcs") as far,
            Proxy(near.endpoint, up=up, down=down) as link,
        ):
            yield Clouds(near, far, near.via(link.endpoint), link)

    def _task(self, cell: Cell, folder: Path, bucket: Any, settings: Mapping[str, Any]) -> Task:
        given = self._options
        step_s = 8 * given.state_mb / given.mbit_s / (cell.ratio or 10.0)
        place = (f"{bucket.url}/run", dict(bucket.options), str(folder))
        return Task(*place, cell.state, given.state_mb, step_s, dict(settings))

    def _stop_copy_start(self, cell: Cell, clouds: Clouds, processes: Processes, folder: Path) -> None:
        """The job saves everything raw to its own bucket and ends; the other one reads straight from there."""
        leaving = self._task(cell, folder, clouds.near, _RAW)
        source = processes.job("stop", leaving)
        target = processes.job("start", self._task(cell, folder, clouds.near_from_far, _RAW))
        processes.until(lambda: len(source.all("step")) >= 2 and target.all("ready"))
        leaving.flag("stop").touch()
        processes.until(lambda: source.all("left"))
        leaving.flag("start").touch()
        processes.until(lambda: target.all("trained") and source.all("digest"))
        account(cell, source, target, {})

    def _move(self, cell: Cell, clouds: Clouds, processes: Processes, folder: Path) -> None:
        """`gpumove move`, run in the far cloud, where a job waits and reads ahead."""
        assert cell.ratio is not None
        transfers = 1 if cell.every_step or self._options.estimate else 2
        usual: dict[str, Any] = {**_ROOM, "codec": "small", "every_steps": max(1, round(transfers * cell.ratio))}
        leaving = self._task(cell, folder, clouds.near, usual)
        arriving = self._task(cell, folder, clouds.far, {**usual, "wait": True})
        if self._options.estimate:  # what a restore takes is known of runs that were started again
            processes.job("begin", leaving)
            processes.until(lambda: processes.ended("begin"))
        source, target = processes.job("leave", leaving), processes.job("wait", arriving)
        processes.until(lambda: source.all("saved") and source.all("step") and target.all("ready"))
        foretold = self._estimate(usual["every_steps"], clouds, processes, source) if self._options.estimate else None
        words = ["move", leaving.url, "--to", arriving.url, "--json", *(["--every-step"] * cell.every_step)]
        command = [sys.executable, "-m", "gpumove", *words]
        processes.start("move", command, {**clouds.near_from_far.env, **clouds.far.env})
        processes.until(lambda: target.all("trained") and source.all("digest") and processes.ended("move"))
        account(cell, source, target, processes.answer("move"))
        if foretold is not None:
            cell.estimated = [asdict(c) for c in against(foretold, cell.report, blackout_s=cell.blackout_s)]

    def _estimate(self, every: int, clouds: Clouds, processes: Processes, source: Lines) -> Transfer:
        """`gpumove estimate` in the far cloud, once the run has committed four times: the link is measured first."""
        processes.until(lambda: len(source.all("step")) > 3 * every)
        run, options = f"{clouds.near_from_far.url}/run", dict(clouds.near_from_far.options)
        there = {"probe_url": f"{clouds.far.url}/run", "probe_options": dict(clouds.far.options)}
        probed = gpumove.estimate(run, storage_options=options, **there).outlooks[0]
        handover_s = probed.transfer.parts["handover"].value
        said = {"rate_bytes_s": probed.rate_bytes_s, "handover_s": handover_s}
        return gpumove.estimate(run, storage_options=options, **said).outlooks[0].transfer


def account(cell: Cell, source: Lines, target: Lines, report: dict[str, Any]) -> None:
    """From the jobs' records and the mover's report to the cell's numbers."""
    stopped, restored, level = source.one("step"), target.one("restored"), target.one("level")
    cell.state_bytes = source.one("state")["bytes"]
    cell.blackout_s = level["at"] - stopped["at"]
    cell.steps_s = [step["seconds"] for step in source.all("step")]
    cell.report, cell.forecast_s = report, report.get("forecast_s")
    events = list(report.get("events", ()))
    ahead = time.monotonic() - time.time()  # the jobs' clock against that of the log
    at = {event["state"]: event["at"] + ahead for event in events}
    marks = {"leave": source.one("left")["at"], "copy": at.get("sealed"), "hand over": at.get("handover")}
    marks |= {"restore": restored["at"], "replay": level["at"] if level["step"] > restored["step"] else None}
    before = stopped["at"]
    for name, mark in marks.items():
        if mark is not None:
            cell.parts_s[name], before = round(mark - before, 3), mark
    asked = next((n for n, event in enumerate(events) if event["state"] == "request"), 0)
    cell.rounds = [event["state"] for event in events[:asked]].count("round")
    if level["step"] != stopped["step"]:
        cell.bad.append(f"the source went up to step {stopped['step']}, the target goes on from {level['step']}")
    if source.one("digest")["digest"] != target.one("digest")["digest"]:
        cell.bad.append(f"the state of step {level['step']} is not the one that has left")
