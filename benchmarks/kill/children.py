"""What the forked processes of the kill loop do: the reference run, the training that gets killed, the inspection.

Torch is imported before the fork, threads exist only after it.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gpumove
from benchmarks.kill.board import Board, watch
from benchmarks.workload import digest_of
from gpumove.store.objects import Store

WRONG_STATE = 3
"""Exit status of a training that resumed from something else than the reference has."""


@dataclass(frozen=True)
class Run:
    """One run: where it lies and how it is trained and saved."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 400
    every_steps: int = 1
    width: int = 384

    @property
    def settings(self) -> dict[str, Any]:
        """Many small packs, and retention after every save: as many places to be hit as possible."""
        return {
            "every_s": None,
            "every_steps": self.every_steps,
            "keep_last": 2,
            "chunk_bytes": 64 << 10,
            "pack_bytes": 512 << 10,
            "budget_bytes": 8 << 20,
        }


class Training:
    """A small job with everything that a real one has: buffers, dropout, an EMA, a schedule, a shuffled loader."""

    def __init__(self, width: int, seed: int = 0) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(32, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8),
        )  # fmt: skip
        self.average = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=50, gamma=0.9)
        generator = torch.Generator().manual_seed(7)
        data = TensorDataset(
            torch.randn(500, 32, generator=generator), torch.randint(0, 8, (500,), generator=generator)
        )
        self.loader = gpumove.ElasticLoader(data, 16, shuffle=True)

    def batches(self) -> Iterator[Sequence[torch.Tensor]]:
        """For ever, over epochs."""
        while True:
            yield from self.loader

    def step(self, batch: Sequence[torch.Tensor], board: Board | None = None) -> torch.Tensor:
        """One step, all of it."""
        loss = functional.cross_entropy(self.model(batch[0]), batch[1])
        self.optimizer.zero_grad()
        loss.backward()
        if board is not None:
            board.enter("optimizer step")
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            for average, current in zip(self.average.parameters(), self.model.parameters()):
                average.lerp_(current, 0.1)
        return loss.detach()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, module in (("model", self.model), ("average", self.average)):
            yield from ((f"{name}.{key}", value) for key, value in module.state_dict().items())
        for index, parameter in enumerate(self.model.parameters()):
            for key, value in sorted(self.optimizer.state[parameter].items()):
                yield f"optimizer.{index}.{key}", value

    def tensors(self) -> str:
        """Digest of what gpumove.load can read."""
        return digest_of(self._tensors)

    def whole(self) -> str:
        """Digest of all that a resumed run depends on."""
        values = [self.scheduler.last_epoch, self.scheduler.get_last_lr(), self.loader.position]
        random = digest_of(lambda: iter([("torch", torch.get_rng_state())]))
        return f"{self.tensors()} {random} {values}"

    def objects(self) -> dict[str, Any]:
        """As a Checkpointer takes them."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "objects": {"average": self.average},
        }


def reference(run: Run) -> list[tuple[str, str]]:
    """Digests after every step of a run that nobody saves, restores or kills; the first is that of step 0."""
    job = Training(run.width)
    found = [(job.tensors(), job.whole())]
    for batch in job.batches():
        job.step(batch)
        found.append((job.tensors(), job.whole()))
        if len(found) > run.steps:
            break
    return found


def train(run: Run, truth: Sequence[Sequence[str]], board: Board) -> int:
    """Resume, check what was resumed, go on to the end. The exit status."""
    watch(Store, board)
    job = Training(run.width)
    with gpumove.Checkpointer(run.url, **job.objects(), storage_options=run.options, **run.settings) as ckpt:
        board.enter("restore")
        step = ckpt.restore()
        if job.whole() != truth[step][1]:
            return WRONG_STATE
        board.set("done", step)
        board.set("restored", step + 1)
        if step < run.steps:
            for batch in job.batches():
                board.enter("forward and backward")
                loss = job.step(batch, board)
                step += 1
                board.set("done", step)
                board.enter("step() call")
                ckpt.step(step, loss=loss)
                if step == run.steps:
                    break
        if step == run.steps and job.whole() != truth[step][1]:
            return WRONG_STATE
        board.enter("close")
    return 0


def inspect(run: Run, truth: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Read everything that the log says exists: all objects, and every checkpoint into live tensors."""
    try:
        found = gpumove.checkpoints(run.url, storage_options=run.options)
    except gpumove.ConfigError as error:
        if error.code != "config.no_run":
            raise
        return {"steps": [], "wrong": [], "damage": [], "needed_bytes": 0}
    report = gpumove.verify(run.url, deep=True, storage_options=run.options)
    wrong = []
    for step in sorted({c.step for c in found}):
        job = Training(run.width, seed=1)
        gpumove.load(
            run.url,
            step,
            model=job.model,
            optimizer=job.optimizer,
            objects={"average": job.average},
            storage_options=run.options,
        )
        if job.tensors() != truth[step][0]:
            wrong.append(step)
    return {
        "steps": [c.step for c in found],
        "wrong": wrong,
        "damage": [f"{d.object}: {d.problem}" for d in report.damage],
        "needed_bytes": report.object_bytes,
    }


def fork(work: Callable[[], int], log: Path) -> int:
    """Run ``work`` in a child whose exit status is its result; errors go to the log. The child's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        status = work()
    except BaseException:  # noqa: BLE001 - a child must never return into its parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ask(work: Callable[[], Any], log: Path) -> Any:
    """Run ``work`` in a child and take its result.

    Raises:
        RuntimeError: it failed; the log has the reason.
    """
    receive, send = os.pipe()
    pid = fork(lambda: _send(send, work()), log)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        words = log.read_text(errors="replace").strip().splitlines() or ["no words"]
        raise RuntimeError(words[-1])
    return json.loads(data)


def _send(fd: int, result: Any) -> int:
    with os.fdopen(fd, "wb") as pipe:
        pipe.write(json.dumps(result).encode())
    return 0
