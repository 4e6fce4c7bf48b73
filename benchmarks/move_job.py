"""The two jobs of `benchmarks.move`, each a process: one trains until it has to leave, the other goes on elsewhere.

python -m benchmarks.move_job ROLE TASK
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gpumove
from benchmarks.move_states import State

ROLES = ("begin", "leave", "wait", "stop", "start")
"""The run's first start. Of a move: the job at the source and the one at the target. Of stop-copy-start: likewise."""
_FURTHER_STEPS = 1
_LOOK_S = 0.02


@dataclass(frozen=True)
class Task:
    """What a job is told."""

    url: str
    options: dict[str, Any]
    folder: str
    state: str
    megabytes: float
    step_s: float
    settings: dict[str, Any]

    def record(self, role: str) -> Path:
        """Where it puts down what happens, and when."""
        return Path(self.folder) / f"{role}.jsonl"

    def flag(self, role: str) -> Path:
        """Appears when a job of stop-copy-start is to stop, or to start."""
        return Path(self.folder) / f"{role}.now"

    def command(self, role: str) -> list[str]:
        """Of the process that does it."""
        return [sys.executable, "-m", "benchmarks.move_job", role, json.dumps(asdict(self))]


class Job:
    """A state, its Checkpointer and its record."""

    def __init__(self, role: str, task: Task) -> None:
        torch.set_num_threads(1)
        self.task, self._file = task, task.record(role).open("a", buffering=1)
        self._busy_s = 0.0
        self.state = State(task.state, task.megabytes)
        self.checkpointer = gpumove.Checkpointer(
            task.url, model=self.state.models, optimizer=self.state.optimizer, storage_options=task.options,
            rng=False, every_s=None, **task.settings,
        )  # fmt: skip

    def say(self, what: str, **more: Any) -> None:
        """A line. The clock is the machine's, so that lines of two processes can be compared."""
        self._file.write(json.dumps({"what": what, "at": time.monotonic(), **more}) + "\n")

    def train(self, step: int) -> None:
        """One step, as long as it takes in all."""
        began = time.monotonic()
        time.sleep(max(0.0, self.task.step_s - self._busy_s))
        working = time.monotonic()
        self.state.train(step)
        self._busy_s = time.monotonic() - working
        self.say("step", step=step, seconds=time.monotonic() - began)


def begin(job: Job) -> None:
    """Save, and end: whoever starts it again restores it."""
    job.state.warm_up()
    job.checkpointer.save(job.checkpointer.restore()).wait()


def leave(job: Job) -> None:
    """Train, save, and leave when a move asks for it."""
    job.state.warm_up()
    job.say("state", bytes=job.state.nbytes)
    step = job.checkpointer.restore()
    job.checkpointer.save(step).wait()
    job.say("saved")
    while True:
        step += 1
        job.train(step)
        if job.checkpointer.step(step):
            break
    job.say("left", step=step, outcome=str(job.checkpointer.notice and job.checkpointer.notice.outcome))
    job.say("digest", step=step, digest=job.state.digest())


def stop(job: Job) -> None:
    """Train, and when it is time save all, raw, and end."""
    job.state.warm_up()
    job.say("state", bytes=job.state.nbytes)
    step = job.checkpointer.restore()
    job.say("saved")
    while not job.task.flag("stop").exists():
        step += 1
        job.train(step)
        job.checkpointer.step(step)
    job.checkpointer.save(step).wait()
    job.say("left", step=step, outcome="saved")
    job.say("digest", step=step, digest=job.state.digest())


def go_on(job: Job) -> None:
    """Restore, and train on; how far the other job had come is known from its record."""
    job.say("ready")
    while not job.checkpointer.config.wait and not job.task.flag("start").exists():
        time.sleep(_LOOK_S)
    step = job.checkpointer.restore()
    job.say("restored", step=step)
    told = map(json.loads, job.task.record("leave").read_text().splitlines()) if job.checkpointer.config.wait else ()
    last = max((line["step"] for line in told if line["what"] == "step"), default=step)
    while step < last:  # the move has not sent the last steps
        step += 1
        job.train(step)
        job.checkpointer.step(step)
    job.say("level", step=step)
    job.say("digest", step=step, digest=job.state.digest())
    for _ in range(_FURTHER_STEPS):
        step += 1
        job.train(step)
        job.checkpointer.step(step)
    job.say("trained", step=step)


def main(role: str, text: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    job = Job(role, Task(**json.loads(text)))
    with job.checkpointer:
        {"begin": begin, "leave": leave, "stop": stop, "wait": go_on, "start": go_on}[role](job)
    job.say("ended")


if __name__ == "__main__":
    main(*sys.argv[1:])
