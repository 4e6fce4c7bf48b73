"""Checkpoints that cannot be read beside the training: dropped by the source's retention just then, or damaged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpumove.errors import IntegrityError
from gpumove.format.manifest import Checkpoint
from gpumove.move.report import Event
from gpumove.move.rounds import Rounds
from gpumove.store.gc import Retention, collect
from tests.move.runs import Place, read
from tests.move.stage import Stage


@pytest.fixture
def stage(recorded: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr("gpumove.move.machine._POLL_S", 0.01)
    made = Stage(recorded)
    yield made
    made.close()


def events(stage: Stage, state: str) -> list[Event]:
    return [event for event in stage.events if event.state == state]


def test_one_that_retention_takes_away_as_it_is_looked_at(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Rounds.left_bytes
    dropped: list[int] = []

    def left_bytes(self: Rounds, newest: Checkpoint | None) -> int:
        if newest is not None and newest.step == 3 and not dropped:
            dropped.append(newest.step)
            stage.commit()
            collect(stage.job, Retention(keep_last=1))
        return genuine(self, newest)

    def go_on(event: Event) -> None:
        if event.state == "round" and stage.steps(stage.source)[-1] == 2:
            stage.commit()

    monkeypatch.setattr(Rounds, "left_bytes", left_bytes)
    stage.hook = go_on
    assert stage.move().phase == "done"
    assert dropped == [3]
    assert not events(stage, "damaged")
    assert 3 not in stage.steps(stage.target)


def spoil(stage: Stage) -> None:
    """The job commits, and a record of that is lost."""
    made = stage.commit()
    with stage.source.open() as store:
        store.delete([made.manifest_key])


def hear(stage: Stage) -> None:
    """The job says that it is there."""
    with stage.source.log() as log:
        begun = log.view.move
        assert begun is not None
        log.move("begin", move=begun.move, other=begun.other, facts={"job": {}})


def test_a_damaged_one_is_passed_over_while_a_job_commits_others(stage: Stage) -> None:
    def go_on(event: Event) -> None:
        if event.state == "begin":
            hear(stage)
        if event.state == "round" and stage.steps(stage.source)[-1] == 2:
            spoil(stage)
        if event.state == "wait" and stage.steps(stage.source)[-1] == 3:
            stage.commit()

    stage.hook = go_on
    done = stage.move()
    assert len(events(stage, "damaged")) == 1
    assert (done.phase, done.step) == ("done", 5)
    assert 3 not in stage.steps(stage.target)
    assert read(stage.target)[0] == 5


def test_a_damaged_one_ends_the_move_where_no_job_is_there(stage: Stage) -> None:
    def go_on(event: Event) -> None:
        if event.state == "round" and stage.steps(stage.source)[-1] == 2:
            spoil(stage)

    stage.hook, stage.deaf = go_on, True
    with pytest.raises(IntegrityError, match="is missing"):
        stage.move()
    assert stage.claimable() == (True, False)
    stage.commit()
    stage.deaf = False
    assert stage.move(resume=True).phase == "done"
