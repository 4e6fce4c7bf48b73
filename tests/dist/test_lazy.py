"""A lazy restore on several ranks: each reads its own shards' optimizer state beside its first forward and backward."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gpumove.errors import IntegrityError
from gpumove.takeover import Takeover
from tests.dist import models
from tests.dist.harness import LOST, run
from tests.dist.jobs import make, url_of
from tests.dist.test_continuation import EVERY, LAST, first_leg, straight
from tests.test_lazy import harm

STOP = EVERY * 2 + 2
CASES = [
    ("ddp2", {}),
    ("ddp2", {"kind": "sgd", "scaler": True}),
    ("fsdp2", {}),
    ("fsdp2", {"half": True, "split": True}),
]
"""Layouts and options."""


def go_on(rank: int, layout: str, url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Resume, with optimizer state that takes longer than forward and backward."""
    bring = Takeover._bring
    came: list[float] = []
    is_back = threading.Event()

    def slow(*arguments: Any) -> None:
        is_back.wait(20)
        time.sleep(0.3 + 0.1 * rank)
        bring(*arguments)
        came.append(time.monotonic())

    Takeover._bring = slow  # type: ignore[method-assign]
    job = make(layout, rank, seed=1, **options)
    with job.checkpointer(url, every_steps=EVERY) as ckpt:
        begun = ckpt.restore(lazy=True)
        returned = time.monotonic()
        is_back.set()
        job.train(ckpt, begun, LAST)
        assert came
        assert returned < came[0]
        return {"losses": job.losses, "samples": job.samples, **job.state()}


@pytest.mark.parametrize(("layout", "options"), CASES, ids=str)
def test_a_lazily_resumed_run_is_the_uninterrupted_run(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    ranks, url = models.RANKS[layout], url_of(tmp_path)
    expected = run(straight, ranks, layout, options)
    assert run(first_leg, ranks, layout, url, options, STOP, lost=range(ranks)) == [LOST] * ranks
    for before, after in zip(expected, run(go_on, ranks, layout, url, options)):
        assert after["losses"] == {step: loss for step, loss in before["losses"].items() if step > STOP - STOP % EVERY}
        assert models.differences(before["full"], after["full"]) == []
        for name in ("lr", "scheduler", "scaler", "position", "rng"):
            assert after[name] == before[name], name


def save_two(rank: int, url: str) -> None:
    job = make("fsdp2", rank)
    with job.checkpointer(url, delta=False) as ckpt:
        step = ckpt.restore()
        for until in (2, 4):
            step = job.train(ckpt, step, until)
            ckpt.save(step).wait()


def meet_damage(rank: int, url: str) -> tuple[str, int]:
    """What every rank hears of damage that one of them finds, and where all go on from."""
    job = make("fsdp2", rank, seed=1)
    with job.checkpointer(url) as ckpt:
        assert ckpt.restore(lazy=True) == 4
        try:
            ckpt.save(4)
            heard = ""
        except IntegrityError as error:
            heard = str(error)
        return heard, ckpt.restore(lazy=True)


def test_damage_that_one_rank_finds_is_told_to_all_when_they_meet(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    run(save_two, 2, url)
    harm(tmp_path / url.rpartition("/")[2], 4, "few.weight.exp_avg")
    told = run(meet_damage, 2, url)
    assert all("optimizer state of step 4" in text for text, _ in told)
    assert [step for _, step in told] == [2, 2]
