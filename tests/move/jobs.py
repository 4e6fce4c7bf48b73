"""Real jobs that move: `gpumove run` at one store, `gpumove run --wait` at another, and `gpumove move` between them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from gpumove.config import Config
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.view import View
from tests.job.harness import GPUMOVE, ROOT, Running
from tests.servers import Bucket

STEPS = 240
TINY = ("--layers", "1", "--width", "32", "--context", "64", "--batch", "8", "--threads", "1", "--seed", "3")


class Job(Running):
    """One life of examples.train_gpt under `gpumove run`; what it says goes into ``folder``."""

    def __init__(
        self, folder: Path, url: str, env: Mapping[str, str], *, wait: bool = False, ranks: int = 2,
        steps: int = STEPS, every: int = 10, pace_s: float = 0.0, broken: str = "", settings: Mapping[str, str] = {},
    ) -> None:  # fmt: skip
        folder.mkdir(exist_ok=True)
        life = len(list(folder.glob("losses-*")))
        self.folder, self.nproc, self._log = folder, ranks, folder / f"stderr-{life}"
        self.record = folder / f"losses-{life}"
        self.record.touch()
        waiting = ["--wait"] if wait else []
        command = [*GPUMOVE, "run", *waiting, url, "--", "--nproc-per-node", str(ranks)]
        command += ["-m", "tests.move.paced", "--ddp", "--url", url, "--out", str(self.record), *TINY]
        self.start([*command, "--steps", str(steps), "--every-steps", str(every)],
                   {**env, "PACE_S": str(pace_s), "BROKEN": broken, **settings})  # fmt: skip

    def losses(self) -> dict[int, str]:
        """By step, with every bit; a line that is being written does not count."""
        lines = self.record.read_text().split("\n")[:-1]
        return {said["step"]: said["loss"] for said in map(json.loads, lines) if "step" in said}

    def workers(self) -> list[psutil.Process]:
        """The processes that train, by rank."""
        below = psutil.Process(self.torchrun()).children(recursive=True)
        return [p for p in below if "tests.move.paced" in p.cmdline()]

    def reach(self, step: int) -> None:
        """Wait until it has done a step."""
        self.until(lambda: max(self.losses(), default=0) >= step, f"step {step}")


class Moving:
    """One `gpumove move` as a process of its own."""

    def __init__(self, folder: Path, source: str, target: str, env: Mapping[str, str], *options: str) -> None:
        number = len(list(folder.glob("move-*.out")))
        self.out, self.err = folder / f"move-{number}.out", folder / f"move-{number}.err"
        command = [*GPUMOVE, "move", source, "--to", target, "--json", *options]
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=err)

    def events(self) -> list[dict[str, Any]]:
        """What it has told so far: one JSON document a line, until its report."""
        found = []
        for line in self.out.read_text().split("\n")[:-1]:
            if not line.startswith('{"at"'):
                break
            found.append(json.loads(line))
        return found

    def until(self, state: str, seconds: float = 60.0, *, or_end: bool = False) -> None:
        """Wait until it has told this, or has ended well if that may be."""
        until = time.monotonic() + seconds
        while state not in [event["state"] for event in self.events()]:
            if or_end and self.process.poll() == 0:
                return
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.01)

    def end(self, seconds: float = 90.0, *, code: int = 0) -> dict[str, Any]:
        """Its report."""
        assert self.process.wait(seconds) == code, self.text()
        text = self.out.read_text()
        report: dict[str, Any] = json.loads(text[text.index("{\n") :])
        return report

    def text(self) -> str:
        """All that it has said."""
        return self.out.read_text() + self.err.read_text()


def view_of(bucket: Bucket, url: str) -> View:
    """What the log at a URL says."""
    with opened(bucket, url) as log:
        return log.view


@contextmanager
def opened(bucket: Bucket, url: str) -> Iterator[Log]:
    store = Store.open(url, Config(), options=bucket.options)
    try:
        log = Log(store)
        log.open(create=False)
        log.read()
        yield log
    finally:
        store.close()
