"""A run to certify, and the four ways to resume it wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gpumove
from gpumove.parity.verdict import Certificate
from tests.jobs import TrainingJob, new_job

Break = Callable[[TrainingJob], object]


def batch_too_far(job: TrainingJob) -> None:
    """The data position is off by one batch."""
    next(iter(job.loader))


def other_dice(job: TrainingJob) -> None:
    """The generators were not restored."""
    torch.manual_seed(99)


def zero_moment(job: TrainingJob) -> None:
    """One moment tensor is lost."""
    job.optimizer.state[job.model.mid.weight]["exp_avg"].zero_()


def late_rate(job: TrainingJob) -> None:
    """The learning rate is off by one step."""
    job.scheduler.step()


BROKEN = {"samples": batch_too_far, "rng": other_dice, "optimizer": zero_moment, "scheduler": late_rate}


def loop(job: TrainingJob, ckpt: gpumove.Checkpointer, step: int, stop: int, *, heed: bool = True) -> int:
    """The loop that users write; the step that it ended after."""
    for ids, target in job.batches():
        loss = nn.functional.cross_entropy(job.model(ids), target)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
        job.optimizer.step()
        job.scheduler.step()
        job.optimizer.zero_grad()
        step += 1
        if (ckpt.step(step, loss=loss.detach(), grad_norm=norm) and heed) or step >= stop:
            return step
    raise AssertionError("unreachable")


def train(url: str | Path, stop: int, *, every: int = 10, **settings: Any) -> int:
    """Train and save, every save waited for; the step that it began after."""
    job = new_job()
    with gpumove.Checkpointer(str(url), **job.parts(), every_s=None, **settings) as ckpt:
        begun = step = ckpt.restore()
        while step < stop:
            step = loop(job, ckpt, step, min(stop, step - step % every + every))
            ckpt.save(step).wait()
    return begun


def certify(url: str | Path, steps: int = 20, damage: Break = lambda job: None, **settings: Any) -> Certificate:
    """As a script does it that knows nothing of certificates: it saves at its end, and waits for that."""
    job = new_job()
    settings = {"every_s": None, "every_steps": 2, "certify": steps, **settings}
    with gpumove.Checkpointer(str(url), **job.parts(), **settings) as ckpt:
        begun = ckpt.restore()
        damage(job)
        step = loop(job, ckpt, begun, 1000)
        ckpt.save(step, pinned=True).wait()
        assert ckpt.certificate is not None
        return ckpt.certificate


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below, with its time and its bytes."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}
