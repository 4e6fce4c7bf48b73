"""A replica is no move under way: neither ends in the wrong order nor a move that was given up take a run anywhere."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from gpumove.errors import ConfigError
from gpumove.move import aftercare
from gpumove.move.moving import move
from gpumove.move.report import Report
from tests.move.runs import CONFIG
from tests.move.stage import WISHES, Stage
from tests.move.test_aftercare import LOSS, ROLLBACK, arrive, newest, script
from tests.road import Road

FORCE = replace(WISHES, leave_timeout_s=0.0, arrive_timeout_s=0.0, force=True)


def _moved_the_wrong_way(stage: Stage, **more: Any) -> Report:
    return move(stage.target.url, stage.source.url, FORCE, config=CONFIG, **more)


def _claim_as_replica(stage: Stage) -> None:
    """What a way back does first."""
    with stage.source.log() as log:
        log.claim(follows=stage.target.url, epoch=stage.look(stage.target).epoch)


def test_of_a_replica_nothing_is_resumed_and_nothing_taken_back(stage: Stage) -> None:
    with closing(Road(stage.source.url, stage.target.url)) as road:
        road.bring(2)
    head = stage.look(stage.source).head
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"is a replica of .*no move between the two is under way"):
            _moved_the_wrong_way(stage, resume=resume)
    with pytest.raises(ConfigError, match="nothing to take back"):
        _moved_the_wrong_way(stage, rollback=True)
    assert stage.look(stage.source).head == head
    assert stage.claimable() == (True, False)


def test_a_way_back_that_was_given_up_is_not_resumed_but_may_be_begun_again(stage: Stage) -> None:
    stage.move()
    _claim_as_replica(stage)
    with stage.target.log() as log:
        for state in ("begin", "cancelled"):
            log.move(state, move="0123456789abcdef", other=stage.source.url)
    with pytest.raises(ConfigError, match=r"is a replica of .*no move between the two is under way"):
        stage.move(FORCE, resume=True)
    assert stage.claimable() == (False, True)
    stage.move(FORCE, rollback=True)
    assert stage.claimable() == (True, False)


def test_a_way_back_that_was_decided_on_is_gone_on_with_as_it_was_decided(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mover dies once it has claimed the source as a replica, before the target's log says that a move begins."""
    monkeypatch.setattr(aftercare, "_POLL_S", 0.02)
    arrive(stage)
    script(stage, {"step": 12, "findings": [LOSS]})
    stage.killed_at("watched", ROLLBACK)
    _claim_as_replica(stage)
    with pytest.raises(ConfigError, match=r"is on its way from .*: go on with it by --resume"):
        stage.move(WISHES)
    assert "taken back, because step 12: the loss is 9" in stage.move(FORCE, resume=True).text
    assert newest(stage.source).facts["back_to"] == 3
    assert stage.claimable() == (True, False)
