"""Saved under one layout, restored under another: every parameter and optimizer tensor, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.dist import models
from tests.dist.harness import run
from tests.dist.jobs import Job, make, url_of

STEPS = 3
PAIRS = [
    ("fsdp2", "plain"), ("plain", "fsdp2"), ("ddp2", "plain"), ("fsdp2", "fsdp4"), ("fsdp4", "fsdp2"),
    ("ddp2", "fsdp4"), ("fsdp4", "ddp2"), ("tp2", "fsdp_tp4"), ("fsdp_tp4", "plain"), ("hsdp4", "fsdp2"),
    ("ddp4", "tp2"), ("fsdp_tp4", "hsdp4"), ("fsdp2", "fsdp1"),
]  # fmt: skip
ALL = [(a, b) for a in models.RANKS for b in models.RANKS if (a, b) not in PAIRS]
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("fsdp2", "plain", {"kind": "fused"}),
    ("ddp2", "fsdp4", {"kind": "sgd", "scaler": True}),
    ("fsdp4", "fsdp2", {"split": True}),
    ("fsdp2", "ddp2", {"half": True, "kind": "loop"}),
    ("ddp2", "fsdp2", {"kind": "tensor_lr"}),
]


def save(rank: int, layout: str, url: str, options: dict[str, Any]) -> dict[str, Any]:
    job = make(layout, rank, **options)
    with job.checkpointer(url) as ckpt:
        assert ckpt.restore() == 0
        job.train(ckpt, 0, STEPS)
        ckpt.save(STEPS).wait()
        return job.state()


def restore(rank: int, layout: str, url: str, options: dict[str, Any]) -> dict[str, Any]:
    job = make(layout, rank, seed=1, **options)
    with job.checkpointer(url) as ckpt:
        assert ckpt.restore() == STEPS
        state = job.state()
        # What was restored must also be fit for training and for the next save.
        job.train(ckpt, STEPS, STEPS + 1)
        ckpt.save(STEPS + 1).wait()
    return state


def spread(scenario: Callable[..., Any], layout: str, *arguments: Any) -> list[Any]:
    """Run it on as many ranks as the layout has."""
    return run(scenario, models.RANKS[layout], layout, *arguments, group=layout != "plain")


class Saves:
    """Each layout is trained and saved once, however many restores read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[str, list[dict[str, Any]]] = {}

    def of(self, layout: str, folder: Path, options: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        """A copy of the run, for a restore to claim, and what every rank held."""
        name = "-".join([layout, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if name not in self._done:
            self._done[name] = spread(save, layout, f"file://{self._folder}/{name}", options)
        shutil.copytree(self._folder / name, folder / "run")
        return url_of(folder), self._done[name]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(tmp_path_factory.mktemp("saves"))


def check(source: str, before: list[dict[str, Any]], target: str, after: list[dict[str, Any]]) -> None:
    """Full tensors and shared values equal on every rank; what belongs to a rank back at its rank."""
    streams = {models.data_rank(source, rank)[0]: state["rng"] for rank, state in enumerate(before)}
    assert len(before[0]["full"]) > 40, "the comparison would be worth little"
    for rank, state in enumerate(after):
        assert models.differences(before[0]["full"], state["full"]) == []
        for shared in ("lr", "scheduler", "scaler", "position"):
            assert state[shared] == before[0][shared], shared
        own = before[rank] if rank < len(before) else before[0]
        assert models.differences(own["buffers"], state["buffers"]) == []
        # A random stream that was saved goes on; a new one is no copy, and equal on all ranks that share it.
        expected = streams.setdefault(models.data_rank(target, rank)[0], state["rng"])
        assert state["rng"] == expected, rank
    assert len({stream["torch"] for stream in streams.values()}) == len(streams)


def move(source: str, target: str, options: dict[str, Any], saves: Saves, folder: Path) -> None:
    url, before = saves.of(source, folder, options)
    check(source, before, target, spread(restore, target, url, options))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_tensor_comes_back_under_another_layout(source: str, target: str, saves: Saves, tmp_path: Path) -> None:
    move(source, target, {}, saves, tmp_path)


@pytest.mark.parametrize(("source", "target", "options"), VARIANTS, ids=str)
def test_every_optimizer_comes_back_under_another_layout(
    source: str, target: str, options: dict[str, Any], saves: Saves, tmp_path: Path
) -> None:
    move(source, target, options, saves, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), ALL)
def test_every_pair_of_layouts(source: str, target: str, saves: Saves, tmp_path: Path) -> None:
    move(source, target, {}, saves, tmp_path)


def evaluate(job: Job) -> None:
    """A forward without backward: FSDP2 leaves the root's parameters gathered, as other objects, after it."""
    job.model.eval()
    with torch.no_grad():
        job.model(torch.zeros(2, models.LENGTH, dtype=torch.int64))
    job.model.train()


def around_evaluations(rank: int, layout: str, url: str) -> dict[str, torch.Tensor]:
    """Save or restore, with an evaluation at every place where users have one."""
    job = make(layout, rank)
    evaluate(job)
    with job.checkpointer(url) as ckpt:
        evaluate(job)
        if ckpt.restore() == 0:
            for step in (1, 2):
                job.train(None, step - 1, step)
                evaluate(job)
                ckpt.save(step)
                evaluate(job)
        else:
            evaluate(job)
    for part in job.model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return models.full_state(job.model, *job.optimizers)


def test_evaluations_do_not_change_what_is_saved_or_its_names(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    before = spread(around_evaluations, "fsdp2", url)[0]
    assert len(before) > 80
    for layout in ("fsdp2", "ddp2"):
        assert models.differences(before, spread(around_evaluations, layout, url)[0]) == []


def untrained(rank: int, layout: str, url: str, seed: int) -> tuple[int, dict[str, torch.Tensor]]:
    job = make(layout, rank, seed=seed)
    with job.checkpointer(url) as ckpt:
        step = ckpt.restore(0) if seed else ckpt.restore()
        if not seed:
            ckpt.save(0).wait()
        found = models.full_state(job.model, *job.optimizers)
        job.train(ckpt, step, 1)
    return len(found), models.full_state(job.model, *job.optimizers)


def test_an_optimizer_without_state_stays_without_state(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    before = spread(untrained, "fsdp2", url, 0)[0]
    after = spread(untrained, "fsdp2", url, 1)[0]
    assert before[0] == after[0] < 30, "no optimizer state was made up"
    assert models.differences(before[1], after[1]) == []
