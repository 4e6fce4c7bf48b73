"""The processes of the demonstration: jobs under `gpumove run`, and the mover; followed, and ended with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from examples.demo import Life

ROOT = Path(__file__).resolve().parents[2]
_GPUMOVE = (sys.executable, "-m", "gpumove")
_LOOK_S = 0.02
_FAREWELL_S = 20.0


@dataclass
class Running:
    """One of them."""

    name: str
    process: subprocess.Popen[bytes]
    folder: Path
    life: Life | None = None
    """What a job's record tells."""
    bar: TaskID | None = None
    good: tuple[int, ...] = (0,)
    """Exit codes that are no failure."""

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def answer(self) -> dict[str, Any]:
        """What it has said last on standard output, as JSON: before that come lines, one for whatever happened."""
        text = "\n" + (self.folder / f"{self.name}.out").read_text()
        found: dict[str, Any] = json.loads(text[text.rindex("\n{") :])
        return found

    @property
    def log(self) -> str:
        """The end of its standard error."""
        return (self.folder / f"{self.name}.log").read_text(errors="replace")[-4000:]


@dataclass
class Stage:
    """Starts processes, follows them all, and lets none outlive it."""

    folder: Path
    bars: Progress
    most_s: float
    """Until which all must be over."""
    running: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._until = time.monotonic() + self.most_s

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        for one in self.running:
            if not one.ended:
                one.process.terminate()  # gpumove run takes its torchrun and the workers along
        for one in self.running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(_FAREWELL_S)
            one.process.kill()
            one.process.wait()

    def train(
        self, name: str, url: str, *, ranks: int, options: Mapping[str, object], env: Mapping[str, str],
        wait: bool = False, good: tuple[int, ...] = (0,),
    ) -> Running:  # fmt: skip
        """A job of examples/train_gpt.py under `gpumove run`."""
        life = Life(name, self.folder / f"{name}.jsonl")
        life.record.write_bytes(b"")
        script = {**options, "url": url, "out": life.record}
        torchrun = ["--standalone", f"--nproc-per-node={ranks}", "-m", "examples.train_gpt", "--ddp", "--threads=1"]
        words = ["run", url, *(["--wait"] if wait else []), "--", *torchrun, *(f"--{k}={v}" for k, v in script.items())]
        # Saves by steps only, however slow this machine is.
        found = self.start(name, words, {**env, "GPUMOVE_EVERY_S": "none"}, good)
        found.life, found.bar = life, self.bars.add_task(name, total=int(str(options["steps"])))
        return found

    def start(self, name: str, words: Sequence[str], env: Mapping[str, str], good: tuple[int, ...] = (0,)) -> Running:
        """One `gpumove ...`."""
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen([*_GPUMOVE, *words], cwd=ROOT, env=dict(env), stdout=out, stderr=log)
        self.running.append(Running(name, process, self.folder, good=good))
        return self.running[-1]

    def until(self, what: Callable[[], object]) -> None:
        """Follow all of them until something holds.

        Raises:
            SystemExit: one has failed, or it takes too long; the message ends with its log.
        """
        while not what():
            for one in self.running:
                self._look(one)
            if time.monotonic() > self._until:
                sys.exit(f"this takes longer than {self.most_s:.0f} s\n" + "\n".join(r.log for r in self.running))
            time.sleep(_LOOK_S)
        for one in self.running:
            self._look(one)

    def _look(self, one: Running) -> None:
        if one.life is not None and one.bar is not None:
            one.life.follow()
            self.bars.update(one.bar, completed=one.life.last)
        if one.ended and one.process.returncode not in one.good:
            sys.exit(f"{one.name} ended with {one.process.returncode}; the end of its log:\n{one.log}")
