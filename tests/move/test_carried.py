"""What a move carries along, whatever comes between: names that were published last, and the wish for single steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

import gpumove
from gpumove.leave import requests
from gpumove.move.pointers import Courier
from gpumove.move.report import Event
from tests.move.runs import CONFIG, Place
from tests.move.stage import TRAINED, WISHES, Stage
from tests.move.test_moves_decide import Rank0, until


@pytest.fixture
def stage(recorded: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr("gpumove.move.machine._POLL_S", 0.01)
    made = Stage(recorded, apart_s=1e-5)
    yield made
    made.close()


def publish(stage: Stage, event: Event) -> None:
    """Once the job has left."""
    if event.state == "round" and stage.left:
        gpumove.publish(stage.source.url, None, "production", config=CONFIG)


def test_a_name_that_was_published_until_the_seal_comes_along(stage: Stage) -> None:
    stage.hook = partial(publish, stage)
    with stage.source.open() as here, stage.target.open() as there:
        mover = stage.mover(here, there)
        mover.rounds.courier.look = lambda: None  # type: ignore[method-assign] # as where it has looked just before
        mover.run()
    assert stage.claimable() == (False, True)
    published = gpumove.resolve(stage.target.url, "production", config=CONFIG)
    assert published.step == stage.steps(stage.target)[-1] == 3


def test_a_name_that_a_killed_mover_has_left_behind_is_brought_by_the_next_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Courier, "look", lambda self: None)  # as where it has looked just before

    stage.hook, stage.arrive = partial(publish, stage), lambda: None  # type: ignore[assignment,return-value]
    stage.killed_at("handover")
    assert gpumove.pointers(stage.target.url, config=CONFIG) == []
    assert stage.move(replace(WISHES, arrive_timeout_s=0.0), resume=True).phase == "handed"
    assert gpumove.resolve(stage.target.url, "production", config=CONFIG).step == 3


def test_the_wish_for_single_steps_outlasts_a_request_that_nobody_has_heard(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that requeues: the new job is to know of it before it is asked to leave."""
    monkeypatch.setattr(requests, "_POLL_S", 0.05)
    stage.deaf = True
    again: list[Rank0] = []

    def requeue(event: Event) -> None:
        asked = any(e.facts.get("every_step") for e in stage.events)
        if asked and event.state in ("wait", "round") and len(stage.steps(stage.source)) < TRAINED:
            stage.commit()
        if event.state == "request" and not again:
            again.append(Rank0(stage._store))
            until(lambda: again[0].requests.asked.every_step)
            assert again[0].requests.asked.slow_s == 0.01
            assert again[0].departure.notice is None, "that was asked of its predecessor"
            again[0].requests.close()
            stage.job, stage.deaf = again[0].log, False
            stage.job.follow()

    stage.hook = requeue
    done = stage.move(replace(WISHES, every_step=True, slow_s=0.01))
    assert done.phase == "done"
    told = [(e.state, e.facts.get("every_step")) for e in stage.events if e.state in ("begin", "request")]
    assert told == [("begin", None), ("begin", True), ("request", True), ("request", True)]
