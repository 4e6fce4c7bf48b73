"""Several ranks wait for their run together: they begin together, leave together, and notice who is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gpumove import Checkpointer
from gpumove.errors import StoreError
from gpumove.waiting import Waiting
from tests.dist import models
from tests.dist.harness import LOST, kill_self, run
from tests.dist.jobs import make
from tests.dist.test_continuation import EVERY, LAST, first_leg, straight
from tests.road import Road
from tests.runs import objects

STOP = EVERY * 2 + 2


def when_warm(ckpt: Checkpointer, then: Any) -> threading.Thread:
    """Do something once this rank has brought up a checkpoint."""
    warm = threading.Event()
    bring_up = Waiting._bring_up

    def noted(*arguments: Any) -> None:
        bring_up(*arguments)
        warm.set()

    def work() -> None:
        assert warm.wait(20)
        then()

    Waiting._bring_up = noted  # type: ignore[method-assign]
    found = threading.Thread(target=work)
    found.start()
    return found


def wait_for_it(rank: int, layout: str, source: str, target: str, until: int = LAST) -> dict[str, Any]:
    """Resume at the target, and train on; rank 0 also plays the tools that move the run."""
    job = make(layout, rank, seed=1)
    with job.checkpointer(target, every_steps=EVERY) as ckpt:
        road = Road(source, target) if rank == 0 else None
        tools = None
        if road is not None:
            road.bring(EVERY)

            def finish() -> None:
                road.bring(2 * EVERY)
                road.hand_over()

            tools = when_warm(ckpt, finish)
        begun = ckpt.restore(wait=True, lazy=until == LAST)
        if tools is not None and road is not None:
            tools.join(20)
            road.close()
        assert begun == 2 * EVERY
        job.train(ckpt, begun, until)
        return {"losses": job.losses, **job.state()}


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_a_run_that_moved_is_the_run_that_did_not(layout: str, tmp_path: Path) -> None:
    ranks, source, target = models.RANKS[layout], f"file://{tmp_path}/source", f"file://{tmp_path}/target"
    expected = run(straight, ranks, layout, {})
    assert run(first_leg, ranks, layout, source, {}, STOP, lost=range(ranks)) == [LOST] * ranks
    for before, after in zip(expected, run(wait_for_it, ranks, layout, source, target)):
        assert after["losses"] == {step: loss for step, loss in before["losses"].items() if step > 2 * EVERY}
        assert models.differences(before["full"], after["full"]) == []
        assert after["position"] == before["position"]


def trained(rank: int, until: int) -> dict[str, Any]:
    job = make("fsdp2", rank)
    job.train(None, 0, until)
    return job.state()


@pytest.mark.parametrize("layout", ["plain", "fsdp1", "fsdp4"])
def test_each_rank_of_another_number_keeps_its_own_share_warm(layout: str, tmp_path: Path) -> None:
    source, target = f"file://{tmp_path}/source", f"file://{tmp_path}/target"
    assert run(first_leg, 2, "fsdp2", source, {}, STOP, lost=range(2)) == [LOST] * 2
    expected, *_ = run(trained, 2, 2 * EVERY)
    ranks = models.RANKS[layout]
    for found in run(wait_for_it, ranks, layout, source, target, 2 * EVERY, group=layout != "plain"):
        assert models.differences(expected["full"], found["full"]) == []


def in_the_wait(then: Callable[[], object]) -> None:
    """Do something once this rank has been waiting for some rounds."""
    word, said = Waiting._word, count(1)

    def noted(*arguments: Any) -> Any:
        if next(said) == 3:
            then()
        return word(*arguments)

    Waiting._word = noted  # type: ignore[method-assign]


def told_to_leave(rank: int, url: str) -> tuple[int, bool, bool]:
    """What restore() and the first step() say when rank 1 alone has a notice."""
    job = make("ddp2", rank)
    with job.checkpointer(url) as ckpt:
        if rank == 1:
            in_the_wait(lambda: ckpt.request_leave(in_s=30))
        step = ckpt.restore(wait=True)
        left: list[bool] = []
        for _, tokens in job.loader:
            job.forward_and_step(tokens)
            left.append(ckpt.step(step + 1))
            break
        return step, left[0], ckpt.leaving


def test_a_notice_on_one_rank_ends_the_wait_of_all(tmp_path: Path) -> None:
    assert run(told_to_leave, 2, f"file://{tmp_path}/run") == [(0, True, True)] * 2
    assert objects(tmp_path) == {}


def lose_one(rank: int, url: str) -> float:
    """How long rank 0 waits for one that is gone."""
    job = make("ddp2", rank)
    with job.checkpointer(url) as ckpt:
        if rank == 1:
            in_the_wait(kill_self)
        began = time.monotonic()
        with pytest.raises(StoreError, match="another rank was lost"):
            ckpt.restore(wait=True)
        return time.monotonic() - began


def test_a_rank_that_dies_ends_the_wait(tmp_path: Path) -> None:
    seconds, lost = run(lose_one, 2, f"file://{tmp_path}/run", lost=[1])
    assert lost is LOST
    assert seconds < 20
