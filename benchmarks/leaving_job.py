"""The training that `benchmarks.leaving` tells to go, and the restore that checks what it said. Each a process.

python -m benchmarks.leaving_job train|restore TASK
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.places import Place
from benchmarks.workload import digest_of

_WIDTH = 256
_LAYER_BYTES = 3 * 4 * _WIDTH**2


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

    def command(self, role: str) -> list[str]:
        """Of the process that does it."""
        return [sys.executable, "-m", "benchmarks.leaving_job", role, json.dumps(asdict(self))]


def put(path: Path, content: dict[str, Any]) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


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


def train_gpumove(task: Task) -> None:
    """Saves, and leaves when told."""
    import gpumove

    job = Job(task.state_mb)
    settings: dict[str, Any] = {
        "every_steps": task.every_steps, "every_s": None, "notices": f"file:{task.notice}",
        "chunk_bytes": 1 << 20, "pack_bytes": 1 << 20, "storage_options": task.options,
    }  # fmt: skip
    with gpumove.Checkpointer(task.url, model=job.model, optimizer=job.optimizer, **settings) as ckpt:
        ckpt.restore()
        for step in steps_of(task, job):
            if ckpt.step(step):
                break
    outcome = ckpt.notice.outcome
    put(task.said, {"text": str(outcome), "durable": outcome.durable, "step": outcome.step, "at": time.time()})


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
            put(task.said, {"text": f"durable: step {step}", "durable": True, "step": step, "at": time.time()})
            return


def restored(task: Task) -> tuple[int, str]:
    """What a resume begins from, loaded into fresh objects: the step and the digest of what is there then."""
    job = Job(task.state_mb)
    if task.peer == "gpumove":
        import gpumove

        parts = {"model": job.model, "optimizer": job.optimizer}
        with gpumove.Checkpointer(task.url, **parts, storage_options=task.options) as ckpt:
            step = ckpt.restore()
            return step, job.digest() if step else ""
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


def main(role: str, text: str) -> None:
    faulthandler.enable()  # who is killed with SIGABRT says where it stood
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    task = Task(**json.loads(text))
    if role == "restore":
        print(json.dumps(restored(task)))
    elif task.peer == "gpumove":
        train_gpumove(task)
    else:
        train_dcp(task)


if __name__ == "__main__":
    main(*sys.argv[1:])
