"""`gpumove run` as a real process over real torchruns, and what it left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
GPUMOVE = [sys.executable, "-m", "gpumove"]
WAIT_S = 90.0


class Running:
    """One `gpumove run` of ``worker.py`` in a folder of its own."""

    def __init__(
        self, folder: Path, way: str, *options: str, argument: str = "0", nproc: int = 2, prefix: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.nproc = folder, nproc
        self._log = folder / "stderr"
        command = [*GPUMOVE, "run", str(folder / "run"), *options, "--", "--nproc-per-node", str(nproc)]
        command += [str(WORKER), str(folder), way, argument]
        self.start([*prefix, *command], env)

    def start(self, command: list[str], env: Mapping[str, str] | None = None) -> None:
        """Run it with its standard error in a file."""
        self._began, self.slack_s = time.monotonic(), 0.0
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.folder), **(env or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it wrote to standard error so far."""
        return self._log.read_text(errors="replace")

    def until(self, what: Callable[[], object], why: str) -> None:
        """Wait until something holds; it fails if the process ends before."""
        until = time.monotonic() + WAIT_S
        while not what():
            assert self.process.poll() is None, f"it ended before {why}:\n{self.log}"
            assert time.monotonic() < until, f"no {why}:\n{self.log}"
            time.sleep(0.02)

    def started(self, generation: int = 0) -> list[int]:
        """The workers' pids, once all of them run."""
        files = [self.folder / f"started-{rank}-{generation}" for rank in range(self.nproc)]
        self.until(lambda: all(f.exists() for f in files), f"workers of generation {generation}")
        # What a slow machine may add to a bound: to begin is several times what it takes to end.
        self.slack_s = self.slack_s or (time.monotonic() - self._began) / 2
        return [int(f.read_text()) for f in files]

    def asked(self) -> None:
        """Wait until every worker has seen a request."""
        self.until(lambda: len(self.notes("asked")) == self.nproc, "request")

    def notes(self, name: str) -> list[str]:
        """The facts of one name that workers put down."""
        return [path.read_text() for path in sorted(self.folder.glob(f"{name}-*"))]

    def torchrun(self) -> int:
        """torchrun's pid."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def send(self, number: signal.Signals) -> None:
        """Signal `gpumove run`, and nothing else."""
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Its exit status and what it wrote to standard output. Nothing of it may be left."""
        out, _ = self.process.communicate(timeout=WAIT_S)
        pids = [int(pid) for name in ("started", "helper") for pid in self.notes(name)]
        left = [pid for pid in pids if _runs(pid)]
        assert not left, f"{left} still run:\n{self.log}"
        assert not list(self.folder.glob("gpumove-run-*")), "its folder is still there"
        return self.process.returncode, out


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
