"""Runs that really were: one that was moved between two stores, and small ones with something missing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

import gpumove
from gpumove.move.moving import move
from gpumove.move.replicate import replicate
from gpumove.move.report import Wishes
from tests.jobs import new_job

CUT, END, EVERY = 60, 120, 20


class Moved(NamedTuple):
    """A run that was moved after step ``CUT``, and the losses of every step."""

    source: str
    target: str
    losses: dict[int, float]


def train(url: str, until: int, *, every: int = EVERY) -> dict[int, float]:
    """Resume or begin, and save; the losses of this life."""
    job = new_job()
    settings = {"every_s": None, "keep_last": None, "chunk_bytes": 4096, "pack_bytes": 8192}
    with gpumove.Checkpointer(url, **job.parts(), **settings) as ckpt:
        step = ckpt.restore()
        while step < until:
            job.train(step, step + 1, ckpt)
            step += 1
            if step % every == 0:
                ckpt.save(step).wait(60)
    return job.losses


@pytest.fixture(scope="session")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    return make_moved(tmp_path_factory.mktemp("moved"))


def make_moved(folder: Path) -> Moved:
    """Train, move, and train on."""
    source, target = f"file://{folder}/here", f"file://{folder}/there"
    losses = train(source, CUT)
    replicate(source, target)
    wishes = Wishes(leave_timeout_s=0.5, arrive_timeout_s=0.0, hear_timeout_s=0.0, force=True)
    move(source, target, wishes)
    losses |= train(target, END)
    done = move(source, target, Wishes(), resume=True)
    assert done.phase == "done"
    return Moved(source, target, losses)
